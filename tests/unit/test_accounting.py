"""What sacct prints becomes billing units; tests/slurm/test_accounting.py asks the real one."""

import json
from pathlib import Path

import polars as pl
import pytest

from finetune_study import accounting, outcome
from finetune_study.paths import Results
from tests.unit import handmade

PRINTED = """\
41|billing=16,cpu=8,gres/gpu:a100=1,gres/gpu=1,mem=100G,node=1
42|cpu=8,mem=100G,node=1
43|
44|cpu=8,billing=2250,node=1
"""


def test_billing_units_of_what_sacct_prints() -> None:
    assert dict(accounting.parse(PRINTED)) == {"41": 16, "44": 2250}


@pytest.fixture
def no_sacct(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")


@pytest.mark.usefixtures("no_sacct")
def test_without_accounting_there_are_no_units_and_no_file(tmp_path: Path) -> None:
    assert accounting.billing_units(["41"], tmp_path / "accounting.json") == {}
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("no_sacct")
@pytest.mark.parametrize("damage", ["", "{", "[]", '{"billing_units": {"41": "many"}}', '{"billing_units": 3}'])
def test_a_damaged_file_is_as_none(tmp_path: Path, damage: str) -> None:
    (tmp_path / "accounting.json").write_text(damage)
    assert accounting.billing_units(["41"], tmp_path / "accounting.json") == {}


@pytest.mark.usefixtures("no_sacct")
def test_what_was_said_once_is_kept_when_accounting_forgets(tmp_path: Path) -> None:
    """And costs are given in it: an epoch of 400 sequences in batches of 8, 3.6 s each, is 0.05 hours."""
    config = handmade.study(training={"effective_batch_size": 8})
    run = handmade.runs(config)["lora", 1]
    done = handmade.completed(run, 3.6).model_copy(update={"slurm_job_id": "41"})
    results = handmade.write(tmp_path, done)
    results.accounting.write_text(json.dumps({"format": 1, "billing_units": {"41": 16, "7": 1}}))
    outcome.write(results, [run.run_id], config.hardware)
    assert pl.read_parquet(results.outcomes_parquet)["billing_units"].to_list() == [16]

    from finetune_study import cells, plan, report

    frame = cells.of_outcomes(plan.plan(config), Results(tmp_path))
    (cost,) = report.gather(config, frame).costs
    assert cost["hours"] == pytest.approx(0.05)
    assert cost["billing_unit_hours"] == pytest.approx(0.8)
    report.build(config, frame, results)
    text = results.report.read_text()
    assert "0.160 billing unit-hours went into the study itself, by the last try of each run." in text  # 36 s
