"""When a call ends and leaves its jobs in SLURM: told by a signal, or as soon as waiting is all that is left to do."""

import os
import signal
import threading
from collections.abc import Collection, Set
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError

ON_SIGNAL, WHEN_SUBMITTED = "on-signal", "when-submitted"
MODES = (ON_SIGNAL, WHEN_SUBMITTED)

EXIT_LEFT = os.EX_TEMPFAIL
"""Exit status (75) of a call that leaves work behind; sysexits.h: a temporary failure, invited to be tried again."""

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Detached(WorkflowError):  # noqa: N818  Snakemake prints the name above the message
    """A call ends, and its jobs stay."""


class Detachment:
    """Watches signals and Snakemake's scheduler."""

    def __init__(self, mode: str | None, workflow: Any) -> None:
        """
        Args:
            mode: one of `MODES`; None: jobs are never left.
            workflow: Snakemake's; its scheduler comes later.
        """
        self.mode, self._workflow = mode, workflow
        self._is_told = False

    def listen(self) -> None:
        """Takes the signals over; to be called again later, since Snakemake takes SIGTERM for itself in between."""
        if self.mode is None or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
                signal.signal(number, self._note)

    def _note(self, number: int, frame: Any) -> None:
        self._is_told = True  # and no more: Snakemake's own way takes a lock that this very thread may hold

    @property
    def is_told(self) -> bool:
        """Whether a signal came that ends the call."""
        if self.mode is None:
            return False
        return self._is_told or bool(self._workflow.scheduler and self._workflow.scheduler._user_kill)

    def is_due(self, waited_for: Collection[Any], *, is_settled: bool) -> bool:
        """Whether the call can end now; the thread that looks after the jobs asks this.

        What runs here, outside of SLURM, is waited for, and concluded.

        Args:
            waited_for: Snakemake's jobs that are in SLURM, or on their way.
            is_settled: whether nothing can be done for them until one of them begins or ends.
        """
        scheduler = self._workflow.scheduler
        if self.is_told and scheduler is not None:
            with scheduler._lock:
                is_working_here = any(job.is_local for job in scheduler.running)
            if is_working_here and not scheduler._user_kill:
                scheduler.exit_gracefully()  # starts nothing more, and says that it waits
            return not is_working_here
        return self.mode == WHEN_SUBMITTED and is_settled and bool(waited_for) and self._is_idle(set(waited_for))

    def _is_idle(self, waited_for: Set[Any]) -> bool:
        """Whether Snakemake waits for those jobs and for nothing else, and starts none until one of them ends."""
        scheduler = self._workflow.scheduler
        with scheduler._lock:
            if not scheduler.running <= waited_for:
                return False  # one runs here, has just ended, or is on its way
            if scheduler._errors and not scheduler.keepgoing:
                return True
            room = {
                name: limit - sum(job.scheduler_resources.get(name, 0) for job in scheduler.running)
                for name, limit in scheduler.global_resources.items()
            }
            return not any(
                job._scheduler_resources is None  # the scheduler has not looked at it yet
                or all(job.scheduler_resources.get(name, 0) <= free for name, free in room.items())
                for job in scheduler.open_jobs
            )
