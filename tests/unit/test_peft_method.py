"""What depends on the model: the plan says beforehand what peft itself says."""

import json
from pathlib import Path
from typing import Any

import pytest
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_study import config, plan
from finetune_study.plan import PlannedRun
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
    found = planned(raw, {"weights": "random", "architecture": architecture}, {method: {}})
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**architecture))
    if found.unsupported is None:
        found.run.parsed_techniques[method].wrap(model, found.run)
    else:
        assert found.unsupported.startswith("peft: ")
        with pytest.raises((TypeError, ValueError), match=r"not supported|Unsupported model type"):
            found.run.parsed_techniques[method].wrap(model, found.run)


def test_models_of_adaption_prompts_are_those_of_peft() -> None:
    assert TRANSFORMERS_MODEL_CONFIG.keys() == ADAPTION_PROMPT_MODELS


def test_where_the_type_of_a_model_comes_from(raw: Raw, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    names = {str(tmp_path): "gpt2", "tiiuae/falcon-180B": "falcon", "nobody/knows-it": None}
    for name, expected in names.items():
        assert model_type(planned(raw, {"name_or_path": name, "weights": "random"}, {"lora": {}}).run) == expected
