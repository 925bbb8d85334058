"""Number formats of the forward and backward pass."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware

BF16_COMPUTE_CAPABILITY = 8.0
"""Ampere; earlier GPUs have no bf16 matrix units (CUDA C++ programming guide, table of arithmetic throughput)."""


class Fp32(Technique):
    """Everything in 32-bit floating point."""

    name: ClassVar[str] = "fp32"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = "the reference: 4 bytes for every weight, gradient and activation"
    source: ClassVar[str] = "IEEE 754"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": "float32"}


class Bf16(Technique):
    """Mixed precision with bfloat16, as `TrainingArguments(bf16=True)` does it."""

    name: ClassVar[str] = "bf16"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = "halves activations and uses matrix units; weights that are trained stay in fp32"
    source: ClassVar[str] = "https://huggingface.co/docs/transformers/main/en/perf_train_gpu_one"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights as they are loaded; `auto`: float32 where they are trained, bfloat16 where PEFT freezes them."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        capability = hardware.compute_capability
        if hardware.device == "cuda" and capability is not None and capability < BF16_COMPUTE_CAPABILITY:
            return f"bf16 needs compute capability {BF16_COMPUTE_CAPABILITY}; this GPU has {capability}: use fp16"
        return None

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        auto = "bfloat16" if any(t.freezes_weights for t in recipe.values()) else "float32"
        return {"dtype": auto if self.dtype == "auto" else self.dtype}

    def training_arguments(self) -> dict[str, Any]:
        return {"bf16": True}


class Fp16(Technique):
    """Mixed precision with float16 and loss scaling, as `TrainingArguments(fp16=True)` does it."""

    name: ClassVar[str] = "fp16"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = (
        "halves activations and uses matrix units; the first steps are skipped while the scale settles"
    )
    source: ClassVar[str] = "Micikevicius et al., arXiv 1710.03740"

    dtype: Literal["auto", "float32", "float16"] = "auto"
    """Of the weights as they are loaded; `auto`: float32 where they are trained, float16 where PEFT freezes them."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu" and not any(t.is_deepspeed for t in recipe.values()):
            return "fp16 on a CPU is silently left out by transformers (activations stay in fp32): use bf16 or fp32"
        return None

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        auto = "float16" if any(t.freezes_weights for t in recipe.values()) else "float32"
        return {"dtype": auto if self.dtype == "auto" else self.dtype}

    def training_arguments(self) -> dict[str, Any]:
        return {"fp16": True}
