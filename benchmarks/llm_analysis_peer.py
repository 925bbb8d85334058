"""llm-analysis as a peer of the predictor, in an environment of its own: its requirements exclude transformers 5."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune_study.forecast.memory import OPTIMIZERS
from finetune_study.forecast.predict import Question
from finetune_study.forecast.recipe import Recipe

ENVIRONMENT = Path(__file__).resolve().parents[1] / "build" / "llm-analysis"
PACKAGES = ("llm-analysis==0.2.2", "fire==0.7.1", "termcolor==3.3.0")
"""Without what it asks for beside them: shapes are given, so that it needs neither transformers nor a hub."""
ROWS = Path(__file__).with_name("llm_analysis_rows.py")


def row_of(question: Question) -> dict[str, Any] | None:
    """The question as llm-analysis understands it; None where it has no means to."""
    recipe = question.recipe
    plain_adam = recipe.optimizer.startswith("adamw") and OPTIMIZERS[recipe.optimizer].states == 2
    if recipe.peft or not plain_adam or any(map(recipe.has, ("offload_optimizer", "offload_param"))):
        return None
    config = question.config
    hidden = config.get("hidden_size") or config["n_embd"]
    shape = {
        "num_layers": config.get("num_hidden_layers") or config["n_layer"],
        "n_head": config.get("num_attention_heads") or config["n_head"],
        "num_key_value_heads": config.get("num_key_value_heads"),
        "hidden_dim": hidden,
        "vocab_size": config["vocab_size"],
        "max_seq_len": question.context,
        "ffn_embed_dim": config.get("intermediate_size") or 4 * hidden,
        "expansion_ratio": (config.get("intermediate_size") or 4 * hidden) / hidden,
    }
    return {
        "shape": shape,
        "num_gpus": question.num_gpus,
        "batch": question.batch,
        "accumulation": question.accumulation,
        "context": question.context,
        "zero": {"zero1": 1, "zero2": 2, "zero3": 3, "fsdp": 3}.get(str(recipe.sharding), 0),
        "recompute": recipe.has("gradient_checkpointing"),
        "flash": recipe.attention != "eager",
        "gated": config["model_type"] in ("llama", "mistral", "qwen2", "gemma", "phi3"),
        **_bytes(recipe),
    }


def _bytes(recipe: Recipe) -> dict[str, int]:
    """Its gradients and master weights have one width, which is subtracted where there is no master copy."""
    if recipe.precision == "bf16_pure":
        return {"bits": 16, "master_bytes": 2, "state_bytes": 2}
    if recipe.master or recipe.sharding == "fsdp":
        return {"bits": 16, "master_bytes": 4, "state_bytes": 8}
    return {"bits": 32, "master_bytes": 4, "state_bytes": 4}


def ask(questions: Sequence[Question]) -> list[float | None]:
    """What it says of each question, GiB on one device.

    Raises:
        subprocess.CalledProcessError: where its environment can't be made.
    """
    rows = [row_of(question) for question in questions]
    asked = [json.dumps(row) for row in rows if row is not None]
    if not asked:
        return [None] * len(rows)
    python = _environment()
    answer = subprocess.run([python, ROWS], input="\n".join(asked), capture_output=True, text=True, check=True)
    answers = iter(answer.stdout.splitlines())
    return [None if row is None else json.loads(next(answers)) for row in rows]


def _environment() -> Path:
    python = ENVIRONMENT / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", ENVIRONMENT], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES], check=True)
    return python
