"""Energy of a GPU, where NVML counts it."""

from typing import Any

from finetune_study import mig


class EnergyMeter:
    """Joules that one GPU took between `start` and `stop`; None where the driver does not say, on a CPU, and for a
    slice (MIG): NVML counts the energy of the whole card, which others use as well."""

    def __init__(self, uuid: str | None) -> None:
        """
        Args:
            uuid: the GPU as the driver names it (`GPU-…`, `MIG-…`); None on a CPU.
        """
        self._handle: Any = None
        self._start: int | None = None
        self.joules: float | None = None
        if uuid is not None and not mig.is_slice_id(uuid):
            import pynvml

            try:
                pynvml.nvmlInit()
                self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            except pynvml.NVMLError:
                self._handle = None

    def _millijoules(self) -> int | None:
        if self._handle is None:
            return None
        import pynvml

        try:
            return int(pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except pynvml.NVMLError:
            return None

    def start(self) -> None:
        self._start = self._millijoules()

    def stop(self) -> None:
        end = self._millijoules()
        if self._start is not None and end is not None:
            self.joules = (end - self._start) / 1000
