"""Studies to run: one that is measured, one that is fresh."""

import copy
from pathlib import Path
from typing import Any

import pytest

from finetune_study.variables import CACHES
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

OF_CACHES = (*CACHES, "HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CONFIG_HOME", "XDG_DATA_HOME")
"""Variables with which whoever runs the tests may have sent caches elsewhere."""


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The home folder of whoever ran the measured study; empty before."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="session")
def measured_once(tmp_path_factory: pytest.TempPathFactory, home: Path) -> Workplace:
    """The tiny study, run by Snakemake for real, once for all tests; take `measured` to change it."""
    place = Workplace(tmp_path_factory.mktemp("measured"))
    place.write(copy.deepcopy(TINY_STUDY))
    with pytest.MonkeyPatch.context() as patch:
        for name in OF_CACHES:
            patch.delenv(name, raising=False)
        answer = place.snakemake(HOME=str(home))
    assert answer.returncode == 0, answer.stdout
    return place


@pytest.fixture
def measured(measured_once: Workplace, tmp_path: Path) -> Workplace:
    """A copy of the measured study."""
    return measured_once.copy(tmp_path / "study")


@pytest.fixture
def fresh(raw: dict[str, Any], tmp_path: Path) -> Workplace:
    """The tiny study, nothing run."""
    place = Workplace(tmp_path / "study")
    place.write(raw)
    return place
