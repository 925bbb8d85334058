"""What tests of all kinds share."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.debian import need
from tests.tiny_study import TINY_STUDY


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Three processes share the suite: what waits for SLURM goes on beside what computes.

    What has one cluster, or one trained model, stays in one process; of the unit tests, each module does.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            module = nodeid.partition("::")[0]
            folder = Path(module).parts[1]
            return module if folder == "unit" else folder

    return ByFolder(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What stays in one process begins first; the modules of unit tests fill what is left."""
    items.sort(key=lambda item: "tests/unit/" in item.nodeid)


@pytest.fixture
def raw() -> dict[str, Any]:
    """The tiny study as YAML would give it; tests change their own copy."""
    return copy.deepcopy(TINY_STUDY)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    from playwright import sync_api  # here: a machine that only tests its GPUs has none

    need("chromium", "chromium")
    with sync_api.sync_playwright() as playwright:
        # No sandbox: the tests also run as root, in a container; the page is our own.
        launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        yield launched
        launched.close()
