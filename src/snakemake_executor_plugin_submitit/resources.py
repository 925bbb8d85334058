"""From a Snakemake job's resources to options of sbatch; the names are those of snakemake-executor-plugin-slurm."""

import itertools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from snakemake_interface_common.exceptions import WorkflowError

NAME = re.compile(r"[\w.-]+")
GRES = re.compile(r"\w+(:[\w.-]+)?(:\d+[TGM]?)?(,\w+(:[\w.-]+)?(:\d+[TGM]?)?)*")

OURS = {
    "job-name": "job_name", "J": "job_name", "output": None, "o": None, "error": None, "e": None, "parsable": None,
    "wrap": None, "array": None, "a": None, "chdir": None, "D": None, "test-only": None, "wait": None, "W": None,
    "account": "slurm_account", "A": "slurm_account", "partition": "slurm_partition", "p": "slurm_partition",
    "time": "runtime", "t": "runtime", "mem": "mem_mb", "mem-per-cpu": "mem_mb_per_cpu", "nodes": "nodes", "N": "nodes",
    "ntasks": "tasks", "n": "tasks", "ntasks-per-node": "tasks_per_node", "ntasks-per-gpu": "tasks_per_gpu",
    "cpus-per-task": "cpus_per_task", "c": "cpus_per_task", "cpus-per-gpu": "cpus_per_gpu", "gres": "gres",
    "gpus": "gpu", "G": "gpu", "constraint": "constraint", "C": "constraint", "qos": "qos", "q": "qos",
    "clusters": "clusters", "M": "clusters",
}  # fmt: skip
"""Options of sbatch that `slurm_extra` may not hold, and the resource that sets each (None: the executor itself)."""


def sbatch_options(resources: Mapping[str, Any], threads: int) -> dict[str, Any]:
    """Options of sbatch by their long names, without the dashes.

    Args:
        resources: the job's; unset ones are absent or None. `runtime` is in minutes, `mem_mb` in SLURM's MB.
        threads: the job's; CPUs of its task unless `cpus_per_task` or `cpus_per_gpu` says otherwise.

    Raises:
        WorkflowError: for a value that SLURM can't have meant, with what is allowed.
    """
    options: dict[str, Any] = {}

    def take(resource: str, option: str) -> None:
        if resources.get(resource) is not None:
            options[option] = resources[resource]

    take("slurm_partition", "partition")
    take("slurm_account", "account")
    take("qos", "qos")
    take("constraint", "constraint")
    for resource in ("slurm_cluster", "clusters", "cluster"):
        take(resource, "clusters")
    if isinstance(runtime := resources.get("runtime"), int | float) and runtime < 1:
        raise WorkflowError(f"The resource `runtime` is {runtime}; it must be at least 1 (minutes).")
    take("runtime", "time")
    options |= _memory(resources)
    options |= _gpus(resources)
    options |= _tasks(resources, wants_gpu="gpus" in options or "gpu" in str(options.get("gres", "")))
    options |= _cpus(resources, threads, wants_gpu="gpus" in options or "gpu" in str(options.get("gres", "")))
    return options


def extra_options(resources: Mapping[str, Any]) -> list[str]:
    """Words of `slurm_extra`, for the command line of sbatch.

    Raises:
        WorkflowError: for an option that has a resource of its own, or that is the executor's.
    """
    text = str(resources.get("slurm_extra") or "")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise WorkflowError(f"The resource `slurm_extra` is {text!r}: {error} (a shell's quotes, in pairs).") from None
    for word in words:
        name = re.match(r"--([\w-]+)|-(\w)", word)
        option = (name[1] or name[2]) if name else None
        # sbatch takes the beginning of an option for the whole.
        meant = next((our for our in OURS if our == option or (name and name[1] and our.startswith(name[1]))), None)
        if meant is not None:
            resource = OURS[meant]
            raise WorkflowError(
                f"slurm_extra can't set {word!r}: "
                + (f"use the resource `{resource}` instead." if resource else "the executor sets it itself.")
            )
    return words


def count_gpus(options: Mapping[str, Any], extra: Sequence[str]) -> int:
    """GPUs that a job asks for on all its nodes together.

    Args:
        options: of sbatch, as `sbatch_options` gives them.
        extra: more words, of which `--gpus-per-node` and `--gpus-per-task` are understood, also where cut short.
    """
    nodes, tasks = int(options.get("nodes") or 1), int(options.get("ntasks") or 1)
    if "ntasks-per-node" in options:
        tasks = nodes * int(options["ntasks-per-node"])
    per_node = [word[3:] for word in str(options.get("gres", "")).split(",") if re.match(r"gpu\b", word)]
    count = nodes * sum(map(_number, per_node)) + (_number(str(options["gpus"])) if "gpus" in options else 0)
    for name, value in _long_options(extra):
        for option, times in (("gpus-per-node", nodes), ("gpus-per-task", tasks)):
            if option.startswith(name) and len(name) > len("gpus-per-"):
                count += times * _number(value)
    return count


