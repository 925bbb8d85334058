"""Checks on a node, before anything is measured, that it offers what the run asks for.

A GPU is asked for its name, memory and processes through the driver (NVML); a slice of one (MIG) has its own. An entry
that is declared a stand-in has no GPU: there SLURM's word for type and number is checked, and the record says so.
"""

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import PositiveFloat, PositiveInt

from finetune_study import mig, variables
from finetune_study.config import Hardware
from finetune_study.errors import RunFailedError, UnfitNodeError
from finetune_study.run import Run
from finetune_study.section import Section

MEMORY_TOLERANCE = 0.1
"""Of the memory that the config names, either way. Cards are named in round numbers: error correction takes a sixteenth
of GDDR memory (an A10G's 24 become 22.5 GiB), the driver some more (79.6 GiB of an 80 GB H100). The next smaller card
of any kind has three quarters at most."""

IDLE_MEMORY_GIB = 2.0
"""Memory that may be in use on a card that nobody uses: the driver's own (0.3 to 0.6 GiB on A100, H100), a desktop's.
Processes of other containers and users may be hidden, and some drivers tell none; what they hold is not."""

PATIENCE_SECONDS = 15.0
"""Processes of a job or a try that just ended may still be leaving the card."""

SCONTROL_SECONDS = 60.0
"""SLURM's controller may be busy; its own tools give up after some 10 s."""

GIB = 2**30

SLURM_GPUS = re.compile(r"gpu:(?:([^:,()]+):)?(\d+)\(")
"""In a job's line `Nodes=… GRES=gpu:a100:2(IDX:0-1)`: type and number on one node."""
SLURM_NODES = re.compile(r"\bNumNodes=(\d+)")


class Asked(Section):
    """What a node must offer beside what run.yaml says; null is not checked."""

    nodes: PositiveInt | None = None
    """Nodes of the job."""
    memory_gib: PositiveFloat | None = None
    """Memory of each GPU."""
    gpu_model: str | None = None
    """Type of the GPUs in SLURM's words; checked for a stand-in."""
    stand_in: bool = False
    """There are no GPUs: SLURM's word for their type and number is checked."""

    @classmethod
    def of(cls, hardware: Hardware, nodes: int = 1) -> Self:
        """What a run on so many nodes of this hardware entry needs."""
        return cls(
            nodes=nodes,
            memory_gib=hardware.memory_gib if hardware.device == "cuda" else None,
            gpu_model=hardware.slurm.gpu_model,
            stand_in=hardware.slurm.stand_in,
        )


NOTHING_MORE = Asked()


def check(run: Run, asked: Asked, environment: Mapping[str, str]) -> dict[str, Any]:
    """What was asked, what was found, and by whom, for the record.

    Args:
        run: what is to be measured.
        asked: what its run.yaml does not say.
        environment: the supervisor's variables: devices that were allotted, SLURM's job.

    Raises:
        UnfitNodeError: when its GPUs are not what was asked for; another node's may be.
        RunFailedError: when nobody can tell, or the number of nodes is wrong, which no other node mends.
    """
    wanted = {"gpu": run.hardware.gpu, "num_gpus": run.num_gpus, **asked.model_dump(mode="json")}
    nodes = environment.get("SLURM_JOB_NUM_NODES")
    found: dict[str, Any] = {"nodes": int(nodes) if nodes else None}
    if asked.stand_in:
        by = "slurm (stand-in)"
        found |= _by_slurm(environment)
        wrong = _wrong_stand_in(run, asked, found)
    elif run.hardware.device == "cuda":
        by = "nvml"
        found["gpus"] = _by_driver(variables.visible_gpus(run.gpus_per_node, environment))
        wrong = _wrong_gpus(run, asked, found["gpus"])
    else:
        by, wrong = "none", []
    kind = UnfitNodeError if wrong else RunFailedError
    if asked.nodes is not None and found["nodes"] not in (None, asked.nodes):
        wrong.insert(0, f"{found['nodes']} nodes instead of {asked.nodes}")
    if wrong:
        raise kind(
            f"This is not what the run asks for, and nothing was measured: {'; '.join(wrong)}",
            where=_where(environment),
            given=f"found by {by}: {_words(found)}",
            allowed=f"as asked: {_words(wanted)}",
            do=f"mend hardware.{run.hardware.name} in the config (gpu, memory_gib, slurm), or run it where that is",
        )
    return {"asked": wanted, "found": found, "by": by}


