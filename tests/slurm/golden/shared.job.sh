#!/bin/bash
# train_a100: runs /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/command.sh once and says in /study/.snakemake/auxiliary/submitit/ended/0123456789abcdef how it ended.
# Written by snakemake-executor-plugin-submitit.

id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" # as the driver knows it
id="${id:-$SLURM_JOB_ID}"
node="${SLURMD_NODENAME:-$(hostname)}"

# Whoever makes this file does the work: a second copy of the same request, or one that was withdrawn, leaves.
if ! (set -o noclobber; echo "$id" > /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/claim) 2> /dev/null && [ "$(cat /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/claim)" != "$id" ]; then
    echo "job $id: this work was claimed by job $(cat /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/claim); nothing to do"
    exit 75
fi

rm -f /study/.snakemake/auxiliary/submitit/ended/0123456789abcdef  # what it said before SLURM requeued it
end() {
    printf '%s %s %s %s\n' "$1" "$id" "$node" "${2:-itself}" > /study/.snakemake/auxiliary/submitit/ended/0123456789abcdef.tmp && mv -f /study/.snakemake/auxiliary/submitit/ended/0123456789abcdef.tmp /study/.snakemake/auxiliary/submitit/ended/0123456789abcdef
    exit "$1"
}

if [ "${SLURM_RESTART_COUNT:-0}" -gt 3 ]; then
    echo "job $id was requeued $SLURM_RESTART_COUNT times, more than the limit of 3"
    end 76
fi

# Its job was submitted under a name for several works. By its own number the last task of an array would rename all.
scontrol update JobId="$id" JobName=train_a100 > /dev/null 2>&1
echo "job $id on $node, $(date --iso-8601=seconds)"
cd /study || end 1

# A file that another node wrote may take a while to be seen here.
for file in ; do
    for ((waited = 0; waited < 5; waited++)); do [ -e "$file" ] && break; sleep 1; done
    [ -e "$file" ] || { echo "input $file is not there after 5 s"; end 66; }
done

# What a try before this one left of the outputs.
for file in ; do rm -rf -- "$file"; done
for tmpdir in "$TMPDIR" "$TEMP" "$TMP" /tmp /var/tmp /usr/tmp "$PWD"; do
    [ -d "$tmpdir" ] && [ -w "$tmpdir" ] && break
done
export TMPDIR="$tmpdir" TMP="$tmpdir" TEMPDIR="$tmpdir" TEMP="$tmpdir"

# SLURM tells of a shared job as a whole; of this work its clock does, and the kernel's count of kills for memory.
oom_kills() {
    local controllers path root events count total=0
    while IFS=: read -r _ controllers path; do
        case ",$controllers," in
        *,memory,*) root=/sys/fs/cgroup/memory events=memory.oom_control ;;
        ,,) root=/sys/fs/cgroup events=memory.events ;;
        *) continue ;;
        esac
        while [ -n "$path" ]; do # the kernel may count at the step or at the job above it
            count=$(sed -n 's/^oom_kill //p' "$root$path/$events" 2> /dev/null)
            total=$((total + ${count:-0}))
            case "${path##*/}" in job_*) break ;; esac
            path=${path%/*}
        done
    done < /proc/self/cgroup
    echo "$total"
}
kills=$(oom_kills)
began=$SECONDS left=$((1170 - SECONDS))

# The command has a process group of its own; what ends this job reaches all of it, and it has time to tidy up.
set -m
timeout --kill-after=30 "$left" /bin/bash /study/.snakemake/auxiliary/submitit/jobs/0123456789abcdef/command.sh < /dev/null &
command=$!
set +m
ending=
trap 'ending=yes; kill -TERM -- "-$command" 2> /dev/null' TERM INT HUP
while :; do
    wait "$command"
    status=$?
    kill -0 "$command" 2> /dev/null || break
done
# A trap ends `wait` early; the status of a child that ended meanwhile is asked once more.
if [ -n "$ending" ]; then
    wait "$command"
    status=$?
    while kill -0 -- "-$command" 2> /dev/null; do sleep 0.1; done
    end "$status" signal
fi
[ "$status" -eq 0 ] || [ "$(oom_kills)" -eq "$kills" ] || end "$status" OUT_OF_MEMORY
[ "$status" -eq 0 ] || [ "$((SECONDS - began))" -lt "$left" ] || end "$status" TIMEOUT
end "$status"
