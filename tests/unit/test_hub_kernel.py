"""Kernels of the hub: what prepare fetches, and where. The hub is a local stand-in, since none is reached from here."""

import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import snapshot_download
from huggingface_hub.constants import HF_HUB_CACHE
from transformers.integrations.hub_kernels import get_attn_kernel_version

from finetune_study import hub_kernel, places, variables
from finetune_study.config import Places
from finetune_study.errors import StudyError
from finetune_study.paths import Results
from finetune_study.study import open_study

NAME = "kernels-community/flash-attn2"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
VERSION = f"v{get_attn_kernel_version(NAME)}"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """A study that `prepare` has entered, by somebody who has a cache of the hub of their own."""
    for name in (*variables.CACHES, "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, "changed by places.enter")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "own"))
    results = Results(tmp_path / "results")
    places.enter(Places(), results)
    return results


def hub(repo_id: str, *, repo_type: str, revision: str, allow_patterns: str, cache_dir: Path) -> str:
    """What snapshot_download leaves in the cache of a repository with one build."""
    assert (repo_id, repo_type, revision, allow_patterns) == (NAME, "kernel", VERSION, "build/*")
    folder = cache_dir / "kernels--kernels-community--flash-attn2"
    snapshot = folder / "snapshots" / COMMIT
    (snapshot / "build" / "torch-cuda").mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / revision).write_text(COMMIT)
    return str(snapshot)


def test_it_lies_where_an_offline_run_looks(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    hub_kernel.prepare(NAME, results.kernel(NAME))
    said = json.loads(results.kernel(NAME).read_text())
    assert said == {"kernel": NAME, "version": VERSION, "commit": COMMIT}
    of_run = Path(variables.of_cache(results.cache.absolute())["XDG_CACHE_HOME"]) / "huggingface" / "hub"
    assert HF_HUB_CACHE.endswith("huggingface/hub"), "the hub's own default below XDG_CACHE_HOME"
    found = snapshot_download(NAME, repo_type="kernel", revision=VERSION, cache_dir=of_run, local_files_only=True)
    assert Path(found).name == COMMIT


def test_one_that_cannot_be_fetched_is_named(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_network(*_: Any, **__: Any) -> str:
        raise OSError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", no_network)
    with pytest.raises(StudyError, match="can't be fetched") as caught:
        hub_kernel.prepare(NAME, results.kernel(NAME))
    assert f"{NAME}, {VERSION}" in str(caught.value)
    assert "no route" in str(caught.value)
    assert not results.kernel(NAME).exists()


def test_a_run_waits_for_the_kernel_that_its_recipe_names(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["hardware"] = {"here": {"memory_gib": 80, "compute_capability": 8.0}}
    raw["recipes"] = {"hub": {"flash_attention_2": {"hub_kernel": NAME}}, "package": {"flash_attention_2": {}}}
    raw["grid"][0] |= {"hardware": "here", "recipes": ["hub", "package"]}
    found = open_study(raw, Results(tmp_path / "results"))
    waits = {found.run(run_id).recipe: found.ops_of(run_id) for run_id in found.planned}
    package = found.results.op("here", "flash_attn")
    assert waits == {"hub": [found.results.kernel(NAME)], "package": [package]}
