"""Billing units by a real sacct."""

import re
import subprocess
import time
from pathlib import Path

import pytest

from finetune_study import accounting
from tests.slurm.cluster import Cluster

pytestmark = pytest.mark.slurm


def test_billing_units_are_those_that_the_controller_says(cluster: Cluster, tmp_path: Path) -> None:
    command = ["sbatch", "--parsable", "--cpus-per-task=2", "--output=/dev/null", "--wrap", "sleep 1"]
    job = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    kept = tmp_path / "accounting.json"
    deadline = time.monotonic() + 60
    while not (found := accounting.billing_units([job, "999999999"], kept)):
        assert time.monotonic() < deadline
        time.sleep(0.5)
    said = subprocess.run(["scontrol", "show", "job", job], check=True, capture_output=True, text=True).stdout
    # Of requested and allocated ones where it tells both; an older SLURM has but one.
    billing = re.findall(r"TRES=\S*billing=(\d+)", said)
    assert found == {job: int(billing[-1])}
    assert found[job] >= 2
    assert accounting.billing_units([job], kept) == found
