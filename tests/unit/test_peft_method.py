"""What depends on the model: the plan says beforehand what peft itself says."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_study import config, model, plan
from finetune_study.plan import PlannedRun
from finetune_study.techniques import ALL
from finetune_study.techniques.adapters import ADAPTION_PROMPT_MODELS
from finetune_study.techniques.peft_method import model_type

Raw = dict[str, Any]

ARCHITECTURES: dict[str, Raw] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "gpt2": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "openai-gpt": {"n_embd": 32, "n_layer": 1, "n_head": 2},
    "gpt_neox": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2},
}


def planned(raw: Raw, model: Raw, recipe: Raw) -> PlannedRun:
    raw["models"] = {"tiny": model}
    raw["recipes"] = {"it": recipe}
    raw["grid"][0]["recipes"] = "it"
    (found,) = plan.plan(config.parse(raw))
    return found


@pytest.mark.parametrize("method", ["lora", "adalora", "loha", "lokr", "oft", "adaption_prompt"])
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_plan_says_what_peft_says(kind: str, method: str, raw: Raw) -> None:
    architecture = {"model_type": kind, "vocab_size": 64, **ARCHITECTURES[kind]}
    found = planned(raw, {"weights": "random", "architecture": architecture}, {method: {}, "eager": {}})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    if found.unsupported is None:
        found.run.parsed_techniques[method].wrap(model, found.run)
    else:
        assert found.unsupported.startswith("peft: ")
        with pytest.raises((TypeError, ValueError), match=r"not supported|Unsupported model type"):
            found.run.parsed_techniques[method].wrap(model, found.run)


METHODS: list[Raw] = [
    *({name: {}} for name, technique in ALL.items() if technique.kind == "peft"),
    {"lora": {"modules_to_save": ["lm_head"]}},
    {"qlora": {"prepare_model_for_kbit_training": False}},
    {"lora": {}, "loha": {}},
    {"lora": {"modules_to_save": ["lm_head"]}, "oft": {}},
    {"lora": {}, "loha": {}, "lokr": {}, "oft": {}},
]


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", "bf16_pure", "fp32"])
@pytest.mark.parametrize("methods", METHODS, ids=str)
def test_what_is_trained_has_one_format(methods: Raw, precision: str, raw: Raw, tmp_path: Path) -> None:
    if precision == "fp8" and {"qlora", "adalora"} & methods.keys():
        pytest.skip("they exclude each other")
    architecture = {"model_type": "llama", "vocab_size": 64, **ARCHITECTURES["llama"]}
    run = planned(raw, {"weights": "random", "architecture": architecture}, {precision: {}, **methods}).run
    AutoConfig.for_model(**architecture).save_pretrained(tmp_path)
    net = model.load(run, tmp_path)
    for name in methods:
        net = run.parsed_techniques[name].wrap(net, run)
    trained = [weight for weight in net.parameters() if weight.requires_grad]
    assert {weight.dtype for weight in trained} == {torch.bfloat16 if precision == "bf16_pure" else torch.float32}
    if precision in ("bf16", "bf16_pure"):
        ids = torch.ones(1, 16, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            net(input_ids=ids, labels=ids).loss.backward()
        assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in trained)


@pytest.mark.parametrize("methods", [{"lora": {}}, {"prompt_tuning": {}}], ids=str)
def test_deepspeed_keeps_the_formats_itself(methods: Raw, raw: Raw, tmp_path: Path) -> None:
    architecture = {"model_type": "llama", "vocab_size": 64, **ARCHITECTURES["llama"]}
    recipe = {"bf16_pure": {}, "zero3": {}, **methods}
    run = planned(raw, {"weights": "random", "architecture": architecture}, recipe).run
    net = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture), dtype=torch.bfloat16)
    net = run.parsed_techniques[next(iter(methods))].wrap(net, run)
    assert {weight.dtype for weight in net.parameters() if weight.requires_grad} == {torch.float32}


def test_models_of_adaption_prompts_are_those_of_peft() -> None:
    assert TRANSFORMERS_MODEL_CONFIG.keys() == ADAPTION_PROMPT_MODELS


def test_where_the_type_of_a_model_comes_from(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    names = {str(tmp_path): "gpt2", "tiiuae/falcon-180B": "falcon", "nobody/knows-it": None}
    for name, expected in names.items():
        assert model_type(planned(raw, {"name_or_path": name, "weights": "random"}, {"lora": {}}).run) == expected
