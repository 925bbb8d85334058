"""Rates are really measured, and forecasts count with them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.training


def test_two_ranks_on_the_cpu(tmp_path: Path) -> None:
    output = tmp_path / "calibration" / "cpu.json"
    command = [sys.executable, "-m", "finetune_study.calibrate", "--device", "cpu", "--num-gpus", "2", str(output)]
    subprocess.run(command, check=True, timeout=300)
    rates = json.loads(output.read_text())["rates"]
    assert 1e9 < rates["matmul_fp32"] < 1e14
    assert 1e8 < rates["memory"] < 1e12
    assert 1e7 < rates["link"] < 1e12
    assert 1e-7 < rates["launch_backward"] < 1e-3
    assert 1e-7 < rates["launch_forward"] < 1e-3
