"""What runs on a node: plain bash, which needs nothing but the shared file system.

batch.sh  a job: it runs its works one after another, each once
job.sh    a work: its command, and what has to be done before and after it
"""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

EXIT_DUPLICATE = 75
"""Of a job that found its work claimed by another one (EX_TEMPFAIL of sysexits.h)."""
EXIT_REQUEUED = 76
"""Of a job that SLURM requeued too often."""
EXIT_NO_INPUT = 66
"""Of a job whose inputs did not appear on its node (EX_NOINPUT of sysexits.h)."""

KILL_SECONDS = 30
"""Between SIGTERM and SIGKILL for a work whose time is over in a job that others share (SLURM's KillWait)."""

NODES_TMPDIR = ""
"""As `tmpdir`: what the node has for it."""

# Where Python, and so Snakemake, looks.
NODES_OWN = """\
for tmpdir in "$TMPDIR" "$TEMP" "$TMP" /tmp /var/tmp /usr/tmp "$PWD"; do
    [ -d "$tmpdir" ] && [ -w "$tmpdir" ] && break
done
"""
GIVEN = """\
tmpdir={tmpdir}
mkdir -p -- "$tmpdir" || end 1
"""
TEMPORARY = 'export TMPDIR="$tmpdir" TMP="$tmpdir" TEMPDIR="$tmpdir" TEMP="$tmpdir"\n'

WHO = """\
id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" # as the driver knows it
id="${id:-$SLURM_JOB_ID}"
node="${SLURMD_NODENAME:-$(hostname)}\""""

TEMPLATE = """\
#!/bin/bash
# {name}: runs {command_file} once and says in {ended} how it ended.
# Written by snakemake-executor-plugin-submitit.

{who}

# Whoever makes this file does the work: a second copy of the same request, or one that was withdrawn, leaves.
if ! (set -o noclobber; echo "$id" > {claim}) 2> /dev/null && [ "$(cat {claim})" != "$id" ]; then
    echo "job $id: this work was claimed by job $(cat {claim}); nothing to do"
    exit {exit_duplicate}
fi

rm -f {ended}  # what it said before SLURM requeued it
end() {{
    printf '%s %s %s %s\\n' "$1" "$id" "$node" "${{2:-itself}}" > {ended}.tmp && mv -f {ended}.tmp {ended}
    exit "$1"
}}

if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {restart_limit} ]; then
    echo "job $id was requeued $SLURM_RESTART_COUNT times, more than the limit of {restart_limit}"
    end {exit_requeued}
fi

{rename}echo "job $id on $node, $(date --iso-8601=seconds)"
cd {workdir} || end 1

# A file that another node wrote may take a while to be seen here.
for file in {inputs}; do
    for ((waited = 0; waited < {latency_wait}; waited++)); do [ -e "$file" ] && break; sleep 1; done
    [ -e "$file" ] || {{ echo "input $file is not there after {latency_wait} s"; end {exit_no_input}; }}
done

# What a try before this one left of the outputs.
for file in {removed}; do rm -rf -- "$file"; done
{exports}{temporary}
# The command has a process group of its own; what ends this job reaches all of it, and it has time to tidy up.
set -m
{limit}{shell} {command_file} < /dev/null &
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
{why}end "$status"
"""

RENAME = """\
# Its job was submitted under a name for several works. By its own number the last task of an array would rename all.
scontrol update JobId="$id" JobName={name} > /dev/null 2>&1
"""

OWN_LIMITS_BEFORE = """
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
began=$SECONDS left=$(({seconds} - SECONDS))
"""
OWN_LIMITS_AFTER = """\
[ "$status" -eq 0 ] || [ "$(oom_kills)" -eq "$kills" ] || end "$status" OUT_OF_MEMORY
[ "$status" -eq 0 ] || [ "$((SECONDS - began))" -lt "$left" ] || end "$status" TIMEOUT
"""

