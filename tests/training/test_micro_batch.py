"""The largest micro-batch that fits, found by real runs that really run out of memory."""

from pathlib import Path
from typing import Any

import pytest

from finetune_study import micro_batch
from tests.training import lab as lab_module
from tests.training.lab import LIMIT_SECONDS, Ended, Lab, launch
from tests.training.test_nodes import STEP

pytestmark = [pytest.mark.training, pytest.mark.long]

EAGER: dict[str, Any] = {"eager": {}}
"""Scores of 512 x 512 for each layer, head and sequence: 0.025 GiB a sequence, of which 16 are too much for 0.3 GiB."""


def largest(lab: Lab, **changes: Any) -> dict[str, Any]:
    return {
        "micro_batch": "max",
        "sequence_length": 512,
        "budget_gib": 0.3,
        "training": {"effective_batch_size": 16},
        "data": {"dataset": lab.plenty},
        **changes,
    }


def sizes_tried(ended: Ended) -> dict[tuple[int, str], str]:
    tried = ended.record.environment[micro_batch.FACT]["tried"]
    return {(one["per_device_train_batch_size"], one["steps"]): one["status"] for one in tried}


def test_largest_that_fits_is_found_and_trained(lab: Lab) -> None:
    ended = lab.train(EAGER, **largest(lab))
    assert (ended.status, ended.record.ending.status) == (0, "completed"), ended.output
    row, size = ended.row, ended.row["per_device_train_batch_size"]
    assert sizes_tried(ended)[size, "short"] == "completed"
    assert (row["micro_batch"], row["gradient_accumulation_steps"]) == ("max", 16 // size)
    assert row["num_timed_steps"] == ended.record.run.protocol.num_timed_steps, "of the run, not of a short one"
    fixed = lab.train(EAGER, **largest(lab, micro_batch=size))
    assert ended.losses == fixed.losses
    assert ended.eval_losses == fixed.eval_losses
    assert ended.peak() == pytest.approx(fixed.peak(), rel=0.1)
    assert size < 16
    assert lab.train(EAGER, **largest(lab, micro_batch=2 * size)).record.ending.status == "device_oom"


def test_ranks_find_it_together(lab: Lab) -> None:
    ended = lab.train(EAGER, **largest(lab, num_gpus=2, budget_gib=0.17))
    assert ended.record.ending.status == "completed", ended.output
    assert len(ended.record.ranks) == 2
    size = ended.row["per_device_train_batch_size"]
    assert size < 8
    larger = lab.train(EAGER, **largest(lab, num_gpus=2, budget_gib=0.17, micro_batch=2 * size))
    assert larger.record.ending.status == "device_oom"


def test_out_of_memory_at_every_size_is_an_outcome(lab: Lab) -> None:
    ended = lab.train(EAGER, **largest(lab, budget_gib=0.04))
    ending = ended.record.ending
    assert (ended.status, ending.status, ending.phase) == (0, "device_oom", "forward")
    assert str(ending.reason).startswith("at every micro-batch; ")
    assert {(1, "short"), (16, "short")} <= sizes_tried(ended).keys()
    assert ended.row["per_device_train_batch_size"] is None


def test_time_that_runs_out_in_the_search_leaves_no_numbers(lab: Lab) -> None:
    paths = lab.prepare(lab.run(EAGER, **largest(lab, budget_gib=0.31)))
    ended = launch(paths, "--time-limit-minutes", "0.001")
    assert ended.record.ending.status == "timeout"
    assert ended.record.ranks == []
    assert ended.row["per_device_train_batch_size"] is None


def test_nodes_find_it_together(tmp_path: Path) -> None:
    lab = Lab(tmp_path)
    paths = lab.prepare(lab.run(EAGER, **largest(lab, num_gpus=2, nodes=2, budget_gib=0.17)))
    launchers = [lab_module.start(paths, variables=STEP | {"SLURM_PROCID": str(node)}) for node in (0, 1)]
    outputs = [launcher.communicate(timeout=LIMIT_SECONDS)[0] for launcher in launchers]
    assert [launcher.returncode for launcher in launchers] == [0, 0], outputs
    ended = Ended(paths, 0, outputs[0], 0.0)
    assert ended.record.ending.status == "completed"
    assert 1 <= ended.row["per_device_train_batch_size"] < 8
