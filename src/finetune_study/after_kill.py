"""Turns a scheduler's kill into an outcome: SLURM ended the job of a run that could not say itself how it ended.

The executor that saw the job end calls it as a command, through a hook that knows nothing of runs; see slurm/README.md.
"""

import shutil
from collections.abc import Callable
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune_study import facts, micro_batch, record
from finetune_study import run as run_module
from finetune_study.errors import RunFailedError
from finetune_study.launch import locked
from finetune_study.paths import Results, RunPaths
from finetune_study.record import About, Ending, Record
from finetune_study.run import Run

RULE = "finetune"


class Kill(BaseModel):
    """What the executor says of the job; it may say more, and of the optional parts less."""

    model_config = ConfigDict(extra="ignore")

    rule: str
    wildcards: dict[str, str]
    state: str
    """In SLURM's words."""
    slurm_job_id: str | None = None
    reason: str | None = None
    exit_code: str | None = None
    node: str | None = None
    elapsed_seconds: float | None = None
    requested_memory_mib: float | None = None
    max_rss_mib: float | None = None
    time_limit_minutes: float | None = None
    job_log: str | None = None

    def in_words(self, limit: str) -> str:
        """In a sentence: who ended what, where and why."""
        job = f" {self.slurm_job_id}" if self.slurm_job_id else ""
        node = f" on {self.node}" if self.node else ""
        return f"SLURM ended job{job}{node} as {self.state}: {limit}"


def _host_oom(kill: Kill) -> Ending:
    given = kill.requested_memory_mib
    limit = "host memory ran out" if given is None else f"it needed more than its {given:g} MiB of host memory"
    return Ending(status="host_oom", reason=kill.in_words(limit))


def _timeout(kill: Kill) -> Ending:
    given = kill.time_limit_minutes
    limit = "its time was over" if given is None else f"its limit of {given:g} min was reached"
    return Ending(status="timeout", reason=kill.in_words(limit))


OUTCOMES: dict[str, Callable[[Kill], Ending]] = {
    "OUT_OF_MEMORY": _host_oom,
    "TIMEOUT": _timeout,
    "DEADLINE": _timeout,
}
"""Limits that SLURM enforces, by the states in which it leaves the job; any other end of a job is no outcome."""


def after_kill(text: str, results: Results) -> str:
    """Gives a run its outcome after its job was killed; what it did, in a line.

    A run that has an outcome keeps it: what it said itself outranks the state of its job.

    Args:
        text: what the executor says of the job, as JSON (`Kill`).
        results: the study's results.

    Raises:
        RunFailedError: when this is no job that a limit of SLURM ended, or it is still at work.
        RecordError: when its run.yaml can't be read.
    """
    kill = _parse(text)
    paths = results.run(kill.wildcards["run_id"])
    run = run_module.load(paths.run_yaml)
    with locked(paths.lock):
        if paths.record.exists():
            return f"{run.run_id}: has its outcome, see {paths.record}"
        written = _record(run, kill, paths)
        record.write_record(paths, written)
        shutil.rmtree(paths.scratch, ignore_errors=True)
    return f"{run.run_id}: {written.ending.status}: {written.ending.reason}"


def _parse(text: str) -> Kill:
    try:
        kill = Kill.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"]))
        raise RunFailedError(f"This does not describe a job: {where} {problem['msg']}".replace("  ", " ")) from None
    if kill.rule != RULE or "run_id" not in kill.wildcards:
        raise RunFailedError(f"A kill of the rule `{kill.rule}` is no result; of `{RULE}` it is")
    if kill.state == "DEADLINE" and not kill.elapsed_seconds:
        raise RunFailedError("The job's deadline passed before it began: that says nothing about the run")
    if kill.state not in OUTCOMES:
        raise RunFailedError(f"The state {kill.state} is no result; results are {', '.join(OUTCOMES)}")
    return kill


def _record(run: Run, kill: Kill, paths: RunPaths) -> Record:
    about, told = _left_behind(kill, paths)
    about.environment["slurm"] = kill.model_dump(exclude={"rule", "wildcards"}, exclude_none=True)
    return record.assemble(run, OUTCOMES[kill.state](kill), about, told, kill.elapsed_seconds)


def _left_behind(kill: Kill, paths: RunPaths) -> tuple[About, dict[int, dict[str, Any]]]:
    """What supervisor and ranks of this very job wrote before they were killed; of another try nothing is taken."""
    about = record.read_about(paths)
    if about is not None and kill.slurm_job_id is not None and about.slurm_job_id == kill.slurm_job_id:
        if micro_batch.is_unsettled(about.environment):
            return about, {}  # what a short run measured is not the run's
        return about, {int(path.stem): facts.read(path) for path in paths.scratch.glob("*.jsonl")}
    host = {"host": kill.node} if kill.node else {}
    return About(record.previous_attempts(paths) + 1, slurm_job_id=kill.slurm_job_id, environment=host), {}
