"""Answers an executor that asks which jobs are worth submitting: none whose run is known to run out of memory.

The executor calls it as a command, through a hook that knows nothing of runs; see slurm/README.md.
"""

import json
import math
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from finetune_study import implied
from finetune_study import run as run_module
from finetune_study.errors import RecordError, RunFailedError
from finetune_study.forecast import prior
from finetune_study.implied import Kin
from finetune_study.paths import Results, RunPaths

RULE = "finetune"

Answer = Literal["submit", "hold", "resolved"]


class Job(BaseModel):
    """What the executor says of a job; it may say more."""

    model_config = ConfigDict(extra="ignore")

    id: str
    state: str
    """`new`, `held` or `pending`."""
    rule: str
    wildcards: dict[str, str] = {}
    input: list[str] = []

    def asks_for(self, results: Results) -> bool:
        """Whether a run may be decided without training; one that is to be measured again is asked for by hand."""
        run_id = self.wildcards.get("run_id")
        return (
            self.rule == RULE and run_id is not None and not any(results.run(run_id).is_request(p) for p in self.input)
        )


class Question(BaseModel):
    jobs: list[Job]


def before_submit(text: str, results: Results) -> str:
    """What to do with each job, as JSON by its id; who is not named is submitted.

    `resolved`: an easier run ran out of memory, and the record that says so is written. `hold`: an easier run may yet
    say so, since it is queued or at work. A job that is in the queue already is left there, where it grows old: it is
    withdrawn as soon as it is resolved. Half of the jobs at most are held, those that most runs may decide, so that
    holding does not empty a queue whose jobs begin at once. What is predicted of a run that is submitted is frozen.

    Args:
        text: what the executor says of the jobs, as JSON (`Question`).
        results: the study's results.

    Raises:
        RunFailedError: when these are no jobs.
    """
    try:
        asked = Question.model_validate_json(text).jobs
    except ValidationError as error:
        raise RunFailedError(f"This does not describe jobs: {error.errors()[0]['msg']}") from None
    jobs = {job.wildcards["run_id"]: job for job in asked if job.asks_for(results)}
    kin = implied.kin(results)
    resolved = {run_id for run_id in jobs if _resolve(run_id, kin, results)}
    queued = jobs.keys() - resolved
    could_decide = {
        run_id: sum(one.run_id in queued or _is_at_work(results.run(one.run_id)) for one in kin.easier(run_id))
        for run_id in queued
        if jobs[run_id].state != "pending" and not kin.fits(run_id)
    }
    waiting = sorted((run_id for run_id, number in could_decide.items() if number), key=lambda i: (-could_decide[i], i))
    answers: dict[str, Answer] = {jobs[run_id].id: "resolved" for run_id in resolved}
    held = set(waiting[: math.ceil(len(queued) / 2)])
    answers |= {jobs[run_id].id: "hold" for run_id in held}
    submitted = (job.wildcards["run_id"] for job in asked if job.rule == RULE and job.state != "pending")
    prior.freeze_all([run_id for run_id in submitted if run_id not in resolved | held], results)
    return json.dumps(answers)


def _resolve(run_id: str, kin: Kin, results: Results) -> bool:
    witness = kin.witness(run_id)
    if witness is None:
        return False
    paths = results.run(run_id)
    try:
        implied.write(paths, run_module.load(paths.run_yaml), witness)
    except RecordError:  # its job will say it in its own log
        return False
    return True


def _is_at_work(paths: RunPaths) -> bool:
    """Its supervisor has written what it knows, and not yet how it ended.

    One that was killed leaves the same: the executor holds nobody for longer than its `hold-minutes`.
    """
    if paths.record.exists() or not paths.about.exists():
        return False
    return not paths.failure.exists() or paths.failure.stat().st_mtime < paths.about.stat().st_mtime
