"""Environment variables of a rank: a list of what may pass and what is set; nothing else reaches a run.

So a variable planted in somebody's shell changes no measurement, and the record names all that matter.
"""

import os
from collections.abc import Mapping

from finetune_study.run import Run

PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "VIRTUAL_ENV", "CONDA_PREFIX", "LOADEDMODULES", "_LMFILES_",
)  # fmt: skip
"""Who and where we are, where software lies, which devices were allotted."""

PASSED_PREFIXES = ("SLURM_", "SLURMD_", "APPTAINER_", "SINGULARITY_")
"""What a scheduler or a container says of the job."""


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank inherits."""
    return {k: v for k, v in environment.items() if k in PASSED or k.startswith(PASSED_PREFIXES)}


def set_for(run: Run, threads: int, environment: Mapping[str, str]) -> dict[str, str]:
    """What is set for all ranks of a run; the config's `environment` has the last word.

    Args:
        run: decides about the device and the hardware's own variables.
        threads: CPU threads of each rank.
        environment: the supervisor's own, which says what devices it was allotted.
    """
    on_cpu = run.hardware.device == "cpu"
    common = {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
        # Everything was fetched by prepare; a look at the hub would only cost time.
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONUNBUFFERED": "1",
        # Libraries tell their authors what will change; each call would say so.
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "PYTHONHASHSEED": "0",
        # Arrow's own pool reserves 1 GiB of data memory at once.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        "DS_ACCELERATOR": "cpu" if on_cpu else "cuda",
    }
    device = CPU_ONLY if on_cpu else _gpus_of(run, environment)
    return common | device | run.hardware.environment


CPU_ONLY = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}


def _gpus_of(run: Run, environment: Mapping[str, str]) -> dict[str, str]:
    """As many of the allotted GPUs as the run asks for: transformers spreads one process over all that it sees."""
    allotted = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
    chosen = allotted[: run.num_gpus] if allotted != [""] else [str(number) for number in range(run.num_gpus)]
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": ",".join(chosen)}


def for_rank(rank: int, world_size: int, port: int) -> dict[str, str]:
    """What torch.distributed asks for."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def cores_of_rank(rank: int, world_size: int) -> list[int]:
    """The rank's share of the cores that this process may use; all of them where there are fewer cores than ranks."""
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // world_size
    return cores[rank * share : (rank + 1) * share] if share else cores
