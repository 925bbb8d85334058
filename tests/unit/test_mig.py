# ruff: noqa: N802, N815  (NVML's own names)
"""Slices of a GPU. This machine has no GPU: NVML and torch's properties are played, with their own words."""

import json
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_study import allocation, mig, plan
from finetune_study import config as config_module
from finetune_study.allocation import Asked
from finetune_study.config import Hardware
from finetune_study.errors import ConfigError, UnfitNodeError
from finetune_study.measure import environment
from finetune_study.measure.energy import EnergyMeter
from tests.unit.test_allocation import A100, Driver, a_run, card, no_patience

__all__ = ["no_patience"]

SLICE = f"{A100} MIG 3g.40gb"
UUID = "MIG-2f5c1a0e-6c1e-5d0b-9a53-1d1e7a1b9f10"
ENTRY: dict[str, Any] = {"gpu": SLICE, "memory_gib": 40, "slurm": {"gpu_model": "a100_3g.40gb"}}
ASKED = Asked.of(Hardware.model_validate(ENTRY))


class SlicedDriver(Driver):
    """Answers as NVML does of cards in MIG mode and their slices, as far as it is asked."""

    NVML_DEVICE_MIG_ENABLE = 1
    NVML_CLOCK_SM = NVML_CLOCK_MEM = NVML_TEMPERATURE_GPU = 0

    def nvmlDeviceGetMigMode(self, gpu: dict[str, Any]) -> list[int]:
        return [gpu.get("mig_mode", 0), 0]

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, gpu: dict[str, Any]) -> dict[str, Any]:
        return dict(gpu["card"])

    def nvmlSystemGetDriverVersion(self) -> str:
        return "570.00"

    def nvmlDeviceGetTotalEnergyConsumption(self, gpu: dict[str, Any]) -> int:
        return 1000

    def nvmlDeviceGetClockInfo(self, gpu: dict[str, Any], clock: int) -> int:
        return 1410

    nvmlDeviceGetMaxClockInfo = nvmlDeviceGetTemperature = nvmlDeviceGetClockInfo

    def nvmlDeviceGetEnforcedPowerLimit(self, gpu: dict[str, Any]) -> int:
        return 400_000

    nvmlDeviceGetCurrentClocksThrottleReasons = nvmlDeviceGetEnforcedPowerLimit


def a_slice(uuid: str = UUID, name: str = SLICE, gib: float = 39.25, **more: Any) -> dict[str, Any]:
    return {"uuid": uuid, "name": name, "gib": gib, "used": 0.1, "pids": (), "card": card(0) | {"mig_mode": 1}, **more}


def plug_in(monkeypatch: pytest.MonkeyPatch, *gpus: dict[str, Any]) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SlicedDriver(*gpus))


def refusal(num_gpus: int = 1, visible: str = UUID, **entry: Any) -> str:
    """What a node with these visible devices is told; another node may do."""
    with pytest.raises(UnfitNodeError) as caught:
        allocation.check(a_run(num_gpus, **(ENTRY | entry)), ASKED, {"CUDA_VISIBLE_DEVICES": visible})
    return str(caught.value)


# --- recognised ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "is_slice"),
    [
        (SLICE, True),
        ("NVIDIA A100-SXM4-80GB MIG 1c.3g.40gb", True),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb+me", True),
        ("a100_3g.40gb", True),
        ("1g.5gb", True),
        ("nvidia_h100_80gb_hbm3_mig_1g.10gb", True),
        ("a100_mig", True),
        (A100, False),
        ("a100", False),
        ("a100-80gb", False),
        ("NVIDIA GeForce RTX 3090", False),
        ("migration", False),
        (None, False),
    ],
)
def test_slices_are_recognised_by_name(name: str | None, is_slice: bool) -> None:
    assert mig.is_slice_name(name) == is_slice


@pytest.mark.parametrize(
    ("name", "is_slice"),
    [(UUID, True), ("MIG-GPU-2f5c/3/0", True), ("GPU-2f5c", False), ("0", False), ("", False), (None, False)],
)
def test_slices_are_recognised_by_what_was_allotted(name: str | None, is_slice: bool) -> None:
    assert mig.is_slice_id(name) == is_slice


# --- planned ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [ENTRY, ENTRY | {"gpu": None}, ENTRY | {"slurm": {}}], ids=["both", "SLURM's", "gpu"])
def test_more_than_one_slice_is_unsupported_with_the_reason(raw: dict[str, Any], entry: dict[str, Any]) -> None:
    raw["hardware"]["slices"] = entry | {"max_gpus": 7}
    raw["grid"][0] |= {"hardware": "slices", "recipes": "full", "num_gpus": [1, 2]}
    one, two = plan.plan(config_module.parse(raw))
    assert one.unsupported is None
    assert str(two.unsupported).startswith("2 GPUs asked for; a run takes one MIG slice")
    assert "NCCL" in str(two.unsupported)


