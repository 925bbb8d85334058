"""What becomes of submitted jobs: what they say themselves, what SLURM says, and what follows from it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from snakemake_executor_plugin_submitit import hooks
from snakemake_executor_plugin_submitit.base import Base
from snakemake_executor_plugin_submitit.gate import LINES_COMPARED
from snakemake_executor_plugin_submitit.ledger import WITHDRAWN, Ended
from snakemake_executor_plugin_submitit.script import EXIT_REQUEUED
from snakemake_executor_plugin_submitit.slurm import (
    KILLED,
    NODE_LOST,
    WAITING,
    JobStatus,
    SlurmError,
    mib,
)
from snakemake_executor_plugin_submitit.task import Task

EXPLAIN_SECONDS = 2.0
"""After a job said that it failed, SLURM's account of it follows; it is asked for so often."""

UNEXPLAINED_SECONDS = 60.0
"""A job that said that it failed, and of which SLURM has said nothing for so long, just failed."""

LOG_END_BYTES = 8192
"""Of a log, to compare failures by."""


class Watching(Base):
    """Concludes from files and from SLURM how jobs ended."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._asking = self._new_patience()
        self._hopeless: dict[tuple[str, str], str | None] = {}
        """Answers of this round: why jobs that wait for a reason never start."""

    # What jobs say

    def _notice_ends(self) -> None:
        ended = self.ledger.ended_tokens()
        if not ended:
            return
        for task in self._in_state("submitted"):
            if task.submission is not None and task.submission.token in ended:
                self._notice(task)

    def _notice(self, task: Task) -> Ended | None:
        """What a job said of its own end; a success needs nobody else's word."""
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        if ended is None:
            return None
        if ended.status == 0:
            self._succeed(task, "success")
        elif ended.by == "itself" and ended.status == task.work.unfit_node_status:
            self._leave_node(task, ended)
        elif task.submission.shared and ended.by != "signal":
            self._conclude(task, self._own_status(task, ended))
        elif task.failed_at is None:
            task.failed_at = time.monotonic()
            self._next_question = min(self._next_question, time.monotonic() + EXPLAIN_SECONDS / 2)
        return ended

    @staticmethod
    def _own_status(task: Task, ended: Ended) -> JobStatus:
        """How a work ended whose job goes on with others, of which SLURM tells nothing."""
        memory = task.work.options.get("mem")
        return JobStatus(
            ended.slurm_id,
            "FAILED" if ended.by == "itself" else ended.by,
            node=ended.node,
            requested_memory_mib=mib(str(memory)) if memory else None,
            time_limit_minutes=task.work.minutes,
            number=task.status.number if task.status else None,
        )

    def _leave_node(self, task: Task, ended: Ended) -> None:
        """The command says that its node is not what was asked for: it is tried on another one."""
        assert task.submission is not None
        unfit = self._nodes_named(task) or [ended.node]
        nodes = self.ledger.exclude(task.work.asked, unfit)
        what = f"node {' and '.join(unfit)} is not what was asked for (status {ended.status})"
        if task.resubmissions >= self.settings.resubmit_limit:
            tried = f"tried were {', '.join(sorted(nodes))}"
            self._fail_alike(task, f"SLURM job {ended.slurm_id}: {what}; {tried}", "unfit nodes")
        else:
            self._submit_again(task, what)

    def _nodes_named(self, task: Task) -> list[str]:
        """Nodes of the cluster that the work itself calls not what was asked for."""
        assert task.submission is not None
        named = self.ledger.unfit_nodes(task.submission)
        try:
            return self.slurm.nodes(named) if named else []
        except SlurmError as error:
            self.listener.warn(f"SLURM did not say whether {', '.join(named)} are nodes: {error}")
            return []

    # What SLURM says

    def _ask_slurm(self) -> None:
        waiting: dict[str, list[Task]] = {}
        for task in self._in_state("submitted"):
            if task.submission is not None and task.submission.slurm_id:
                waiting.setdefault(task.submission.slurm_id, []).append(task)
        if not waiting or self._asking.is_waiting or time.monotonic() < self._next_question:
            return
        try:
            found, complete = self._confirmed(waiting, self.slurm.status(list(waiting))), True
        except SlurmError as error:
            found, complete = self._ask_controller(list(waiting), error), False
        self._hopeless.clear()
        for slurm_id, tasks in waiting.items():
            for task in tasks:
                self._judge(task, found.get(slurm_id), complete)
        unexplained = any(task.failed_at is not None for task in self._in_state("submitted"))
        self._next_question = time.monotonic() + (EXPLAIN_SECONDS if unexplained else self.settings.status_interval)

    def _confirmed(self, waiting: Mapping[str, Sequence[Task]], found: dict[str, JobStatus]) -> dict[str, JobStatus]:
        """Accounting calls a job over that SLURM is about to requeue, or that still tidies up after SIGTERM, and seldom
        knows for what a job waits; the controller knows better."""
        doubtful = [
            status.slurm_id
            for status in found.values()
            if not status.is_active
            and status.state != "COMPLETED"
            and (status.state in NODE_LOST or not all(map(self._has_ended, waiting[status.slurm_id])))
        ]
        pending = [status.slurm_id for status in found.values() if status.state == "PENDING"]
        try:
            known = self.slurm.queue([*doubtful, *pending]) if doubtful or pending else {}
        except SlurmError as error:
            if not doubtful:
                return found
            pause = self._asking.failed()
            if self._asking.is_over:
                return found
            self.listener.warn(f"sacct answers, squeue fails; asking again in {pause:.0f} s: {error}")
            known = {slurm_id: JobStatus(slurm_id, "COMPLETING") for slurm_id in doubtful}
        else:
            self._asking.worked()
        return found | {slurm_id: status for slurm_id, status in known.items() if status.is_active}

    def _has_ended(self, task: Task) -> bool:
        return task.submission is not None and self.ledger.ended(task.submission) is not None

    def _ask_controller(self, ids: list[str], error: SlurmError) -> dict[str, JobStatus]:
        """Accounting does not answer: the controller may; that it does not know a job means nothing then."""
        pause = self._asking.failed()
        try:
            found = self.slurm.queue(ids)
        except SlurmError as also:
            self.listener.warn(f"SLURM does not answer; asking again in {pause:.0f} s: {also}")
            if self._asking.is_over:
                raise self._gave_up(str(also)) from None
            return {}
        self.listener.warn(f"sacct fails, squeue answers; asking again in {pause:.0f} s: {error}")
        return found

    # What follows

    def _judge(self, task: Task, status: JobStatus | None, complete: bool) -> None:
        """Concludes from what SLURM says of a task's job."""
        if task.state != "submitted":
            return
        now = time.monotonic()
        if status is None:
            if complete:
                self._unknown(task, now)
            return
        task.unknown_since = None
        if status.is_active:
            self._follow(task, status, now)
        # The job's own word outranks SLURM's; it may have been written while SLURM was asked.
        elif (ended := self._notice(task)) is None or (ended.status != 0 and task.state == "submitted"):
            task.status = status
            self._over(task, status, now)

    def _follow(self, task: Task, status: JobStatus, now: float) -> None:
        """A job that is not over."""
        assert task.submission is not None
        task.adopted = False  # whatever comes now, this call has seen it
        has_run = task.failed_at is not None or (task.status is not None and task.status.state not in WAITING)
        if status.state not in WAITING and task.submission.shared and not self.ledger.has_begun(task.submission):
            status = replace(status, state="PENDING", reason="its turn in this job has not come")
        task.status = status
        if status.state == "PENDING" and (never := self._never_starts(task, status)):
            self._give_back(task, status, never)
            return
        if has_run and status.state in WAITING and self._waits(task):
            self._hurry(task)
        if not self._has_ended(task):
            task.failed_at = None  # it was requeued, and runs again
        if task.failed_at is not None and now - task.failed_at >= UNEXPLAINED_SECONDS:
            self._conclude_unexplained(task)

    def _over(self, task: Task, status: JobStatus, now: float) -> None:
        """A job that is over for SLURM."""
        assert task.submission is not None
        shared = task.submission.shared
        if shared and not self.ledger.has_begun(task.submission) and status.state != "CANCELLED":
            self.listener.say(f"{task.work.name}: SLURM job {status.slurm_id} ended before its turn; trying again")
            self._start_over(task)
            return
        has_said = not shared and self.ledger.has_begun(task.submission)
        is_told = status.is_whole and (has_said or status.state != "COMPLETED")
        if not is_told and now - (task.failed_at or now) < UNEXPLAINED_SECONDS:
            task.failed_at = task.failed_at or now
            return
        claimant = self.ledger.claimed_by(task.submission)
        if claimant not in (None, WITHDRAWN, task.submission.slurm_id):
            self.ledger.moved(task.submission, str(claimant))  # a twin of this submission does the work
        elif status.state == "COMPLETED" and has_said:
            self._succeed(task, "success")
        elif status.state == "COMPLETED":
            self._fail(task, f"SLURM job {status.slurm_id} ended, and left no word of this work; are its scripts gone?")
        else:
            self._conclude(task, status)

    def _conclude(self, task: Task, status: JobStatus) -> None:
        """A job that was no success by itself."""
        assert task.submission is not None
        if status.state in NODE_LOST:
            self._submit_again(task, status.explanation(), status)
        elif status.state in KILLED and self._made_a_result(task, status):
            # A result, and no proof that such jobs can be a success.
            stopped = self._gate.failed(task, status.state, "")
            self._succeed(task, "killed, and a result")
            self._stop_kind(task.work.kind, stopped)
        elif task.adopted and task.resubmissions < self.settings.resubmit_limit:
            stopped = None if status.state == "CANCELLED" else self._count_failure(task, self._how(task, status))
            task.resubmissions += 1
            self.listener.say(f"{task.work.name}: SLURM job {task.submission.slurm_id} failed meanwhile; trying again")
            self._start_over(task)
            self._stop_kind(task.work.kind, stopped)
        else:
            self._fail_as(task, status)

    def _never_starts(self, task: Task, status: JobStatus) -> str | None:
        """Why a pending job will not start, however long it waits; tasks of an array all wait for the same."""
        if status.reason is None:
            return None
        of = status.slurm_id.partition("_")[0], status.reason
        if of not in self._hopeless:
            self._hopeless[of] = self._limits_for(task.work).never_starts(status.slurm_id, status.reason)
        return self._hopeless[of]

    def _give_back(self, task: Task, status: JobStatus, why: str) -> None:
        """A job that SLURM took and will never start."""
        shared = task.submission is not None and task.submission.shared
        if not self._withdraw_pending(task):
            return
        if shared:
            self._may_begin_anew(task)
            if task.work.asked not in self._unshared:
                self._unshare(task.work, why)
        else:
            self._fail(
                task,
                f"SLURM took job {status.slurm_id} and will never start it: {status.explanation()}: {why}; ask for "
                "what partition, account and QOS allow (scontrol show partition, sacctmgr show assoc)",
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
        elif self._notice(task) is None or task.state == "submitted":
            self.ledger.withdraw(task.submission)
            self._fail(task, f"SLURM job {slurm_id} is lost: neither sacct nor squeue has known it for "
                       f"{self.settings.lost_after_seconds} s, and it left no exit status.")  # fmt: skip

    def _made_a_result(self, task: Task, status: JobStatus) -> bool:
        assert task.submission is not None
        if self.settings.after_kill is None:
            return False
        logs = self.ledger.logs_of(task.submission)
        job = {
            **task.work.description,
            "slurm_job_id": status.number or status.slurm_id,
            "state": status.state,
            "reason": status.explanation(),
            "exit_code": status.exit_code,
            "node": status.node,
            "elapsed_seconds": status.elapsed_seconds,
            "requested_memory_mib": status.requested_memory_mib,
            "max_rss_mib": status.max_rss_mib,
            "time_limit_minutes": status.time_limit_minutes,
            "job_log": str(logs[0]) if logs else None,
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

    def _submit_again(self, task: Task, why: str, status: JobStatus | None = None) -> None:
        limit = self.settings.resubmit_limit
        if task.resubmissions >= limit and status is not None:
            self._fail_as(task, status, f"; it was submitted {task.resubmissions + 1} times")
            return
        task.resubmissions += 1
        self.listener.say(f"{task.work.name}: {why}; submitting it again ({task.resubmissions} of {limit})")
        self._start_over(task)

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
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        if status.reason is None and status.by is None and not task.submission.shared:
            status = replace(status, reason=self.slurm.details(status.slurm_id))
        if ended is not None and ended.status == EXIT_REQUEUED:
            more += f"; SLURM had requeued it more than {self.settings.resubmit_limit} times"
        message = f"SLURM job {status.slurm_id}: {status.explanation(ended.status if ended else None)}{more}"
        if status.state == "CANCELLED":
            self._fail(task, message)
        else:
            self._fail_alike(task, message, self._how(task, status))

    def _how(self, task: Task, status: JobStatus) -> str:
        """How it failed, in words that failures with the same cause share."""
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        return f"{status.state}, status {ended.status if ended else 'unknown'}"

    def _fail_alike(self, task: Task, message: str, how: str) -> None:
        """A failure that may have a cause in common with others."""
        stopped = self._count_failure(task, how)
        self._fail(task, message)
        self._stop_kind(task.work.kind, stopped)

    def _count_failure(self, task: Task, how: str) -> str | None:
        """Why no more of its kind is submitted, if this failure was one too many."""
        assert task.submission is not None
        ended = self.ledger.ended(task.submission)
        nodes = [node for node in (ended and ended.node, task.status and task.status.node) if node]
        return self._gate.failed(task, how, _ends_of(self.ledger.logs_of(task.submission)), nodes)

    def _stop_kind(self, kind: str | None, message: str | None) -> None:
        """What of a kind has not begun is not going to, if there is a reason."""
        if message is None:
            return
        for task in [task for task in self._tasks.values() if task.work.kind == kind]:
            if task.state != "submitted" or (task.is_pending and self._withdraw_pending(task)):
                self._fail(task, message)


def _ends_of(logs: Sequence[Path]) -> str:
    """The last lines of logs."""
    ends = []
    for log in logs:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_END_BYTES))
            ends += stream.read().decode(errors="replace").splitlines()[-LINES_COMPARED:]
    return "\n".join(ends)
