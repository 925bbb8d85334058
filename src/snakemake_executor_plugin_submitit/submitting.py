"""From new tasks to jobs in SLURM's queue."""

import time
from collections.abc import Sequence
from typing import Any

from snakemake_executor_plugin_submitit import batch as batches
from snakemake_executor_plugin_submitit.base import Base
from snakemake_executor_plugin_submitit.batch import Batch
from snakemake_executor_plugin_submitit.ledger import WITHDRAWN, Submission
from snakemake_executor_plugin_submitit.limits import Refusal
from snakemake_executor_plugin_submitit.slurm import SlurmError
from snakemake_executor_plugin_submitit.task import Task, Work


class NoRoomError(Exception):
    """SLURM takes no more jobs of these now; it does when others have ended."""

    def __init__(self, words: str, refusal: Refusal) -> None:
        super().__init__(f"{words} ({refusal.why})" if refusal.why else words)
        self.room = refusal.room
        """For so many jobs there is room, as far as known."""
        self.is_certain = refusal.passes is True
        """The cluster's limits say so, not the words alone."""


SUBMIT_SECONDS = 5.0
"""A round submits for so long, then looks after the jobs that are there already."""

GATHER_SECONDS, GATHER_AT_MOST_SECONDS = 0.3, 3.0
"""Snakemake hands jobs over one by one: while they come they are gathered, for one question to `before_submit` and for
arrays of those that ask for the same."""


