"""`finetune-study status` beside a real SLURM."""

import subprocess
from collections.abc import Iterator

import pytest

from finetune_study import status
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def held(cluster: Cluster) -> Iterator[str]:
    """A job that waits for its owner to let it go."""
    command = ["sbatch", "--parsable", "--hold", "--output=/dev/null", "--wrap", "true"]
    job = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield job
    subprocess.run(["scancel", job], check=True)


def test_a_held_job_is_said_to_never_clear_by_waiting(held: str) -> None:
    found = status.squeue([held, "not a number"])
    assert found is not None
    seen = found[held]
    assert (seen.state, seen.reason) == ("PENDING", "JobHeldUser")
    advice = status.advice(seen.reason)
    assert advice is not None
    assert "scontrol release" in advice


@pytest.fixture
def held_array(cluster: Cluster) -> Iterator[str]:
    command = ["sbatch", "--parsable", "--hold", "--array=0-1", "--output=/dev/null", "--wrap", "true"]
    job = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    yield job
    subprocess.run(["scancel", job], check=True)


def test_each_task_of_an_array_is_seen(held_array: str) -> None:
    seen = status.squeue([f"{held_array}_0", f"{held_array}_1"])
    assert seen is not None
    assert {*seen} == {f"{held_array}_0", f"{held_array}_1"}
    assert {one.state for one in seen.values()} == {"PENDING"}
