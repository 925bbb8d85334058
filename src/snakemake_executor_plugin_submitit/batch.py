"""From tasks to requests: works that share a job, jobs that make an array."""

import itertools
import math
import shlex
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_submitit.ledger import Ledger, Submission
from snakemake_executor_plugin_submitit.script import batch_script, job_script
from snakemake_executor_plugin_submitit.slurm import submit
from snakemake_executor_plugin_submitit.task import Task, Work

UNPROVED_FILE = "UNPROVED_FILE"
"""Environment variable of works that have a kind: a success that makes this file is none that proves the kind."""
UNFIT_NODES_FILE = "UNFIT_NODES_FILE"
"""Environment variable of works that know of unfit nodes: where they may name them, if it is not the batch script's."""

EXCLUDE = ("--exclude", "-x")


@dataclass
class Batch:
    """One sbatch: jobs that ask for the same, each with its works."""

    jobs: list[list[Task]]
    token: str

    @property
    def tasks(self) -> list[Task]:
        return [task for job in self.jobs for task in job]

    @property
    def work(self) -> Work:
        """One of them; what is asked of SLURM is the same for all."""
        return self.jobs[0][0].work

    @property
    def submission(self) -> Submission:
        submission = self.jobs[0][0].submission
        assert submission is not None
        return submission

    def options(self) -> dict[str, Any]:
        """Of sbatch."""
        work, works_per_job = self.work, len(self.jobs[0])
        options: dict[str, Any] = {**work.options, "job-name": work.name if len(self.tasks) == 1 else work.rule}
        if work.minutes is not None:
            options["time"] = work.minutes * works_per_job
        if len(self.jobs) > 1:
            options["array"] = f"0-{len(self.jobs) - 1}"
        return options


def form(tasks: Sequence[Task], most_jobs: int, per_job: int | None = None) -> Iterator[Batch]:
    """Shares tasks out over as few jobs as their time allows, all about equally long, and these over arrays.

    Args:
        tasks: that ask for the same.
        most_jobs: of an array.
        per_job: works of a job; default: as many as their time allows.
    """
    num_jobs = math.ceil(len(tasks) / (per_job or tasks[0].work.per_job))
    jobs = [list(tasks[place::num_jobs]) for place in range(num_jobs)]
    for _, equally_long in itertools.groupby(jobs, key=len):
        rest = list(equally_long)
        while rest:
            yield Batch(rest[:most_jobs], uuid.uuid4().hex[:16])
            rest = rest[most_jobs:]


def intend(batch: Batch, ledger: Ledger) -> None:
    """Notes in the ledger what is about to be submitted."""
    for place, job in enumerate(batch.jobs):
        for task in job:
            task.submission = Submission(
                key=task.work.key,
                token=uuid.uuid4().hex[:16],
                digest=task.work.digest,
                asked=task.work.asked,
                name=task.work.name,
                batch=batch.token,
                place=place if len(batch.jobs) > 1 else None,
                shared=len(job) > 1,
                gpu_hours=task.work.gpu_hours,
                resubmissions=task.resubmissions,
            )
    ledger.intend(task.submission for task in batch.tasks if task.submission is not None)


def send(batch: Batch, ledger: Ledger, extra: Sequence[str], latency_wait: int, restart_limit: int) -> str:
    """Writes the scripts and calls sbatch.

    Args:
        batch: what to submit; it is in the ledger.
        ledger: where it is noted, and below which everything lies.
        extra: words for sbatch beside those of the works.
        latency_wait: seconds until inputs must be seen on a node.
        restart_limit: how often SLURM may requeue a job.

    Returns:
        SLURM's id of the job or the array.

    Raises:
        SlurmError: as `slurm.submit` does.
    """
    for task in batch.tasks:
        assert task.submission is not None
        work, submission, folder = task.work, task.submission, ledger.folder_of(task.submission)
        (folder / "command.sh").write_text(work.command + "\n", encoding="utf-8")
        answers = {} if work.unfit_node_status is None else {UNFIT_NODES_FILE: str(folder / "unfit")}
        if work.kind is not None:
            answers[UNPROVED_FILE] = str(folder / "unproved")
        script = job_script(
            name=work.name,
            folder=folder,
            ended=ledger.ended_folder / submission.token,
            workdir=work.workdir,
            shell=work.shell,
            inputs=work.inputs,
            removed=work.removed,
            latency_wait=latency_wait,
            exports={**work.exports, **answers},
            tmpdir=work.tmpdir,
            restart_limit=restart_limit,
            is_alone=len(batch.tasks) == 1,
            limit_minutes=work.minutes if submission.shared else None,
        )
        (folder / "job.sh").write_text(script, encoding="utf-8")
    places = [[task.submission.token for task in job if task.submission] for job in batch.jobs]
    folder = ledger.batch_folder_of(batch.submission)
    path: Path = folder / "batch.sh"
    path.write_text(batch_script(places, ledger.folder), encoding="utf-8")
    return submit(folder, batch.options(), extra, f"exec bash {shlex.quote(str(path))}")


def excluding(extra: Sequence[str], nodes: set[str]) -> list[str]:
    """Words for sbatch with nodes excluded beside those that they exclude already: of two options it takes the last."""
    if not nodes:
        return list(extra)
    words, excluded = [], sorted(nodes)
    given = iter(extra)
    for word in given:
        name, _, value = word.partition("=")
        if name in EXCLUDE:
            excluded.append(value or next(given, ""))
        elif word.startswith("-x") and not word.startswith("--"):
            excluded.append(word[2:])
        else:
            words.append(word)
    return [*words, f"--exclude={','.join(filter(None, excluded))}"]