def _words(facts: Mapping[str, Any]) -> str:
    return json.dumps({name: value for name, value in facts.items() if value is not None})[1:-1]


def _where(environment: Mapping[str, str]) -> str:
    job = environment.get("SLURM_JOB_ID")
    return os.uname().nodename + (f", SLURM job {job} on {environment.get('SLURMD_NODENAME', '?')}" if job else "")


# --- real GPUs -------------------------------------------------------------------------------------------------------


def _wrong_gpus(run: Run, asked: Asked, gpus: list[dict[str, Any]]) -> list[str]:
    wrong = []
    if len(gpus) < run.gpus_per_node:
        wrong.append(f"{len(gpus)} GPUs instead of {run.gpus_per_node}")
    if run.num_gpus > 1 and any(gpu["slice_of"] for gpu in gpus):
        wrong.append(f"{run.num_gpus} GPUs asked for; {mig.ONE_FOR_A_RUN}")
    for gpu in gpus:
        if run.hardware.gpu is not None and not _is_called(gpu, run.hardware.gpu):
            wrong.append(f"GPU {gpu['id']} is {gpu['name']!r}, not {run.hardware.gpu!r}")
        if gpu["is_divided"]:
            wrong.append(
                f"GPU {gpu['id']} is divided into slices (MIG), and CUDA would take the first of them; "
                "CUDA_VISIBLE_DEVICES must name one, as `nvidia-smi -L` prints it"
            )
        off = abs(gpu["memory_gib"] / asked.memory_gib - 1) if asked.memory_gib else 0.0
        if off > MEMORY_TOLERANCE:
            wrong.append(f"GPU {gpu['id']} has {gpu['memory_gib']:.1f} GiB, not about {asked.memory_gib:g}")
        if _is_in_use(gpu) and not gpu["processes"]:
            wrong.append(
                f"{gpu['memory_used_gib']:.1f} GiB of GPU {gpu['id']} are in use by processes unseen from here"
            )
        if gpu["processes"]:
            others = ", ".join(map(_describe, gpu["processes"]))
            wrong.append(f"GPU {gpu['id']} is in use by {others}")
    return wrong


def _is_called(gpu: Mapping[str, Any], name: str) -> bool:
    if gpu["slice_of"] == gpu["name"]:  # an older driver; the slice's memory tells it from others
        return mig.is_slice_name(name) and name.partition(" MIG ")[0] == gpu["name"]
    return bool(gpu["name"] == name)


def _is_in_use(gpu: Mapping[str, Any]) -> bool:
    return bool(gpu["processes"]) or gpu["memory_used_gib"] > IDLE_MEMORY_GIB


def _describe(pid: int) -> str:
    try:
        return f"process {pid} ({Path(f'/proc/{pid}/comm').read_text(encoding='utf-8').strip()})"
    except OSError:
        return f"process {pid}"


def _by_driver(visible: list[str]) -> list[dict[str, Any]]:
    """What NVML says of each GPU that the ranks will see; one that it does not know is left out.

    No rank has been started: every process on a card is somebody else's.
    """
    try:
        import pynvml as nvml

        nvml.nvmlInit()
    except Exception as error:  # no package, no library, no driver, a driver that does not answer
        raise RunFailedError(
            "The GPUs can't be checked: NVML does not answer",
            given=f"{type(error).__name__}: {error}",
            do="`nvidia-smi` must work on the node, and `nvidia-ml-py` be installed in the entry's software; without a "
            "GPU set `device: cpu`",
        ) from None
    try:
        until = time.monotonic() + PATIENCE_SECONDS
        while True:
            gpus = [found for name in visible if (found := _look_at(nvml, name)) is not None]
            if time.monotonic() >= until or not any(map(_is_in_use, gpus)):
                return gpus
            time.sleep(1)
    except nvml.NVMLError as error:
        raise UnfitNodeError(
            "The GPUs can't be checked: NVML gives an error",
            given=error,
            do="look at `nvidia-smi` on the node: a GPU that fell off the bus needs its administrator",
        ) from None
    finally:
        nvml.nvmlShutdown()


