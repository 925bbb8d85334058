"""A real SLURM cluster for all tests that need one, and places to run Snakemake in."""

import copy
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import SCRIPT, Cluster, ask, wait_for
from tests.slurm.place import Place
from tests.tiny_study import TINY_STUDY
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
def account(cluster: Cluster) -> Iterator[str]:
    """An account with limits of its own."""
    name = f"limited-{uuid.uuid4().hex[:6]}"
    for command in (f"add account {name}", f"add user root account={name}"):
        subprocess.run(["sacctmgr", "-i", *command.split()], check=True, capture_output=True)
    wait_for(lambda: name in ask("scontrol", "show", "assoc_mgr", "flags=assoc"), "SLURM knows the account")
    yield name
    for command in (f"remove user root account={name}", f"remove account {name}"):
        subprocess.run(["sacctmgr", "-i", *command.split()], check=False, capture_output=True)


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Place]:
    """An empty folder; when the test is over, its drivers and jobs are too, and the cluster is as it was."""
    place = Place(tmp_path)
    yield place
    place.leave()
    cluster.mend()
    cluster.clear(tmp_path)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model and data of the tiny study: nearly all studies here train on them."""
    place = Workplace(tmp_path_factory.mktemp("prepared"))
    place.write(copy.deepcopy(TINY_STUDY))
    answer = place.snakemake("prepare")
    assert answer.returncode == 0, answer.stdout
    return place.results / "prepared"


@pytest.fixture
def workplace(cluster: Cluster, prepared: Path, tmp_path: Path) -> Iterator[Workplace]:
    """A folder for a study, in which nothing has run; its jobs are gone when the test is."""
    place = Workplace(tmp_path)
    shutil.copytree(prepared, place.results / "prepared")
    yield place
    cluster.mend()
    cluster.clear(tmp_path)