BATCH = """\
#!/bin/bash
# One job, or each one of an array: runs its works one after another.
# Written by snakemake-executor-plugin-submitit.

case "${{SLURM_ARRAY_TASK_ID:-0}}" in
{places}
esac
{who}
jobs={jobs}
ended={ended}
stop= signalled= status=0
trap 'stop=yes signalled=yes; kill -TERM "$job" 2> /dev/null' TERM INT HUP
# One work is cancelled, and the others go on.
trap 'signalled=yes; [ ! -e "$jobs/$work/cancel" ] || kill -TERM "$job" 2> /dev/null' USR1

for work in $works; do
    [ -z "$stop" ] || break
    # What is not wanted any more has no folder, or is cancelled.{skip_ended}
    [ -d "$jobs/$work" ] && [ ! -e "$jobs/$work/cancel" ] || {{ status={exit_duplicate}; continue; }}
    bash "$jobs/$work/job.sh" >> "$jobs/$work/log" 2>&1 &
    job=$! signalled=
    while :; do
        wait "$job"
        status=$?
        kill -0 "$job" 2> /dev/null || break
    done
    # A trap ends `wait` early.
    if [ -n "$signalled" ]; then wait "$job"; status=$?; fi
    # Killed, it left no word.
    [ "$status" -lt 128 ] || [ -e "$ended/$work" ] || echo "$status $id $node itself" > "$ended/$work"
done
exit "{status}"
"""

SKIP_ENDED = """
    # After SLURM requeued the job: what has ended by itself has ended.
    grep -qs ' signal$' "$ended/$work" || [ ! -e "$ended/$work" ] || continue"""


def batch_script(places: Sequence[Sequence[str]], folder: Path) -> str:
    """What sbatch runs.

    Args:
        places: tokens of the works of each job, in the order of the array's indices; of one job for no array.
        folder: of the ledger.
    """
    cases = "\n".join(f"{place}) works={shlex.quote(' '.join(tokens))} ;;" for place, tokens in enumerate(places))
    shared = any(len(tokens) > 1 for tokens in places)
    return BATCH.format(
        places=cases,
        who=WHO,
        jobs=shlex.quote(str(folder / "jobs")),
        ended=shlex.quote(str(folder / "ended")),
        skip_ended=SKIP_ENDED if shared else "",
        exit_duplicate=EXIT_DUPLICATE,
        status="0" if shared else "$status",  # of a shared job SLURM has nothing to tell but of the job
    )


def job_script(
    *,
    name: str,
    folder: Path,
    ended: Path,
    workdir: Path,
    shell: str,
    inputs: Sequence[str],
    removed: Sequence[str],
    latency_wait: int,
    exports: Mapping[str, str],
    tmpdir: str | None = None,
    restart_limit: int,
    is_alone: bool = True,
    limit_minutes: int | None = None,
) -> str:
    """What a work runs.

    Args:
        name: of the job, for its readers.
        folder: of this submission; the command is in `command.sh` there.
        ended: where the exit status goes, at once and whole.
        workdir: where the command runs.
        shell: interpreter of the command.
        inputs: files that must be there before.
        removed: files and folders that are deleted before.
        latency_wait: seconds until they must have appeared.
        exports: environment variables.
        tmpdir: for temporary files; `NODES_TMPDIR`, or a folder, which is made; None: as the job finds it.
        restart_limit: how often SLURM may requeue the job.
        is_alone: its job was submitted for it alone, and has its name.
        limit_minutes: the work's share of a job that it shares with others, of which `KILL_SECONDS` are for its end;
            None where the job is its own.
    """
    quoted = shlex.quote
    temporary = ""
    if tmpdir is not None:
        temporary = (NODES_OWN if tmpdir == NODES_TMPDIR else GIVEN.format(tmpdir=quoted(tmpdir))) + TEMPORARY
    # All of it lies within those minutes, or a work that does not heed SIGTERM would take its neighbours' time.
    seconds = 60 * limit_minutes - KILL_SECONDS if limit_minutes else 0
    return TEMPLATE.format(
        who=WHO,
        rename="" if is_alone else RENAME.format(name=quoted(name)),
        limit=f'timeout --kill-after={KILL_SECONDS} "$left" ' if seconds else "",
        why=OWN_LIMITS_AFTER if seconds else "",
        name=name,
        command_file=quoted(str(folder / "command.sh")),
        claim=quoted(str(folder / "claim")),
        ended=quoted(str(ended)),
        workdir=quoted(str(workdir)),
        shell=quoted(shell),
        inputs=" ".join(quoted(str(file)) for file in inputs),
        removed=" ".join(quoted(str(file)) for file in removed),
        latency_wait=latency_wait,
        exports="".join(f"export {key}={quoted(value)}\n" for key, value in exports.items()),
        temporary=temporary + (OWN_LIMITS_BEFORE.replace("{seconds}", str(seconds)) if seconds else ""),
        restart_limit=restart_limit,
        exit_duplicate=EXIT_DUPLICATE,
        exit_no_input=EXIT_NO_INPUT,
        exit_requeued=EXIT_REQUEUED,
    )
