import errno

import pytest

from finetune_study import oom

CUDA = (
    "CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.10 GiB is free."
)


class OutOfMemoryError(RuntimeError):
    """Stands in for torch.OutOfMemoryError, which only a GPU raises."""


@pytest.mark.parametrize(
    ("error", "on_device", "asked"),
    [
        (
            RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1234 bytes. x"
            ),
            False,
            1234,
        ),
        (OutOfMemoryError(CUDA), True, int(1.5 * 2**30)),
        (RuntimeError("CUDA error: out of memory"), True, None),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, None),
        (MemoryError(), False, None),
        (RuntimeError("can't start new thread"), False, None),
        (RuntimeError("std::bad_alloc"), False, None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), False, None),
    ],
)
def test_recognises(error: BaseException, on_device: bool, asked: int | None) -> None:
    found = oom.recognise(error)
    assert found is not None
    assert (found.on_device, found.bytes_requested) == (on_device, asked)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../third_party/gloo] Connection closed by peer"),
        ValueError("out of memory is a phrase of the user's data"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOSPC, "No space left on device"),
        KeyError("memory"),
    ],
)
def test_a_bug_is_not_an_oom(error: BaseException) -> None:
    assert oom.recognise(error) is None


def test_an_oom_behind_another_error_is_found() -> None:
    error = ValueError("could not load")
    error.__cause__ = MemoryError()
    assert oom.recognise(error) is not None


@pytest.mark.parametrize(("unused", "fragmented"), [("2.00 GiB", True), ("512.00 MiB", False)])
def test_fragmentation_is_read_from_the_allocators_own_words(unused: str, fragmented: bool) -> None:
    words = f"{CUDA} Of the allocated memory 70.00 GiB is allocated by PyTorch, and {unused} is reserved by PyTorch but"
    found = oom.recognise(OutOfMemoryError(f"{words} unallocated. If reserved memory is large, try ..."))
    assert found is not None
    assert found.bytes_allocated == 70 * 2**30
    assert found.fragmented is fragmented


def test_fragmentation_is_not_guessed() -> None:
    found = oom.recognise(OutOfMemoryError(CUDA))
    assert found is not None
    assert found.fragmented is None
