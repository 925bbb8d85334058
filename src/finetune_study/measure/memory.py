"""Peak memory of a rank, per phase.

On a GPU torch's allocator keeps the peaks. On a CPU the measure is the growth of the process's data memory (VmData in
/proc/self/status, what RLIMIT_DATA limits) over a baseline; the kernel keeps no high-water mark of it, so a thread
samples it while large torch operations run without the interpreter's lock.
"""

import resource
import threading
from pathlib import Path
from typing import Any, Protocol

from finetune_study.measure.phases import Phases

SAMPLING_SECONDS = 0.005
"""Operations of a step that matter for the peak take longer. To be woken so often cost 3 % of the time of a rank with
one core (benchmarks/overhead.py): it is done where nothing is timed."""
TIMED_SAMPLING_SECONDS = 0.02
"""While steps are timed, which take the same memory as those before them."""

_STATUS = Path("/proc/self/status")


def _kib(field: bytes) -> int:
    status = _STATUS.read_bytes()
    begin = status.index(field) + len(field)
    return int(status[begin : status.index(b"kB", begin)])


def data_memory_bytes() -> int:
    """VmData of this process: private writable memory, whether touched or not; bytes."""
    return _kib(b"VmData:") * 1024


def peak_rss_bytes() -> int:
    """Most resident memory of this process so far; bytes."""
    return _kib(b"VmHWM:") * 1024


class MemoryMeter(Protocol):
    """Memory of one rank's device."""

    def start(self) -> None:
        """Sets the baseline; a budget holds from here on."""

    def pace(self, *, timed: bool) -> None:
        """Spares steps that are timed."""

    def held_bytes(self) -> int:
        """Device memory in use now."""

    def held_bytes_when_refused(self, requested: int | None) -> int:
        """Device memory in use when an allocation failed; the error has freed some of it since."""

    def lift_budget(self) -> None:
        """Lets an OOM be written down."""

    def report(self) -> dict[str, Any]:
        """Peaks in bytes: of training (evaluation left out), and of every phase."""


def _training_peak(by_phase: dict[str, int]) -> int | None:
    return max((peak for phase, peak in by_phase.items() if phase != "evaluate"), default=None)


class DataMemoryMeter:
    """A CPU rank: growth of data memory, limited by RLIMIT_DATA."""

    def __init__(self, phases: Phases, budget_bytes: int | None) -> None:
        self._phases = phases
        self._budget = budget_bytes
        self._baseline = 0
        self._peaks: dict[str, int] = {}
        self._limits = resource.getrlimit(resource.RLIMIT_DATA)
        self._stop = threading.Event()
        self._interval = SAMPLING_SECONDS
        self._thread = threading.Thread(target=self._sample, name="memory", daemon=True)

    def start(self) -> None:
        # The thread's stack belongs to the baseline, not to the model.
        self._thread.start()
        self._baseline = data_memory_bytes()
        self._peaks.clear()
        self._phases.listen(self._look)
        if self._budget is not None:
            # The soft limit alone: an OOM is written down after lifting it again.
            resource.setrlimit(resource.RLIMIT_DATA, (self._baseline + self._budget, self._limits[1]))

    def pace(self, *, timed: bool) -> None:
        self._interval = TIMED_SAMPLING_SECONDS if timed else SAMPLING_SECONDS

    def held_bytes(self) -> int:
        return data_memory_bytes() - self._baseline

    def held_bytes_when_refused(self, requested: int | None) -> int:
        if self._budget is None or requested is None:
            return self.held_bytes()
        # The kernel refuses what does not fit into the rest of the budget.
        return max(self.held_bytes(), self._budget - requested)

    def lift_budget(self) -> None:
        resource.setrlimit(resource.RLIMIT_DATA, self._limits)

    def close(self) -> None:
        """Stops sampling and lifts the budget: the process goes on with other work."""
        self._stop.set()
        self._thread.join()
        self.lift_budget()

    def report(self) -> dict[str, Any]:
        self._look(self._phases.current)
        return {
            "baseline_bytes": self._baseline,
            "peak_device_used_bytes": _training_peak(self._peaks),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_device_used_bytes_by_phase": dict(self._peaks),
        }

    def _look(self, phase: str) -> None:
        held = self.held_bytes()
        if held > self._peaks.get(phase, 0):
            self._peaks[phase] = held

    def _sample(self) -> None:
        while not self._stop.wait(self._interval):
            self._look(self._phases.current)


class CudaMemoryMeter:
    """A GPU rank: torch's allocator, and the whole device as the driver sees it."""

    def __init__(self, phases: Phases, keep_history: bool) -> None:
        self._phases = phases
        self._keep_history = keep_history
        self._allocated: dict[str, int] = {}
        self._reserved: dict[str, int] = {}
        self._used: dict[str, int] = {}

    def start(self) -> None:
        import torch

        torch.cuda.reset_peak_memory_stats()
        self._phases.listen(self._look)
        if self._keep_history:
            torch.cuda.memory._record_memory_history(max_entries=100_000)

    def pace(self, *, timed: bool) -> None:
        """The allocator keeps its peaks by itself."""

    def held_bytes(self) -> int:
        import torch

        return int(torch.cuda.memory_allocated())

    def held_bytes_when_refused(self, requested: int | None) -> int:
        return self.held_bytes()

    def lift_budget(self) -> None:
        """A GPU has no budget of ours."""

    def close(self) -> None:
        """Nothing runs beside the training."""

    def report(self) -> dict[str, Any]:
        self._look(self._phases.current)
        self._ask_driver(self._phases.current)
        return {
            "peak_allocated_bytes": _training_peak(self._allocated),
            "peak_reserved_bytes": _training_peak(self._reserved),
            "peak_device_used_bytes": _training_peak(self._used),
            "peak_rss_bytes": peak_rss_bytes(),
            "peak_allocated_bytes_by_phase": dict(self._allocated),
            "peak_reserved_bytes_by_phase": dict(self._reserved),
        }

    def _look(self, phase: str) -> None:
        import torch

        self._allocated[phase] = max(self._allocated.get(phase, 0), torch.cuda.max_memory_allocated())
        self._reserved[phase] = max(self._reserved.get(phase, 0), torch.cuda.max_memory_reserved())
        torch.cuda.reset_peak_memory_stats()
        if phase in ("load", "optimizer"):
            self._ask_driver(phase)

    def _ask_driver(self, phase: str) -> None:
        """Once a step is enough: what the allocator took it seldom gives back, and asking takes long."""
        import torch

        free, total = torch.cuda.mem_get_info()
        self._used[phase] = max(self._used.get(phase, 0), total - free)
