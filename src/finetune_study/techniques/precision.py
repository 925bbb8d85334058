"""Number formats of the forward and backward pass."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware

BF16_COMPUTE_CAPABILITY = 8.0
"""Ampere; earlier GPUs have no bf16 and no TF32 matrix units (CUDA C++ programming guide, table of arithmetic
throughput)."""


def is_deepspeed(recipe: Recipe) -> bool:
    """Whether DeepSpeed's engine runs the steps of a recipe."""
    return any(technique.is_deepspeed for technique in recipe.values())


def _why_not_loaded_as(dtype: str, name: str, recipe: Recipe) -> str | None:
    if dtype != "auto" and is_deepspeed(recipe) and not any(t.uses_loaded_weights() for t in recipe.values()):
        return (
            f"DeepSpeed casts all weights to the format of {name} when it starts, however they were loaded, silently: "
            f"leave {name}.dtype at auto"
        )
    return None


def _loaded_as(dtype: str, half: str, recipe: Recipe) -> str:
    """DeepSpeed's fp32 copies are made of what it has cast, so that fp32 would only fill the host's memory."""
    if dtype != "auto":
        return dtype
    return half if is_deepspeed(recipe) or any(t.freezes_weights for t in recipe.values()) else "float32"


def _lacks_units(hardware: "Hardware", what: str, instead: str) -> str | None:
    capability = hardware.compute_capability
    if hardware.device == "cuda" and capability is not None and capability < BF16_COMPUTE_CAPABILITY:
        return f"{what} needs compute capability {BF16_COMPUTE_CAPABILITY}; this GPU has {capability}: use {instead}"
    return None


class Fp32(Technique):
    """Everything in 32-bit floating point."""

    name: ClassVar[str] = "fp32"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = (
        "memory: the reference, 4 bytes for every weight, gradient and activation; "
        "speed: the reference, without matrix units; "
        "quality: the reference"
    )
    source: ClassVar[str] = "IEEE 754"

    def number_format(self) -> str:
        return "float32"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": "float32"}

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"tf32": False}  # left open, transformers switches it on for compiled models


class Tf32(Fp32):
    """32-bit floating point, whose matrix products round their inputs to TF32's 10 bits of mantissa."""

    name: ClassVar[str] = "tf32"
    effect: ClassVar[str] = (
        "memory: as fp32; speed: matrix products several times faster; quality: as fp32 within noise"
    )
    source: ClassVar[str] = "https://docs.pytorch.org/docs/stable/notes/cuda.html, TF32"

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu":
            return "transformers: --tf32 requires Ampere or a newer GPU arch; on a CPU use fp32"
        return _lacks_units(hardware, "tf32", "fp16 or fp32")

    def number_format(self) -> str:
        return "tf32"

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"tf32": True}


class Bf16(Technique):
    """Mixed precision with bfloat16, as `TrainingArguments(bf16=True)` does it."""

    name: ClassVar[str] = "bf16"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = (
        "memory: halves activations, weights that are trained stay in fp32; "
        "speed: matrix units; "
        "quality: as fp32 within noise"
    )
    source: ClassVar[str] = "https://huggingface.co/docs/transformers/main/en/perf_train_gpu_one"

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the weights as they are loaded; `auto`: bfloat16 where PEFT freezes them, or DeepSpeed casts them anyway; else
    float32. Under DeepSpeed it can be chosen only where something is computed from the loaded weights (qlora, DoRA,
    PiSSA, OLoRA, LoftQ)."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        return _lacks_units(hardware, self.name, "fp16") or _why_not_loaded_as(self.dtype, self.name, recipe)

    def number_format(self) -> str:
        return "bfloat16"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": _loaded_as(self.dtype, "bfloat16", recipe)}

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"bf16": True}


class Bf16Pure(Technique):
    """Weights, gradients and optimizer states in bfloat16, nothing in 32 bit but what qlora prepares so."""

    name: ClassVar[str] = "bf16_pure"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = (
        "memory: a quarter to a half of mixed precision's model states; "
        "speed: as bf16 or faster, with less to move; "
        "quality: small updates are rounded away"
    )
    source: ClassVar[str] = "Zamirai et al., arXiv 2010.06192"

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        return _lacks_units(hardware, self.name, "fp16")

    def number_format(self) -> str:
        return "bfloat16"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": "bfloat16"}

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        # DeepSpeed takes its number format from here; without it autocast would only repeat what the weights are.
        return {"bf16": True} if is_deepspeed(recipe) else {}

    def deepspeed(self, device: str) -> dict[str, Any]:
        return {"bf16": {"bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}}


class Fp16(Technique):
    """Mixed precision with float16 and loss scaling, as `TrainingArguments(fp16=True)` does it."""

    name: ClassVar[str] = "fp16"
    kind: ClassVar[Kind] = "precision"
    effect: ClassVar[str] = (
        "memory: halves activations, weights that are trained stay in fp32; "
        "speed: matrix units, the first steps are skipped while the scale settles; "
        "quality: as fp32 within noise, unless the scale never settles"
    )
    source: ClassVar[str] = "Micikevicius et al., arXiv 1710.03740"

    dtype: Literal["auto", "float32", "float16"] = "auto"
    """Of the weights as they are loaded; `auto`: float16 where PEFT freezes them, or DeepSpeed casts them anyway; else
    float32. Under DeepSpeed it can be chosen only where something is computed from the loaded weights (qlora, DoRA,
    PiSSA, OLoRA, LoftQ)."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu" and not is_deepspeed(recipe):
            return "fp16 on a CPU is silently left out by transformers (activations stay in fp32): use bf16 or fp32"
        return _why_not_loaded_as(self.dtype, self.name, recipe)

    def number_format(self) -> str:
        return "float16"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": _loaded_as(self.dtype, "float16", recipe)}

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"fp16": True}
