"""What a run asks of SLURM, from its hardware entry."""

import math
import shlex
from pathlib import Path

from finetune_study.config import Hardware, Protocol
from finetune_study.run import Run

MARGIN_MINUTES = 5.0
"""Between the run's own time limit and SLURM's, so that `launch` ends a run first: it ends the ranks and writes the
record, the executor looks at it, and a busy file system may hold both up. It costs nothing: a job that is done gives
its GPUs back."""


def resources(run: Run, hardware: Hardware, protocol: Protocol) -> dict[str, str | int | None]:
    """Resources of the run's job in the names of Snakemake's SLURM executors; None is left to the cluster.

    There is no `tasks`: the official executor makes it `--ntasks-per-gpu`, which asks for the CPUs once for every GPU.
    sbatch takes CPUs by task, and there is one on each node; GPUs and memory are those of a node. `mem` is in MB, as
    `mem_mb` is, which may not be None.
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
        "nodes": run.nodes,
        "tasks_per_node": 1 if run.nodes > 1 else None,
        "gres": _gres(run, hardware),
        "cpus_per_task": _cpus(run, hardware),
        "mem": None if memory is None else math.ceil(1024 * memory * run.gpus_per_node),
        "runtime": math.ceil(minutes),
        "slurm_extra": asked.extra,
    }


def _gres(run: Run, hardware: Hardware) -> str | None:
    if hardware.device == "cpu" and not hardware.slurm.stand_in:
        return None
    model = hardware.slurm.gpu_model
    return f"gpu:{model}:{run.gpus_per_node}" if model else f"gpu:{run.gpus_per_node}"


def _cpus(run: Run, hardware: Hardware) -> int:
    return hardware.slurm.cpus_per_gpu * run.gpus_per_node


def srun(run: Run) -> list[str]:
    """What stands before the command of a launcher, so that every node of the run has one."""
    return ["srun", f"--nodes={run.nodes}", f"--ntasks={run.nodes}", "--ntasks-per-node=1"] if run.nodes > 1 else []


ON_NODE = Path(__file__).with_name("on_node.sh")


def on_each_node(run: Run, hardware: Hardware, python: str) -> str:
    """The part of a shell command that calls Python on each node of the run's job; arguments follow it.

    Outside of a SLURM job it is called here alone, and says itself that this will not do.

    Args:
        run: what the job does.
        hardware: its entry.
        python: what calls Python on one node.
    """
    if run.nodes == 1:
        return python
    words = [
        *srun(run),
        f"--cpus-per-task={_cpus(run, hardware)}",  # since SLURM 22.05 srun does not take it over from sbatch
        "--overlap",  # the official executor has a step of its own around the command
        "--export=ALL",  # where sbatch is told to pass no variables, srun would not either
        "--mpi=none",
        "--input=none",
        # The first node decides when the others end, not a default of the site.
        "--kill-on-bad-exit=0",
        "--wait=0",
    ]
    return f"${{SLURM_JOB_ID:+{' '.join(words)}}} bash {shlex.quote(str(ON_NODE))} {shlex.quote(python)}"
