"""Commands of the user's that have a say: before a job is submitted, and after the scheduler killed one."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from threading import Event
from typing import Any, Literal, cast, get_args

Verdict = Literal["submit", "hold", "resolved"]
VERDICTS: tuple[str, ...] = get_args(Verdict)

HOOK_SECONDS = 300
"""A hook that takes longer is broken."""

STOP_SECONDS = 0.5
"""How soon a hook is ended when the driver is to stop."""


class HookError(Exception):
    """A hook that can't be started, failed, or did not answer as it must."""


def before_submit(command: str, jobs: Sequence[Mapping[str, Any]], stop: Event) -> dict[str, Verdict]:
    """Asks the user's command about jobs.

    It gets `{"jobs": [...]}` on standard input, each job with `id`, `state` (`new`, `held`, `pending`),
    `waited_seconds`, `rule`, `wildcards`, `input`, `output`, `log`, and answers on standard output with
    `{"<id>": "submit" | "hold" | "resolved"}`. Who is not named is submitted.

    Raises:
        HookError: with what it said instead.
    """
    output = _run("before_submit", command, {"jobs": list(jobs)}, stop)
    try:
        answer = json.loads(output)
    except ValueError:
        answer = None
    if not isinstance(answer, dict) or not all(verdict in VERDICTS for verdict in answer.values()):
        raise HookError(
            f"before_submit must answer with a JSON object of {', '.join(VERDICTS)} by job id; "
            f"it said: {output[:500]!r}"
        )
    return {str(job): cast(Verdict, verdict) for job, verdict in answer.items()}


def after_kill(command: str, job: Mapping[str, Any], stop: Event) -> str:
    """Offers the user's command a job that the scheduler killed; the job's outputs must exist when it ends with 0.

    It gets the job on standard input: `rule`, `wildcards`, `input`, `output`, `log`, `slurm_job_id`, `state`, `reason`,
    `exit_code`, `node`, `elapsed_seconds`, `requested_memory_mib`, `max_rss_mib`, `time_limit_minutes`, `job_log`.

    Returns:
        What it said.

    Raises:
        HookError: when it made no result of it.
    """
    return _run("after_kill", command, job, stop)


def _run(name: str, command: str, given: Mapping[str, Any], stop: Event) -> str:
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, shell=True, stdin=pipe, stdout=pipe, stderr=pipe, text=True,
        start_new_session=True,  # a Ctrl-C at the terminal is the driver's to answer
    )  # fmt: skip
    until = time.monotonic() + HOOK_SECONDS
    question: str | None = json.dumps(given)
    while True:
        try:
            output, errors = process.communicate(question, timeout=STOP_SECONDS)
            break
        except subprocess.TimeoutExpired:
            question = None  # it was handed over at the first try
            if stop.is_set() or time.monotonic() >= until:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                why = "was stopped" if stop.is_set() else f"did not end within {HOOK_SECONDS} s"
                raise HookError(f"{name} {why}: {command}") from None
    if process.returncode:
        said = (errors or output).strip()
        raise HookError(f"{name} ended with status {process.returncode}: {said[-2000:] or 'it said nothing'}")
    return output.strip()
