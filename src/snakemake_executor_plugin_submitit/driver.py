"""The driver's one loop: submit, notice ends, ask SLURM, conclude. It knows nothing of Snakemake.

A task's way:  new ─(before_submit)─▶ submitted ─▶ over
                 └──────▶ held ──────┘    │
                            ▲─ withdrawn ─┘   (before_submit, while the job is pending)
"""

import os
import shlex
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, Literal, Protocol

from snakemake_executor_plugin_submitit import hooks
from snakemake_executor_plugin_submitit.ledger import WITHDRAWN, Ended, Ledger, Submission
from snakemake_executor_plugin_submitit.script import EXIT_REQUEUED, job_script
from snakemake_executor_plugin_submitit.settings import ExecutorSettings
from snakemake_executor_plugin_submitit.slurm import (
    KILLED,
    NEVER_STARTS,
    NODE_LOST,
    WAITING,
    JobStatus,
    Slurm,
    SlurmError,
    submit,
)

FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 2.0, 60.0
"""Before a SLURM that is busy is asked again; doubled each time."""

SUBMIT_SECONDS = 5.0
"""A round submits for so long, then looks after the jobs that are there already."""

EXPLAIN_SECONDS = 2.0
"""After a job said that it failed, SLURM's account of it follows; it is asked for so often."""

UNEXPLAINED_SECONDS = 60.0
"""A job that said that it failed, and of which SLURM has said nothing for so long, just failed."""


class GaveUpError(Exception):
    """SLURM stays out of reach; all jobs are left as they are."""


@dataclass(frozen=True)
class Work:
    """What a task runs, and how it asks SLURM for it."""

    key: str
    """Names the work in every call; a later driver finds the task by it."""
    digest: str
    """Of the command; a task with another one is not the same work."""
    asked: str
    """Digest of what is asked of SLURM."""
    name: str
    """In squeue."""
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

    @property
    def is_pending(self) -> bool:
        return self.state == "submitted" and (self.status is None or self.status.state in WAITING)


class Listener(Protocol):
    """Who hears what becomes of tasks."""

    def success(self, task: Task) -> None: ...

    def failure(self, task: Task, message: str, log: Path | None) -> None: ...

    def say(self, message: str) -> None: ...

    def warn(self, message: str) -> None: ...


class Patience:
    """Asks again, ever more slowly, and not for ever."""

    def __init__(self, limit_seconds: float) -> None:
        self._limit = limit_seconds
        self._first: float | None = None
        self._pause = FIRST_PAUSE_SECONDS
        self._again_at = 0.0

    @property
    def is_waiting(self) -> bool:
        return time.monotonic() < self._again_at

    @property
    def is_over(self) -> bool:
        return self._first is not None and time.monotonic() - self._first >= self._limit

    @property
    def is_tried(self) -> bool:
        """Whether something failed and has not worked since."""
        return self._first is not None

    def failed(self) -> float:
        """Notes a failure; seconds until the next try."""
        self._first = self._first or time.monotonic()
        pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
        self._again_at = time.monotonic() + pause
        return pause

    def worked(self) -> None:
        self._first, self._pause, self._again_at = None, FIRST_PAUSE_SECONDS, 0.0