class Submitting(Base):
    """Groups new tasks by what they ask for, and submits what may be submitted now."""

    _unsent: Batch | None = None
    """An sbatch whose answer was lost, or that SLURM was too busy for."""
    _gathering_since: float | None = None
    _last_arrival = 0.0
    _is_cut_short = False
    """The last round had more to submit than it had time for."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._submitting = self._new_patience()
        self._told_full: set[str] = set()

    @property
    def seconds_to_next_round(self) -> float | None:
        """When there is something to submit; None: nothing now."""
        if self._gathering_since is not None:
            return GATHER_SECONDS / 3
        return 0.0 if self._is_cut_short else None

    @property
    def _has_more_to_submit(self) -> bool:
        """Whether tasks wait for something else than other jobs."""
        return (
            self._gathering_since is not None
            or self._is_cut_short
            or self._unsent is not None
            or self._submitting.is_waiting
        )

    def _gathered(self) -> bool:
        """Whether no more tasks are on their way."""
        if self._gathering_since is None:
            return True
        now = time.monotonic()
        if now - self._last_arrival < GATHER_SECONDS and now - self._gathering_since < GATHER_AT_MOST_SECONDS:
            return False
        self._gathering_since = None
        return True

    def _note_arrival(self) -> None:
        self._last_arrival = time.monotonic()
        self._gathering_since = self._gathering_since or self._last_arrival

    def _submit_new(self) -> None:
        self._is_cut_short = False
        if self._submitting.is_waiting:
            return
        if self._unsent is not None and not self._send_again(self._unsent):
            return
        until = time.monotonic() + SUBMIT_SECONDS
        for group in self._groups():
            patience = self._full.get(group[0].work.asked)
            if (patience is None or not patience.is_waiting) and not self._submit_group(group, until):
                return

    def _groups(self) -> list[list[Task]]:
        """Tasks that may be submitted now, by what they ask for; one that has to wait for a job is alone."""
        new = self._in_state("new")
        for task in new:
            if message := self._gate.why_never(task):
                self._fail(task, message)
        new = [task for task in new if task.state == "new"]
        groups: dict[tuple[str, str | None], list[Task]] = {}
        for task in self._gate.let_through(new, self._in_state("submitted")):
            groups.setdefault((task.work.asked, task.after), []).append(task)
        return list(groups.values())

    def _submit_group(self, group: Sequence[Task], until: float) -> bool:
        """Whether SLURM can be asked for more."""
        left = list(group)
        # Where there was no room, jobs end one by one.
        most = 1 if group[0].work.asked in self._full else self._array_limit(group[0].work)
        while affordable := self._gate.affordable(left):
            if self._stop.is_set() or time.monotonic() >= until:
                self._is_cut_short = True
                return False
            batch = next(batches.form(affordable, most, 1 if group[0].work.asked in self._unshared else None))
            batches.intend(batch, self.ledger)
            try:
                if not self._send(batch):
                    return False
            except NoRoomError as error:
                fewer = len(batch.jobs) // 2 if error.room is None else min(error.room, len(batch.jobs) - 1)
                if fewer < 1:
                    self._wait_for_room(left, error)
                    return True
                most = fewer
            left = [task for task in left if task.state == "new"]
        return True

    def _wait_for_room(self, tasks: Sequence[Task], error: NoRoomError) -> None:
        patience = self._full.get(tasks[0].work.asked)
        if patience is None:
            patience = self._full[tasks[0].work.asked] = self._new_patience()
        if tasks[0].work.asked not in self._told_full:
            self._told_full.add(tasks[0].work.asked)
            self.listener.say(f"{len(tasks)} job(s) wait until SLURM has room for them: {error}")
        patience.failed()
        if patience.is_over and not error.is_certain and not self._in_state("submitted"):
            raise self._gave_up(str(error)) from None

    def _array_limit(self, work: Work) -> int:
        try:
            return max(1, min(self.settings.array_limit, self._limits_for(work).max_array_size()))
        except SlurmError:
            return 1

    def _send_again(self, batch: Batch) -> bool:
        try:
            return self._send(batch)
        except NoRoomError as error:
            self._wait_for_room(batch.tasks, error)
            return True

    def _send(self, batch: Batch) -> bool:
        """Submits a batch; whether SLURM can be asked for more.

        Raises:
            NoRoomError: when there is no room for all of it now; nothing of it was taken.
        """
        self._unsent = batch
        # After an sbatch whose answer was lost, its job may be there.
        if self._submitting.is_tried and (slurm_id := self._find(batch.submission)):
            self._sent(batch, slurm_id)
            return True
        work = batch.work
        extra = batches.excluding(work.extra, self.ledger.excluded.get(work.asked, set()))
        if after := batch.tasks[0].after:
            extra.append(f"--dependency=afterany:{after}")
        if self.settings.max_gpu_hours is not None:
            extra.append("--no-requeue")  # what SLURM runs again by itself nobody has counted
        try:
            slurm_id = batches.send(batch, self.ledger, extra, self.latency_wait, self.settings.resubmit_limit)
        except SlurmError as error:
            if error.transient:
                if self._submitting.is_over:
                    raise self._gave_up(str(error)) from None
                pause = self._submitting.failed()
                self.listener.warn(f"SLURM can't take jobs at the moment; asking again in {pause:.0f} s: {error}")
                return False
            refusal = self._limits_for(work).verdict_of_refusal(str(error), batch.options(), len(batch.jobs))
            if refusal.passes is not False:
                self._return(batch)
                raise NoRoomError(str(error), refusal) from None
            message = f"SLURM did not take the job: {error}{f' ({refusal.why})' * bool(refusal.why)}"
            if batch.submission.shared:
                self._return(batch)
                self._unshare(work, message)
            else:
                self._refuse(batch, message)
        else:
            self._sent(batch, slurm_id)
        return True

    def _sent(self, batch: Batch, slurm_id: str) -> None:
        self._answered()
        self._full.pop(batch.work.asked, None)
        self.ledger.submitted(batch.token, slurm_id)
        for task in batch.tasks:
            task.state, task.status = "submitted", None
            task.unknown_since = task.failed_at = None
            assert task.submission is not None
            self.listener.say(f"{task.work.name}: submitted as SLURM job {task.submission.slurm_id}")

    def _answered(self) -> None:
        self._unsent = None
        self._submitting.worked()

    def _return(self, batch: Batch) -> None:
        """Its tasks may be submitted in another way: SLURM has taken nothing of it."""
        self._answered()
        for task in batch.tasks:
            assert task.submission is not None
            self.ledger.close(task.submission, "not taken", keep_files=False)
            task.submission = None

    def _refuse(self, batch: Batch, message: str) -> None:
        self._answered()
        if excluded := self.ledger.excluded.get(batch.work.asked):
            message += f" (without the nodes {', '.join(sorted(excluded))}, which were not what was asked for)"
        for task in batch.tasks:
            self._fail(task, message)

    def _find(self, submission: Submission) -> str | None:
        """SLURM's id of a batch of which it was not noted, if SLURM or a job of it tells of one."""
        try:
            if slurm_id := self.slurm.find(self.ledger.batch_folder_of(submission)):
                return slurm_id
        except SlurmError as error:
            self.listener.warn(f"SLURM did not say whether {submission.name} was submitted: {error}")
        mates = self.ledger.batch_mates(submission.batch)
        claims = (self.ledger.claimed_by(one) for one in mates)
        return next((claim.partition("_")[0] for claim in claims if claim not in (None, WITHDRAWN)), None)
