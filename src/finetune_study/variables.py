"""Environment variables of a rank: a list of what may pass and what is set; nothing else reaches a run.

What keeps caches out of the home folder is also set where models and data are prepared.

So a variable planted in somebody's shell changes no measurement, and the record names all that matter.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from finetune_study.run import Run

PASSED = (
    "PATH", "HOME", "USER", "LOGNAME", "LANG", "LC_ALL", "TZ", "TMPDIR",
    "LD_LIBRARY_PATH", "CUDA_HOME", "CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES",
    "VIRTUAL_ENV", "CONDA_PREFIX", "LOADEDMODULES", "_LMFILES_",
)  # fmt: skip
"""Who and where we are, where software lies, which devices were allotted."""

PASSED_PREFIXES = ("SLURM_", "SLURMD_", "APPTAINER_", "SINGULARITY_")
"""What a scheduler or a container says of the job."""


CACHES = {
    # Whoever keeps to the XDG folders: the hub's client, datasets, accelerate, torch.hub, torch's own kernels, pip.
    "XDG_CACHE_HOME": "",
    # These would write to ~/.triton, ~/.nv, ~/.config/matplotlib, ~/nltk_data, beside a module, or to a shared /tmp.
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TORCHINDUCTOR_CACHE_DIR": "torch_inductor",
    "TRITON_HOME": "triton",
    "TRITON_CACHE_DIR": "triton/cache",
    "CUDA_CACHE_PATH": "cuda",
    "MPLCONFIGDIR": "matplotlib",
    "NUMBA_CACHE_DIR": "numba",
    "NLTK_DATA": "nltk",
}
"""Variables that say where libraries keep caches, and the folder of each below the study's."""


def of_cache(cache: Path) -> dict[str, str]:
    """Sends the caches of all libraries to one folder."""
    return {name: str(cache / folder) for name, folder in CACHES.items()}


def for_preparation(cache: Path, environment: Mapping[str, str]) -> dict[str, str]:
    """What is set where models and data are fetched; a hub cache of the user's own (`HF_HOME`) stays the user's.

    Args:
        cache: the study's folder of caches.
        environment: the user's, which says where the hub's client finds the token of a gated model.
    """
    home = environment.get("HF_HOME") or f"{environment.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    token = environment.get("HF_TOKEN_PATH") or f"{home}/token"
    return of_cache(cache) | {"HF_TOKEN_PATH": token}


def passed_on(environment: Mapping[str, str]) -> dict[str, str]:
    """What a rank inherits."""
    return {k: v for k, v in environment.items() if k in PASSED or k.startswith(PASSED_PREFIXES)}


def set_for(run: Run, threads: int, environment: Mapping[str, str], interface: str = "lo") -> dict[str, str]:
    """What is set for all ranks of a run on one node; the config's `environment` has the last word.

    Args:
        run: decides about the device and the hardware's own variables.
        threads: CPU threads of each rank.
        environment: the supervisor's own, which says what devices it was allotted.
        interface: of the network over which the ranks speak with each other.
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
    # NCCL finds its networks by itself; gloo would ask for the node's name, which may stand for its loopback.
    cpu_only = {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": interface}
    return common | (cpu_only if on_cpu else _gpus_of(run, environment)) | run.hardware.environment


def _gpus_of(run: Run, environment: Mapping[str, str]) -> dict[str, str]:
    visible = ",".join(visible_gpus(run.gpus_per_node, environment))
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": visible}


def allotted_gpus(environment: Mapping[str, str]) -> list[str] | None:
    """Numbers or UUIDs of the GPUs that this process was given; None where nobody says."""
    given = environment.get("CUDA_VISIBLE_DEVICES")
    return None if given is None else [name.strip() for name in given.split(",") if name.strip()]


def visible_gpus(num_gpus: int, environment: Mapping[str, str]) -> list[str]:
    """As many of the node's allotted GPUs as a run asks for: transformers spreads one process over all that it sees."""
    allotted = allotted_gpus(environment)
    return [str(number) for number in range(num_gpus)] if allotted is None else allotted[:num_gpus]


def for_rank(rank: int, world_size: int, ranks_on_node: int, master: tuple[str, int]) -> dict[str, str]:
    """What torch.distributed asks for, and so DeepSpeed; nothing is left for it to find out by MPI.

    Args:
        rank: number of the rank in the run.
        world_size: ranks of the run.
        ranks_on_node: as many on each node.
        master: address and port of the first rank.
    """
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank % ranks_on_node),
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(ranks_on_node),
        "MASTER_ADDR": master[0],
        "MASTER_PORT": str(master[1]),
    }


def _cores(environment: Mapping[str, str]) -> tuple[list[int], int]:
    """Cores that this process may use, and how many of them are the run's: SLURM need not bind a job to its own."""
    cores = sorted(os.sched_getaffinity(0))
    return cores, min(len(cores), int(environment.get("SLURM_CPUS_PER_TASK") or len(cores)))


def threads_of_rank(world_size: int, environment: Mapping[str, str]) -> int:
    """How many CPU threads each rank has.

    Args:
        world_size: how many ranks share this node's cores.
        environment: the supervisor's own, in which SLURM says how many CPUs it gave.
    """
    _, given = _cores(environment)
    return max(1, given // world_size)


def cores_of_rank(rank: int, world_size: int, environment: Mapping[str, str]) -> list[int]:
    """The rank's share of the cores that this process may use; all of them where there are fewer cores than ranks.

    All of them, too, where SLURM gave fewer CPUs without saying which: another job may have been given the first ones.
    """
    cores, given = _cores(environment)
    share = given // world_size
    return cores[rank * share : (rank + 1) * share] if share and given == len(cores) else cores