def _look_at(nvml: Any, name: str) -> dict[str, Any] | None:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(int(name)) if name.isdigit() else nvml.nvmlDeviceGetHandleByUUID(name)
    except (nvml.NVMLError_NotFound, nvml.NVMLError_InvalidArgument):
        return None
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    try:
        processes = [process.pid for process in nvml.nvmlDeviceGetComputeRunningProcesses(handle)]
    except nvml.NVMLError:
        processes = None  # a virtual GPU, or one that is hidden from us
    uuid = nvml.nvmlDeviceGetUUID(handle)
    is_slice = mig.is_slice_id(uuid)
    card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if is_slice else handle
    return {
        "id": name,
        "uuid": uuid,
        "name": nvml.nvmlDeviceGetName(handle),
        "slice_of": nvml.nvmlDeviceGetName(card) if is_slice else None,
        "is_divided": not is_slice and _is_divided(nvml, handle),
        "memory_gib": round(memory.total / GIB, 2),
        "memory_used_gib": round(memory.used / GIB, 2),
        "processes": processes,
    }


def _is_divided(nvml: Any, handle: Any) -> bool:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
    except nvml.NVMLError:
        return False  # a GPU or a driver that knows no slices
    return bool(current == nvml.NVML_DEVICE_MIG_ENABLE)


# --- GPUs that are not there -----------------------------------------------------------------------------------------


def _wrong_stand_in(run: Run, asked: Asked, found: Mapping[str, Any]) -> list[str]:
    wrong = []
    if len(found["gpus"]) < run.gpus_per_node:
        wrong.append(f"{len(found['gpus'])} GPUs instead of {run.gpus_per_node}")
    if len(found["visible"]) < run.gpus_per_node:
        wrong.append(f"CUDA_VISIBLE_DEVICES names {len(found['visible'])} GPUs instead of {run.gpus_per_node}")
    wanted = asked.gpu_model or run.hardware.gpu
    others = sorted({model for model in found["gpus"] if model != wanted})
    if others:
        wrong.append(f"the GPUs are {', '.join(others)}, not {wanted}")
    return wrong


def _by_slurm(environment: Mapping[str, str]) -> dict[str, Any]:
    """Types of the GPUs that SLURM gave to this job here, and their numbers as it put them into the environment."""
    job = environment.get("SLURM_JOB_ID")
    if job is None:
        raise RunFailedError(
            "A stand-in is checked by SLURM's word, and this is no SLURM job",
            where="slurm.stand_in",
            do="run it with `snakemake --profile slurm`, or take `stand_in` and `gpu_model` out of its hardware entry",
        )
    said = _show_job(job)
    # Of all lines that name types and numbers, those that say what the job got on its nodes.
    got = [line for line in said.splitlines() if line.lstrip().startswith("Nodes=")]
    own = next((line for line in got if _names_node(line, environment.get("SLURMD_NODENAME"))), "\n".join(got))
    gpus = [model or "untyped" for model, number in SLURM_GPUS.findall(own) for _ in range(int(number))]
    nodes = SLURM_NODES.search(said)
    return {
        "nodes": int(nodes[1]) if nodes else None,
        "gpus": gpus,
        "visible": variables.allotted_gpus(environment) or [],
    }


def _names_node(line: str, node: str | None) -> bool:
    """Whether a line `Nodes=a100-[1-2] …`, of nodes that gave alike, is about this one."""
    nodes = line.split()[0].removeprefix("Nodes=")
    return node is not None and (
        node == nodes or ("[" in nodes and node in _scontrol("show", "hostnames", nodes).split())
    )


def _show_job(job: str) -> str:
    return _scontrol("show", "job", "--details", job)


def _scontrol(*words: str) -> str:
    command = ["scontrol", *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=SCONTROL_SECONDS, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailedError(
            "The stand-in can't be checked: SLURM does not say what this job got",
            where=" ".join(command),
            given=getattr(error, "stderr", None) or error,
            do="scontrol must work on the node, inside an image as well",
        ) from None
