"""A real GPU; without one everything here is skipped."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.hardware import gpu_hardware
from tests.training.lab import STEPS, Lab
from tests.training.pairs import Trained


@pytest.fixture(scope="session")
def gpu() -> dict[str, Any]:
    try:
        return gpu_hardware()
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no GPU: {error}")


@pytest.fixture(scope="session")
def gpu_lab(gpu: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("gpu-lab"), gpu)


@pytest.fixture(scope="session")
def trained(gpu_lab: Lab, gpu: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trained]:
    trained = Trained(gpu_lab, tmp_path_factory.mktemp("gpu-pools"))
    yield trained
    trained.stop()
    if path := os.environ.get("TECHNIQUES_RAN"):
        used = " or ".join(map(str, trained.numbers_of_devices()))
        what = f"a Llama of 98,624 weights with random weights, {STEPS} optimizer steps, GPUs of a run: {used}"
        trained.write(Path(path), device=gpu["gpu"], command="make gpu-check", what=what)
