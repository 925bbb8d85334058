"""What a GPU is, as a hardware entry; the measured matrix needs this, and no pytest."""

from typing import Any


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
