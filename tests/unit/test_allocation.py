# ruff: noqa: N802, N818  (NVML's own names)
import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune_study import allocation, record
from finetune_study import run as run_module
from finetune_study.allocation import NOTHING_MORE, Asked
from finetune_study.config import Hardware, Slurm
from finetune_study.errors import RunFailedError, UnfitNodeError
from finetune_study.paths import Results
from finetune_study.run import Run
from tests.unit import handmade

GIB = 2**30
A100 = "NVIDIA A100-SXM4-80GB"
ON_SLURM = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "1", "SLURMD_NODENAME": "a100-1"}


def a_run(num_gpus: int = 1, nodes: int = 1, **hardware: Any) -> Run:
    entry = {"memory_gib": 80, "max_gpus": 8, **hardware}
    block = {"targets": "tiny", "hardware": "it", "recipes": "full", "sequence_length": 128}
    block |= {"num_gpus": num_gpus, "nodes": nodes}
    study = handmade.study(hardware={"it": entry}, grid=[block])
    return handmade.planned(study)[0].run


def refusal(run: Run, asked: Asked, environment: dict[str, str], node_is_unfit: bool = True) -> str:
    """What is said; of a node whose GPUs are not what was asked for, so that another one may do."""
    with pytest.raises(RunFailedError) as caught:
        allocation.check(run, asked, environment)
    assert isinstance(caught.value, UnfitNodeError) == node_is_unfit
    return str(caught.value)


# --- GPUs, with NVML's words -----------------------------------------------------------------------------------------


class NVMLError(Exception):
    pass


class NVMLErrorNotFound(NVMLError):
    pass


class Driver(ModuleType):
    """Answers as NVML does: this machine has no GPU, and there is no other way to have a wrong one."""

    NVMLError = NVMLError
    NVMLError_NotFound = NVMLErrorNotFound
    NVMLError_InvalidArgument = NVMLErrorNotFound

    def __init__(self, *gpus: dict[str, Any], broken: bool = False) -> None:
        super().__init__("pynvml")
        self.gpus, self.broken = gpus, broken

    def nvmlInit(self) -> None:
        if self.broken:
            raise NVMLError("Driver Not Loaded")

    def nvmlShutdown(self) -> None:
        pass

    def nvmlDeviceGetHandleByIndex(self, index: int) -> dict[str, Any]:
        if index >= len(self.gpus):
            raise NVMLErrorNotFound
        return self.gpus[index]

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> dict[str, Any]:
        for gpu in self.gpus:
            if gpu["uuid"] == uuid:
                return gpu
        raise NVMLErrorNotFound

    def nvmlDeviceGetName(self, gpu: dict[str, Any]) -> str:
        return str(gpu["name"])

    def nvmlDeviceGetUUID(self, gpu: dict[str, Any]) -> str:
        return str(gpu["uuid"])

    def nvmlDeviceGetMemoryInfo(self, gpu: dict[str, Any]) -> Any:
        return SimpleNamespace(total=int(gpu["gib"] * GIB), used=int(gpu["used"] * GIB))

    def nvmlDeviceGetMigMode(self, gpu: dict[str, Any]) -> list[int]:
        raise NVMLError("Not Supported")

    def nvmlDeviceGetComputeRunningProcesses(self, gpu: dict[str, Any]) -> list[Any]:
        return [SimpleNamespace(pid=pid) for pid in gpu["pids"]]


def card(
    number: int, name: str = A100, gib: float = 79.25, pids: tuple[int, ...] = (), used: float = 0.5
) -> dict[str, Any]:
    return {"uuid": f"GPU-{number}", "name": name, "gib": gib, "pids": pids, "used": used}


@pytest.fixture(autouse=True)
def no_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocation, "PATIENCE_SECONDS", 0.0)


def plug_in(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any], **more: Any) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", Driver(*gpus, **more))


ASKED = Asked(nodes=1, memory_gib=80, gpu_model="a100")


