from pathlib import Path
from typing import Any

import yaml
from typer.testing import CliRunner

from finetune_study import cli
from finetune_study.paths import Results
from finetune_study.study import open_study
from tests.unit import handmade


def test_plan_counts_runs_by_reason(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["recipes"] = {"full": {}, "lora": {"lora": {}}, "flash": {"flash_attention_2": {}}, "tf32": {"tf32": {}}}
    raw["grid"][0] |= {"recipes": list(raw["recipes"]), "sequence_length": [32, 64, 128]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw), encoding="utf-8")
    results = Results(tmp_path / "results")
    found = {(one.run.recipe, one.run.sequence_length): one.run for one in open_study(raw, results).planned.values()}
    handmade.write(results.root, handmade.out_of_memory(found["full", 32]), handmade.completed(found["lora", 32], 1.0))
    answer = CliRunner().invoke(cli.app, ["plan", "-c", str(tmp_path / "config.yaml"), "-r", str(results.root)])
    assert answer.exit_code == 0, answer.output
    *counts, summary = answer.output.splitlines()[-6:]
    implied, measured, to_train, flash, tf32 = sorted(counts)
    assert (implied, measured, to_train) == ("2 implied out of memory", "2 measured", "2 to train")
    assert flash.startswith("3 unsupported: FlashAttention-2 has CUDA kernels alone")
    assert tf32.startswith("3 unsupported: transformers: --tf32 requires")
    assert summary == "12 runs, 2 measured, 2 to train, 6 unsupported, 2 implied out of memory"
