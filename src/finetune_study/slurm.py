"""What a run asks of SLURM, from its hardware entry."""

import math

from finetune_study.config import Hardware, Protocol
from finetune_study.run import Run

MARGIN_MINUTES = 5.0
"""Between the run's own time limit and SLURM's, so that `launch` ends a run first: it ends the ranks and writes the
record, the executor looks at it, and a busy file system may hold both up. It costs nothing: a job that is done gives
its GPUs back."""


def resources(run: Run, hardware: Hardware, protocol: Protocol) -> dict[str, str | int | None]:
    """Resources of the run's job in the names of Snakemake's SLURM executors; None is left to the cluster.

    There is no `tasks`: the official executor makes it `--ntasks-per-gpu`, which asks for the CPUs once for every GPU.
    `mem` is in MB, as `mem_mb` is, which may not be None.
    """
    asked = hardware.slurm
    minutes = protocol.time_limit_minutes + asked.startup_minutes + MARGIN_MINUTES
    memory = asked.mem_gib_per_gpu
    return {
        "job_name": run.run_id,
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "nodes": 1,
        "gres": _gres(run, hardware),
        "cpus_per_task": asked.cpus_per_gpu * run.num_gpus,
        "mem": None if memory is None else math.ceil(1024 * memory * run.num_gpus),
        "runtime": math.ceil(minutes),
        "slurm_extra": asked.extra,
    }


def _gres(run: Run, hardware: Hardware) -> str | None:
    if hardware.device == "cpu" and not hardware.slurm.stand_in:
        return None
    model = hardware.slurm.gpu_model
    return f"gpu:{model}:{run.num_gpus}" if model else f"gpu:{run.num_gpus}"
