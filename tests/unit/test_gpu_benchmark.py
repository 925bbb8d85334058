"""What the measured matrix keeps of a run, and of where it ran; measuring itself needs a GPU."""

import importlib.metadata
import os
from pathlib import Path

import pytest
from benchmarks import gpu

from finetune_study import techniques
from finetune_study.outcome import COLUMNS

A100 = {"device": "cuda", "gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0, "max_gpus": 1}


def test_what_is_kept_are_columns_of_outcomes() -> None:
    assert set(gpu.KEPT) <= COLUMNS.keys()
    assert {"optimizer_class", "attention_implementation", "attention_kernel", "compute_dtype"} <= set(gpu.KEPT)


def test_versions_are_kept_of_all_that_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nvidia-smi is a stand-in, as there is no GPU."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 560.35.03\necho 560.35.03\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    kept = gpu.about({"gpu": "NVIDIA A100-SXM4-80GB"})["versions"]
    for name in ("torch", "transformers", "peft", "deepspeed", "accelerate", "bitsandbytes", "torchao"):
        assert kept[name] == importlib.metadata.version(name)
    assert (kept["flash-attn"], kept["cuda"], kept["driver"]) == (None, None, "560.35.03")


def test_an_earlier_result_is_never_lost(tmp_path: Path) -> None:
    names = []
    for date in ("2026-11-22", "2026-11-23", "2026-11-23", "2026-11-23"):
        path = gpu.new_file(tmp_path, "NVIDIA A100-SXM4-80GB", date)
        assert not path.exists()
        path.write_text("{}", encoding="utf-8")
        names.append(path.name.removeprefix("nvidia-a100-sxm4-80gb-"))
    assert names == ["2026-11-22.json", "2026-11-23.json", "2026-11-23-2.json", "2026-11-23-3.json"]


def test_a_row_says_the_settings_that_are_not_the_defaults() -> None:
    rows = {one.run.recipe: techniques.chosen_settings(one.run.parsed_techniques) for one in gpu.study(A100)}
    assert rows["lora-checkpoints"] == {"lora": {"r": 64, "lora_alpha": 32}}
    assert rows["full-mixed"] == {}