class Driver:
    """Looks after tasks. `add` and `cancel` may be called from another thread than `round`."""

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
        self._incoming: SimpleQueue[Task] = SimpleQueue()
        self._tasks: dict[str, Task] = {}
        self._turn = threading.Lock()
        self._stop = threading.Event()
        self._submitting = Patience(60.0 * settings.patience_minutes)
        self._asking = Patience(60.0 * settings.patience_minutes)
        self._writing = Patience(60.0 * settings.patience_minutes)
        self._next_question = 0.0
        self._next_hook = 0.0
        self._seen: set[str] = set()
        self._is_full = False

    def add(self, task: Task) -> None:
        """Takes a task on; the next round sees to it."""
        self._incoming.put(task)

    def goes_on(self, work: Work) -> bool:
        """Whether an earlier driver submitted this work and did not conclude it."""
        submission = self.ledger.open.get(work.key)
        if submission is None or submission.digest == work.digest:
            return submission is not None
        return self.settings.keep_changed and self.ledger.claimed_by(submission) not in (None, WITHDRAWN)

    @property
    def is_busy(self) -> bool:
        """Whether there is more to submit at once."""
        return not self._submitting.is_waiting and any(task.state == "new" for task in self._tasks.values())

    @property
    def is_settled(self) -> bool:
        """Whether nothing can be done until a job begins or ends: each is submitted and was seen, or has to wait."""
        return self._incoming.empty() and all(
            task.state == "held"
            or (task.state == "submitted" and not task.adopted and task.failed_at is None)
            or (task.state == "new" and self._is_full and self._submitting.is_waiting)
            for task in self._tasks.values()
        )

    def left(self) -> str:
        """What is left behind when this driver ends now, in words."""
        tasks = list(self._tasks.values())
        if not tasks:
            return "No SLURM job is left. The same command goes on from here."
        ids = [str(task.submission.slurm_id) for task in tasks if task.state == "submitted" and task.submission]
        which = f": {', '.join(ids[:20])}{', ...' * (len(ids) > 20)}" if ids else ""
        others = len(tasks) - len(ids)
        more = f" {others} more are not submitted yet." if others else ""
        return f"{len(ids)} SLURM job(s) are left as they are{which}.{more} The same command goes on with them."

    def round(self) -> None:
        """One turn of the loop; never waits for a job."""
        if self._writing.is_waiting:
            return
        with self._turn:
            try:
                for step in (self._take_in, self._ask_hook, self._submit_new, self._notice_ends, self._ask_slurm):
                    if not self._stop.is_set():
                        step()
                self._writing.worked()
            except OSError as error:
                # A full quota, a file system that does not answer: nothing is lost by waiting.
                if self._writing.is_over:
                    raise
                pause = self._writing.failed()
                self.listener.warn(f"{self.ledger.folder}: {error}; going on in {pause:.0f} s")

    def strangers(self) -> list[str]:
        """Jobs that earlier calls submitted, that this one did not ask for, and that are not over.

        What is over needs nobody any more: its outputs are there, or the next call that wants them makes them.
        """
        unseen = [one for one in self.ledger.open.values() if one.key not in self._seen]
        active: set[str] = set()
        try:
            known = self.slurm.queue([one.slurm_id for one in unseen if one.slurm_id]) if unseen else {}
            active = {slurm_id for slurm_id, status in known.items() if status.is_active}
        except SlurmError:
            return [one.slurm_id for one in unseen if one.slurm_id]
        for one in unseen:
            ended = self.ledger.ended(one)
            if ended is not None and one.slurm_id not in active:
                self.ledger.close(one, "not asked for", keep_files=ended.status != 0 or self.settings.keep_logs)
        return [one.slurm_id for one in unseen if one.slurm_id in active]

    def cancel(self) -> None:
        """Cancels everything that was submitted.

        What has begun stays in the ledger: it may take its time to end, or SLURM may not have heard. The next call sees
        what became of it before it submits anything in its place.
        """
        self._stop.set()
        with self._turn:
            self._drain()
            mine = [t.submission for t in self._tasks.values() if t.state != "over" and t.submission is not None]
            ids = [one.slurm_id for one in mine if one.slurm_id]
            if ids:
                self.listener.say(
                    f"Cancelling {len(ids)} SLURM job(s): {', '.join(ids[:20])}{', ...' * (len(ids) > 20)}"
                )
                self._cancel_patiently(ids)
            for submission in mine:
                if self.ledger.withdraw(submission):
                    self.ledger.close(submission, "cancelled", keep_files=True)

    def _cancel_patiently(self, ids: list[str]) -> bool:
        """Whether SLURM took it; it is asked three times."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            try:
                self.slurm.cancel(ids)
                return True
            except SlurmError as error:
                if pause > 2 * FIRST_PAUSE_SECONDS:
                    self.listener.warn(f"These jobs could not be cancelled ({error}): scancel {' '.join(ids)}")
                    return False
                time.sleep(pause)
                pause *= 2

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
            submission = self.ledger.open.get(task.work.key)
            if submission is None:
                continue
            if self._is_changed(task.work, submission) and self._take_back(task, submission):
                continue
            if submission.slurm_id or self._find(submission):
                task.state, task.submission, task.adopted = "submitted", submission, True
                self._next_question = 0.0
                self.listener.say(f"{task.work.name}: goes on as SLURM job {submission.slurm_id}")
            else:
                # The last driver died at the sbatch, and no job came of it, or none that may begin from now on.
                self.ledger.close(submission, "never submitted", keep_files=False)

    def _is_changed(self, work: Work, submission: Submission) -> bool:
        """Whether a job has to make room for another one: what it runs has changed, or what it asks of SLURM.

        A job that has begun got what it asked for, and may go on with its command if the user wants it so.
        """
        if submission.digest != work.digest:
            return not self.settings.keep_changed or self.ledger.withdraw(submission)
        return submission.asked != work.asked and self.ledger.withdraw(submission)

    def _find(self, submission: Submission) -> bool:
        """Whether a job came of a submission whose id was not noted; it is noted then."""
        slurm_id = None
        try:
            slurm_id = self.slurm.find(self.ledger.folder_of(submission))
        except SlurmError as error:
            self.listener.warn(f"SLURM did not say whether {submission.name} was submitted: {error}")
        if slurm_id is None and not self.ledger.withdraw(submission):
            slurm_id = self.ledger.claimed_by(submission)
        if slurm_id is None:
            return False
        self.ledger.submitted(submission, slurm_id)
        return True

    def _take_back(self, task: Task, submission: Submission) -> bool:
        """Cancels a job that has changed; False when it runs and SLURM does not take the word."""
        has_begun = not self.ledger.withdraw(submission)
        if submission.slurm_id:
            self.listener.say(f"{task.work.name}: it has changed; SLURM job {submission.slurm_id} is cancelled")
            if not self._cancel_patiently([submission.slurm_id]) and has_begun:
                return False
        if has_begun:
            task.after = submission.slurm_id
        self.ledger.close(submission, "taken back", keep_files=True)
        return True

    # before_submit

    def _ask_hook(self) -> None:
        command, now = self.settings.before_submit, time.monotonic()
        if command is None:
            return
        asked = [task for task in self._tasks.values() if task.state == "new"]
        if now >= self._next_hook:
            self._next_hook = now + self.settings.before_submit_interval
            asked = [task for task in self._tasks.values() if task.state in ("new", "held") or task.is_pending]
        if not asked:
            return
        by_id = {task.work.key: task for task in asked}
        try:
            verdicts = hooks.before_submit(command, [self._describe(task) for task in asked], self._stop)
        except hooks.HookError as error:
            self.listener.warn(f"{error}\nA hook that fails holds nothing up: the jobs are submitted.")
            verdicts = {}
        for key, task in by_id.items():
            verdict = verdicts.get(key, "submit")
            if verdict == "resolved" and (missing := self._missing(task)):
                self.listener.warn(f"{task.work.name}: before_submit calls it resolved, but there is no {missing}")
                verdict = "submit"
            if task.state == "submitted" and (
                verdict == "submit"
                or (verdict == "hold" and not self._may_be_held(task))  # it would come back, at the queue's end
                or not self._withdraw_pending(task)
            ):
                continue
            if verdict == "resolved":
                self.listener.say(f"{task.work.name}: resolved by before_submit, not run")
                self._succeed(task, "resolved")
            else:
                task.state = "held" if verdict == "hold" else "new"
        self._let_go_of_held()

    @staticmethod
    def _missing(task: Task) -> str:
        """Outputs that are not there."""
        return ", ".join(path for path in task.work.outputs if not os.path.lexists(task.work.workdir / path))

    def _describe(self, task: Task) -> dict[str, Any]:
        state = "pending" if task.state == "submitted" else task.state
        return {
            "id": task.work.key,
            "state": state,
            "waited_seconds": round(time.monotonic() - task.since),
            **task.work.description,
        }

    def _withdraw_pending(self, task: Task) -> bool:
        """Takes a pending job out of the queue, unless it has begun."""
        submission = task.submission
        assert submission is not None
        if not self.ledger.withdraw(submission):
            return False
        if submission.slurm_id:
            self._cancel_patiently([submission.slurm_id])
        self.ledger.close(submission, "withdrawn", keep_files=False)
        task.submission, task.status = None, None
        return True

    def _may_be_held(self, task: Task) -> bool:
        """Nobody is held for longer than agreed, nor when no job is left that could change the answer."""
        others = any(one is not task and one.state in ("new", "submitted") for one in self._tasks.values())
        return others and time.monotonic() - task.since < 60.0 * self.settings.hold_minutes

    def _let_go_of_held(self) -> None:
        held = [task for task in self._tasks.values() if task.state == "held"]
        for task in [task for task in held if not self._may_be_held(task)]:
            task.state = "new"

    # Submitting

    def _submit_new(self) -> None:
        until = time.monotonic() + SUBMIT_SECONDS
        for task in [task for task in self._tasks.values() if task.state == "new"]:
            if self._stop.is_set() or self._submitting.is_waiting or time.monotonic() >= until:
                return
            self._submit(task)

    def _submit(self, task: Task, resubmissions: int = 0) -> None:
        work = task.work
        submission = task.submission or self.ledger.intend(work.key, work.digest, work.asked, work.name, resubmissions)
        task.submission, folder = submission, self.ledger.folder_of(submission)
        # After an sbatch whose answer was lost, its job may be there.
        if submission.slurm_id or (self._submitting.is_tried and self._has_come(submission)):
            self._submitted(task)
            return
        self._write_scripts(task.work, folder, submission)
        options = {**task.work.options, "job-name": task.work.name}
        extra = [*([f"--dependency=afterany:{task.after}"] if task.after else []), *task.work.extra]
        try:
            slurm_id = submit(folder, options, extra, f"exec bash {shlex.quote(str(folder / 'job.sh'))}")
        except SlurmError as error:
            if not error.transient:
                self._submitting.worked()
                self._fail(task, f"SLURM did not take the job: {error}")
                return
            if self._submitting.is_over and not (error.is_full and self._has_jobs):
                raise self._gave_up(error) from None
            self._is_full = error.is_full
            pause = self._submitting.failed()
            self.listener.warn(f"SLURM can't take jobs at the moment; asking again in {pause:.0f} s: {error}")
            return
        self.ledger.submitted(submission, slurm_id)
        self._submitted(task)

    @property
    def _has_jobs(self) -> bool:
        """Whether a job of ours is there whose end makes room."""
        return any(task.state == "submitted" for task in self._tasks.values())

    def _has_come(self, submission: Submission) -> bool:
        try:
            slurm_id = self.slurm.find(self.ledger.folder_of(submission)) or self.ledger.claimed_by(submission)
        except SlurmError:
            return False
        if slurm_id is None:
            return False
        self.ledger.submitted(submission, slurm_id)
        return True

    def _submitted(self, task: Task) -> None:
        assert task.submission is not None
        self._submitting.worked()
        task.state, task.status = "submitted", None
        task.unknown_since = task.failed_at = None
        self.listener.say(f"{task.work.name}: submitted as SLURM job {task.submission.slurm_id}")

    def _write_scripts(self, work: Work, folder: Path, submission: Submission) -> None:
        (folder / "command.sh").write_text(work.command + "\n", encoding="utf-8")
        script = job_script(
            name=work.name,
            folder=folder,
            ended=self.ledger.ended_folder / submission.token,
            workdir=work.workdir,
            shell=work.shell,
            inputs=work.inputs,
            removed=work.removed,
            latency_wait=self.latency_wait,
            exports=work.exports,
            tmpdir=work.tmpdir,
            restart_limit=self.settings.resubmit_limit,
        )
        (folder / "job.sh").write_text(script, encoding="utf-8")

    # Noticing ends

    def _notice_ends(self) -> None:
        ended = self.ledger.ended_tokens()
        if not ended:
            return
        for task in list(self._tasks.values()):
            if task.state == "submitted" and task.submission is not None and task.submission.token in ended:
                self._notice(task)

    def _notice(self, task: Task) -> Ended | None:
        """What a job said of its own end; a success needs nobody else's word."""
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        if ended is None:
            return None
        if ended.status == 0:
            self._succeed(task, "success")
        elif task.failed_at is None:
            task.failed_at = time.monotonic()
            self._next_question = min(self._next_question, time.monotonic() + EXPLAIN_SECONDS / 2)
        return ended

    def _ask_slurm(self) -> None:
        waiting = {t.submission.slurm_id: t for t in self._tasks.values() if t.state == "submitted" and t.submission}
        ids = [slurm_id for slurm_id in waiting if slurm_id]
        if not ids or self._asking.is_waiting or time.monotonic() < self._next_question:
            return
        try:
            found = self.slurm.status(ids)
            found, complete = self._confirmed(waiting, found), True
        except SlurmError as error:
            found, complete = self._ask_controller(ids, error), False
        for slurm_id in ids:
            self._judge(waiting[slurm_id], found.get(slurm_id), complete)
        unexplained = any(task.failed_at is not None for task in waiting.values() if task.state == "submitted")
        self._next_question = time.monotonic() + (EXPLAIN_SECONDS if unexplained else self.settings.status_interval)

    def _confirmed(self, waiting: Mapping[str | None, Task], found: dict[str, JobStatus]) -> dict[str, JobStatus]:
        """Accounting calls a job over that SLURM is about to requeue, or that still tidies up after SIGTERM; the
        controller knows better."""
        doubtful = [
            status.slurm_id
            for status in found.values()
            if not status.is_active
            and status.state != "COMPLETED"
            and (task := waiting.get(status.slurm_id)) is not None
            and task.submission is not None
            and (status.state in NODE_LOST or self.ledger.ended(task.submission) is None)
        ]
        try:
            known = self.slurm.queue(doubtful) if doubtful else {}
        except SlurmError as error:
            pause = self._asking.failed()
            if self._asking.is_over:
                return found
            self.listener.warn(f"sacct answers, squeue fails; asking again in {pause:.0f} s: {error}")
            known = {slurm_id: JobStatus(slurm_id, "COMPLETING") for slurm_id in doubtful}
        else:
            self._asking.worked()
        return found | {slurm_id: status for slurm_id, status in known.items() if status.is_active}

    def _ask_controller(self, ids: list[str], error: SlurmError) -> dict[str, JobStatus]:
        """Accounting does not answer: the controller may; that it does not know a job means nothing then."""
        pause = self._asking.failed()
        try:
            found = self.slurm.queue(ids)
        except SlurmError as also:
            self.listener.warn(f"SLURM does not answer; asking again in {pause:.0f} s: {also}")
            if self._asking.is_over:
                raise self._gave_up(also) from None
            return {}
        self.listener.warn(f"sacct fails, squeue answers; asking again in {pause:.0f} s: {error}")
        return found

    def _gave_up(self, error: SlurmError) -> GaveUpError:
        return GaveUpError(f"SLURM has not answered for {self.settings.patience_minutes} min: {error}\n{self.left()}")

    def _judge(self, task: Task, status: JobStatus | None, complete: bool) -> None:
        """Concludes from what SLURM says of one job."""
        assert task.submission is not None
        if task.state != "submitted":
            return
        now = time.monotonic()
        if status is None:
            if complete:
                self._unknown(task, now)
            return
        task.unknown_since = None
        has_run = task.failed_at is not None or (task.status is not None and task.status.state not in WAITING)
        task.status = status
        if status.is_active:
            task.adopted = False  # whatever comes now, this call has seen it
            if status.state == "PENDING" and NEVER_STARTS.fullmatch(status.reason or ""):
                self._give_back(task, status)
                return
            if has_run and status.state in WAITING and self._waits(task):
                self._hurry(task)
            if self.ledger.ended(task.submission) is None:
                task.failed_at = None  # it was requeued, and runs again
            if task.failed_at is not None and now - task.failed_at >= UNEXPLAINED_SECONDS:
                self._conclude_unexplained(task)
            return
        # The job's own word outranks SLURM's; it may have been written while SLURM was asked.
        if (ended := self._notice(task)) is not None and ended.status == 0:
            return
        if not status.is_whole and now - (task.failed_at or now) < UNEXPLAINED_SECONDS:
            task.failed_at = task.failed_at or now
            return
        claimant = self.ledger.claimed_by(task.submission)
        if claimant not in (None, WITHDRAWN, task.submission.slurm_id):
            self.ledger.submitted(task.submission, str(claimant))  # a twin of this submission does the work
        elif status.state == "COMPLETED":
            self._succeed(task, "success")
        elif status.state in NODE_LOST:
            self._submit_again(task, status)
        elif status.state in KILLED and self._made_a_result(task, status):
            self._succeed(task, "killed, and a result")
        elif task.adopted:
            self.listener.say(f"{task.work.name}: SLURM job {task.submission.slurm_id} failed meanwhile; trying again")
            self._start_over(task)
        else:
            self._fail_as(task, status)

    def _give_back(self, task: Task, status: JobStatus) -> None:
        """A job that SLURM took and will never start."""
        assert task.submission is not None
        if self.ledger.withdraw(task.submission):
            self._cancel_patiently([status.slurm_id])
            self._fail(
                task,
                f"SLURM took job {status.slurm_id} and will never start it: {status.explanation()}; ask for what "
                "partition, account and QOS allow (scontrol show partition, sacctmgr show assoc)",
            )

    def _waits(self, task: Task) -> bool:
        """Whether the controller says so too; accounting may lag."""
        assert task.submission is not None
        slurm_id = str(task.submission.slurm_id)
        try:
            known = self.slurm.queue([slurm_id])
        except SlurmError:
            return False
        return slurm_id in known and known[slurm_id].state in WAITING

    def _hurry(self, task: Task) -> None:
        """A job that was requeued: what it said of its end is void, and it need not wait."""
        assert task.submission is not None
        slurm_id = str(task.submission.slurm_id)
        self.ledger.forget_end(task.submission)
        self.listener.say(f"{task.work.name}: SLURM job {slurm_id} was requeued")
        try:
            self.slurm.hurry(slurm_id)
        except SlurmError as error:
            self.listener.warn(f"SLURM job {slurm_id} waits until SLURM starts it again: {error}")

    def _unknown(self, task: Task, now: float) -> None:
        """Accounting knows nothing of a job: it may lag, it may have been purged."""
        assert task.submission is not None
        slurm_id = str(task.submission.slurm_id)
        task.unknown_since = task.unknown_since or now
        if now - task.unknown_since < self.settings.lost_after_seconds:
            return
        try:
            known = self.slurm.queue([slurm_id])
        except SlurmError:
            return
        if known:
            self._judge(task, known[slurm_id], complete=False)
        elif (ended := self._notice(task)) is None or ended.status != 0:
            self.ledger.withdraw(task.submission)
            self._fail(task, f"SLURM job {slurm_id} is lost: neither sacct nor squeue has known it for "
                       f"{self.settings.lost_after_seconds} s, and it left no exit status.")  # fmt: skip

    def _made_a_result(self, task: Task, status: JobStatus) -> bool:
        assert task.submission is not None
        if self.settings.after_kill is None:
            return False
        job = {
            **task.work.description,
            "slurm_job_id": status.slurm_id,
            "state": status.state,
            "reason": status.explanation(),
            "exit_code": status.exit_code,
            "node": status.node,
            "elapsed_seconds": status.elapsed_seconds,
            "requested_memory_mib": status.requested_memory_mib,
            "max_rss_mib": status.max_rss_mib,
            "time_limit_minutes": status.time_limit_minutes,
            "job_log": str(self.ledger.log_of(task.submission)),
        }
        try:
            said = hooks.after_kill(self.settings.after_kill, job, self._stop)
        except hooks.HookError as error:
            self.listener.warn(f"{task.work.name}: no result was made of {status.state}: {error}")
            return False
        if missing := self._missing(task):
            self.listener.warn(f"{task.work.name}: after_kill ended with 0 but did not make {missing}")
            return False
        self.listener.say(f"{task.work.name}: {status.state}, which after_kill made a result{': ' * bool(said)}{said}")
        return True

    # Ends

    def _submit_again(self, task: Task, status: JobStatus) -> None:
        assert task.submission is not None
        before = task.submission.resubmissions
        if before >= self.settings.resubmit_limit:
            self._fail_as(task, status, f"; it was submitted {before + 1} times")
            return
        self.listener.say(
            f"{task.work.name}: {status.explanation()}; "
            f"submitting it again ({before + 1} of {self.settings.resubmit_limit})"
        )
        self._start_over(task, before + 1)

    def _start_over(self, task: Task, resubmissions: int = 0) -> None:
        assert task.submission is not None
        self.ledger.withdraw(task.submission)
        self.ledger.close(task.submission, "submitted again", keep_files=True)
        task.submission, task.state, task.status, task.adopted = None, "new", None, False
        task.failed_at = task.unknown_since = None
        self._submit(task, resubmissions)

    def _succeed(self, task: Task, how: str) -> None:
        task.state = "over"
        if task.submission is not None:
            self.ledger.close(task.submission, how, keep_files=self.settings.keep_logs)
        self._forget()
        self.listener.success(task)

    def _conclude_unexplained(self, task: Task) -> None:
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        status = ended.status if ended else "unknown"
        node = ended.node if ended else "unknown"
        self._fail(
            task,
            f"SLURM job {task.submission.slurm_id}: the command ended with status {status} on node {node}; "
            "SLURM has not said how the job ended",
        )

    def _fail_as(self, task: Task, status: JobStatus, more: str = "") -> None:
        if status.reason is None and status.by is None and (reason := self.slurm.details(status.slurm_id)):
            status = JobStatus(**{**status.__dict__, "reason": reason})
        ended = self.ledger.ended(task.submission) if task.submission else None
        if ended is not None and ended.status == EXIT_REQUEUED:
            more += f"; SLURM had requeued it more than {self.settings.resubmit_limit} times"
        self._fail(task, f"SLURM job {status.slurm_id}: {status.explanation(ended.status if ended else None)}{more}")

    def _fail(self, task: Task, message: str) -> None:
        task.state = "over"
        log = None
        if task.submission is not None:
            log = self.ledger.log_of(task.submission) if task.submission.slurm_id else None
            self.ledger.close(task.submission, "failure", keep_files=True)
        self._forget()
        where = f", log: {log}" if log else ""
        self.listener.failure(task, f"{task.work.name}: {message}{where}", log)

    def _forget(self) -> None:
        self._tasks = {key: task for key, task in self._tasks.items() if task.state != "over"}
