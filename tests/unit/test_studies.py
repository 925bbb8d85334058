"""The ready studies: what each of them plans, and that it is the paper's."""

from collections import Counter
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from snakemake.common.configfile import load_configfile
from snakemake.utils import update_config
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finetune_study import config, plan
from finetune_study.plan import PlannedRun

FOLDER = Path("config/studies")
NAMES = ("best-default", "large-models", "limited-gpus", "long-context")
CONTEXTS = [256, 512, 1024, 2048, 4096]
NO_FLASH = "FlashAttention-2 needs compute capability 8.0; this GPU has 7.0: use sdpa"


def planned(name: str) -> list[PlannedRun]:
    return plan.plan(config.load(FOLDER / f"{name}.yaml"))


def values(runs: list[PlannedRun], name: str) -> list[Any]:
    """What stands on an axis, in the order of the plan."""
    return list(dict.fromkeys(getattr(one.run, name) for one in runs))


def test_every_study_is_tested_here() -> None:
    assert tuple(sorted(path.stem for path in FOLDER.glob("*.yaml"))) == NAMES


@pytest.mark.parametrize(
    ("name", "runs", "unsupported"),
    [
        # targets x machines x recipes x repeats
        ("best-default", 3 * 2 * 20 * 3, {}),
        # targets x machines x recipes
        ("large-models", 2 * 2 * 10, {}),
        # machines x contexts x recipes of each of two targets, and of the largest; flash recipes of a V100 don't run
        ("long-context", 2 * 5 * (2 * 6 + 3), {NO_FLASH: 5 * (2 * 2 + 1)}),
        # targets x machines x GPUs x contexts x recipes
        ("limited-gpus", 3 * 2 * 4 * 5 * 15, {NO_FLASH: 3 * 4 * 5 * 5}),
    ],
)
def test_plan(name: str, runs: int, unsupported: dict[str, int]) -> None:
    found = planned(name)
    assert len(found) == runs
    reasons = Counter(one.unsupported for one in found if one.unsupported is not None)
    assert reasons == unsupported
    for one in found:
        on_v100 = one.run.hardware.name == "v100"
        assert (one.unsupported is not None) == (on_v100 and "flash_attention_2" in one.run.techniques)
        assert ("fp16" in one.run.techniques) == on_v100
        assert ("bf16" in one.run.techniques) != on_v100


def test_axes_are_the_papers() -> None:
    axes = {name: [values(planned(name), axis) for axis in ("target", "num_gpus", "sequence_length")] for name in NAMES}
    llamas = ["llama2-7b", "llama2-13b", "llama2-70b"]
    assert axes == {
        "best-default": [llamas, [8], [256]],
        "large-models": [["llama2-70b", "falcon-180b"], [8], [256]],
        "limited-gpus": [llamas, [1, 2, 4, 8], CONTEXTS],
        "long-context": [llamas, [8], CONTEXTS],
    }
    for name in NAMES:
        assert values(planned(name), "per_device_train_batch_size") == (["max"] if name == "limited-gpus" else [1])


@pytest.mark.parametrize("name", NAMES)
def test_settings_are_the_papers(name: str) -> None:
    study = config.load(FOLDER / f"{name}.yaml")
    assert study.training.effective_batch_size == 8
    assert study.training.learning_rate == 4e-4
    assert study.training.lr_scheduler_type == "linear"
    assert study.data.dataset == "knkarthick/samsum"
    assert {model.weights for model in study.models.values()} == {"random"}
    gpus = {key: (entry.max_gpus, entry.memory_gib, entry.compute_capability) for key, entry in study.hardware.items()}
    assert gpus == {"a100": (8, 80, 8.0), "v100": (8, 32, 7.0)}
    for one in planned(name):
        used = one.run.techniques
        assert "adamw_torch" in used
        assert used.get("lora", {"r": 64, "lora_alpha": 32}).items() >= {"r": 64, "lora_alpha": 32}.items()
        assert ("offload" in one.run.recipe) == ("offload_optimizer" in used), "the name says what the recipe is"
        assert ("flash" in one.run.recipe) == ("flash_attention_2" in used)
        assert ("-gc" in one.run.recipe) == ("gradient_checkpointing" in used)
        assert ("lora" in one.run.recipe) == ("lora" in used)
        assert next((n for n in ("zero2", "zero3") if n in used), "") == one.run.recipe.split("-")[0].rstrip("fulora")


@pytest.mark.parametrize("name", NAMES)
def test_study_on_the_command_line_is_the_study_alone(name: str) -> None:
    """Snakemake lays it over config/config.yaml, key by key."""
    merged: dict[str, Any] = load_configfile("config/config.yaml")
    update_config(merged, load_configfile(str(FOLDER / f"{name}.yaml")))
    study, alone = config.parse(merged), config.load(FOLDER / f"{name}.yaml")
    assert [one.run.run_id for one in plan.plan(study)] == [one.run.run_id for one in plan.plan(alone)]
    assert (study.protocol, study.report, study.places) == (alone.protocol, alone.report, alone.places)


def test_what_studies_share_is_equal() -> None:
    raws = [config.read(FOLDER / f"{name}.yaml") for name in NAMES]
    for section in ("hardware", "data", "training"):
        assert all(raw[section] == raws[0][section] for raw in raws)
    models = [item for raw in raws for item in raw["models"].items()]
    assert all(one == other for name, one in models for same, other in models if name == same)


def test_shapes_have_the_weights_that_their_names_say() -> None:
    """131 million of LoRA for Llama 2 70B are the number of arXiv 2406.02290; it tells which layers were adapted."""
    sizes, adapted = {}, 0
    studies = [config.load(FOLDER / f"{name}.yaml") for name in ("best-default", "large-models")]
    for name, target in {**studies[0].models, **studies[1].models}.items():
        if target.architecture is None:
            continue
        shape = dict(target.architecture)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[shape.pop("model_type")](**shape))
            sizes[name] = sum(weight.numel() for weight in model.parameters())
            if name == "llama2-70b":
                lora = peft.LoraConfig(task_type="CAUSAL_LM", **studies[0].recipes["lora"]["lora"])
                adapted = peft.get_peft_model(model, lora).get_nb_trainable_parameters()[0]
    assert sizes == {
        "llama2-7b": 6_738_415_616,
        "llama2-13b": 13_015_864_320,
        "llama2-70b": 68_976_648_192,
        "falcon-180b": 178_557_088_768,
    }
    assert adapted == 131_072_000
