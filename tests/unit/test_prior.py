"""prior.json: frozen when a run is submitted, and never changed."""

import json
from pathlib import Path
from typing import Any

import pytest

from finetune_study.before_submit import before_submit
from finetune_study.forecast import prior
from finetune_study.paths import Results
from finetune_study.study import open_study, write_plan

Raw = dict[str, Any]


@pytest.fixture
def results(raw: Raw, tmp_path: Path) -> Results:
    results = Results(tmp_path)
    write_plan(open_study(raw, results))
    return results


def run_ids(results: Results) -> list[str]:
    return sorted(folder.name for folder in results.runs.iterdir())


def asked(run_id: str, state: str = "new") -> str:
    return json.dumps({"jobs": [{"id": "1", "state": state, "rule": "finetune", "wildcards": {"run_id": run_id}}]})


def test_the_forecast_of_the_moment_is_frozen_and_stays(results: Results) -> None:
    paths = results.run(run_ids(results)[0])
    prior.freeze(paths)
    assert not paths.prior.exists()  # nobody has forecast it
    paths.forecast.write_text('{"predicted_step_time_seconds": 1.0}')
    before_submit(asked(paths.folder.name), results)
    assert json.loads(paths.prior.read_text()) == {"predicted_step_time_seconds": 1.0}
    paths.forecast.write_text('{"predicted_step_time_seconds": 2.0}')
    before_submit(asked(paths.folder.name), results)
    prior.freeze(paths)
    assert json.loads(paths.prior.read_text()) == {"predicted_step_time_seconds": 1.0}


def test_what_is_in_the_queue_already_gets_no_prior(results: Results) -> None:
    paths = results.run(run_ids(results)[0])
    paths.forecast.write_text("{}")
    before_submit(asked(paths.folder.name, "pending"), results)
    assert not paths.prior.exists()


@pytest.mark.parametrize("name", ["record", "superseded"])
def test_a_run_that_was_measured_before_gets_none(name: str, results: Results) -> None:
    paths = results.run(run_ids(results)[0])
    paths.forecast.write_text("{}")
    getattr(paths, name).mkdir()
    prior.freeze(paths)
    assert not paths.prior.exists()


def test_what_nobody_forecast_is_predicted_when_it_is_submitted(raw: Raw, tmp_path: Path) -> None:
    raw["hardware"]["a100"] = {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}
    raw["grid"][0]["hardware"] = ["a100", raw["grid"][0]["hardware"]]
    results = Results(tmp_path)
    write_plan(open_study(raw, results))
    on_gpu = [run_id for run_id in run_ids(results) if "a100" in run_id]
    first, second = on_gpu[:2]
    on_cpu = next(run_id for run_id in run_ids(results) if run_id not in on_gpu)
    prior.freeze_all([first, on_cpu], results)
    assert not results.run(on_cpu).prior.exists()  # nobody asked
    found = json.loads(results.run(first).prior.read_text())
    assert found["predicted_peak_memory_allocated_gib"] > 0
    prior.freeze_all([second], results, seconds=-1)
    assert not results.run(second).prior.exists()  # no time: it is submitted without
