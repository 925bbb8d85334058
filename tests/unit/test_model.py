"""What the probes say of a model is what torch's profiler sees."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_study import model

KERNELS = {
    "aten::_scaled_dot_product_flash_attention_for_cpu": "flash_attention",
    "aten::_scaled_dot_product_attention_math": "math",
}
"""Kernels of a CPU, by the profiler's names for them."""

TINY = LlamaConfig(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=128, use_cache=False,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])  # with dropout a CPU has no fused kernel
def test_the_kernel_that_is_told_is_the_one_that_runs(dtype: torch.dtype, autocast: bool, dropout: float) -> None:
    TINY.attention_dropout = dropout
    net = AutoModelForCausalLM.from_config(TINY, attn_implementation="sdpa", dtype=dtype).train()
    ids = torch.ones(1, 16, dtype=torch.long)
    told: list[str] = []
    original = torch.nn.functional.scaled_dot_product_attention
    model.attention_kernel_probe(told.append)
    try:
        with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            net(input_ids=ids, labels=ids)
        assert torch.nn.functional.scaled_dot_product_attention is original
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    ran = {KERNELS[event.key] for event in profile.key_averages() if event.key in KERNELS}
    assert ran == set(told) == {"math" if dropout else "flash_attention"}


def test_a_mask_is_cast_as_autocast_does_it() -> None:
    told: list[str] = []
    query = torch.ones(1, 2, 8, 16)
    values: dict[str, Any] = {"value": torch.ones(1, 2, 8, 16, dtype=torch.bfloat16), "attn_mask": torch.zeros(8, 8)}
    original = torch.nn.functional.scaled_dot_product_attention
    model.attention_kernel_probe(told.append)
    with torch.profiler.profile() as profile, torch.autocast("cpu", torch.bfloat16):
        torch.nn.functional.scaled_dot_product_attention(query, query, **values)
    assert torch.nn.functional.scaled_dot_product_attention is original
    ran = {KERNELS[event.key] for event in profile.key_averages() if event.key in KERNELS}
    assert ran == set(told) == {"flash_attention"}
