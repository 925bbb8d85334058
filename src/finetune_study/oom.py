"""Recognises the many ways in which memory runs out."""

import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass

CPU_ALLOCATOR = re.compile(r"DefaultCPUAllocator: can't allocate memory: you tried to allocate (?P<bytes>\d+) bytes")
CUDA_ALLOCATOR = re.compile(r"Tried to allocate (?P<number>[\d.]+) (?P<unit>bytes|KiB|MiB|GiB)")
CUDA_HELD = re.compile(
    r"(?P<allocated>[\d.]+) (?P<allocated_unit>\w+) is allocated by PyTorch.*?"
    r"(?P<unused>[\d.]+) (?P<unused_unit>\w+) is reserved by PyTorch but unallocated",
    re.DOTALL,
)
"""What the allocator itself says of the moment; by the time that an error is caught it may have freed some."""
CUDA_ELSEWHERE = re.compile(
    r"CUDA error: out of memory|CUDA_ERROR_OUT_OF_MEMORY|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
    r"|Failed to CUDA (m|c)alloc",
)
HOST_ELSEWHERE = re.compile(
    r"std::bad_alloc|can't start new thread|Cannot allocate memory|Thread creation failed", re.IGNORECASE
)
"""C++ allocation, Python's and the system's threads (their stacks count), mmap, and libgomp, which ends the process."""

UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@dataclass(frozen=True)
class OutOfMemory:
    """An error that means that memory ran out."""

    on_device: bool
    """The accelerator's allocator failed; False: an allocation in host memory did."""
    message: str
    bytes_requested: int | None
    bytes_allocated: int | None = None
    """What PyTorch held in tensors when the allocation failed, where the error says so."""
    bytes_reserved: int | None = None
    """What its allocator held altogether."""

    @property
    def fragmented(self) -> bool | None:
        """Whether more unused memory was held than was asked for."""
        if self.bytes_requested is None or self.bytes_reserved is None or self.bytes_allocated is None:
            return None
        return self.bytes_reserved - self.bytes_allocated > self.bytes_requested


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def recognise(error: BaseException) -> OutOfMemory | None:
    """What ran out, if the error or one that led to it says that memory did."""
    for one in _chain(error):
        found = _recognise_one(one)
        if found is not None:
            return found
    return None


def _recognise_one(error: BaseException) -> OutOfMemory | None:
    message = str(error)
    if match := CPU_ALLOCATOR.search(message):
        return OutOfMemory(False, message, int(match["bytes"]))
    if type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and CUDA_ELSEWHERE.search(message)
    ):
        asked, held = CUDA_ALLOCATOR.search(message), CUDA_HELD.search(message)
        requested = _bytes(asked["number"], asked["unit"]) if asked else None
        if held is None:
            return OutOfMemory(True, message, requested)
        allocated = _bytes(held["allocated"], held["allocated_unit"])
        return OutOfMemory(True, message, requested, allocated, allocated + _bytes(held["unused"], held["unused_unit"]))
    if isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM):
        return OutOfMemory(False, message or type(error).__name__, None)
    if isinstance(error, RuntimeError) and HOST_ELSEWHERE.search(message):
        return OutOfMemory(False, message, None)
    return None


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * UNITS[unit])
