"""What a GPU is, as a hardware entry, and what trains there; the measured matrix needs this, and no pytest."""

import importlib.metadata
from typing import Any

VERSIONS = (
    "torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "torchao", "liger-kernel", "flash-attn",
    "flash-attn-3", "flash-attn-4", "triton",
)  # fmt: skip
"""Packages whose versions are stored with what ran."""


def versions() -> dict[str, str | None]:
    """Of this Python's packages; None where one is not installed."""
    packages = importlib.metadata.distributions()
    installed = {str(one.metadata["Name"]).lower().replace("_", "-"): one.version for one in packages}
    return {name: installed.get(name) for name in VERSIONS}


def gpu_hardware() -> dict[str, Any]:
    """The hardware entry of the first GPU.

    Raises:
        RuntimeError: where there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no GPU")
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": "cuda",
        "gpu": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "compute_capability": properties.major + properties.minor / 10,
        "max_gpus": torch.cuda.device_count(),
    }
