"""What is carried to a machine with a GPU that can fetch nothing."""

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def wheels(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    return importlib.import_module("wheels")


def test_all_that_the_check_imports_is_carried_but_what_pytorch_brings(wheels: Any) -> None:
    found = wheels.needed("3.12", "x86_64")
    checked = {"transformers", "accelerate", "peft", "deepspeed", "datasets", "bitsandbytes", "polars", "pydantic"}
    behind_them = {
        "pyyaml",
        "psutil",
        "packaging",
        "pytest",
        "pyarrow",
        "tokenizers",
        "polars-runtime-32",
        "nvidia-ml-py",
    }
    assert checked | behind_them <= found.keys()
    assert not {"torch", "triton", "finetune-study", "snakemake"} & found.keys()


def test_markers_are_those_of_the_other_machine(wheels: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    class Package:
        version = "1"

        def __init__(self, name: str) -> None:
            needs = [
                "old; python_version < '3.12'",
                "arm; platform_machine == 'aarch64'",
                "extra; extra == 'x'",
                "plain",
            ]
            self.requires = needs if name == "pytest" else []

    monkeypatch.setattr(wheels, "ROOTS", ("pytest",))
    monkeypatch.setattr(wheels.importlib.metadata, "distribution", Package)
    assert [*wheels.needed("3.12", "x86_64")] == ["plain", "pytest"]
    assert [*wheels.needed("3.11", "aarch64")] == ["arm", "old", "plain", "pytest"]
