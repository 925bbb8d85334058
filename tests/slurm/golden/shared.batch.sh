#!/bin/bash
# One job, or each one of an array: runs its works one after another.
# Written by snakemake-executor-plugin-submitit.

case "${SLURM_ARRAY_TASK_ID:-0}" in
0) works='00 01' ;;
1) works='10 11' ;;
esac
id="${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}" # as the driver knows it
id="${id:-$SLURM_JOB_ID}"
node="${SLURMD_NODENAME:-$(hostname)}"
jobs=/study/.snakemake/auxiliary/submitit/jobs
ended=/study/.snakemake/auxiliary/submitit/ended
stop= signalled= status=0
trap 'stop=yes signalled=yes; kill -TERM "$job" 2> /dev/null' TERM INT HUP
# One work is cancelled, and the others go on.
trap 'signalled=yes; [ ! -e "$jobs/$work/cancel" ] || kill -TERM "$job" 2> /dev/null' USR1

for work in $works; do
    [ -z "$stop" ] || break
    # What is not wanted any more has no folder, or is cancelled.
    # After SLURM requeued the job: what has ended by itself has ended.
    grep -qs ' signal$' "$ended/$work" || [ ! -e "$ended/$work" ] || continue
    [ -d "$jobs/$work" ] && [ ! -e "$jobs/$work/cancel" ] || { status=75; continue; }
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
exit "0"
