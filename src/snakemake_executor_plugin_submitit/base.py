"""What all parts of the driver share: the tasks, their ledger, and how a task ends."""

import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from snakemake_executor_plugin_submitit.gate import Gate
from snakemake_executor_plugin_submitit.ledger import Ledger, Submission
from snakemake_executor_plugin_submitit.limits import Limits
from snakemake_executor_plugin_submitit.patience import FIRST_PAUSE_SECONDS, Patience
from snakemake_executor_plugin_submitit.settings import ExecutorSettings
from snakemake_executor_plugin_submitit.slurm import Slurm, SlurmError
from snakemake_executor_plugin_submitit.task import Listener, Task, Work

TOLD_AT_ONCE = 20
"""Ids in a message."""


class GaveUpError(Exception):
    """SLURM stays out of reach; all jobs are left as they are."""


class Base:
    """Tasks, by the key of their work, and what is done to them from several places."""

    def __init__(
        self, ledger: Ledger, slurm: Slurm, settings: ExecutorSettings, listener: Listener, latency_wait: int
    ) -> None:
        """
        Args:
            ledger: what earlier drivers left, and where this one writes.
            slurm: the cluster.
            settings: the user's.
            listener: hears of ends.
            latency_wait: seconds in which a file must be seen on another node.
        """
        self.ledger, self.slurm, self.settings, self.listener = ledger, slurm, settings, listener
        self.latency_wait = latency_wait
        self._tasks: dict[str, Task] = {}
        self._gate = Gate(ledger, settings)
        self._limits: dict[str | None, Limits] = {}
        """What is known of clusters, by name; None is this machine's."""
        self._stop = threading.Event()
        self._has_news = False
        """In this round a task ended or has to begin anew: there may be more to submit."""
        self._next_question = 0.0
        self._full: dict[str, Patience] = {}
        """Requests for which there was no room, by what they ask for."""
        self._unshared: set[str] = set()
        """Requests that SLURM takes for one work, and not for several that share a job."""

    def _in_state(self, state: str) -> list[Task]:
        return [task for task in self._tasks.values() if task.state == state]

    def _limits_for(self, work: Work) -> Limits:
        """Of the cluster that it goes to; where SLURM may choose among several, of the first."""
        named = work.options.get("clusters")
        cluster = str(named).partition(",")[0] if named else None
        return self._limits.setdefault(cluster, Limits(cluster))

    def _new_patience(self) -> Patience:
        return Patience(60.0 * self.settings.patience_minutes)

    def _may_begin_anew(self, task: Task) -> None:
        self._has_news = True
        task.submission, task.state, task.status, task.adopted = None, "new", None, False
        task.failed_at = task.unknown_since = None

    def _start_over(self, task: Task) -> None:
        """Submits a task once more, as another submission."""
        assert task.submission is not None
        self.ledger.withdraw(task.submission)
        self.ledger.close(task.submission, "submitted again", keep_files=True)
        self._may_begin_anew(task)

    def _succeed(self, task: Task, how: str) -> None:
        if task.submission is not None:
            if how == "success" and not (self.ledger.folder_of(task.submission) / "unproved").exists():
                self._gate.succeeded(task)
            self.ledger.close(task.submission, how, keep_files=self.settings.keep_logs)
        self._is_over(task)
        self.listener.success(task)

    def _fail(self, task: Task, message: str) -> None:
        logs: list[Path] = []
        if task.submission is not None:
            logs = self.ledger.logs_of(task.submission)
            self.ledger.close(task.submission, "failure", keep_files=True)
        self._is_over(task)
        where = f", log: {' and '.join(map(str, logs))}" if logs else ""
        self.listener.failure(task, f"{task.work.name}: {message}{where}", logs)

    @staticmethod
    def _missing(task: Task) -> str:
        """Outputs that are not there."""
        return ", ".join(path for path in task.work.outputs if not os.path.lexists(task.work.workdir / path))

    def _is_over(self, task: Task) -> None:
        task.state = "over"
        self._has_news = True
        self._tasks.pop(task.work.key, None)
        for patience in self._full.values():
            patience.hurry()

    def _withdraw_pending(self, task: Task) -> bool:
        """Takes a pending work back, unless it has begun."""
        submission = task.submission
        assert submission is not None
        if not self.ledger.withdraw(submission):
            return False
        self._cancel([submission])
        self.ledger.close(submission, "withdrawn", keep_files=False)
        task.submission, task.status = None, None
        return True

    def _unshare(self, work: Work, why: str) -> None:
        """Works that ask for this have jobs of their own from now on: several at once are more than SLURM gives."""
        self._unshared.add(work.asked)
        self.listener.warn(
            f"{work.rule}: max_job_minutes={work.max_job_minutes} is too much, every work gets a job of its own: {why}"
        )

    def _cancel(self, submissions: Sequence[Submission]) -> bool:
        """Ends works, whether they have begun or not; of a job that runs others as well, these alone.

        Returns:
            Whether SLURM took it.
        """
        tokens, ids = {one.token for one in submissions}, []
        for one in submissions:
            if not one.slurm_id:
                continue
            if {mate.token for mate in self.ledger.job_mates(one)} <= tokens:
                ids.append(one.slurm_id)
            elif self.ledger.has_begun(one):
                (self.ledger.folder_of(one) / "cancel").touch()
                what = f"--batch --signal=USR1 {one.slurm_id}"
                self._patiently(partial(self.slurm.signal, one.slurm_id, "USR1"), what)
        ids = list(dict.fromkeys(ids))
        return not ids or self._patiently(partial(self.slurm.cancel, ids), " ".join(ids))

    def _patiently(self, command: Callable[[], None], what: str) -> bool:
        """Whether SLURM took it; it is asked three times."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                command()
                return True
            except SlurmError as error:
                if pause > 2 * FIRST_PAUSE_SECONDS:
                    self.listener.warn(f"These jobs could not be cancelled ({error}): scancel {what}")
                    return False
                time.sleep(pause)
                pause *= 2

    def left(self) -> str:
        """What is left behind when this driver ends now, in words."""
        if not self._tasks:
            return "No SLURM job is left. The same command goes on from here."
        submitted = self._in_state("submitted")
        ids = slurm_ids(task.submission for task in submitted if task.submission)
        which = f": {some(ids)}" if ids else ""
        others = len(self._tasks) - len(submitted)
        more = f" {others} more are not submitted yet." if others else ""
        return f"{len(ids)} SLURM job(s) are left as they are{which}.{more} The same command goes on with them."

    def _gave_up(self, error: str) -> GaveUpError:
        return GaveUpError(f"SLURM has not answered for {self.settings.patience_minutes} min: {error}\n{self.left()}")


def slurm_ids(submissions: Iterable[Submission]) -> list[str]:
    """Ids of their jobs, each once."""
    return list(dict.fromkeys(one.slurm_id for one in submissions if one.slurm_id))


def some(ids: Sequence[str]) -> str:
    """Ids for a message."""
    return ", ".join(ids[:TOLD_AT_ONCE]) + ", ..." * (len(ids) > TOLD_AT_ONCE)
