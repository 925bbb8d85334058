"""Real runs, shared by the tests of this folder."""

import os
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.training.lab import STEPS, Lab
from tests.training.pairs import Trained


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="session")
def trained(lab: Lab, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Trained]:
    trained = Trained(lab, tmp_path_factory.mktemp("pools"))
    yield trained
    trained.stop()
    if path := os.environ.get("TECHNIQUES_RAN"):
        about = f"a Llama of 98,624 weights with random weights, {STEPS} optimizer steps, on one or two ranks"
        command = shlex.join(["python", "-m", "pytest", *map(str, request.config.invocation_params.args)])
        trained.write(Path(path), device="CPU", command=command, what=about)
