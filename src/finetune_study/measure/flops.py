"""Floating-point operations that a model needs for a training step, whatever the hardware really does.

Counted are matrix products, two operations for a multiplication and an addition (Narayanan et al., arXiv 2104.04473;
Chowdhery et al., arXiv 2204.02311, appendix B): every linear layer once forward, once for the gradient of its input,
and once more for the gradient of its weight if that is trained; attention's two products over the full square of the
context, forward and twice backward. Recomputation is not counted. The optimizer, norms and element-wise work are not
counted either.
"""

from typing import Any


def model_flops(model: Any, sequence_length: int, num_sequences: int) -> float | None:
    """FLOPs of forward and backward passes over some sequences; None for a model whose layers are not all known.

    Args:
        model: a causal language model of transformers, with or without peft's layers; its shapes are read from its
            modules, so weights may be sharded away.
        sequence_length: positions of a sequence.
        num_sequences: sequences of the step.
    """
    import torch

    config = model.config.get_text_config()
    if getattr(config, "num_local_experts", None) or getattr(config, "num_experts", None):
        return None  # how many of a mixture's weights a token meets is the model's own affair
    per_token = 0.0
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            products = module.in_features * module.out_features
        elif type(module).__name__ == "Conv1D":  # GPT-2's linear layer, in transformers.pytorch_utils
            products = module.nx * module.nf
        else:
            continue
        passes = 3 if module.weight.requires_grad else 2
        per_token += 2 * passes * products
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 3 * 2 * 2 * config.num_attention_heads * width * sequence_length * config.num_hidden_layers
    return float((per_token + attention) * sequence_length * num_sequences)
