"""What is to be run, and what is known of it on its way."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from snakemake_executor_plugin_submitit.ledger import Submission
from snakemake_executor_plugin_submitit.slurm import WAITING, JobStatus


@dataclass(frozen=True)
class Work:
    """What a task runs, and how it asks SLURM for it."""

    key: str
    """Names the work in every call; a later driver finds the task by it."""
    digest: str
    """Of the command; a task with another one is not the same work."""
    asked: str
    """Digest of what is asked of SLURM, with kind and `max_job_minutes`: works for which it is equal are submitted
    together."""
    name: str
    """In squeue."""
    rule: str
    command: str
    shell: str
    workdir: Path
    options: Mapping[str, Any]
    """Of sbatch."""
    extra: Sequence[str]
    """More words for sbatch."""
    is_direct: bool
    """The command is the rule's own: no Snakemake in the job looks after inputs and outputs."""
    inputs: Sequence[str]
    """Files that must be seen on the node first."""
    removed: Sequence[str]
    """What is left of them by an earlier try goes first."""
    outputs: Sequence[str]
    exports: Mapping[str, str]
    description: Mapping[str, Any]
    """For hooks: rule, wildcards, input, output, log."""
    tmpdir: str | None = None
    """Where temporary files go; None: not said."""
    minutes: int | None = None
    """Asked for; None is the partition's default."""
    num_gpus: int = 0
    """Asked for, on all nodes together."""
    max_job_minutes: int | None = None
    """Works that ask for the same may share one job of up to so many minutes, one after another; None: they don't."""
    kind: str | None = None
    """Works of one kind have a canary in common, and stop together when they fail alike."""
    unfit_node_status: int | None = None
    """The command ends with it to say that its node is not what was asked for."""

    @property
    def per_job(self) -> int:
        """How many such works fit into one job, one after another."""
        if not self.max_job_minutes or not self.minutes:
            return 1
        return max(1, self.max_job_minutes // self.minutes)

    @property
    def gpu_hours(self) -> float:
        """What it asks for, if it takes all its time."""
        return self.num_gpus * (self.minutes or 0) / 60


@dataclass
class Task:
    """One job of Snakemake on its way."""

    work: Work
    info: Any
    """Whoever added the task gets it back with its end."""
    state: Literal["new", "held", "submitted", "over"] = "new"
    submission: Submission | None = None
    status: JobStatus | None = None
    since: float = field(default_factory=time.monotonic)
    """When it was added."""
    unknown_since: float | None = None
    failed_at: float | None = None
    """When it said that it failed, which SLURM has not explained yet."""
    adopted: bool = False
    """An earlier driver submitted it."""
    after: str | None = None
    """A job that was cancelled in favour of this one, and may take its time to end."""
    is_asked: bool = False
    """The user's hook has had its say."""
    resubmissions: int = 0
    """How often it was submitted again, because of nodes that were lost or not fit."""

    @property
    def is_pending(self) -> bool:
        return self.state == "submitted" and (self.status is None or self.status.state in WAITING)


class Listener(Protocol):
    """Who hears what becomes of tasks."""

    def success(self, task: Task) -> None: ...

    def failure(self, task: Task, message: str, logs: Sequence[Path]) -> None: ...

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...
