"""What the plan says of a model's attention is what transformers says."""

from functools import partial
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from finetune_study import config, plan
from finetune_study.techniques.attention import NO_FLASH, NO_SDPA


@pytest.mark.long
def test_the_lists_are_those_of_transformers() -> None:
    """It imports every causal language model that there is."""
    types = {
        kind: CONFIG_MAPPING[kind] for kind in CONFIG_MAPPING if CONFIG_MAPPING[kind] in MODEL_FOR_CAUSAL_LM_MAPPING
    }
    found: dict[str, Any] = {kind: MODEL_FOR_CAUSAL_LM_MAPPING[settings] for kind, settings in types.items()}
    classes = {kind: one[0] if isinstance(one, tuple) else one for kind, one in found.items()}
    assert {kind for kind, one in classes.items() if not one._supports_sdpa} == NO_SDPA
    assert {kind for kind, one in classes.items() if not one._supports_flash_attn} == NO_FLASH


@pytest.mark.parametrize("kind", ["bloom", "gemma2", "gpt_neo", "opt", "llama"])
@pytest.mark.parametrize("attention", ["sdpa", "flash_attention_2", "eager"])
def test_the_plan_says_what_transformers_says(kind: str, attention: str, raw: dict[str, Any]) -> None:
    raw["models"] = {"tiny": {"weights": "random", "architecture": {"model_type": kind}}}
    raw["hardware"] = {"a100": {"memory_gib": 80, "compute_capability": 8.0}}
    # The default is sdpa, in a recipe that names none.
    raw["recipes"] = {"it": {} if attention == "sdpa" else {attention: {}}}
    raw["grid"] = [{**raw["grid"][0], "hardware": "a100", "recipes": "it"}]
    reason = plan.plan(config.parse(raw))[0].unsupported
    loads = partial(AutoModelForCausalLM.from_config, CONFIG_MAPPING[kind](), attn_implementation=attention)
    with torch.device("meta"):
        if reason is not None:
            assert reason.startswith(f"transformers: a {kind} does not support {attention}")
            with pytest.raises(ValueError, match="does not support"):
                loads()
        elif attention == "flash_attention_2":
            with pytest.raises(ImportError, match="FlashAttention2"):  # the model takes it, the package is missing
                loads()
        else:
            loads()
