"""DeepSpeed's op is built for real, once, and found by the runs that come after."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from finetune_study import places, run, study
from finetune_study.config import Places
from finetune_study.paths import Results
from tests.workflow.workplace import Workplace

pytestmark = pytest.mark.long


def on_gpus(place: Workplace) -> None:
    raw = place.read()
    raw["hardware"] = {"gpu": {"memory_gib": 80, "compute_capability": 8.0, "max_gpus": 2}}
    raw["recipes"] = {"zero2": {"zero2": {}}, "offload": {"zero2": {}, "offload_optimizer": {}}}
    raw["grid"][0] |= {"hardware": "gpu", "recipes": ["zero2", "offload"], "num_gpus": [1, 2]}
    place.write(raw)


def test_an_op_is_built_once_for_all_runs_that_need_it(fresh: Workplace) -> None:
    on_gpus(fresh)
    planned = fresh.planned()
    assert (planned["prepare_op"], planned["finetune"]) == (1, 4)
    assert fresh.planned("prepare")["prepare_op"] == 1


@pytest.mark.training
def test_op_is_compiled_kept_and_found(fresh: Workplace) -> None:
    found = study.open_study(fresh.read(), Results(fresh.results))
    study.write_plan(found)
    run_yaml, output = found.results.run(next(iter(found.planned))).run_yaml, fresh.folder / "op.json"
    command = [sys.executable, "-m", "finetune_study.compiled", str(run_yaml), "cpu_adam", str(output)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert json.loads(output.read_text())["seconds"] < 20, "the second time nothing is compiled"
    with places.opened(Places(), run.load(run_yaml), found.results) as where:
        assert [*Path(where["TORCH_EXTENSIONS_DIR"]).glob("cpu_adam/*.so")]


def test_what_can_not_be_compiled_says_why(fresh: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    found = study.open_study(fresh.read(), Results(fresh.results))
    study.write_plan(found)
    run_yaml, output = found.results.run(next(iter(found.planned))).run_yaml, fresh.folder / "op.json"
    monkeypatch.setenv("PATH", str(fresh.folder))  # no compiler
    command = [sys.executable, "-m", "finetune_study.compiled", str(run_yaml), "cpu_adam", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "DeepSpeed's op `cpu_adam` can't be compiled" in done.stderr
    assert "C++ compiler" in done.stderr
    assert not output.exists()
