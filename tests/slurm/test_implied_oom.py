"""The executor asks the study which runs are worth a job, as `--profile slurm` has it."""

import copy
import json

import pytest

from finetune_study import record
from tests.slurm.test_study import jobs_of, place, stand_in, statuses, submit
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

__all__ = ["place"]

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_harder_runs_wait_for_the_easier_one_and_take_no_job(place: Workplace) -> None:
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"no-memory": stand_in("v100", memory_gib=0.003)}
    raw["data"]["num_eval_samples"] = 0  # memory that runs out in evaluation proves nothing
    raw["grid"][0] |= {"hardware": "no-memory", "recipes": "full", "sequence_length": [64, 96, 128]}
    place.write(raw)
    place.snakemake("forecast", "prepare")  # so that all are ready, and asked about, together
    answer = submit(place, "--jobs", "3")
    assert answer.returncode == 0, answer.stdout
    head = "tiny_no-memoryx1_s{}_b1_full_r1"
    implied = dict.fromkeys((head.format(96), head.format(128)), "implied_oom")
    assert statuses(place) == {head.format(64): "device_oom"} | implied
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


def test_of_twenty_ready_runs_none_is_trained_that_an_early_one_decides(place: Workplace) -> None:
    """Half of the runs are queued meanwhile, the easiest ahead, so that no node waits for an answer: a job that begins
    after the witness has ended says so and ends at once, and those that have not begun are withdrawn."""
    sizes = [size for size in range(1, 121) if 480 % size == 0][:20]
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"no-memory": stand_in("v100", memory_gib=0.003, cpus_per_gpu=16)}  # one job fills a node
    raw["data"] |= {"num_eval_samples": 0, "num_dialogues": 480}
    raw["training"]["effective_batch_size"] = 480
    raw["protocol"] |= {"num_untimed_steps": 0, "num_timed_steps": 1}
    raw["grid"][0] |= {"hardware": "no-memory", "recipes": "full", "per_device_train_batch_size": sizes[::-1]}
    place.write(raw)
    answer = submit(place, "--jobs", "20", "--submitit-no-canary")
    assert answer.returncode == 0, answer.stdout
    runs = {size: place.record(f"_b{size}_").parent for size in sizes}
    endings = {size: record.read_record(folder / "record.json").ending for size, folder in runs.items()}
    trained = [size for size, ending in endings.items() if ending.status == "device_oom"]
    assert trained in ([1], [1, 2]), "the easiest first, at most one on each node"
    for size in sizes:
        if size not in trained:
            assert endings[size].status == "implied_oom"
            assert endings[size].witness in {runs[easier].name for easier in trained}
            assert record.read_record(runs[size] / "record.json").ranks == [], "no process of it began"
    jobs = {size: jobs_of(place, runs[size].name) for size in sizes}
    assert jobs[3], "the next ones were in the queue"
    assert not any(jobs[size] for size in sizes[11:]), "the others never took a job"


def test_inside_a_job_that_runs_share_what_one_decides_is_not_trained(place: Workplace) -> None:
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"no-memory": stand_in("v100", memory_gib=0.003, max_job_minutes=60)}
    raw["data"]["num_eval_samples"] = 0
    contexts = [64, 66, 68, 70]
    raw["grid"][0] |= {"hardware": "no-memory", "recipes": "full", "sequence_length": contexts}
    place.write(raw)
    place.snakemake("prepare")  # so that all are ready, and asked about, together
    answer = submit(place, "--jobs", "4", "--submitit-no-canary")
    assert answer.returncode == 0, answer.stdout
    ledger = place.folder / ".snakemake" / "auxiliary" / "submitit" / "ledger.jsonl"
    events = [json.loads(line) for line in ledger.read_text(encoding="utf-8").splitlines()]
    assert any(event.get("shared") for event in events), "half of the runs are queued, and share a job"
    endings = {context: record.read_record(place.record(f"_s{context}_")).ending for context in contexts}
    assert [endings[context].status for context in contexts] == ["device_oom"] + 3 * ["implied_oom"]
    assert {endings[context].witness for context in contexts[1:]} == {place.record("_s64_").parent.name}
