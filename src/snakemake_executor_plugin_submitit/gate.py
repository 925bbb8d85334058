"""Which works may be submitted: canaries, works that fail alike, and the GPU-hours that may be asked for."""

import hashlib
import itertools
import re
from collections.abc import Sequence

from snakemake_executor_plugin_submitit.detach import WHEN_SUBMITTED
from snakemake_executor_plugin_submitit.ledger import Ledger
from snakemake_executor_plugin_submitit.settings import ExecutorSettings
from snakemake_executor_plugin_submitit.task import Task

LINES_COMPARED = 10
"""Of the end of a log; a cause and where it came from fit in."""

ROUNDING = 1e-9
"""Hours; minutes over 60 are no round numbers."""

OWN_LINE = re.compile(r"^job \S+ on \S+, .*\n?", re.MULTILINE)
"""What the executor's script says first (script.py)."""

FOLDERS = re.compile(r"(?<![\w.])~?/?(?:[^\s/'\":=(),]+/)+")
TEMPORARY = re.compile(r"\btmp[\w.-]*")
"""Where something lies differs from run to run, and so do names of temporary files."""

NUMBERS = re.compile(r"\b0x[0-9a-f]+\b|\d+([._]\d+)*")
"""What differs between two logs that say the same: ids, times, sizes."""


class Gate:
    """Decides over new tasks; hears how others ended."""

    def __init__(self, ledger: Ledger, settings: ExecutorSettings) -> None:
        self._ledger, self._settings = ledger, settings
        # Where nothing is left of earlier calls, somebody calls who has seen what failed; a crontab has not.
        self._is_attended = settings.detach != WHEN_SUBMITTED
        if self._is_attended and not ledger.open:
            ledger.forgive()
        self._stopped: dict[str, str] = {}
        """Why no more of a kind is submitted."""

    def why_never(self, task: Task) -> str | None:
        """Why a task is not submitted in this call at all."""
        work, most = task.work, self._settings.max_gpu_hours
        if stopped := self._why_stopped(task):
            return stopped
        if most is None or not work.num_gpus:
            return None
        if work.minutes is None:
            return "not submitted: max-gpu-hours can't be kept to by a job without a time limit; set its `runtime`"
        if self.affordable([task]):
            return None
        return (
            f"not submitted: it asks for {work.gpu_hours:.2f} GPU-hours, and of max-gpu-hours={most:g} "
            f"{self._ledger.gpu_hours_asked:.2f} were asked for already, in all calls together; give more, or leave it"
        )

    def affordable(self, tasks: Sequence[Task]) -> list[Task]:
        """As many of the first of them as are still within the budget."""
        most, asked = self._settings.max_gpu_hours, self._ledger.gpu_hours_asked
        if most is None:
            return list(tasks)
        sums = itertools.accumulate((task.work.gpu_hours for task in tasks), initial=asked)
        next(sums)
        return [
            task for task, total in zip(tasks, sums, strict=True) if total <= most + ROUNDING or not task.work.num_gpus
        ]

    @property
    def is_exceeded(self) -> bool:
        """Whether more was asked for than there is: by calls that had no such limit, or a higher one."""
        most = self._settings.max_gpu_hours
        return most is not None and self._ledger.gpu_hours_asked > most + ROUNDING

    def let_through(self, new: Sequence[Task], submitted: Sequence[Task]) -> list[Task]:
        """The tasks that may be submitted now: of a kind that never had a success, one at a time."""
        busy = {task.work.kind for task in submitted}
        through = []
        for task in new:
            kind = task.work.kind
            if kind is None or self._settings.no_canary or kind in self._ledger.proved:
                through.append(task)
            elif kind not in busy:
                busy.add(kind)
                through.append(task)
        return through

    def succeeded(self, task: Task) -> None:
        if task.work.kind is not None:
            self._ledger.prove(task.work.kind)
            self._ledger.forgive(task.work.kind)

    def failed(self, task: Task, how: str, log: str, nodes: Sequence[str] = ()) -> str | None:
        """Counts a failure.

        Args:
            task: what failed.
            how: what it ended with.
            log: the end of what it said.
            nodes: that it ran on.

        Returns:
            Why no more of its kind is submitted, if this failure was one too many.
        """
        limit, kind = self._settings.failure_limit, task.work.kind
        if kind is None or not limit or kind in self._stopped:
            return None
        said = hashlib.sha256(_signature(task, f"{how}\n{log}", nodes).encode()).hexdigest()[:16]
        self._ledger.fail(kind, said, task.work.key)
        if len(self._ledger.failures[kind][said]) < limit:
            return None
        return self._stop(kind, f" (the last one: {task.work.name}, {how})")

    def _stop(self, kind: str, more: str = "") -> str:
        self._stopped[kind] = (
            f"not submitted: {self._settings.failure_limit} jobs of the kind `{kind}` failed alike, and none was a "
            f"success meanwhile{more}; mend the cause, and {self._again}"
        )
        return self._stopped[kind]

    @property
    def _again(self) -> str:
        return "call again" if self._is_attended else f"call once without --submitit-detach {WHEN_SUBMITTED}"

    def _why_stopped(self, task: Task) -> str | None:
        """Works of its kind failed alike, or it failed alike in several calls."""
        limit, kind = self._settings.failure_limit, task.work.kind
        if kind is None or not limit:
            return None
        alike = self._ledger.failures.get(kind, {}).values()
        if kind not in self._stopped and any(len(works) >= limit for works in alike):
            self._stop(kind)
        if kind in self._stopped:
            return self._stopped[kind]
        if any(works[task.work.key] >= limit for works in alike):
            return f"not submitted: it failed {limit} times alike; mend the cause, and {self._again}"
        return None


def _signature(task: Task, text: str, nodes: Sequence[str]) -> str:
    """What was said, without what differs from job to job."""
    text = OWN_LINE.sub("", text)
    own = {task.work.name, *nodes, *map(str, task.work.description["wildcards"].values())}
    for word in sorted(filter(None, own), key=len, reverse=True):
        if not NUMBERS.fullmatch(word):  # those go with all others
            text = re.sub(rf"(?<![^\W_]){re.escape(word)}(?![^\W_])", "*", text)
    text = NUMBERS.sub("#", TEMPORARY.sub("tmp", FOLDERS.sub("", text)))
    lines = [line.strip() for line in text.splitlines()]
    return "\n".join(dict.fromkeys(filter(None, lines[:1] + lines[-LINES_COMPARED:])))
