"""Forecasts of a study: rows, bill, priors, and runs that are not tried."""

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_study.config import Hardware
from finetune_study.forecast import predict, show, time
from finetune_study.forecast import study as forecast
from finetune_study.paths import Results
from finetune_study.record import Ending, Record, write_record
from finetune_study.study import Study, open_study, write_plan

Raw = dict[str, Any]


@pytest.fixture
def gpu_raw(raw: Raw) -> Raw:
    raw["hardware"]["a100"] = {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}
    raw["hardware"]["a100"]["price_usd_per_gpu_hour"] = 3.0
    raw["grid"][0]["hardware"] = "a100"
    return raw


def opened(raw: Raw, folder: Path) -> Study:
    study = open_study(raw, Results(folder))
    write_plan(study)
    return study


def test_every_run_has_its_row_and_the_bill_is_their_sum(gpu_raw: Raw, tmp_path: Path) -> None:
    rows = forecast.write(opened(gpu_raw, tmp_path))
    assert [row["state"] for row in rows] == ["to train"] * 2
    for row in rows:
        assert set(row) == set(forecast.COLUMNS)
        assert row["fits"] == "fits"
        assert row["memory_gib"] == 79.15  # what torch sees of it, not what the entry says
        assert 0 < row["predicted_peak_memory_allocated_gib"] <= row["predicted_peak_memory_reserved_gib"]
    total = forecast.totals(rows)["a100"]
    assert total["gpu_hours"] == pytest.approx(sum(row["predicted_gpu_hours"] for row in rows))
    assert total["cost_usd"] == pytest.approx(3.0 * total["gpu_hours"])
    again = open_study(gpu_raw, Results(tmp_path))
    assert f"predicted: {total['gpu_hours']:.1f} GPU-hours, {total['cost_usd']:.2f} US dollars" in again.summary()


def test_the_bill_counts_what_does_not_fit_or_is_not_supported_and_charges_neither(
    gpu_raw: Raw, tmp_path: Path
) -> None:
    charged = forecast.totals(forecast.write(opened(gpu_raw, tmp_path / "all")))["a100"]
    rows = forecast.write(opened(gpu_raw, tmp_path / "some"))
    rows[0]["fits"] = "does not fit"
    total = forecast.totals(rows)["a100"]
    assert (total["runs"], total["do_not_fit"], total["unsupported"]) == (2, 1, 0)
    assert total["gpu_hours"] == pytest.approx(rows[1]["predicted_gpu_hours"])
    assert total["cost_usd"] < charged["cost_usd"]
    rows[1]["state"] = "unsupported"
    total = forecast.totals(rows)["a100"]
    assert (total["runs"], total["unsupported"], total["gpu_hours"], total["cost_usd"]) == (1, 1, 0, 0)


