"""What tests of all kinds share."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_study import TINY_STUDY

TESTS = Path(__file__).parent


def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Which tests stay together when two processes share the suite: those of the one cluster, and of one trained model.

    So what waits for SLURM goes on beside what computes.
    """
    for item in items:
        folder, *names = item.path.relative_to(TESTS).with_suffix("").parts
        item.add_marker(pytest.mark.xdist_group("/".join([folder, *names] if folder == "unit" else [folder])))


@pytest.fixture
def raw() -> dict[str, Any]:
    """The tiny study as YAML would give it; tests change their own copy."""
    return copy.deepcopy(TINY_STUDY)
