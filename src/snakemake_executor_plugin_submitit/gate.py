"""Which works may be submitted: canaries, works that fail alike, and the GPU-hours that may be asked for."""

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from snakemake_executor_plugin_submitit.ledger import Ledger
from snakemake_executor_plugin_submitit.settings import ExecutorSettings
from snakemake_executor_plugin_submitit.task import Task

LINES_COMPARED = 10
"""Of the end of a log; a cause and where it came from fit in."""

ROUNDING = 1e-9
"""Hours; minutes over 60 are no round numbers."""

NUMBERS = re.compile(r"\b0x[0-9a-f]+\b|\d+([._]\d+)*")
"""What differs between two logs that say the same: ids, times, sizes."""


@dataclass
class Kind:
    """What is known of works that have hardware and software in common."""

    failures: dict[str, set[str]] = field(default_factory=dict)
    """Works that failed since its last success, by what was said."""
    stopped: str | None = None
    """Why no more of it is submitted."""


class Gate:
    """Decides over new tasks; hears how others ended."""

    def __init__(self, ledger: Ledger, settings: ExecutorSettings) -> None:
        self._ledger, self._settings = ledger, settings
        self._kinds: dict[str, Kind] = {}

    def why_never(self, task: Task) -> str | None:
        """Why a task is not submitted in this call at all."""
        work, most = task.work, self._settings.max_gpu_hours
        if work.kind is not None and (stopped := self._kind(work.kind).stopped):
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
            self._kind(task.work.kind).failures.clear()

    def failed(self, task: Task, how: str, log: str) -> str | None:
        """Counts a failure.

        Args:
            task: what failed.
            how: what it ended with.
            log: the end of what it said.

        Returns:
            Why no more of its kind is submitted, if this failure was one too many.
        """
        limit, kind = self._settings.failure_limit, task.work.kind
        if kind is None or not limit:
            return None
        known = self._kind(kind)
        said = _signature(task, f"{how}\n{log}")
        alike = known.failures.setdefault(said, set())
        alike.add(task.work.key)
        if len(alike) < limit or known.stopped:
            return None
        known.stopped = (
            f"not submitted: {limit} jobs of the kind `{kind}` failed alike, and none was a success meanwhile "
            f"(the last one: {task.work.name}, {how}); mend the cause, and call again"
        )
        return known.stopped

    def _kind(self, name: str) -> Kind:
        return self._kinds.setdefault(name, Kind())


def _signature(task: Task, text: str) -> str:
    """What was said, without what differs from job to job."""
    own = sorted({task.work.name, *map(str, task.work.description["wildcards"].values())}, key=len, reverse=True)
    for word in filter(None, own):
        text = text.replace(word, "*")
    lines = [NUMBERS.sub("#", line).strip() for line in text.splitlines()]
    return "\n".join(dict.fromkeys(filter(None, lines[:1] + lines[-LINES_COMPARED:])))
