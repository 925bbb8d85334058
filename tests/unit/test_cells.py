from pathlib import Path

import polars as pl
import pytest

from finetune_study import cells as cells_module
from finetune_study import outcome
from finetune_study.paths import Results
from tests.unit import handmade

STUDY = handmade.study()
RUNS = handmade.runs(STUDY)
FULL, LORA = RUNS["full", 1], RUNS["lora", 1]


def test_one_row_per_planned_run_in_the_order_of_the_plan(tmp_path: Path) -> None:
    frame = handmade.frame(STUDY, tmp_path, handmade.completed(LORA, 1.0, 1.0, 1.0))
    assert frame["run_id"].to_list() == [FULL.run_id, LORA.run_id]
    assert frame["state"].to_list() == ["not_run", "completed"]
    assert frame["attempts"].to_list() == [0, 1]
    assert frame["status"].to_list() == [None, "completed"]


def test_columns_are_those_of_outcomes_and_five_more(tmp_path: Path) -> None:
    frame = handmade.frame(STUDY, tmp_path)
    assert frame.schema == cells_module.SCHEMA
    assert frame.columns[:-5] == list(outcome.COLUMNS)
    assert frame.columns[-5:] == ["state", "attempts", "failure_cause", "failure_log_tail", "failure_log"]


def test_a_run_that_was_not_tried_says_what_it_is(tmp_path: Path) -> None:
    row = handmade.frame(STUDY, tmp_path).row(0, named=True)
    assert (row["target"], row["recipe"], row["sequence_length"], row["memory_budget_gib"]) == (
        "tiny",
        "full",
        128,
        1.0,
    )
    assert row["step_time_seconds_median"] is None


def test_a_failure_is_shown_with_its_cause_and_log(tmp_path: Path) -> None:
    failure = handmade.failure(FULL, cause="KeyError: 'loss'", log_tail="line 1\nline 2", attempt=2)
    row = handmade.frame(STUDY, tmp_path, failure).row(0, named=True)
    assert row["state"] == "failed"
    assert row["status"] is None
    assert row["attempts"] == 2
    assert row["failure_cause"] == "KeyError: 'loss'"
    assert row["failure_log_tail"] == "line 1\nline 2"
    assert row["failure_log"] == "results/launch.log"


def test_characters_of_control_in_a_log_are_replaced(tmp_path: Path) -> None:
    """A right-to-left override shows a text in another order than it has."""
    said = "a\tb\n\x1b[31mred\x9b2J\x07 \u202etxt.exe\u202c \u2066it\u2069 \u200f\u061c ü 学 \N{GRINNING FACE}"
    shown = "a\tb\n�[31mred�2J� �txt.exe� �it� �� ü 学 \N{GRINNING FACE}"
    planned = handmade.planned(handmade.study())
    failed, ended = planned[0].run, planned[1].run
    handmade.write(tmp_path, handmade.failure(failed, cause=said, log_tail=said))
    handmade.write(tmp_path, handmade.out_of_memory(ended))
    results = Results(tmp_path)
    results.run(ended.run_id).log.write_text(said, encoding="utf-8")
    outcome.write(results, [ended.run_id], {})
    of_records, of_outcomes = cells_module.cells(planned, results, {}), cells_module.of_outcomes(planned, results)
    for frame in (of_records, of_outcomes):
        rows = {row["run_id"]: row for row in frame.to_dicts()}
        assert rows[failed.run_id]["failure_cause"] == rows[failed.run_id]["failure_log_tail"] == shown
        assert rows[ended.run_id]["log_tail"] == shown


def test_an_outcome_outranks_a_failure_left_beside_it(tmp_path: Path) -> None:
    results = handmade.write(tmp_path, handmade.failure(FULL))
    stale = results.run(FULL.run_id).failure.read_text()
    handmade.write(tmp_path, handmade.out_of_memory(FULL))
    results.run(FULL.run_id).failure.write_text(stale)
    assert handmade.frame(STUDY, tmp_path)["state"].to_list() == ["device_oom", "not_run"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("record.json", '{"format": 1, "run":'),
        ("record.json", "[]"),
        ("record.json", '{"format": 99}'),
        ("failure.json", '{"format": 1, "run_id":'),
        ("failure.json", ""),
        ("prior.json", "{"),
    ],
)
def test_a_damaged_file_is_a_failed_cell_and_touches_no_other(tmp_path: Path, name: str, content: str) -> None:
    handmade.write(tmp_path, handmade.completed(LORA, 1.0))
    if name == "prior.json":
        handmade.write(tmp_path, handmade.completed(FULL, 1.0))
    folder = Results(tmp_path).run(FULL.run_id).folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(content)
    frame = handmade.frame(STUDY, tmp_path)
    assert frame["state"].to_list() == ["failed", "completed"]
    assert any(word in frame["failure_cause"][0] for word in ("damaged", "newer version"))


def test_cells_from_outcomes_are_those_from_records(tmp_path: Path) -> None:
    results = handmade.write(tmp_path, handmade.completed(FULL, 1.0), handmade.failure(LORA))
    planned = handmade.planned(STUDY)
    outcomes = outcome.collect(results, [one.run.run_id for one in planned], STUDY.hardware)
    assert outcomes.height == 1
    assert cells_module.complete(outcomes, planned, results).equals(
        cells_module.cells(planned, results, STUDY.hardware), null_equal=True
    )


def test_prices_come_from_the_config(tmp_path: Path) -> None:
    priced = handmade.study(hardware={"cpu": {"device": "cpu", "memory_gib": 1.0, "price_usd_per_gpu_hour": 7.2}})
    frame = handmade.frame(priced, tmp_path, handmade.completed(FULL, 2.0, 2.0, 2.0))
    # 400 sequences in steps of 8 take 50 steps of 2 s: 100 s.
    assert frame["epoch_hours"][0] == pytest.approx(100 / 3600)
    assert frame["cost_usd_per_epoch"][0] == pytest.approx(0.2)


def test_an_empty_plan_gives_an_empty_frame(tmp_path: Path) -> None:
    frame = cells_module.cells([], Results(tmp_path), STUDY.hardware)
    assert frame.height == 0
    assert isinstance(frame, pl.DataFrame)
    assert frame.schema == cells_module.SCHEMA