def test_the_bill_says_of_how_many_runs_it_is(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    assert study.summary().endswith("2 to train; no forecast yet (snakemake --cores all forecast)")
    first, second = forecast.write(study)
    document = json.loads(study.results.forecast.read_text())

    def bill() -> str:
        study.results.forecast.write_text(json.dumps(document))
        return open_study(gpu_raw, Results(tmp_path)).summary().partition("; ")[2]

    assert "runs" not in bill()
    document["runs"][first["run_id"]] = [None, None]
    hours, dollars = second["predicted_gpu_hours"], second["predicted_cost_usd"]
    assert bill() == f"predicted: {hours:.1f} GPU-hours, {dollars:.2f} US dollars of 1 of 2 runs"
    document["runs"][second["run_id"]] = [None, None]
    assert bill() == "predicted: no time of 2 runs"


def test_the_bill_outlives_the_forecast_of_another_study_in_the_same_folder(gpu_raw: Raw, tmp_path: Path) -> None:
    forecast.write(opened(gpu_raw, tmp_path))
    bill = open_study(gpu_raw, Results(tmp_path)).summary().partition("; ")[2]
    other = {**gpu_raw, "protocol": {**gpu_raw.get("protocol", {}), "num_timed_steps": 7}}
    assert opened(other, tmp_path).summary().endswith("no forecast yet (snakemake --cores all forecast)")
    forecast.write(opened(other, tmp_path))
    assert bill.startswith("predicted: ")
    assert open_study(gpu_raw, Results(tmp_path)).summary().partition("; ")[2] == bill


def test_the_bill_of_forecasts_of_runs_charges_none_that_does_not_fit(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    first, second = forecast.write(study)
    study.results.forecast.unlink()
    own = study.results.run(first["run_id"]).forecast
    own.write_text(json.dumps({**json.loads(own.read_text()), "margin_gib": -1.0}))
    hours, dollars = second["predicted_gpu_hours"], second["predicted_cost_usd"]
    expected = f"predicted: {hours:.1f} GPU-hours, {dollars:.2f} US dollars without 1 that do not fit"
    assert open_study(gpu_raw, Results(tmp_path)).summary().endswith(expected)


def test_the_summary_charges_no_run_that_does_not_fit(gpu_raw: Raw, tmp_path: Path) -> None:
    wide = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 64, "num_attention_heads": 64}
    gpu_raw["models"]["tiny"]["architecture"] |= wide
    rows = forecast.write(opened(gpu_raw, tmp_path))
    assert all(row["fits"] == "does not fit" and row["predicted_gpu_hours"] > 0 for row in rows)
    summary = open_study(gpu_raw, Results(tmp_path)).summary()
    assert "predicted: 0.0 GPU-hours, 0.00 US dollars without 2 that do not fit" in summary


def test_epoch_hours_are_known_before_data_is_prepared_or_it_is_said_why_not(gpu_raw: Raw, tmp_path: Path) -> None:
    def row(name: str, **data: Any) -> dict[str, Any]:
        return forecast.write(opened({**gpu_raw, "data": {**gpu_raw.get("data", {}), **data}}, tmp_path / name))[0]

    made = row("made", dataset="generated")
    assert made["predicted_epoch_hours"] > 0
    assert "epoch" not in made["warnings"]
    assert "at most" in row("dropped", dataset="generated", overlong="drop")["warnings"]
    other = row("hub", dataset="knkarthick/samsum")
    assert other["predicted_epoch_hours"] is None
    assert "knkarthick/samsum has is known when it is prepared: no epoch hours" in other["warnings"]


def test_a_forecast_stands_beside_each_run_to_train_and_freezes_nothing(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    row = forecast.write(study)[0]
    paths = study.results.run(row["run_id"])
    kept = json.loads(paths.forecast.read_text())
    assert kept["predicted_peak_memory_allocated_gib"] == row["predicted_peak_memory_allocated_gib"]
    assert not paths.prior.exists()


def test_a_forecast_that_is_the_same_is_not_written_again(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    paths = study.results.run(forecast.write(study)[0]["run_id"])
    before = paths.forecast.stat().st_ino
    forecast.write(study)
    assert paths.forecast.stat().st_ino == before
    paths.forecast.write_text("{}")
    forecast.write(study)
    assert "predicted_peak_memory_allocated_gib" in paths.forecast.read_text()


def test_outcomes_without_training_are_no_reason_for_another_forecast(gpu_raw: Raw, tmp_path: Path) -> None:
    gpu_raw["hardware"]["a100"]["compute_capability"] = 7.0
    gpu_raw["recipes"]["full"] = {"flash_attention_2": {}}
    study = opened(gpu_raw, tmp_path)
    after = open_study(gpu_raw, study.results)
    assert set(after.recorded) == set(after.without_training) != set()


def test_measured_runs_teach_the_step_time_of_those_to_come(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    done, to_come = forecast.write(study)
    ended = Record(run=study.run(done["run_id"]), ending=Ending(status="completed"))
    write_record(study.results.run(done["run_id"]), ended)
    measured = {"run_id": [done["run_id"]], "step_time_seconds_median": [3 * done["predicted_step_time_seconds"]]}
    pl.DataFrame(measured).write_parquet(study.results.outcomes_parquet)
    same, refined = forecast.write(open_study(gpu_raw, study.results))
    assert same["predicted_step_time_seconds"] == done["predicted_step_time_seconds"]
    assert refined["predicted_step_time_seconds"] == pytest.approx(3 * to_come["predicted_step_time_seconds"])
    assert refined["predicted_peak_memory_allocated_gib"] == to_come["predicted_peak_memory_allocated_gib"]
    assert to_come["predicted_cost_usd"] < refined["predicted_cost_usd"] < 3 * to_come["predicted_cost_usd"]
    assert "learnt from 1 measured runs" in refined["warnings"]


def test_a_run_alone_is_predicted_as_in_its_study(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    row = forecast.write(study)[0]
    alone = forecast.row_of_run(study.run(row["run_id"]), study.results, predict.Traces(study.results.traces))
    of_prices = {name for name in row if "cost_usd" in name}
    assert {k: v for k, v in alone.items() if k not in of_prices} == {
        k: v for k, v in row.items() if k not in of_prices
    }


def test_a_cpu_has_no_step_time_until_it_is_calibrated(raw: Raw, tmp_path: Path) -> None:
    study = opened(raw, tmp_path)
    rows = forecast.write(study)
    assert all(row["predicted_peak_memory_allocated_gib"] for row in rows)
    assert {row["predicted_step_time_seconds"] for row in rows} == {row["predicted_cost_usd"] for row in rows} == {None}
    text = show.table(rows)
    assert "no step time until, in a study, `snakemake --cores all calibrate` measures them" in text
    assert "2 without a predicted time, and not in the sums" in text
    paths = study.results.calibration("cpu")
    paths.parent.mkdir(parents=True)
    paths.write_text(json.dumps({"rates": {"matmul_fp32": 1e11, "attention_fp32": 1e11, "memory": 1e10}}))
    assert all(row["predicted_step_time_seconds"] > 0 for row in forecast.write(study))


def test_a_model_that_is_not_known_yet_is_null_with_the_reason(gpu_raw: Raw, tmp_path: Path) -> None:
    gpu_raw["models"]["tiny"] = {"name_or_path": "nobody/knows-it"}
    study = opened(gpu_raw, tmp_path)
    row = forecast.write(study)[0]
    assert row["predicted_peak_memory_allocated_gib"] is None
    assert "not here yet" in row["warnings"]
    assert not study.results.run(row["run_id"]).prior.exists()


def test_what_is_predicted_not_to_fit_is_not_trained_when_asked(gpu_raw: Raw, tmp_path: Path) -> None:
    wide = {"hidden_size": 16384, "intermediate_size": 65536, "num_hidden_layers": 64, "num_attention_heads": 64}
    gpu_raw["models"]["tiny"]["architecture"] |= wide
    study = opened(gpu_raw, tmp_path)
    forecast.write(study)
    assert not study.recorded, "off by default"
    gpu_raw["protocol"]["skip_predicted_oom"] = 0.2
    asked = opened(gpu_raw, tmp_path)
    forecast.write(asked)
    after = open_study(gpu_raw, Results(tmp_path))
    assert set(after.recorded) == set(after.planned)
    assert not after.pending
    record = json.loads(after.results.run(next(iter(after.planned))).record.read_text())
    assert record["ending"]["status"] == "predicted_oom"
    rows = forecast.write(after)
    assert {row["state"] for row in rows} == {"not tried"}
    assert after.plan_digest != study.plan_digest
    needed = 1 - min(row["margin_gib"] / row["memory_gib"] for row in rows)
    gpu_raw["protocol"]["skip_predicted_oom"] = needed  # more than any of them needs, less the device itself
    raised = open_study(gpu_raw, Results(tmp_path))
    assert set(raised.pending) == set(raised.planned)
    gpu_raw["protocol"]["skip_predicted_oom"] = 0.1
    assert not open_study(gpu_raw, Results(tmp_path)).pending
    del gpu_raw["protocol"]["skip_predicted_oom"]
    taken_back = open_study(gpu_raw, Results(tmp_path))
    assert set(taken_back.pending) == set(taken_back.planned)


def test_a_calibration_replaces_the_data_sheet(gpu_raw: Raw, tmp_path: Path) -> None:
    study = opened(gpu_raw, tmp_path)
    before = forecast.write(study)[0]["predicted_step_time_seconds"]
    path = study.results.calibration("a100")
    path.parent.mkdir(parents=True)
    slow = {f"launch_{way}": 10 * seconds for way, seconds in time.LAUNCH_SECONDS.items()}
    path.write_text(json.dumps({"rates": slow}))
    after = forecast.write(study)[0]["predicted_step_time_seconds"]
    assert after == pytest.approx(10 * before, rel=0.05), "a tiny model waits for its launches"


@pytest.mark.parametrize(
    ("name", "gpu", "memory", "expected", "known"),
    [
        ("a100-80gb", "NVIDIA A100-SXM4-80GB MIG 1g.10gb", 9.5, 9.5, False),
        ("v100-16gb", "Tesla V100-PCIE-32GB", 32, 32, False),
        ("v100-16gb", "Tesla V100-SXM2-32GB", 32, 31.74, True),
        ("h100-80gb", "NVIDIA H100 NVL", 94, 94, False),
        ("a100-80gb", None, 80, 79.15, True),
        ("mine", "A100-SXM4-80GB", 80, 79.15, True),
        ("a100-80gb", "NVIDIA A100-SXM4-80GB", 40, 40, True),
    ],
)
def test_an_entry_is_the_card_that_its_gpu_names(
    name: str, gpu: str | None, memory: float, expected: float, known: bool
) -> None:
    device = forecast.device_of(name, Hardware(device="cuda", gpu=gpu, memory_gib=memory))
    assert (device.memory_gib, bool(device.tflops)) == (expected, known)
