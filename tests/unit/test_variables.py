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


def test_ranks_share_the_cores_without_overlap() -> None:
    import os

    cores = sorted(os.sched_getaffinity(0))
    if len(cores) >= 2:
        first, second = variables.cores_of_rank(0, 2), variables.cores_of_rank(1, 2)
        assert not set(first) & set(second)
        assert len(first) == len(second) == len(cores) // 2
    assert variables.cores_of_rank(3, 10 * len(cores)) == cores


@pytest.mark.parametrize(
    ("allotted", "num_gpus", "seen"),
    [({}, 1, "0"), ({}, 2, "0,1"), ({"CUDA_VISIBLE_DEVICES": "5,3,7"}, 2, "5,3")],
)
def test_run_sees_as_many_gpus_as_it_asks_for(
    raw: dict[str, Any], allotted: dict[str, str], num_gpus: int, seen: str
) -> None:
    raw["hardware"]["cpu"]["device"] = "cuda"
    raw["grid"][0]["num_gpus"] = num_gpus
    run = plan.plan(config.parse(raw))[0].run
    assert variables.set_for(run, threads=1, environment=allotted)["CUDA_VISIBLE_DEVICES"] == seen
