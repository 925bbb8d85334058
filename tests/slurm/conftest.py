"""A real SLURM cluster for all tests that need one, and places to run Snakemake in."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster
from tests.slurm.place import Place
from tests.workflow.workplace import Workplace


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The cluster of tests/slurm/cluster.sh; it stays up where it was up before."""
    refusal = subprocess.run([SCRIPT, "why-not"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if refusal.returncode != 0:
        pytest.skip(refusal.stdout.strip())
    was_up = subprocess.run([SCRIPT, "status"]).returncode == 0
    subprocess.run([SCRIPT, "up"], check=True)
    yield Cluster()
    if not was_up:
        subprocess.run([SCRIPT, "down"], check=True)


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Place]:
    """An empty folder; when the test is over, its drivers and jobs are too, and the cluster is as it was."""
    place = Place(tmp_path)
    yield place
    place.leave()
    cluster.mend()
    cluster.clear(tmp_path)


@pytest.fixture
def workplace(cluster: Cluster, tmp_path: Path) -> Iterator[Workplace]:
    """An empty folder for a study; its jobs are gone when the test is."""
    yield Workplace(tmp_path)
    cluster.mend()
    cluster.clear(tmp_path)
