"""Fused kernels for the parts of a transformer, by liger-kernel."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.errors import RunFailedError
from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class Liger(Technique):
    """Triton kernels in place of norm, rotary embedding, gated product and loss; logits are made in chunks.
    A run of a model type that liger-kernel does not know is refused."""

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
            return "liger-kernel is made of Triton kernels, which are compiled for GPUs alone: leave it out"
        return None

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"use_liger_kernel": True, "liger_kernel_config": self.model_dump()}

    def wrap(self, model: Any, run: "Run") -> Any:
        """The model as it is: its kernels come with the trainer.

        Raises:
            RunFailedError: where there are none for it. liger-kernel itself says so in its log alone, and changes
                nothing (monkey_patch.py, _apply_liger_kernel_to_instance): a run without would be taken for one with.
        """
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        kind = model.config.model_type
        if kind not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise RunFailedError(
                "liger-kernel has no kernels for models of this type, and would silently change nothing",
                where="liger",
                given=kind,
                allowed=", ".join(sorted(MODEL_TYPE_TO_APPLY_LIGER_FN)),
                do="take `liger` out of the recipes of this model, or install a release that knows it",
            )
        return model