def test_the_gpus_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0, pids=(1,)), card(1), card(2))
    said = allocation.check(a_run(2, gpu=A100), ASKED, ON_SLURM | {"CUDA_VISIBLE_DEVICES": "1,2"})
    assert said["by"] == "nvml"
    assert said["asked"] == {
        "gpu": A100, "num_gpus": 2, "nodes": 1, "memory_gib": 80.0, "gpu_model": "a100", "stand_in": False,
    }  # fmt: skip
    assert said["found"]["nodes"] == 1
    assert [gpu["uuid"] for gpu in said["found"]["gpus"]] == ["GPU-1", "GPU-2"]
    assert said["found"]["gpus"][0] == {
        "id": "1", "uuid": "GPU-1", "name": A100, "slice_of": None, "is_divided": False,
        "memory_gib": 79.25, "memory_used_gib": 0.5, "processes": [],
    }  # fmt: skip
    json.dumps(said)


def test_gpus_are_named_by_uuid_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0), card(1))
    said = allocation.check(a_run(gpu=A100), ASKED, {"CUDA_VISIBLE_DEVICES": "GPU-1"})
    assert [gpu["uuid"] for gpu in said["found"]["gpus"]] == ["GPU-1"]


def test_where_nobody_allots_gpus_the_first_ones_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0), card(1, name="another"))
    assert len(allocation.check(a_run(gpu=A100), ASKED, {})["found"]["gpus"]) == 1
    assert "GPU 1 is 'another'" in refusal(a_run(2, gpu=A100), ASKED, {})


@pytest.mark.parametrize(
    ("gpu", "asked", "words"),
    [
        (card(0, name="Tesla V100-SXM2-32GB", gib=32), ASKED, "GPU 0 is 'Tesla V100-SXM2-32GB', not 'NVIDIA A100"),
        (card(0, gib=39.4), ASKED, "GPU 0 has 39.4 GiB, not about 80"),
        (card(0, gib=79.25), Asked(memory_gib=40), "GPU 0 has 79.2 GiB, not about 40"),
        (card(0, pids=(os.getpid(),)), ASKED, f"GPU 0 is in use by process {os.getpid()} ("),
        (card(0, pids=(2**22 + 1,)), ASKED, f"GPU 0 is in use by process {2**22 + 1}"),
        (card(0, used=8.2), ASKED, "8.2 GiB of GPU 0 are in use by processes unseen from here"),
    ],
    ids=["model", "too small", "too large", "in use", "in use by a process that can't be seen", "memory in use"],
)
def test_another_gpu_is_refused_with_asked_and_found(
    monkeypatch: pytest.MonkeyPatch, gpu: dict[str, Any], asked: Asked, words: str
) -> None:
    plug_in(monkeypatch, gpu)
    message = refusal(a_run(gpu=A100), asked, ON_SLURM)
    assert "not what the run asks for, and nothing was measured" in message
    assert words in message
    assert '"num_gpus": 1' in message
    assert gpu["name"] in message
    assert "SLURM job 7 on a100-1" in message


@pytest.mark.parametrize(
    ("named", "found"), [(80, 79.25), (80, 79.65), (80, 80), (24, 22.49), (48, 44.99), (32, 31.75)]
)
def test_memory_is_compared_as_cards_are_named(monkeypatch: pytest.MonkeyPatch, named: float, found: float) -> None:
    plug_in(monkeypatch, card(0, gib=found))
    allocation.check(a_run(), Asked(memory_gib=named), {})


@pytest.mark.parametrize("visible", ["0", "0,GPU-9", "0,5", ""])
def test_too_few_gpus(monkeypatch: pytest.MonkeyPatch, visible: str) -> None:
    plug_in(monkeypatch, card(0))
    count = 1 if visible else 0
    assert f"{count} GPUs instead of 2" in refusal(a_run(2), NOTHING_MORE, {"CUDA_VISIBLE_DEVICES": visible})


def test_several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0))
    assert "2 nodes instead of 1" in refusal(
        a_run(), ASKED, ON_SLURM | {"SLURM_JOB_NUM_NODES": "2"}, node_is_unfit=False
    )


def test_processes_that_are_leaving_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = card(0, pids=(1,))
    plug_in(monkeypatch, gpu)
    monkeypatch.setattr(allocation, "PATIENCE_SECONDS", 60.0)
    monkeypatch.setattr(time, "sleep", lambda _: gpu.update(pids=()))
    assert allocation.check(a_run(), ASKED, {})["found"]["gpus"][0]["processes"] == []


