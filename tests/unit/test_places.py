import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_study import config, places, plan
from finetune_study.config import Places
from finetune_study.errors import StudyError
from finetune_study.paths import Results
from finetune_study.run import Run


@pytest.fixture
def run(raw: dict[str, Any]) -> Run:
    return plan.plan(config.parse(raw))[0].run


@pytest.fixture
def environment() -> Iterator[None]:
    """What a test does to the variables of this process is undone."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_hardware_entry_leaves_open_what_the_study_says() -> None:
    study, hardware = Places(cache="/scratch/cache", temporary="/scratch/tmp"), Places(temporary="$SLURM_TMPDIR")
    assert places.of(study, hardware) == Places(cache="/scratch/cache", temporary="$SLURM_TMPDIR")
    assert places.of(study, Places()) == study


def test_places_make_no_other_run(raw: dict[str, Any]) -> None:
    before = [planned.run for planned in plan.plan(config.parse(raw))]
    raw["places"] = {"cache": "/elsewhere", "temporary": "$SCRATCH"}
    raw["hardware"]["cpu"]["places"] = {"temporary": "$SLURM_TMPDIR"}
    assert [planned.run for planned in plan.plan(config.parse(raw))] == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"cache": " "}, "places.cache: an empty text is no folder"),
        ({"temporary": "~other/tmp"}, "places.temporary: '~other/tmp': another user's home folder"),
        ({"temp": "/tmp"}, "places.temp: unknown key (did you mean `temporary`?)"),
    ],
)
def test_what_is_no_folder_is_refused(raw: dict[str, Any], given: dict[str, str], words: str) -> None:
    raw["places"] = given
    with pytest.raises(StudyError) as caught:
        config.parse(raw)
    assert words in str(caught.value)


def test_options_leave_variables_to_the_node() -> None:
    assert places.options(Places()) == ""
    assert (
        places.options(Places(cache="$SCRATCH/a b", temporary="~/tmp")) == "'--cache=$SCRATCH/a b' '--temporary=~/tmp'"
    )


def test_home_and_variables_are_written_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", "/home/user")
    monkeypatch.setenv("SCRATCH", "/scratch/user")
    monkeypatch.chdir(tmp_path)
    assert places.written_out("~/x", "places.cache") == Path("/home/user/x")
    assert places.written_out("${SCRATCH}/x", "places.cache") == Path("/scratch/user/x")
    assert places.written_out("x", "places.cache") == tmp_path / "x"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_that_is_not_set_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    """Empty is as bad: `$SCRATCH/cache` would be a folder of the root."""
    monkeypatch.delenv("SCRATCH", raising=False)
    if value is not None:
        monkeypatch.setenv("SCRATCH", value)
    with pytest.raises(StudyError, match=r"\$SCRATCH of a folder in the config is not set"):
        places.written_out("$SCRATCH/cache", "places.cache")


def test_a_folder_that_can_not_be_written_to_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    for asked in (Places(cache=f"{tmp_path}/file/cache"), Places(temporary=f"{tmp_path}/file/tmp")):
        with (
            pytest.raises(StudyError, match=f"can't be written to(.|\n)*{tmp_path}/file/.*: Not a directory"),
            places.opened(asked, run, Results(tmp_path / "results")),
        ):
            pytest.fail("it was opened")


def test_temporary_files_go_when_the_run_ends(tmp_path: Path, run: Run) -> None:
    asked = Places(cache=str(tmp_path / "cache"), temporary=str(tmp_path / "tmp"))
    with places.opened(asked, run, Results(tmp_path / "results")) as variables:
        folder = Path(variables["TMPDIR"])
        assert folder.parent == tmp_path / "tmp"
        (folder / "of-a-rank").mkdir()
        assert variables["XDG_CACHE_HOME"] == str(tmp_path / "cache")
        assert all(value.startswith(str(tmp_path)) for value in variables.values())
    assert list((tmp_path / "tmp").iterdir()) == []
    assert not (tmp_path / "results").exists()


def test_by_default_caches_lie_in_the_results(tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with places.opened(Places(), run, Results(Path("results"))) as variables:
        assert variables["CUDA_CACHE_PATH"] == str(tmp_path / "results" / "cache" / "cuda")


# --- compiled ops -----------------------------------------------------------------------------------------------------

COMPILE = """
import pathlib, sys, torch
from torch.utils import cpp_extension
cpp_extension.load(name="op", sources=[sys.argv[1]], is_python_module=False)
"""


def compile_op(source: Path, variables: dict[str, str]) -> None:
    """As DeepSpeed has its ops compiled, but without torch's own headers, which take a minute."""
    subprocess.run([sys.executable, "-c", COMPILE, str(source)], env=os.environ | variables, check=True)


