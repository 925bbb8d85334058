"""Where and with what a run was measured."""

import hashlib
import importlib.metadata
import os
import platform
import site
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_study import mig

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "accelerate", "datasets", "flash-attn", "finetune-study")
"""Whose versions get a place of their own; all others are in the digest."""

LOCK_COPY = "finetune-study.lock"
"""In the environment's prefix: the lock file it was installed from, put there by the Makefile."""


def installed_packages() -> list[str]:
    """`name==version` of every package of this Python, sorted; this project's own version is told by its commit."""
    # Not along sys.path: importing setuptools adds its private copies of packages there.
    folders = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    found = {f"{d.metadata['Name']}=={d.version}".lower() for d in importlib.metadata.distributions(path=folders)}
    return sorted(name for name in found if not name.startswith("finetune-study=="))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git(*arguments: str) -> str | None:
    try:
        answer = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip()


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _memory_total_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe(device: str) -> dict[str, Any]:
    """Versions, commit, lock, host and device of this process.

    Args:
        device: `cuda` or `cpu`.
    """
    import torch

    packages = installed_packages()
    lock = Path(sys.prefix) / LOCK_COPY
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", ".")
    facts: dict[str, Any] = {
        "versions": {
            "python": platform.python_version(),
            **{name.replace("-", "_"): _version(name) for name in PACKAGES},
            "cuda": torch.version.cuda,
        },
        "packages": packages,
        "software_sha256": _sha256("\n".join(packages).encode()),
        "lock_sha256": _sha256(lock.read_bytes()) if lock.exists() else None,
        "commit": _git("rev-parse", "HEAD"),
        "commit_has_local_changes": None if changes is None else bool(changes),
        "host": socket.gethostname(),
        "system": platform.platform(),
        "processor": _processor(),
        "processor_cores": os.cpu_count(),
        "host_memory_bytes": _memory_total_bytes(),
        "device_name": torch.cuda.get_device_name() if device == "cuda" else _processor(),
    }
    if device == "cuda":
        facts["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        facts["gpu_memory_bytes"] = torch.cuda.get_device_properties().total_memory
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
    return facts


def gpu_uuid() -> str | None:
    """The driver's name for this process's GPU, `GPU-…` or `MIG-…`; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    properties, visible = torch.cuda.get_device_properties(), os.environ.get("CUDA_VISIBLE_DEVICES")
    kind = "MIG" if mig.is_slice_name(properties.name) or mig.is_slice_id(visible) else "GPU"
    return f"{kind}-{properties.uuid}"


def gpu_state(uuid: str | None) -> dict[str, Any]:
    """Clocks in MHz, power in watts, temperature and reasons for throttling right now; empty without NVML.

    All of these are the whole card's, so that they are null for a slice of it.
    """
    if uuid is None:
        return {}
    import pynvml as nvml

    is_slice = mig.is_slice_id(uuid)
    try:
        nvml.nvmlInit()
        handle = None if is_slice else nvml.nvmlDeviceGetHandleByUUID(uuid)
        driver = nvml.nvmlSystemGetDriverVersion()
    except nvml.NVMLError:
        return {}
    readings: dict[str, Callable[[], Any]] = {
        "sm_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "max_sm_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(handle, nvml.NVML_CLOCK_SM),
        "memory_clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
        "power_limit_watts": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1000,
        "temperature_celsius": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
        "throttle_reasons_bits": lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
    }
    state: dict[str, Any] = {"driver": driver}
    for name, read in readings.items():
        try:
            state[name] = None if is_slice else read()
        except nvml.NVMLError:
            state[name] = None
    return state
