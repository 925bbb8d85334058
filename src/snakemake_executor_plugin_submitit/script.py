"""The text that a job runs on its node: plain bash, which needs nothing but the shared file system."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

EXIT_DUPLICATE = 75
"""Of a job that found its work claimed by another one (EX_TEMPFAIL of sysexits.h)."""
EXIT_REQUEUED = 76
"""Of a job that SLURM requeued too often."""
EXIT_NO_INPUT = 66
"""Of a job whose inputs did not appear on its node (EX_NOINPUT of sysexits.h)."""

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

TEMPLATE = """\
#!/bin/bash
# {name}: runs {command_file} once and says in {ended} how it ended.
# Written by snakemake-executor-plugin-submitit.

id="$SLURM_JOB_ID"
node="${{SLURMD_NODENAME:-$(hostname)}}"

# Whoever makes this file does the work: a second copy of the same request, or one that was withdrawn, leaves.
if ! (set -o noclobber; echo "$id" > {claim}) 2> /dev/null && [ "$(cat {claim})" != "$id" ]; then
    echo "job $id: this work was claimed by job $(cat {claim}); nothing to do"
    exit {exit_duplicate}
fi

rm -f {ended}  # what it said before SLURM requeued it
end() {{
    printf '%s %s %s\\n' "$1" "$id" "$node" > {ended}.tmp && mv -f {ended}.tmp {ended}
    exit "$1"
}}

if [ "${{SLURM_RESTART_COUNT:-0}}" -gt {restart_limit} ]; then
    echo "job $id was requeued $SLURM_RESTART_COUNT times, more than the limit of {restart_limit}"
    end {exit_requeued}
fi

echo "job $id on $node, $(date --iso-8601=seconds)"
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
{shell} {command_file} < /dev/null &
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
fi
end "$status"
"""


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
) -> str:
    """What sbatch runs.

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
    """
    quoted = shlex.quote
    temporary = ""
    if tmpdir is not None:
        temporary = (NODES_OWN if tmpdir == NODES_TMPDIR else GIVEN.format(tmpdir=quoted(tmpdir))) + TEMPORARY
    return TEMPLATE.format(
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
        temporary=temporary,
        restart_limit=restart_limit,
        exit_duplicate=EXIT_DUPLICATE,
        exit_no_input=EXIT_NO_INPUT,
        exit_requeued=EXIT_REQUEUED,
    )
