"""An exported recipe is run as a lab would run it: on data of its own, cut off, and gone on with."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune_study import export as exporter
from finetune_study import model_source
from finetune_study.config import Config
from finetune_study.plan import plan
from finetune_study.study import Study
from tests.unit import handmade

pytestmark = pytest.mark.long

ARCHITECTURE = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 259,
}


RECIPES: dict[str, dict[str, Any]] = {
    "lora-gc": {"lora": {"r": 4}, "gradient_checkpointing": {}},
    "zero2": {"zero2": {}},
    "zero3": {"zero3": {}},
    "zero3-lora": {"zero3": {}, "lora": {"r": 4}},
}


def config(recipe: str = "lora-gc", num_gpus: int = 1) -> Config:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": recipe, "sequence_length": 64, "num_gpus": num_gpus}
    return handmade.study(
        models={"tiny": {"architecture": ARCHITECTURE, "weights": "random"}},
        recipes=RECIPES,
        grid=[block],
        training={"effective_batch_size": 2, "learning_rate": 0.01},
    )


def exported(root: Path, recipe: str = "lora-gc", num_gpus: int = 1) -> Path:
    study_config = config(recipe, num_gpus)
    planned = {one.run.run_id: one for one in plan(study_config)}
    (run,) = (one.run for one in planned.values())
    results = handmade.write(root / "results", handmade.completed(run, 0.05, 0.05, 0.05))
    study = Study(study_config, results, planned)
    frame = handmade.frame(study_config, root / "results")
    one = exporter.choose(study, frame, "tiny", "cpu", None, None)
    exporter.export(study, one, root / "export")
    return root / "export"


def model(root: Path) -> Path:
    """A model of one's own, with weights: what random weights in a study stand for."""
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = root / "model"
    (run,) = (one.run for one in plan(config()))
    model_source.prepare(run.model, folder)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).save_pretrained(folder)
    return folder


def start(folder: Path, *arguments: str) -> str:
    """The job's script as SLURM would start it."""
    variables = os.environ | {"SLURM_SUBMIT_DIR": str(folder)}
    done = subprocess.run(["bash", "job.sbatch", *arguments], cwd=folder, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.training
def test_an_exported_recipe_trains_one_epoch_checks_the_promise_and_goes_on_after_a_cut(tmp_path: Path) -> None:
    folder, own = exported(tmp_path), model(tmp_path)
    rows = [{"dialogue": f"A: is it {n}?\nB: it is.", "summary": f"It is {n}."} for n in range(12)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings: dict[str, Any] = json.loads((folder / "training_arguments.json").read_text())
    assert (settings["per_device_train_batch_size"], settings["gradient_accumulation_steps"]) == (1, 2)
    (folder / "training_arguments.json").write_text(json.dumps(settings | {"save_steps": 2, "logging_steps": 1}))

    start(folder, "my.jsonl", "--model", str(own))
    promised = json.loads((folder / "output" / "promised.json").read_text())
    assert promised["optimizer_steps"] == 6
    assert promised["promised_hours"] == pytest.approx(6 * 0.05 / 3600)
    assert promised["taken_over_promised"] == pytest.approx(promised["taken_hours"] / promised["promised_hours"])
    assert promised["promised_step_seconds"] == 0.05
    assert promised["seconds_before_first_step"] > 0
    assert 0 < promised["taken_step_seconds_median"] < promised["taken_hours"] * 3600 / 3
    assert (folder / "output" / "adapter_model.safetensors").exists()

    # As after a time limit: the last checkpoint and what followed are gone.
    subprocess.run(["rm", "-r", str(folder / "output" / "checkpoint-6")], check=True)
    said = start(folder, "my.jsonl", "--model", str(own))
    again = json.loads((folder / "output" / "promised.json").read_text())
    assert again["resumed_from"] == "output/checkpoint-4"
    until_there = json.loads((folder / "output" / "checkpoint-4" / "seconds.json").read_text())
    assert again["taken_hours"] > until_there / 3600 > 0, "hours are of the whole epoch"
    assert '"optimizer_steps": 6' in said


@pytest.mark.training
@pytest.mark.parametrize("recipe", ["zero2", "zero3", "zero3-lora"])
def test_what_deepspeed_trained_is_a_model_that_transformers_reads(recipe: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, own = exported(tmp_path, recipe, num_gpus=2), model(tmp_path)
    (folder / "my.jsonl").write_text("".join(json.dumps({"text": f"It is {n}."}) + "\n" for n in range(4)))
    start(folder, "my.jsonl", "--model", str(own), "--merge")
    assert json.loads((folder / "output" / "promised.json").read_text())["optimizer_steps"] == 2
    saved = folder / "output" / ("merged" if "lora" in recipe else "")
    assert len(AutoTokenizer.from_pretrained(saved)) == len(AutoTokenizer.from_pretrained(own))
    before, after = (AutoModelForCausalLM.from_pretrained(one).state_dict() for one in (own, saved))
    assert before.keys() == after.keys()
    changed = [name for name in before if not torch.equal(before[name].float(), after[name].float())]
    assert any("q_proj" in name for name in changed)
    assert all(before[name].shape == after[name].shape for name in before)