def test_a_driver_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, broken=True)
    message = refusal(a_run(), ASKED, {}, node_is_unfit=False)
    assert "NVML does not answer" in message
    assert "Driver Not Loaded" in message
    assert "nvidia-smi" in message
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert "NVML does not answer" in refusal(a_run(), ASKED, {}, node_is_unfit=False)


def test_a_gpu_that_fell_off_the_bus_is_its_nodes_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0))

    def lost(*_: Any) -> None:
        raise NVMLError("GPU is lost")

    monkeypatch.setattr(Driver, "nvmlDeviceGetMemoryInfo", lost)
    assert "GPU is lost" in refusal(a_run(), ASKED, {})


# --- GPUs that are not there -----------------------------------------------------------------------------------------

DETAILS = """JobId=7 JobName=x
   NumNodes={nodes} NumCPUs=4 NumTasks=1 CPUs/Task=4 ReqB:S:C:T=0:0:*:*
   TRES=cpu=4,mem=100M,node=1,billing=4,gres/gpu=2
   JOB_GRES=gpu:h100:9
     Nodes={names} CPU_IDs=0-3 Mem=100 GRES={gres}
{more}   TresPerNode=gres:gpu:h100:9
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a scontrol into the path that answers in the words of SLURM 22.05."""

    def answers(gres: str, nodes: int = 1, names: str = "a100-1", more: str = "") -> None:
        script = tmp_path / "scontrol"
        text = DETAILS.format(gres=gres, nodes=nodes, names=names, more=more)
        hostnames = "[ \"$*\" = 'show hostnames a100-[1-2]' ] && echo a100-1 && echo a100-2 && exit"
        first = "[ \"$*\" = 'show job --details 7' ]"
        script.write_text(f"#!/bin/sh\n{hostnames}\n{first} && cat <<'END'\n{text}END\n")
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    return answers


STAND_IN = Asked(nodes=1, gpu_model="a100", stand_in=True)
CPU: dict[str, Any] = {"device": "cpu", "memory_gib": 2}


def test_stand_in_is_checked_by_slurms_word(slurm: Any) -> None:
    slurm("gpu:a100:2(IDX:0-1)")
    environment = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1"}
    said = allocation.check(a_run(2, **CPU), STAND_IN, environment)
    assert said["by"] == "slurm (stand-in)"
    assert said["found"] == {"nodes": 1, "gpus": ["a100", "a100"], "visible": ["0", "1"]}
    json.dumps(said)


@pytest.mark.parametrize(
    ("gres", "visible", "nodes", "words"),
    [
        ("gpu:v100:2(IDX:0-1)", "0,1", 1, "the GPUs are v100, not a100"),
        ("gpu:a100:1(IDX:0),gpu:v100:1(IDX:1)", "0,1", 1, "the GPUs are v100, not a100"),
        ("gpu:2(IDX:0-1)", "0,1", 1, "the GPUs are untyped, not a100"),
        ("gpu:a100:1(IDX:0)", "0", 1, "1 GPUs instead of 2"),
        ("", "0,1", 1, "0 GPUs instead of 2"),
        ("gpu:a100:2(IDX:0-1)", "0", 1, "CUDA_VISIBLE_DEVICES names 1 GPUs instead of 2"),
        ("gpu:a100:2(IDX:0-1)", "0,1", 2, "2 nodes instead of 1"),
    ],
)
def test_stand_in_on_the_wrong_type_is_refused(slurm: Any, gres: str, visible: str, nodes: int, words: str) -> None:
    slurm(gres, nodes)
    variables = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": visible}
    message = refusal(a_run(2, **CPU), STAND_IN, variables, node_is_unfit=nodes == 1)
    assert words in message
    assert "slurm (stand-in)" in message


