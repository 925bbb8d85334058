"""Layers checkpointed in groups have the plain gradients, on models whose layers return tensors and tuples."""

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, AutoModelForCausalLM

from finetune_study.techniques.gradient_checkpointing import checkpointed_layers, join

SIZES = {"hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4, "vocab_size": 50}
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, **DROPOUT},
    "llama": {"intermediate_size": 64, "attention_dropout": 0.2},
    "gpt_neox": {"intermediate_size": 64, **DROPOUT},
}


def model_of(model_type: str, attention: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | ARCHITECTURES[model_type] | changes))
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).train()


def gradients(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    tokens = torch.randint(0, SIZES["vocab_size"], (2, 8))
    for _ in range(2):  # of two steps
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: weight.grad for name, weight in model.named_parameters()}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_groups_have_the_plain_gradients(model_type: str, attention: str, use_reentrant: bool) -> None:
    plain = gradients(model_of(model_type, attention))
    model = model_of(model_type, attention)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    layers = checkpointed_layers(model)
    computed: list[Any] = []
    for layer in layers:
        layer.get_submodule("mlp").register_forward_pre_hook(lambda layer, _: computed.append(layer))
    join(layers, 2, use_reentrant)
    grouped = gradients(model)
    assert len(computed) == 1 + 2 * 2 * len(layers), "the form once, and in two steps every layer twice"
    assert plain.keys() == grouped.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(grouped[name], gradient)


@pytest.mark.parametrize("model_type", ["llama", pytest.param("falcon", marks=pytest.mark.long)])
def test_groups_compile_to_the_graphs_of_single_layers(model_type: str) -> None:
    """Whether layers return tensors or tuples; and in each step the same graphs, with the plain gradients."""

    def compiled(groups: bool) -> tuple[dict[str, Any], int]:
        torch.compiler.reset()
        # Graphs of another shape draw other masks of dropout.
        model = model_of(model_type, "sdpa", hidden_dropout=0.0, attention_dropout=0.0)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        if groups:
            join(checkpointed_layers(model), 2, use_reentrant=False)
        counting = CompileCounterWithBackend("aot_eager")
        model.compile(backend=counting)
        return gradients(model), counting.frame_count

    (plain, graphs), (grouped, graphs_of_groups) = compiled(groups=False), compiled(groups=True)
    assert graphs_of_groups == graphs
    assert plain.keys() == grouped.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(grouped[name], gradient)


def test_evaluation_is_as_it_was() -> None:
    model = model_of("falcon", "sdpa")
    tokens = torch.arange(8)[None]
    before = model.eval()(input_ids=tokens).logits
    model.gradient_checkpointing_enable()
    join(checkpointed_layers(model), 2, False)
    torch.testing.assert_close(model(input_ids=tokens).logits, before)
