"""The executor asks the study which runs are worth a job, as `--profile slurm` has it."""

import copy
import json

import pytest

from finetune_study import record
from tests.slurm.test_study import jobs_of, place, stand_in, statuses, submit
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

__all__ = ["place"]

pytestmark = pytest.mark.slurm


def test_harder_runs_wait_for_the_easier_one_and_take_no_job(place: Workplace) -> None:
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"no-memory": stand_in("v100", memory_gib=0.003)}
    raw["data"]["num_eval_samples"] = 0  # memory that runs out in evaluation proves nothing
    raw["grid"][0] |= {"hardware": "no-memory", "recipes": "full", "sequence_length": [64, 96, 128]}
    place.write(raw)
    place.snakemake("forecast")
    answer = submit(place, "--jobs", "3")
    assert answer.returncode == 0, answer.stdout
    head = "tiny_no-memoryx1_s{}_b1_full_r1"
    assert statuses(place) == {
        head.format(64): "device_oom",
        head.format(96): "implied_oom",
        head.format(128): "implied_oom",
    }
    witness = place.record("_s64_").parent.name
    assert len(jobs_of(place, witness)) == 1
    prior = json.loads((place.record("_s64_").parent / "prior.json").read_text())
    assert prior["predicted_peak_memory_allocated_gib"] > 0
    for word in ("_s96_", "_s128_"):
        path = place.record(word)
        assert record.read_record(path).ending.witness == witness
        assert jobs_of(place, path.parent.name) == []
        assert not (path.parent / "prior.json").exists()
        assert f"{path.parent.name}: resolved by before_submit, not run" in answer.stdout
    again = submit(place)
    assert "Nothing to be done" in again.stdout, again.stdout
