from pathlib import Path
from typing import Any

import pytest

from finetune_study.paths import MANIFEST, Results
from finetune_study.prepared import new_folder, read_manifest
from finetune_study.study import open_study
from tests.unit import handmade


@pytest.fixture
def results(raw: dict[str, Any], tmp_path: Path) -> Results:
    """With a prepared model of two files."""
    results = Results(tmp_path / "results")
    run = next(iter(open_study(raw, results).planned.values())).run
    with new_folder(results.model(run.model_key)) as (folder, _):
        (folder / "config.json").touch()
        (folder / "model.safetensors").touch()
    return results


def test_what_a_purge_left_of_a_prepared_model_counts_as_nothing(raw: dict[str, Any], results: Results) -> None:
    (folder,) = (results.root / "prepared" / "models").iterdir()
    open_study(raw, results)
    assert read_manifest(folder) is not None
    (folder / "model.safetensors").unlink()
    open_study(raw, results)
    assert not (folder / MANIFEST).exists()


def test_model_that_no_run_needs_any_more_may_be_purged(raw: dict[str, Any], results: Results) -> None:
    (folder,) = (results.root / "prepared" / "models").iterdir()
    planned = open_study(raw, results).planned.values()
    handmade.write(results.root, *(handmade.completed(one.run, 1.0) for one in planned))
    (folder / "model.safetensors").unlink()
    open_study(raw, results)
    assert (folder / MANIFEST).exists()


def test_the_easiest_of_a_kind_goes_first(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["training"]["effective_batch_size"] = 4
    raw["grid"][0] |= {
        "recipes": "full",
        "sequence_length": [128, 64],
        "per_device_train_batch_size": [2, 1, "max"],
    }
    found = open_study(raw, Results(tmp_path / "fresh"))
    easier = {
        (run.sequence_length, run.per_device_train_batch_size): found.number_of_easier(run.run_id)
        for run in (one.run for one in found.planned.values())
    }
    first = min(found.planned, key=lambda run_id: -found.priority(run_id))
    assert (found.run(first).sequence_length, found.run(first).per_device_train_batch_size) == (64, "max")
    assert easier == {(64, "max"): 0, (64, 1): 1, (64, 2): 2, (128, "max"): 1, (128, 1): 3, (128, 2): 5}


def test_repeats_go_one_after_the_other_and_recipes_mix(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["grid"][0] |= {"recipes": ["full", "lora"], "sequence_length": [64, 128]}
    raw["protocol"]["repeats"] = 3
    found = open_study(raw, Results(tmp_path / "fresh"))
    order = sorted((found.run(run_id) for run_id in found.planned), key=lambda run: -found.priority(run.run_id))
    assert [run.repeat for run in order] == [1] * 4 + [2] * 4 + [3] * 4
    assert [run.sequence_length for run in order] == [64, 64, 128, 128] * 3
    first = [run.recipe for run in order[::2]]
    assert {*first} == {"full", "lora"}, "the order of equals is drawn by lot, not that of the plan"


def test_a_python_that_is_not_there_keeps_nobody_from_planning(raw: dict[str, Any], tmp_path: Path) -> None:
    gone = str(tmp_path / "gone" / "bin" / "python")
    for hardware in raw["hardware"].values():
        hardware["software"] = {"python": gone}
    found = open_study(raw, Results(tmp_path / "fresh"))
    ((name, error),) = found.missing_software.items()
    assert f"hardware.{name}.software.python" in str(error)
    assert "to train" in found.summary()
    assert "no such interpreter" not in found.summary(), "what needs no Python of theirs is not kept from it"
    handmade.write(tmp_path / "fresh", *(handmade.completed(one.run, 1.0) for one in found.planned.values()))
    assert open_study(raw, Results(tmp_path / "fresh")).missing_software == {}, "nothing is left to start"
