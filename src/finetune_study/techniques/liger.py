"""Fused kernels for the parts of a transformer, by liger-kernel."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware


class Liger(Technique):
    """Triton kernels in place of norm, rotary embedding, gated product and loss; logits are made in chunks."""

    name: ClassVar[str] = "liger"
    kind: ClassVar[Kind] = "kernels"
    packages: ClassVar[tuple[str, ...]] = ("liger_kernel",)
    effect: ClassVar[str] = (
        "memory: no full logits, fewer activations; speed: faster steps; quality: the same within rounding"
    )
    source: ClassVar[str] = "Hsu et al., arXiv 2410.10989"

    rope: bool = True
    """Fuse the rotary embedding."""
    rms_norm: bool = True
    """Fuse the norm."""
    swiglu: bool = True
    """Fuse the gated product of the feed-forward."""
    fused_linear_cross_entropy: bool = True
    """Compute output layer and loss in chunks, without keeping the logits."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu":
            return "liger-kernel is made of Triton kernels, which need a GPU (No module named 'triton')"
        return None

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"use_liger_kernel": True, "liger_kernel_config": self.model_dump()}
