"""What the measured matrix keeps of a run, and of where it ran; measuring itself needs a GPU."""

import importlib.metadata
import json
import os
import subprocess
import sys
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
    for number, date in enumerate(("2026-11-22", "2026-11-23", "2026-11-23", "2026-11-23")):
        path = gpu.new_file(tmp_path, "NVIDIA A100-SXM4-80GB")
        assert path.name == "nvidia-a100-sxm4-80gb.json"
        assert not path.exists()
        path.write_text(json.dumps({"date": date, "number": number}), encoding="utf-8")
    found = {
        path.stem.removeprefix("nvidia-a100-sxm4-80gb"): json.loads(path.read_text()) for path in tmp_path.iterdir()
    }
    assert {name: one["number"] for name, one in found.items()} == {
        "-2026-11-22": 0,
        "-2026-11-23": 1,
        "-2026-11-23-2": 2,
        "": 3,
    }


def test_what_is_missing_is_said_in_a_sentence(tmp_path: Path) -> None:
    """By a Python that has nothing but its own library."""
    script = Path(gpu.__file__)
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "lacks torch, transformers" in done.stderr
    assert "pip install '.[training]' pytest" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_row_says_the_settings_that_are_not_the_defaults() -> None:
    rows = {one.run.recipe: techniques.chosen_settings(one.run.parsed_techniques) for one in gpu.study(A100)}
    assert rows["lora-checkpoints"] == {"lora": {"r": 64, "lora_alpha": 32}}
    assert rows["full-mixed"] == {}
