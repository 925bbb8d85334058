"""Matrix products in 8-bit floating point, by torchao."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run

FP8_COMPUTE_CAPABILITY = 8.9
"""Ada; earlier GPUs have no fp8 matrix units (CUDA C++ programming guide, table of arithmetic throughput)."""
FP8_MULTIPLE = 16
"""Both sides of an fp8 product are multiples of it (cuBLAS, `torch._scaled_mm`)."""


class Fp8(Technique):
    """bf16 mixed precision whose linear layers multiply in float8, with a scale for each tensor or row."""

    name: ClassVar[str] = "fp8"
    kind: ClassVar[Kind] = "precision"
    packages: ClassVar[tuple[str, ...]] = ("torchao",)
    excludes: ClassVar[dict[str, str]] = {
        "qlora": (
            "torchao's fp8 layers take dense weights, and those that bitsandbytes packs have another shape (shapes "
            "cannot be multiplied)"
        ),
        "adalora": (
            "peft's AdaLoRA changes the output of a layer in place, which torch forbids for torchao's layers (is a "
            "view and is being modified inplace)"
        ),
    }
    effect: ClassVar[str] = (
        "memory: as bf16; "
        "speed: large matrix products up to twice as fast, slower where they are small; "
        "quality: close to bf16, products are rounded to 8 bit"
    )
    source: ClassVar[str] = "Micikevicius et al., arXiv 2209.05433; https://github.com/pytorch/ao (torchao.float8)"

    recipe: Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"] = "tensorwise"
    """torchao's `Float8LinearConfig.from_recipe_name`: what shares a scale."""
    emulate: bool = False
    """Round as fp8 does and multiply in fp32: the losses of fp8 on hardware without it, slower than without."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        capability = hardware.compute_capability
        if self.emulate or hardware.device == "cpu":  # torch multiplies fp8 on a CPU, without units for it
            return None
        if capability is not None and capability < FP8_COMPUTE_CAPABILITY:
            return f"fp8 needs compute capability {FP8_COMPUTE_CAPABILITY}; this GPU has {capability}: use bf16 or fp16"
        return None

    def is_exported(self) -> bool:
        return False

    def number_format(self) -> str:
        return "float32" if self.emulate else "float8"

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"dtype": "bfloat16" if any(t.freezes_weights for t in recipe.values()) else "float32"}

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"bf16": True}

    def wrap(self, model: Any, run: "Run") -> Any:
        import torch
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        output = model.get_output_embeddings()

        def fits(module: torch.nn.Module, name: str) -> bool:
            # The output layer decides about the loss and stays as it is, as in torchao's own recipes.
            sides = (getattr(module, "in_features", 1), getattr(module, "out_features", 1))
            return module is not output and not any(side % FP8_MULTIPLE for side in sides)

        config = Float8LinearConfig.from_recipe_name(self.recipe)
        if self.emulate:
            import dataclasses

            config = dataclasses.replace(config, emulate=True)
        return convert_to_float8_training(model, config=config, module_filter_fn=fits)