def test_op_that_was_compiled_once_is_there_for_later_runs(tmp_path: Path, run: Run) -> None:
    asked, results = Places(), Results(tmp_path / "results")
    source = tmp_path / "op.cpp"
    source.write_text('extern "C" int answer() { return 42; }\n')
    made: list[int] = []
    for number in range(3):
        if number == 2:
            source.write_text('extern "C" int answer() { return 43; }\n')
        with places.opened(asked, run, results) as variables:
            compile_op(source, variables)
            made.append((Path(variables["TORCH_EXTENSIONS_DIR"]) / "op" / "op.so").stat().st_mtime_ns)
        (kept,) = (results.cache / "torch_extensions").iterdir()
        assert [path.name for path in kept.iterdir()] == ["op"]
        assert (kept / "op" / "op.so").stat().st_mtime_ns == made[-1]
    assert made[0] == made[1] < made[2]


def write_op(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / f"{name}.so").write_text(text)


def test_op_whose_compilation_was_cut_off_is_not_kept(tmp_path: Path, run: Run) -> None:
    """Its lock would make torch wait for ever in every later run."""
    results = Results(tmp_path / "results")
    with places.opened(Places(), run, results) as variables:
        folder = Path(variables["TORCH_EXTENSIONS_DIR"])
        write_op(folder, "whole", "a")
        write_op(folder, "locked", "b")
        (folder / "locked" / "lock").touch()
        (folder / "without_library").mkdir()
    with places.opened(Places(), run, results) as variables:
        assert [path.name for path in Path(variables["TORCH_EXTENSIONS_DIR"]).iterdir()] == ["whole"]


def test_runs_at_the_same_time_do_not_wait_for_each_other(tmp_path: Path, run: Run) -> None:
    results = Results(tmp_path / "results")
    with places.opened(Places(), run, results) as first, places.opened(Places(), run, results) as second:
        assert first["TORCH_EXTENSIONS_DIR"] != second["TORCH_EXTENSIONS_DIR"]
        for variables in (first, second):
            write_op(Path(variables["TORCH_EXTENSIONS_DIR"]), "op", variables["TMPDIR"])
    with places.opened(Places(), run, results) as third:
        assert (Path(third["TORCH_EXTENSIONS_DIR"]) / "op" / "op.so").read_text() in (first["TMPDIR"], second["TMPDIR"])


def test_another_kind_of_hardware_has_ops_of_its_own(tmp_path: Path, run: Run) -> None:
    results = Results(tmp_path / "results")
    with places.opened(Places(), run, results) as variables:
        write_op(Path(variables["TORCH_EXTENSIONS_DIR"]), "op", "a")
    other = run.model_copy(update={"hardware": run.hardware.model_copy(update={"name": "other"})})
    with places.opened(Places(), other, results) as variables:
        assert list(Path(variables["TORCH_EXTENSIONS_DIR"]).iterdir()) == []


# --- where models and data are prepared -------------------------------------------------------------------------------

WHERE = """
from huggingface_hub import constants as c
from datasets import config as d
print(c.HF_HUB_CACHE, c.HF_TOKEN_PATH, d.HF_DATASETS_CACHE)
"""


def hub_folders() -> list[str]:
    """Where the hub's client keeps models, looks for the token, and where `datasets` keeps data."""
    return subprocess.run([sys.executable, "-c", WHERE], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.usefixtures("environment")
def test_downloads_go_to_the_cache_and_the_token_is_still_found(tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "XDG_"))]:
        del os.environ[name]
    os.environ["HOME"] = str(tmp_path / "home")
    places.enter(Places(cache=str(tmp_path / "cache"), temporary=str(tmp_path / "tmp")), Results(tmp_path / "results"))
    assert hub_folders() == [
        str(tmp_path / "cache/huggingface/hub"),
        str(tmp_path / "home/.cache/huggingface/token"),
        str(tmp_path / "cache/huggingface/datasets"),
    ]
    assert os.environ["TMPDIR"] == str(tmp_path / "tmp")


@pytest.mark.usefixtures("environment")
def test_hub_cache_of_the_users_own_is_used(tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("HF_", "XDG_"))]:
        del os.environ[name]
    os.environ["HF_HOME"] = str(tmp_path / "lab")
    places.enter(Places(cache=str(tmp_path / "cache")), Results(tmp_path / "results"))
    assert hub_folders() == [str(tmp_path / "lab" / name) for name in ("hub", "token", "datasets")]
