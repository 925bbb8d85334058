"""The driver's one loop: submit, notice ends, ask SLURM, conclude. It knows nothing of Snakemake.

A task's way:  new ─(before_submit)─▶ submitted ─▶ over
                 └──────▶ held ──────┘    │
                            ▲─ withdrawn ─┘   (before_submit, while the job is pending)

holding.py     what the user's command before_submit says of it
submitting.py  from new to submitted: the gate (gate.py), sharing of jobs and arrays (batch.py), room
watching.py    from submitted to over
base.py        what these share
"""

import threading
from queue import Empty, SimpleQueue
from typing import Any

from snakemake_executor_plugin_submitit.base import GaveUpError, slurm_ids, some
from snakemake_executor_plugin_submitit.holding import Holding
from snakemake_executor_plugin_submitit.ledger import Submission
from snakemake_executor_plugin_submitit.slurm import SlurmError
from snakemake_executor_plugin_submitit.submitting import Submitting
from snakemake_executor_plugin_submitit.task import Task, Work
from snakemake_executor_plugin_submitit.watching import Watching


class Driver(Holding, Submitting, Watching):
    """Looks after tasks. `add` and `cancel` may be called from another thread than `round`."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._incoming: SimpleQueue[Task] = SimpleQueue()
        self._turn = threading.Lock()
        self._writing = self._new_patience()
        self._seen: set[str] = set()
        self._never_sent: set[str] = set()
        """Batches of an earlier driver of which no job came."""

    def add(self, task: Task) -> None:
        """Takes a task on; the next round sees to it."""
        self._incoming.put(task)

    def goes_on(self, work: Work) -> bool:
        """Whether an earlier driver submitted this work and did not conclude it."""
        submission = self.ledger.open.get(work.key)
        if submission is None or submission.digest == work.digest:
            return submission is not None
        return self.settings.keep_changed and self.ledger.has_begun(submission)

    @property
    def is_settled(self) -> bool:
        """Whether nothing can be done until a job begins or ends: each is submitted and was seen, or has to wait."""
        return (
            self._incoming.empty()
            and not self._has_news
            and not self._has_more_to_submit
            and all(not task.adopted and task.failed_at is None for task in self._in_state("submitted"))
        )

    def round(self) -> None:
        """One turn of the loop; never waits for a job."""
        if self._writing.is_waiting:
            return
        with self._turn:
            self._has_news = False
            try:
                for step in (self._take_in, self._let_in, self._notice_ends, self._ask_slurm):
                    if not self._stop.is_set():
                        step()
                self._writing.worked()
            except OSError as error:
                # A full quota, a file system that does not answer: nothing is lost by waiting.
                if self._writing.is_over:
                    raise GaveUpError(f"{self.ledger.folder}: {error}\n{self.left()}") from None
                pause = self._writing.failed()
                self.listener.warn(f"{self.ledger.folder}: {error}; going on in {pause:.0f} s")

    def _let_in(self) -> None:
        """What comes together is asked about, and submitted, together."""
        if self._gathered():
            self._ask_hook()
            if not self._stop.is_set():
                self._submit_new()

    def strangers(self) -> list[str]:
        """Jobs that earlier calls submitted, that this one did not ask for, and that are not over.

        What is over needs nobody any more: its outputs are there, or the next call that wants them makes them.
        """
        unseen = [one for one in self.ledger.open.values() if one.key not in self._seen]
        try:
            known = self.slurm.queue(slurm_ids(unseen)) if unseen else {}
        except SlurmError:
            return slurm_ids(unseen)
        active = {slurm_id for slurm_id, status in known.items() if status.is_active}
        for one in unseen:
            ended = self.ledger.ended(one)
            if ended is not None and (one.shared or one.slurm_id not in active):
                self.ledger.close(one, "not asked for", keep_files=ended.status != 0 or self.settings.keep_logs)
        return [slurm_id for slurm_id in slurm_ids(unseen) if slurm_id in active]

    def cancel(self) -> None:
        """Cancels everything that was submitted.

        What has begun stays in the ledger: it may take its time to end, or SLURM may not have heard. The next call sees
        what became of it before it submits anything in its place.
        """
        self._stop.set()
        with self._turn:
            self._drain()
            mine = [task.submission for task in self._tasks.values() if task.submission is not None]
            ids = slurm_ids(mine)
            if ids:
                self.listener.say(f"Cancelling {len(ids)} SLURM job(s): {some(ids)}")
            for submission in mine:
                self.ledger.withdraw(submission)
            self._cancel(mine)
            for submission in mine:
                if self.ledger.withdraw(submission):
                    self.ledger.close(submission, "cancelled", keep_files=True)

    # Taking tasks on: new ones, and those that an earlier driver left.

    def _drain(self) -> list[Task]:
        taken: list[Task] = []
        while True:
            try:
                task = self._incoming.get_nowait()
            except Empty:
                return taken
            self._tasks[task.work.key] = task
            self._seen.add(task.work.key)
            taken.append(task)

    def _take_in(self) -> None:
        for task in self._drain():
            self._note_arrival()
            submission = self.ledger.open.get(task.work.key)
            if submission is None:
                continue
            if self._is_changed(task.work, submission) and self._take_back(task, submission):
                continue
            if submission.slurm_id or self._was_sent(submission):
                if submission.gpu_hours and self._gate.is_exceeded and self.ledger.withdraw(submission):
                    self._give_back_to_budget(task, submission)
                    continue
                task.state, task.submission, task.adopted = "submitted", submission, True
                task.resubmissions = submission.resubmissions
                self._next_question = 0.0
                self.listener.say(f"{task.work.name}: goes on as SLURM job {submission.slurm_id}")
            else:
                # The last driver died at the sbatch, and no job came of it, or none that may begin from now on.
                self.ledger.close(submission, "never submitted", keep_files=False)

    def _give_back_to_budget(self, task: Task, submission: Submission) -> None:
        """Of a pending job that an earlier call asked for; the task is new again, and judged as all others."""
        self.listener.say(f"{task.work.name}: SLURM job {submission.slurm_id} was more than max-gpu-hours allows")
        self._cancel([submission])
        self.ledger.close(submission, "over the budget", keep_files=False)

    def _is_changed(self, work: Work, submission: Submission) -> bool:
        """Whether a job has to make room for another one: what it runs has changed, or what it asks of SLURM.

        A job that has begun got what it asked for, and may go on with its command if the user wants it so.
        """
        if submission.digest != work.digest:
            return not self.settings.keep_changed or self.ledger.withdraw(submission)
        return submission.asked != work.asked and self.ledger.withdraw(submission)

    def _was_sent(self, submission: Submission) -> bool:
        """Whether a job came of a submission whose id was not noted; it is noted then."""
        slurm_id = None if submission.batch in self._never_sent else self._find(submission)
        if slurm_id is not None:
            self.ledger.submitted(submission.batch, slurm_id)
            return True
        self._never_sent.add(submission.batch)
        if self.ledger.withdraw(submission):
            return False
        self.ledger.moved(submission, str(self.ledger.claimed_by(submission)))
        return True

    def _take_back(self, task: Task, submission: Submission) -> bool:
        """Cancels a job that has changed; False when it runs and SLURM does not take the word."""
        has_begun = not self.ledger.withdraw(submission)
        if submission.slurm_id:
            self.listener.say(f"{task.work.name}: it has changed; SLURM job {submission.slurm_id} is cancelled")
            if not self._cancel([submission]) and has_begun:
                return False
        if has_begun:
            task.after = submission.slurm_id
        self.ledger.close(submission, "taken back", keep_files=True)
        return True
