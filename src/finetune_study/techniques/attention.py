"""Implementations of the same attention."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware

FLASH_ATTENTION_2_COMPUTE_CAPABILITY = 8.0
"""Ampere and newer (README of the flash-attn package)."""


class _Attention(Technique):
    kind: ClassVar[Kind] = "attention"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"attn_implementation": self.name}


class Eager(_Attention):
    """Attention written out: scores, softmax and product are tensors of their own."""

    name: ClassVar[str] = "eager"
    effect: ClassVar[str] = "memory and traffic grow with the square of the context"
    source: ClassVar[str] = "Vaswani et al., arXiv 1706.03762"


class Sdpa(_Attention):
    """`torch.nn.functional.scaled_dot_product_attention`: torch chooses the kernel."""

    name: ClassVar[str] = "sdpa"
    effect: ClassVar[str] = "memory linear in the context where a fused kernel is chosen; the default"
    source: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
    )


class FlashAttention2(_Attention):
    """The kernels of the flash-attn package."""

    name: ClassVar[str] = "flash_attention_2"
    effect: ClassVar[str] = "memory linear in the context, faster at long contexts; little below 1024 tokens"
    source: ClassVar[str] = "Dao, arXiv 2307.08691"

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        capability = hardware.compute_capability
        needed = FLASH_ATTENTION_2_COMPUTE_CAPABILITY
        if hardware.device == "cpu":
            return "FlashAttention-2 has CUDA kernels alone: use sdpa"
        if capability is not None and capability < needed:
            return f"FlashAttention-2 needs compute capability {needed}; this GPU has {capability}: use sdpa"
        if "fp32" in recipe:
            return "FlashAttention-2 takes fp16 and bf16 alone: use one of these, or sdpa"
        return None