def test_each_node_of_a_run_is_checked_by_its_own_line(slurm: Any) -> None:
    """Nodes that gave alike share a line; SLURM's own tool says which nodes those are."""
    two = a_run(4, nodes=2, **CPU)
    asked = Asked(nodes=2, gpu_model="a100", stand_in=True)
    here = {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0,1", "SLURMD_NODENAME": "a100-2"}
    slurm("gpu:a100:2(IDX:0-1)", 2, names="a100-[1-2]")
    assert allocation.check(two, asked, here)["found"]["gpus"] == ["a100", "a100"]
    slurm("gpu:a100:2(IDX:0-1)", 2, more="     Nodes=a100-2 CPU_IDs=0 GRES=gpu:a100:1(IDX:0)\n")
    assert "1 GPUs instead of 2" in refusal(two, asked, here)
    assert allocation.check(two, asked, here | {"SLURMD_NODENAME": "a100-1"})["found"]["gpus"] == ["a100", "a100"]


def test_stand_in_without_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "this is no SLURM job" in refusal(a_run(**CPU), STAND_IN, {}, node_is_unfit=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    message = refusal(a_run(**CPU), STAND_IN, {"SLURM_JOB_ID": "7"}, node_is_unfit=False)
    assert "SLURM does not say what this job got" in message


def test_a_cpu_has_nothing_to_check_but_its_node() -> None:
    said = allocation.check(a_run(**CPU), NOTHING_MORE, {})
    assert (said["by"], said["found"]) == ("none", {"nodes": None})
    message = refusal(a_run(**CPU), Asked(nodes=1), {"SLURM_JOB_NUM_NODES": "3"}, node_is_unfit=False)
    assert "3 nodes instead of 1" in message


def test_what_is_asked_comes_from_the_hardware_entry() -> None:
    assert Asked.of(Hardware(memory_gib=80, slurm=Slurm(gpu_model="a100"))) == ASKED
    stand_in = Hardware(device="cpu", memory_gib=2, slurm=Slurm(gpu_model="a100", stand_in=True))
    assert Asked.of(stand_in) == STAND_IN


def test_a_run_on_the_wrong_node_fails_and_records_nothing(tmp_path: Path) -> None:
    """As the rule calls it: before model and data are looked for, and before any rank is started."""
    run = a_run(**CPU)
    paths = Results(tmp_path).run(run.run_id)
    record.write_atomically(paths.run_yaml, run_module.dump(run))
    command = [sys.executable, "-m", "finetune_study.launch", str(paths.run_yaml), "--allocation", '{"nodes": 1}']
    variables = {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURMD_NODENAME": "a100-1"}
    answer = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert answer.returncode == 1
    assert "2 nodes instead of 1" in answer.stderr
    assert not paths.record.exists()
    failure = record.read_failure(paths.failure)
    assert 'found by none: "nodes": 2' in failure.cause
    assert '"nodes": 1' in failure.cause
    assert failure.slurm_job_id == "7"


def test_an_unfit_node_has_a_status_of_its_own_and_counts_as_no_attempt(slurm: Any, tmp_path: Path) -> None:
    """Where failures before it do: as the rule calls it, three times."""
    slurm("gpu:v100:1(IDX:0)")
    run = a_run(**CPU)
    paths = Results(tmp_path).run(run.run_id)
    record.write_atomically(paths.run_yaml, run_module.dump(run))
    record.write_failure(paths, handmade.failure(run, attempt=2))
    asked = STAND_IN.model_dump_json()
    command = [sys.executable, "-m", "finetune_study.launch", str(paths.run_yaml), "--allocation", asked]
    for _ in range(3):
        answer = subprocess.run(
            command, env=os.environ | {"SLURM_JOB_ID": "7", "CUDA_VISIBLE_DEVICES": "0"}, capture_output=True, text=True
        )
        assert answer.returncode == 69, answer.stderr
        failure = record.read_failure(paths.failure)
        assert (failure.attempt, failure.unfit_node, failure.interrupted) == (2, True, False)
        assert "the GPUs are v100, not a100" in failure.cause
    assert not paths.record.exists()
    # Any other failure is one, and says nothing of the node.
    plain = subprocess.run([*command[:-1], "{}"], capture_output=True, text=True)
    assert plain.returncode == 1
    assert "is not prepared" in plain.stderr
    assert record.read_failure(paths.failure).attempt == 3
    assert '"unfit_node"' not in paths.failure.read_text()
