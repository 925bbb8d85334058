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
