"""The executor is a package of its own: it holds what it needs, and nobody else's code."""

import ast
import email
import importlib.util
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLUGIN = ROOT / "src" / "snakemake_executor_plugin_submitit"
STUDY = ROOT / "src" / "finetune_study"
ABOUT_THE_STUDY = {
    f"test_{name}.py"
    for name in (
        "accounting",
        "clusters_page",
        "doctor",
        "implied_oom",
        "nodes",
        "places",
        "software",
        "status",
        "study",
    )
}
"""All others here are about the plugin."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """As it is built from its folder."""
    folder = tmp_path_factory.mktemp("wheel")
    isolation = [] if importlib.util.find_spec("hatchling") is None else ["--no-build-isolation"]
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", *isolation, "--wheel-dir", str(folder), str(PLUGIN)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if built.returncode != 0 and "hatchling" in built.stdout and "No matching distribution" in built.stdout:
        pytest.skip("hatchling builds the wheel, and no package index has it here")
    assert built.returncode == 0, built.stdout
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def _metadata(wheel: zipfile.ZipFile) -> "email.message.Message[str, str]":
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return email.message_from_string(wheel.read(name).decode())


def _imported(files: Iterable[Path]) -> dict[str, set[str]]:
    """Top names of all that files import, by file."""
    found: dict[str, set[str]] = {}
    for file in files:
        names = found.setdefault(str(file.relative_to(ROOT)), set())
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively"
                names.add(str(node.module).split(".")[0])
    return found


def test_wheel_holds_the_plugin_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {f"{PLUGIN.name}/{path.name}" for path in PLUGIN.glob("*.py")} | {f"{PLUGIN.name}/py.typed"}
    for name in names:
        assert wheel.read(name) == (PLUGIN.parent / name).read_bytes()


def test_metadata_has_readme_and_needs(wheel: zipfile.ZipFile) -> None:
    metadata = _metadata(wheel)
    assert metadata["Name"] == "snakemake-executor-plugin-submitit"
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload() == (PLUGIN / "README.md").read_text(encoding="utf-8")
    needs = {re.split(r"[^\w-]", str(need))[0] for need in metadata.get_all("Requires-Dist", [])}
    strangers = {
        name
        for names in _imported(PLUGIN.glob("*.py")).values()
        for name in names
        if name not in sys.stdlib_module_names
    }
    assert strangers - {PLUGIN.name} == {need.replace("-", "_") for need in needs}


def test_plugin_and_study_do_not_know_each_other() -> None:
    for file, names in _imported(PLUGIN.glob("*.py")).items():
        assert STUDY.name not in names, file
    for file, names in _imported(STUDY.rglob("*.py")).items():
        assert PLUGIN.name not in names, file


def test_tests_of_the_plugin_do_not_know_the_study() -> None:
    files = [file for file in Path(__file__).parent.glob("*.py") if file.name not in ABOUT_THE_STUDY]
    for file, names in _imported(files).items():
        assert STUDY.name not in names, file
