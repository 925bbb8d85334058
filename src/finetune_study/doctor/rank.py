"""One rank of the doctor's job: imports what training imports, and talks to its peers.

Each look is told by itself, so that a crash in one leaves the others: a fact `<look>`, or `<look>_error`.
"""

import argparse
import contextlib
import datetime
import functools
import importlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from finetune_study.facts import Facts

PACKAGES = ("transformers", "peft", "accelerate", "datasets", "deepspeed")
"""What training imports beside torch."""

PEERS_SECONDS = 120
"""How long ranks wait for each other; a blocked network shows as this."""

MESSAGE_BYTES = 64 * 2**20
"""A size that uses the links fully (nccl-tests show a plateau from some ten MiB on)."""

REPETITIONS = 5


def examine(path: Path, device: str, packages: Sequence[str], build: bool) -> None:
    """Tells what this rank finds.

    Args:
        path: of its facts.
        device: `cuda` or `cpu`.
        packages: what the study's techniques import beside PACKAGES.
        build: build and load DeepSpeed's optimizer for offloaded states.
    """
    facts = Facts(path)

    def attempt(name: str, look: Callable[[], Any]) -> bool:
        facts.tell(at=name)
        try:
            facts.tell(**{name: look()})
        except Exception as error:
            first = (str(error).strip().splitlines() or ["no message"])[0]
            facts.tell(**{f"{name}_error": f"{type(error).__name__}: {first}"})
            return False
        return True

    if attempt("torch", _torch):
        if device == "cuda":
            attempt("gpu", _gpu)
        attempt("all_reduce", lambda: _all_reduce(device))
    if os.environ["RANK"] == "0":
        for name in (*PACKAGES, *packages):
            attempt(name, functools.partial(_version, name))
        attempt("ops", lambda: _ops(build))
    facts.ended("completed")


def _torch() -> dict[str, Any]:
    began = time.monotonic()
    import torch

    return {
        "version": torch.__version__,
        "cuda": torch.version.cuda,
        "architectures": torch.cuda.get_arch_list(),
        "import_seconds": round(time.monotonic() - began, 1),
    }


def _version(name: str) -> dict[str, Any]:
    began = time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):  # DeepSpeed talks
        module = importlib.import_module(name)
    version = getattr(module, "__version__", None)
    return {"version": version and str(version), "import_seconds": round(time.monotonic() - began, 1)}


def _gpu() -> dict[str, Any]:
    import torch

    torch.cuda.init()  # says why there is none
    properties = torch.cuda.get_device_properties(int(os.environ["LOCAL_RANK"]))
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "compute_capability": f"{properties.major}.{properties.minor}",
        # A kernel has to run: a build without this GPU's code says so here.
        "sum": float(torch.ones(1000, device=f"cuda:{os.environ['LOCAL_RANK']}").sum()),
    }


def _all_reduce(device: str) -> dict[str, Any]:
    """All ranks add up their numbers; the rate of the slowest link, as nccl-tests define it (bus bandwidth)."""
    import torch
    import torch.distributed as distributed

    backend = "nccl" if device == "cuda" else "gloo"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(backend, timeout=datetime.timedelta(seconds=PEERS_SECONDS))
    try:
        ranks = distributed.get_world_size()
        data = torch.ones(MESSAGE_BYTES // 4, device=device)
        distributed.all_reduce(data)  # the first one sets up the connections
        if not bool((data == ranks).all()):
            raise RuntimeError(f"the sum over {ranks} ranks is wrong: {float(data.min())} to {float(data.max())}")
        _finish(device)
        began = time.monotonic()
        for _ in range(REPETITIONS):
            distributed.all_reduce(data)
        _finish(device)
        seconds = (time.monotonic() - began) / REPETITIONS
        rate = 2 * (ranks - 1) / ranks * MESSAGE_BYTES / seconds
        version = ".".join(map(str, torch.cuda.nccl.version())) if backend == "nccl" else None
        return {"backend": backend, "version": version, "ranks": ranks, "gigabytes_per_second": round(rate / 1e9, 2)}
    finally:
        distributed.destroy_process_group()


def _finish(device: str) -> None:
    import torch

    if device == "cuda":
        torch.cuda.synchronize()


def _ops(build: bool) -> dict[str, Any]:
    """DeepSpeed's optimizer for offloaded states: whether it can be built here, and, if asked, that it loads."""
    from deepspeed.ops.op_builder import CPUAdamBuilder

    builder = CPUAdamBuilder()
    found = {
        "compatible": bool(builder.is_compatible(verbose=False)),
        "why_not": builder.error_log,
        "tools": {name: shutil.which(name) for name in ("c++", "ninja", "nvcc")},
    }
    if build:
        began = time.monotonic()
        builder.load(verbose=False)
        found["load_seconds"] = round(time.monotonic() - began, 1)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("facts", type=Path)
    parser.add_argument("device", choices=("cuda", "cpu"))
    parser.add_argument("packages", nargs="*")
    parser.add_argument("--build", action="store_true")
    arguments = parser.parse_args()
    examine(arguments.facts, arguments.device, arguments.packages, arguments.build)
