"""Slices of a GPU, NVIDIA's Multi-Instance GPU (MIG): how they are recognised, and what they can't do.

The source of all that is said here is NVIDIA's Multi-Instance GPU User Guide, docs.nvidia.com/datacenter/tesla/
mig-user-guide: "CUDA Device Enumeration" for what a process sees, "Application Considerations" for what slices can't
share, "Device Names" for profiles such as 3g.40gb.
"""

import re

SLICE_NAME = re.compile(r"(?<![a-z0-9])\d+g\.\d+gb|(?<![a-z])mig(?![a-z])", re.IGNORECASE)
"""In the driver's and torch's name of a slice, `NVIDIA A100-SXM4-80GB MIG 3g.40gb`, and in SLURM's, `a100_3g.40gb`."""

ONE_FOR_A_RUN = (
    "a run takes one MIG slice: CUDA shows a process no more than one, and slices have neither peer-to-peer access nor "
    "CUDA IPC between them, which NCCL builds on (NVIDIA's MIG User Guide, Application Considerations)"
)


def is_slice_name(name: str | None) -> bool:
    """Whether a name of a GPU, the driver's, torch's or SLURM's, is that of a slice."""
    return name is not None and SLICE_NAME.search(name) is not None


def is_slice_id(name: str | None) -> bool:
    """Whether a UUID or an entry of CUDA_VISIBLE_DEVICES is a slice's: MIG-<uuid>, by old drivers MIG-GPU-<uuid>/…"""
    return name is not None and name.startswith("MIG-")
