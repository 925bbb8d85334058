"""What tests of all kinds share."""

import copy
from typing import Any

import pytest

from tests.tiny_study import TINY_STUDY


@pytest.fixture
def raw() -> dict[str, Any]:
    """The tiny study as YAML would give it; tests change their own copy."""
    return copy.deepcopy(TINY_STUDY)
