from typing import Any

import pytest

from finetune_study import slurm
from finetune_study.config import Hardware, Protocol
from tests.unit import handmade


def resources(num_gpus: int = 1, minutes: float = 30.0, **hardware: Any) -> dict[str, Any]:
    """What a run on this hardware entry asks for; what it leaves to the cluster is left out."""
    entry = {"memory_gib": 80, "max_gpus": 8, **hardware}
    block = {"targets": "tiny", "hardware": "it", "recipes": "full", "sequence_length": 128, "num_gpus": num_gpus}
    run = handmade.planned(handmade.study(hardware={"it": entry}, grid=[block]))[0].run
    asked = slurm.resources(run, Hardware.model_validate(entry), Protocol(time_limit_minutes=minutes))
    assert asked.pop("job_name") == run.run_id
    return {name: value for name, value in asked.items() if value is not None}


def test_an_entry_that_says_nothing_leaves_all_to_the_cluster() -> None:
    assert resources() == {"nodes": 1, "gres": "gpu:1", "cpus_per_task": 8, "runtime": 45}


def test_all_that_can_be_asked_for() -> None:
    asked = {
        "partition": "a100",
        "account": "lab",
        "qos": "long",
        "constraint": "nvlink&80gb",
        "gpu_model": "a100",
        "cpus_per_gpu": 6,
        "mem_gib_per_gpu": 62.5,
        "startup_minutes": 1,
        "extra": "--reservation='gpu week'",
    }
    assert resources(4, slurm=asked) == {
        "slurm_partition": "a100",
        "slurm_account": "lab",
        "qos": "long",
        "constraint": "nvlink&80gb",
        "nodes": 1,
        "gres": "gpu:a100:4",
        "cpus_per_task": 24,
        "mem": 256_000,
        "runtime": 36,
        "slurm_extra": "--reservation='gpu week'",
    }


def test_a_cpu_asks_for_no_gpu_but_a_stand_in_does() -> None:
    assert "gres" not in resources(device="cpu")
    assert resources(2, device="cpu", slurm={"gpu_model": "v100", "stand_in": True})["gres"] == "gpu:v100:2"


@pytest.mark.parametrize(("limit", "startup", "minutes"), [(5, 0, 10), (0.1, 0.2, 6), (4.5, 0.5, 10), (4.5, 0.6, 11)])
def test_slurms_limit_comes_after_the_runs_own(limit: float, startup: float, minutes: int) -> None:
    assert resources(minutes=limit, slurm={"startup_minutes": startup})["runtime"] == minutes
    assert minutes >= limit + startup + slurm.MARGIN_MINUTES