UNCOUNTABLE = {
    "exclusive": "it takes all GPUs of a node",
    "gpus-per-socket": "how many sockets a job gets is known when it runs",
    "tres-per-task": "it may hold GPUs",
}
"""Options of sbatch with which a job may get more GPUs than `count_gpus` says."""


def check_countable(extra: Sequence[str]) -> None:
    """For where a budget of GPU-hours is kept to.

    Raises:
        WorkflowError: for options with which GPUs can't be counted.
    """
    for name, _ in _long_options(extra):
        for option, why in UNCOUNTABLE.items():
            if len(name) > 2 and option.startswith(name):
                raise WorkflowError(
                    f"slurm_extra holds --{name}, and max-gpu-hours is to be kept to: {why}. Ask for GPUs by `gres`, "
                    "or call without max-gpu-hours."
                )


def _number(words: str) -> int:
    """Of `a100:4`, `4`, or a bare type."""
    last = words.rpartition(":")[2]
    return int(last) if last.isdigit() else 1


def _long_options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    for word, following in itertools.zip_longest(words, words[1:], fillvalue=""):
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            yield name, value if equals else following


def whole(resources: Mapping[str, Any], name: str, minimum: int = 1) -> int | None:
    """A resource that is a whole number; None where it is not set.

    Raises:
        WorkflowError: for anything else.
    """
    value = resources.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise WorkflowError(f"The resource `{name}` is {value!r}; it must be a whole number of at least {minimum}.")
    return value


def _memory(resources: Mapping[str, Any]) -> dict[str, str]:
    if per_cpu := whole(resources, "mem_mb_per_cpu"):
        return {"mem-per-cpu": f"{per_cpu}M"}
    if (total := whole(resources, "mem_mb", minimum=0)) is not None:
        return {"mem": f"{total}M"}
    return {}


def _gpus(resources: Mapping[str, Any]) -> dict[str, str]:
    options: dict[str, str] = {}
    gres, model = resources.get("gres"), resources.get("gpu_model")
    if gres:
        if not GRES.fullmatch(str(gres)):
            raise WorkflowError(
                f"The resource `gres` is {gres!r}; it must look like `gpu`, `gpu:2` or `gpu:a100:2` "
                "(a number may end in T, G or M)."
            )
        options["gres"] = str(gres)
    if model and not NAME.fullmatch(str(model)):
        raise WorkflowError(f"The resource `gpu_model` is {model!r}; it must be a name as in `sinfo -o %G`, as `a100`.")
    count = whole(resources, "gpu", minimum=0)
    if model:
        options["gpus"] = f"{model}:{1 if count is None else count}"
    elif count:
        options["gpus"] = str(count)
    return options


def _tasks(resources: Mapping[str, Any], wants_gpu: bool) -> dict[str, int]:
    options: dict[str, int] = {}
    nodes = whole(resources, "nodes")
    tasks, per_node = whole(resources, "tasks"), whole(resources, "tasks_per_node")
    if tasks and per_node:
        raise WorkflowError("Give either the resource `tasks` or `tasks_per_node`, not both.")
    if resources.get("mpi") and not (tasks or per_node):
        raise WorkflowError("The resource `mpi` needs `tasks` or `tasks_per_node`.")
    if per_gpu := whole(resources, "tasks_per_gpu"):
        if wants_gpu:
            options["ntasks-per-gpu"] = per_gpu
    elif per_node:
        options["ntasks-per-node"] = per_node
    else:
        options["ntasks"] = tasks or 1
    if nodes is None and not per_node and options.get("ntasks") == 1:
        # One process can't use a second node, but SLURM hands one out for 12 GPUs where a node has 8.
        nodes = 1
    if nodes is not None:
        options["nodes"] = nodes
    return options


def _cpus(resources: Mapping[str, Any], threads: int, wants_gpu: bool) -> dict[str, int]:
    for resource, option, applies in (
        ("cpus_per_task", "cpus-per-task", True),
        ("cpus_per_gpu", "cpus-per-gpu", wants_gpu),
    ):
        count = resources.get(resource)
        if count is not None and applies:
            if isinstance(count, bool) or not isinstance(count, int):
                raise WorkflowError(f"The resource `{resource}` is {count!r}; it must be a whole number.")
            # Below zero: say nothing of CPUs, as partitions want it that give them by GPU.
            return {} if count < 0 else {option: max(1, count)}
    return {"cpus-per-task": max(1, threads)}
