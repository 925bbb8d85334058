from typing import Any

import pytest
import torch
import transformers

from finetune_study.measure.flops import model_flops

T = 10
"""Positions of a sequence."""


def llama(**changes: Any) -> Any:
    """Two layers of width 8 with four heads of 2, of which two hold keys and values."""
    settings: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 16,
    }
    with torch.device("meta"):
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings | changes))


LAYER = 8 * 8 + 2 * (8 * 4) + 8 * 8 + 3 * 8 * 12
HEAD = 8 * 16
ATTENTION = 3 * 2 * (2 * 8 * T) * 2
"""For a token: forward and twice backward, two products of 8 x T each, two operations, two layers."""


def test_llama_with_grouped_keys() -> None:
    per_token = 6 * (2 * LAYER + HEAD) + ATTENTION
    assert model_flops(llama(), T, 1) == per_token * T
    assert model_flops(llama(), T, 3) == 3 * per_token * T


def test_tied_embeddings_are_multiplied_all_the_same() -> None:
    assert model_flops(llama(tie_word_embeddings=True), T, 1) == model_flops(llama(), T, 1)


def test_attention_grows_with_the_square_of_the_context() -> None:
    one, two, three = (model_flops(llama(), n * T, 1) or 0 for n in (1, 2, 3))
    assert three - 2 * two + one == 2 * ATTENTION * T


def test_heads_wider_than_the_model() -> None:
    """`head_dim` need not be the width over the heads: here heads of 4."""
    layer = 8 * 16 + 2 * (8 * 8) + 16 * 8 + 3 * 8 * 12
    assert model_flops(llama(head_dim=4), T, 1) == (6 * (2 * layer + HEAD) + 2 * ATTENTION) * T


def test_gpt2_with_its_own_linear_layer() -> None:
    config = transformers.GPT2Config(n_embd=8, n_layer=2, n_head=4, n_positions=T, vocab_size=16)
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    layer = 8 * 24 + 8 * 8 + 2 * (8 * 32)
    assert model_flops(model, T, 1) == (6 * (2 * layer + HEAD) + ATTENTION) * T


def test_lora_has_no_gradients_of_frozen_weights() -> None:
    import peft

    adapted = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"]))
    adapters = 2 * (2 * 8 + 2 * 8)
    per_token = 4 * (2 * LAYER + HEAD) + 6 * adapters + ATTENTION
    assert model_flops(adapted, T, 1) == per_token * T


def test_a_frozen_layer_alone() -> None:
    model = llama()
    model.lm_head.weight.requires_grad = False
    assert model_flops(model, T, 1) == (6 * 2 * LAYER + 4 * HEAD + ATTENTION) * T


@pytest.mark.parametrize(
    ("config", "kind"), [("MixtralConfig", "MixtralForCausalLM"), ("Qwen3MoeConfig", "Qwen3MoeForCausalLM")]
)
def test_a_mixture_of_experts_is_not_known(config: str, kind: str) -> None:
    settings = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "vocab_size": 16, "head_dim": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    with torch.device("meta"):
        model = getattr(transformers, kind)(getattr(transformers, config)(**settings, **heads))
    assert model_flops(model, T, 1) is None