def test_a_slice_of_slurms_and_a_whole_card_contradict_each_other(raw: dict[str, Any]) -> None:
    raw["hardware"]["slices"] = ENTRY | {"gpu": A100}
    with pytest.raises(ConfigError) as caught:
        config_module.parse(raw)
    for words in ("hardware.slices", "a100_3g.40gb` is a slice (MIG)", f"{A100} MIG 3g.40gb", "or leave `gpu` out"):
        assert words in str(caught.value)


# --- checked on the node ---------------------------------------------------------------------------------------------


def test_a_slice_is_looked_at_by_its_uuid_and_has_a_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, card(0) | {"mig_mode": 1}, a_slice("MIG-other", pids=(1,)), a_slice())
    said = allocation.check(a_run(**ENTRY), ASKED, {"CUDA_VISIBLE_DEVICES": UUID})
    assert said["found"]["gpus"] == [
        {
            "id": UUID, "uuid": UUID, "name": SLICE, "slice_of": A100, "is_divided": False,
            "memory_gib": 39.25, "memory_used_gib": 0.1, "processes": [],
        }
    ]  # fmt: skip
    json.dumps(said)


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (a_slice(name=f"{A100} MIG 1g.10gb", gib=9.5), f"GPU {UUID} is '{A100} MIG 1g.10gb', not '{SLICE}'"),
        (a_slice(gib=19.5), f"GPU {UUID} has 19.5 GiB, not about 40"),
        (a_slice(pids=(2**22 + 1,)), f"GPU {UUID} is in use by process {2**22 + 1}"),
        (a_slice("MIG-other"), "0 GPUs instead of 1"),
    ],
    ids=["another profile", "another memory", "in use", "not there"],
)
def test_another_slice_is_refused(monkeypatch: pytest.MonkeyPatch, found: dict[str, Any], words: str) -> None:
    plug_in(monkeypatch, found)
    assert words in refusal()


def test_a_driver_that_gives_a_slice_its_cards_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Believed where the entry says that it is a slice of that card, and only there."""
    plug_in(monkeypatch, a_slice(name=A100))
    allocation.check(a_run(**ENTRY), ASKED, {"CUDA_VISIBLE_DEVICES": UUID})
    assert "not 'Tesla V100 MIG 3g.40gb'" in refusal(gpu="Tesla V100 MIG 3g.40gb")
    assert f"not '{A100}'" in refusal(gpu=A100, slurm={})


def test_several_slices_are_refused_where_no_name_gave_them_away(monkeypatch: pytest.MonkeyPatch) -> None:
    plug_in(monkeypatch, a_slice("MIG-1"), a_slice("MIG-2"))
    assert "a run takes one MIG slice" in refusal(2, "MIG-1,MIG-2", gpu=None, slurm={})


def test_a_divided_card_is_not_taken_for_a_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """NVML tells the memory of the card; CUDA would take its first slice."""
    plug_in(monkeypatch, card(0) | {"mig_mode": 1}, card(1))
    whole: dict[str, Any] = {"gpu": A100, "memory_gib": 80, "slurm": {}}
    assert "GPU 0 is divided into slices (MIG)" in refusal(visible="0", **whole)
    allocation.check(a_run(**whole), Asked(memory_gib=80), {"CUDA_VISIBLE_DEVICES": "1"})


# --- measured --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "visible", "uuid"),
    [(SLICE, "0", "MIG-abc"), (A100, UUID, "MIG-abc"), (A100, "GPU-abc", "GPU-abc"), (A100, None, "GPU-abc")],
)
def test_a_rank_knows_that_its_gpu_is_a_slice(
    monkeypatch: pytest.MonkeyPatch, name: str, visible: str | None, uuid: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(name=name, uuid="abc"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment.gpu_uuid() == uuid


def test_what_belongs_to_the_whole_card_is_null_for_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Although a driver may give the card's readings for it."""
    plug_in(monkeypatch, card(0), a_slice())
    for uuid, joules, clock in (("GPU-0", 0.0, 1410), (UUID, None, None)):
        meter = EnergyMeter(uuid)
        meter.start()
        meter.stop()
        assert meter.joules == joules
        state = environment.gpu_state(uuid)
        assert state.pop("driver") == "570.00"
        assert state["sm_clock_mhz"] == clock
        assert {value is None for value in state.values()} == {clock is None}
