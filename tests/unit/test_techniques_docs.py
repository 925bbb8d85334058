import json
from pathlib import Path

import pytest

from finetune_study import techniques, techniques_docs
from finetune_study.errors import StudyError

ROOT = Path(__file__).parents[2]


Runs = list[tuple[list[str], int, str]]
"""Techniques, number of devices, how it ended."""


def store(folder: Path, name: str, device: str, runs: Runs, matrix: Runs | None = None) -> None:
    rows = [
        [{"techniques": names, "num_gpus": number, "ended": ended} for names, number, ended in part]
        for part in (runs, matrix or [])
    ]
    whole = {"device": device, "technique_runs": rows[0]} | ({"matrix": rows[1]} if matrix else {})
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(whole), encoding="utf-8")


def row(page: str, technique: str) -> list[str]:
    (line,) = [line for line in page.splitlines() if line.startswith(f"| `{technique}` |") and "|" in line[20:]][:1]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_committed_page_is_in_step() -> None:
    techniques_docs.generate(ROOT / "docs" / "techniques.md", ROOT / "benchmarks" / "results", check=True)


def test_a_page_out_of_step_names_the_repair(tmp_path: Path) -> None:
    page = tmp_path / "techniques.md"
    techniques_docs.generate(page, tmp_path, check=False)
    store(tmp_path, "techniques-cpu.json", "CPU", [(["lora"], 1, "completed")])
    with pytest.raises(StudyError, match="run `finetune-study techniques-docs`"):
        techniques_docs.generate(page, tmp_path, check=True)


def test_nothing_is_said_to_have_run_without_a_stored_result(tmp_path: Path) -> None:
    page = techniques_docs.page(tmp_path)
    assert {row(page, name)[-1] for name in techniques.ALL} == {"never run"}
    assert "GPUs: none yet" in page


def test_cells_are_those_of_the_stored_results(tmp_path: Path) -> None:
    cpu = [(["lora"], 1, "completed"), (["lora", "zero2"], 2, "completed"), (["muon"], 2, "ValueError: no")]
    store(tmp_path, "techniques-cpu.json", "CPU", cpu)
    gpu = [(["fp8"], 1, "ValueError"), (["tf32"], 1, "completed")]
    measured = [(["bf16", "sdpa"], 1, "completed"), (["bf16", "zero3"], 8, "completed"), (["eager"], 1, "oom")]
    store(tmp_path, "gpu/nvidia-a100.json", "NVIDIA A100", gpu, measured)
    page = techniques_docs.page(tmp_path)
    assert row(page, "lora")[-2:] == ["run on 1 and 2, beside 1 other", "never run"]
    assert row(page, "muon")[-2:] == ["never run", "never run"]
    assert row(page, "tf32")[-2:] == ["never run", "run on 1"]
    assert row(page, "bf16")[-1] == "run on 1 and 8, beside 2 others", "of the measured matrix"
    assert row(page, "zero3")[-1] == "run on 8, beside 1 other"
    assert row(page, "eager")[-1] == "never run", "it ran out of memory"
    assert row(page, "fp8")[-1] == "never run"
    assert "[gpu/nvidia-a100.json](../benchmarks/results/gpu/nvidia-a100.json), 3 recipes" in page
    assert "GPUs: none yet" not in page


def test_files_of_one_device_share_a_column(tmp_path: Path) -> None:
    store(tmp_path, "techniques-cpu-1.json", "CPU", [(["lora"], 1, "completed")])
    store(tmp_path, "techniques-cpu-2.json", "CPU", [(["lora", "zero2"], 2, "completed")])
    page = techniques_docs.page(tmp_path)
    assert row(page, "lora")[-2:] == ["run on 1 and 2, beside 1 other", "never run"]
    assert "seen on CPU | seen on a GPU |" in page
    assert page.count("seen on CPU") == 1


def test_what_can_run_where(tmp_path: Path) -> None:
    page = techniques_docs.page(tmp_path)
    columns = ["technique", "kind", *techniques_docs.PLACES]
    cells = dict(zip(columns, row(page, "bf16"), strict=False))
    assert (cells["CPU"], cells["A100"]) == ("yes", "yes")
    number = cells["V100"].removeprefix("no (").removesuffix(")")
    assert f"\n{number}. bf16 needs compute capability 8.0; this GPU has 7.0: use fp16\n" in page


def test_exclusions_are_listed_with_their_reason(tmp_path: Path) -> None:
    page = techniques_docs.page(tmp_path)
    reason = techniques.ALL["gradient_checkpointing"].excludes["prefix_tuning"]
    assert f"| `prefix_tuning` | `gradient_checkpointing` | everywhere | {reason} |" in page
    assert "| `adalora` | `zero2` | everywhere | peft moves ranks by the gradients" in page
    assert "| `bf16_pure` | `offload_optimizer` | CPU | DeepSpeed: Master weights" in page
    assert "| `offload_optimizer` | `adamw_8bit` | GPUs | DeepSpeed updates" in page
    assert "| `fp16` | `optimizer_in_backward` | everywhere | torch's loss scaling" in page, "a CPU has fp16 nowhere"
    assert "| `adalora` | `zeropp` |" not in page, "it is zero3, which zeropp needs, that is in the way"


def test_what_each_changes_is_said_by_its_module(tmp_path: Path) -> None:
    page = techniques_docs.page(tmp_path)
    assert "| `lora` | Freezes the weights and trains a low-rank update of chosen linear layers. | memory: " in page


def test_settings_are_said_where_they_were_stored(tmp_path: Path) -> None:
    rows = [
        {"techniques": ["lora"], "num_gpus": 1, "ended": "completed", "settings": {"lora": {"r": 4}}},
        {"techniques": ["fp8"], "num_gpus": 1, "ended": "completed", "settings": {}},
        {"techniques": ["muon"], "num_gpus": 1, "ended": "ValueError", "settings": {"muon": {"nesterov": False}}},
    ]
    for name, runs in (("new", rows), ("defaults", rows[1:2])):
        path = tmp_path / f"techniques-{name}.json"
        path.write_text(json.dumps({"device": "CPU", "technique_runs": runs}), encoding="utf-8")
    store(tmp_path, "techniques-old.json", "CPU", [(["lora"], 1, "completed")])
    page = techniques_docs.page(tmp_path)
    assert "techniques-new.json), 2 recipes, at default settings, but for `lora` with `r: 4`\n" in page
    assert row(page, "lora")[-2] == "run on 1; with `r: 4`, too, on 1", "an older file does not say with what"
    (tmp_path / "techniques-old.json").unlink()
    assert row(techniques_docs.page(tmp_path), "lora")[-2] == "run on 1, never but with `r: 4`"
    assert "techniques-defaults.json), 1 recipes, all at default settings\n" in page
    assert "techniques-old.json), 1 recipes, whose settings were not stored\n" in page


NO_NUMBER = '{"device": "x", "technique_runs": [{"techniques": ["lora"], "ended": "completed"}]}'


@pytest.mark.parametrize("text", ["{", "[]", '{"device": "x"}', NO_NUMBER])
def test_a_broken_result_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "techniques-cpu.json").write_text(text)
    with pytest.raises(StudyError, match=r"techniques-cpu\.json"):
        techniques_docs.page(tmp_path)
