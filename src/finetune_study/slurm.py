"""What a run asks of SLURM, from its hardware entry."""

import math
import re
import shlex
from pathlib import Path

from finetune_study import software
from finetune_study.config import Config, Hardware, Protocol, Slurm
from finetune_study.errors import UNFIT_NODE_STATUS, ConfigError
from finetune_study.run import Run

MARGIN_MINUTES = 5.0
"""Between the run's own time limit and SLURM's, so that `launch` ends a run first: it ends the ranks and writes the
record, the executor looks at it, and a busy file system may hold both up. It costs nothing: a job that is done gives
its GPUs back."""


def job_name(name: str) -> str:
    """A name in the letters that every tool of SLURM, and the database of its accounting, has in common."""
    return re.sub(r"[^\w.-]", "_", name, flags=re.ASCII)


def resources(run: Run, hardware: Hardware, protocol: Protocol, kind: str) -> dict[str, str | int | None]:
    """Resources of the run's job in the names of Snakemake's SLURM executors; None is left to the cluster.

    There is no `tasks`: the official executor makes it `--ntasks-per-gpu`, which asks for the CPUs once for every GPU.
    sbatch takes CPUs by task, and there is one on each node; GPUs and memory are those of a node. `mem` is in MB, as
    `mem_mb` is, which may not be None. The last three are this project's executor's.

    Args:
        run: what the job is for.
        hardware: its hardware entry.
        protocol: of the study.
        kind: what `submit_kind` says of the entry.
    """
    asked = hardware.slurm
    memory = asked.mem_gib_per_gpu
    return {
        "job_name": job_name(run.run_id),
        "slurm_partition": asked.partition,
        "slurm_account": asked.account,
        "qos": asked.qos,
        "constraint": asked.constraint,
        "nodes": run.nodes,
        "tasks_per_node": 1 if run.nodes > 1 else None,
        "gres": _gres(run, hardware),
        "cpus_per_task": _cpus(run, hardware),
        "mem": None if memory is None else math.ceil(1024 * memory * run.gpus_per_node),
        "runtime": runtime_minutes(asked, protocol),
        "slurm_extra": asked.extra,
        "max_job_minutes": asked.max_job_minutes,
        "submit_kind": kind,
        "unfit_node_status": UNFIT_NODE_STATUS,
    }


def runtime_minutes(asked: Slurm, protocol: Protocol) -> int:
    """SLURM's time limit of one run."""
    return math.ceil(protocol.time_limit_minutes + asked.startup_minutes + MARGIN_MINUTES)


def submit_kind(name: str, hardware: Hardware) -> str:
    """What runs share that fail alike where something is wrong with the place: hardware entry and software.

    Software that was mended makes another kind, and with it a new beginning.
    """
    return f"{name}-{software.digest(hardware.software)}"


def check(config: Config) -> None:
    """What can be seen to be impossible before anything is submitted.

    Raises:
        ConfigError: when a job that packs runs could not hold one.
    """
    for name in sorted({name for block in config.grid for name in block.hardware}):
        job_minutes(name, config.hardware[name], config.protocol)


def job_minutes(name: str, hardware: Hardware, protocol: Protocol) -> int:
    """The longest job that is asked for: of one run, or of as many as may share one.

    Args:
        name: of the hardware entry.
        hardware: the entry.
        protocol: of the study.

    Raises:
        ConfigError: when a job that packs runs could not hold one.
    """
    asked, needed = hardware.slurm, runtime_minutes(hardware.slurm, protocol)
    if asked.max_job_minutes is None:
        return needed
    if asked.max_job_minutes < needed:
        raise ConfigError(
            f"A job of {asked.max_job_minutes} minutes can't hold a run, which may take {needed}",
            where=f"hardware.{name}.slurm.max_job_minutes",
            given=asked.max_job_minutes,
            allowed=f"at least {needed} (protocol.time_limit_minutes {protocol.time_limit_minutes:g} + "
            f"slurm.startup_minutes {asked.startup_minutes:g} + {MARGIN_MINUTES:g}, rounded up), or null",
            do="raise it to several times that, so that several runs share a job; or lower the time limit of a "
            "run; or leave it out: then every run is a job of its own",
        )
    return asked.max_job_minutes // needed * needed


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
