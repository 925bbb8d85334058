"""Rates that a device reaches, measured here on a CPU with small sizes."""

from pathlib import Path

import pytest

from finetune_study import calibrate
from finetune_study.forecast import time
from finetune_study.forecast.hardware import Device


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibrate, "SIDE", {"cpu": 256})
    monkeypatch.setattr(calibrate, "BYTES", {"cpu": 2**20})
    monkeypatch.setattr(calibrate, "PASSES", 1)
    monkeypatch.setattr(calibrate, "CPU_WEIGHTS", 2**12)
    monkeypatch.setattr(calibrate, "REPEATS", 1)


def test_every_rate_that_a_forecast_reads_is_measured(tmp_path: Path) -> None:
    found = calibrate.calibrate("cpu", 1)["rates"]
    assert set(found) == {
        "matmul_fp32", "attention_fp32", "matmul_bf16", "attention_bf16", "memory", "launch_forward", "launch_backward",
        "host", "cpu_optimizer",
    }  # fmt: skip
    assert all(rate > 0 for rate in found.values())
    rates = time.rates_of(Device(name="cpu", device="cpu"), 1, found)
    assert rates is not None
    assert rates.matmul["bf16"] == found["matmul_bf16"] * time.SHAPES_OF_LAYERS
    assert rates.launch == {"forward": found["launch_forward"], "backward": found["launch_backward"]}
    assert (rates.memory, rates.host, rates.cpu_optimizer) == tuple(
        found[name] for name in ("memory", "host", "cpu_optimizer")
    )


def test_a_link_that_was_measured_within_a_node_says_nothing_between_nodes() -> None:
    device = Device(name="x", tflops={"bf16": 100}, memory_gb_per_s=1000, network_gb_per_s=10, link_gb_per_s=300)
    within, between = (time.rates_of(device, gpus, {"link": 5e10}) for gpus in (8, 16))
    assert within is not None
    assert between is not None
    assert within.link == 5e10
    assert between.link == 10e9 * time.LINK_EFFICIENCY
