import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_study.config import Hardware
from finetune_study.doctor import describe, scheduler
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.probe import parse_gpus
from finetune_study.doctor.scheduler import Cluster
from finetune_study.errors import StudyError
from tests.unit.test_doctor_scheduler import cluster

A100 = "NVIDIA A100-SXM4-80GB, 81920, 560.35.03, 8.0"

MIXED = """\
n1|gpu|gpu:a100:4(S:0),gpu:v100:4(S:1)|64|512000|(null)|idle
n1|debug|gpu:a100:4(S:0),gpu:v100:4(S:1)|64|512000|(null)|idle
n2|gpu|gpu:a100:8|128|1024000|(null)|idle
n3|mig|gpu:1g.10gb:14|64|512000|(null)|idle
n4|cpu|(null)|64|512000|(null)|idle
"""


def mixed() -> Cluster:
    names = ("gpu", "debug", "mig", "cpu")
    partitions = "".join(f"PartitionName={name} Default=NO State=UP MaxTime=1-00:00:00\n" for name in names)
    return dataclasses.replace(
        cluster(), nodes=scheduler.parse_nodes(MIXED), partitions=scheduler.parse_partitions(partitions)
    )


def described(here: Cluster, entries: list[Entry], said: dict[str, str]) -> tuple[str, dict[str, Any]]:
    gpus = {name: parse_gpus(text) for name, text in said.items()}
    text = describe.describe(here, entries, gpus)
    return text, yaml.safe_load(text)["hardware"]


def test_every_kind_of_gpu_has_an_entry_that_loads() -> None:
    drafts = describe.drafts(mixed(), [])
    assert [one.name for one in drafts] == ["gpu-a100", "gpu-v100", "debug-a100", "debug-v100", "mig-1g.10gb"]
    text, found = described(mixed(), drafts, {"gpu-a100": A100, "debug-a100": A100, "mig-1g.10gb": A100})
    assert list(found) == ["a100-80gb", "debug-a100-80gb"], "two places, two names"
    assert found["a100-80gb"] == {
        "gpu": "NVIDIA A100-SXM4-80GB",
        "memory_gib": 80.0,
        "compute_capability": 8.0,
        "max_gpus": 8,
        "slurm": {
            "partition": "gpu",
            "account": "lab",
            "gpu_model": "a100",
            "cpus_per_gpu": 8,
            "mem_gib_per_gpu": 56.0,
        },
    }
    # A slice's memory is not that of its GPU: `nvidia-smi` does not tell it.
    assert "  # 1g.10gb:\n" in text
    assert "jobs of at most 1-00:00:00" in text
    assert "your accounts: lab, root" in text


def test_a_cluster_of_which_nothing_is_known_in_full_loads_as_well() -> None:
    text, found = described(cluster(), describe.drafts(cluster(), []), {})
    assert found == {}
    assert "  #   memory_gib: '?'" in text


def test_what_the_config_says_stays_and_what_the_driver_knows_better_is_mended() -> None:
    slurm = {"partition": "a100", "gpu_model": "a100", "cpus_per_gpu": 1, "qos": "long"}
    raw = {"gpu": "A100", "memory_gib": 40, "max_gpus": 16, "price_usd_per_gpu_hour": 2.5, "slurm": slurm}
    entry = Entry("mine", Hardware.model_validate(raw))
    assert [one.name for one in describe.drafts(cluster(), [entry])] == ["v100"]
    _, found = described(cluster(), [entry], {"mine": A100})
    assert (found["mine"]["gpu"], found["mine"]["memory_gib"]) == ("NVIDIA A100-SXM4-80GB", 80)
    assert (found["mine"]["max_gpus"], found["mine"]["price_usd_per_gpu_hour"]) == (8, 2.5)
    assert found["mine"]["slurm"] == slurm | {"account": "lab", "mem_gib_per_gpu": 3.0}
    near = Entry("mine", Hardware.model_validate(raw | {"memory_gib": 79}))
    assert described(cluster(), [near], {"mine": A100})[1]["mine"]["memory_gib"] == 79


def test_names_are_used_once() -> None:
    """The config has an entry of that name already, for something else."""
    cpu = Entry("v100", Hardware(device="cpu", memory_gib=3))
    other = Entry("v100-32gb", Hardware.model_validate({"memory_gib": 80, "slurm": {"partition": "a100"}}))
    drafts = describe.drafts(cluster(), [cpu, other])
    assert [one.name for one in drafts] == ["v100-2"]
    _, found = described(cluster(), [cpu, other, *drafts], {"v100-2": "Tesla V100-SXM2-32GB, 32768, 560.35.03, 7.0"})
    assert list(found) == ["v100-32gb", "v100-2-32gb"]


def test_entry_that_gets_any_of_several_types() -> None:
    entry = Entry("any", Hardware.model_validate({"memory_gib": 80, "slurm": {"partition": "gpu"}}))
    _, found = described(mixed(), [entry], {})
    assert "gpu_model" not in found["any"]["slurm"]


def test_entries_without_gpus_are_not_described() -> None:
    entry = Entry("cpu", Hardware(device="cpu", memory_gib=3))
    assert described(cluster(), [entry], {})[1] == {}


def test_a_file_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "x" / "cluster.yaml"
    assert describe.write(path, "one", force=False) == path
    assert describe.write(path, "two", force=False) == path.with_name("cluster-2.yaml")
    assert describe.write(path, "three", force=False) == path.with_name("cluster-3.yaml")
    assert path.read_text() == "one"
    assert describe.write(path, "four", force=True) == path
    assert path.read_text() == "four"
    with pytest.raises(StudyError, match="can't be written"):
        describe.write(Path("/proc/doctor/cluster.yaml"), "one", force=False)
