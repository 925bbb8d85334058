"""The model as one compiled program."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from finetune_study.techniques.base import Kind, Recipe, Technique


class TorchCompile(Technique):
    """torch.compile: operations are fused into kernels that are made for this model and these shapes."""

    name: ClassVar[str] = "torch_compile"
    kind: ClassVar[Kind] = "compilation"
    effect: ClassVar[str] = (
        "memory: fewer activations; "
        "speed: fewer, larger kernels, after a slow first step; "
        "quality: as without, within rounding"
    )
    source: ClassVar[str] = "Ansel et al., ASPLOS 2024, https://docs.pytorch.org/docs/stable/torch.compiler.html"

    torch_compile_backend: Literal["inductor", "aot_eager", "eager", "cudagraphs"] = "inductor"
    """What makes the kernels; `eager` and `aot_eager` make none, to find out what fails."""
    torch_compile_mode: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """`default`, `reduce-overhead` or `max-autotune`; null: the backend's own choice. Of inductor alone."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.torch_compile_mode is not None and self.torch_compile_backend != "inductor":
            raise ValueError(f"torch_compile_mode is inductor's; the backend {self.torch_compile_backend} ignores it")
        return self

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"torch_compile": True, **self.model_dump()}
