import os
from typing import Any

import pytest

from finetune_study import config, plan, variables


def test_what_a_user_planted_does_not_pass() -> None:
    planted = {
        "PATH": "/bin",
        "SLURM_JOB_ID": "7",
        "OMP_NUM_THREADS": "64",
        "LD_PRELOAD": "libtcmalloc.so",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "NCCL_P2P_DISABLE": "1",
        "GLIBC_TUNABLES": "x",
        "HF_TOKEN": "secret",
        "PYTHONPATH": "/elsewhere",
    }
    assert variables.passed_on(planted) == {"PATH": "/bin", "SLURM_JOB_ID": "7"}


def test_hardware_has_the_last_word(raw: dict[str, Any]) -> None:
    raw["hardware"]["cpu"]["environment"] = {"GLOO_SOCKET_IFNAME": "eth7"}
    run = plan.plan(config.parse(raw))[0].run
    chosen = variables.set_for(run, threads=2, environment={})
    assert chosen["GLOO_SOCKET_IFNAME"] == "eth7"
    assert chosen["OMP_NUM_THREADS"] == "2"
    assert chosen["DS_ACCELERATOR"] == "cpu"


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3, 5, 7})


def share(world_size: int, **environment: str) -> tuple[list[list[int]], int]:
    """Cores of every rank, and the threads of each."""
    cores = [variables.cores_of_rank(rank, world_size, environment) for rank in range(world_size)]
    return cores, variables.threads_of_rank(world_size, environment)


@pytest.mark.usefixtures("four_cores")
def test_ranks_share_the_cores_without_overlap() -> None:
    assert share(1) == ([[1, 3, 5, 7]], 4)
    assert share(2) == ([[1, 3], [5, 7]], 2)
    assert share(3) == ([[1], [3], [5]], 1)
    assert share(8) == ([[1, 3, 5, 7]] * 8, 1)


@pytest.mark.usefixtures("four_cores")
def test_slurm_says_how_many_cores_are_the_jobs() -> None:
    # It bound the job to them, or gave more than there are: they are shared out.
    assert share(2, SLURM_CPUS_PER_TASK="4") == ([[1, 3], [5, 7]], 2)
    assert share(2, SLURM_CPUS_PER_TASK="16") == ([[1, 3], [5, 7]], 2)
    # It did not bind the job: nobody knows which are its own.
    assert share(1, SLURM_CPUS_PER_TASK="2") == ([[1, 3, 5, 7]], 2)
    assert share(2, SLURM_CPUS_PER_TASK="2") == ([[1, 3, 5, 7]] * 2, 1)


@pytest.mark.parametrize(
    ("allotted", "num_gpus", "seen"),
    [
        ({}, 1, "0"),
        ({}, 2, "0,1"),
        ({"CUDA_VISIBLE_DEVICES": "5,3,7"}, 2, "5,3"),
        ({"CUDA_VISIBLE_DEVICES": "GPU-a, GPU-b"}, 2, "GPU-a,GPU-b"),
        ({"CUDA_VISIBLE_DEVICES": "4"}, 2, "4"),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1, ""),
    ],
)
def test_run_sees_as_many_gpus_as_it_asks_for(
    raw: dict[str, Any], allotted: dict[str, str], num_gpus: int, seen: str
) -> None:
    raw["hardware"]["cpu"]["device"] = "cuda"
    raw["grid"][0]["num_gpus"] = num_gpus
    run = plan.plan(config.parse(raw))[0].run
    assert variables.set_for(run, threads=1, environment=allotted)["CUDA_VISIBLE_DEVICES"] == seen


def test_ranks_find_each_other_by_variables_alone() -> None:
    """Of the second of two nodes with two ranks each, the second rank."""
    assert variables.for_rank(3, 4, 2, ("10.0.0.7", 29500)) == {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "10.0.0.7",
        "MASTER_PORT": "29500",
    }


def test_gloo_takes_the_network_that_leads_to_the_other_nodes(raw: dict[str, Any]) -> None:
    run = plan.plan(config.parse(raw))[0].run
    assert variables.set_for(run, 1, {})["GLOO_SOCKET_IFNAME"] == "lo"
    assert variables.set_for(run, 1, {}, interface="ib0")["GLOO_SOCKET_IFNAME"] == "ib0"
    raw["hardware"]["cpu"]["environment"] = {"GLOO_SOCKET_IFNAME": "eth7"}
    run = plan.plan(config.parse(raw))[0].run
    assert variables.set_for(run, 1, {}, interface="ib0")["GLOO_SOCKET_IFNAME"] == "eth7"


def test_run_sees_the_gpus_of_its_own_node(raw: dict[str, Any]) -> None:
    raw["hardware"]["cpu"]["device"] = "cuda"
    raw["grid"][0] |= {"num_gpus": 4, "nodes": 2}
    run = plan.plan(config.parse(raw))[0].run
    assert variables.set_for(run, 1, {"CUDA_VISIBLE_DEVICES": "3,4,5"})["CUDA_VISIBLE_DEVICES"] == "3,4"
