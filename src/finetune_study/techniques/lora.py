"""Low-rank adaptation, by peft."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from finetune_study.section import LATER
from finetune_study.techniques.base import Recipe
from finetune_study.techniques.peft_method import MIXED, PeftMethod

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class Lora(PeftMethod):
    """Freezes the weights and trains a low-rank update of chosen linear layers."""

    name: ClassVar[str] = "lora"
    method: ClassVar[str] = "LORA"
    beside: ClassVar[frozenset[str]] = MIXED - {"lora"}
    effect: ClassVar[str] = (
        "memory: gradients and optimizer states for a few per cent of the weights; "
        "speed: as fast as full fine-tuning, or faster; "
        "quality: close to full fine-tuning on narrow tasks, below it on broad ones"
    )
    source: ClassVar[str] = "Hu et al., arXiv 2106.09685"

    r: PositiveInt = 8
    """Rank of the update."""
    lora_alpha: PositiveInt = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the update."""
    target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the output layer."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitude and direction apart (arXiv 2402.09353)."""
    modules_to_save: list[str] | None = None
    """Layers that are trained whole beside the update."""
    init_lora_weights: bool | Literal["gaussian", "olora", "orthogonal", "pissa", "pissa_niter_16", "loftq"] = Field(
        default=True, json_schema_extra=LATER
    )
    """How the update begins: true is no change at all; `pissa` (arXiv 2404.02948) and `loftq` (arXiv 2310.08659) take a
    part of the weights into it; for `loftq` peft quantises them itself, on a GPU alone, so it is not for qlora."""

    def packages_needed(self) -> tuple[str, ...]:
        return (*self.packages, *(("bitsandbytes", "scipy") if self.init_lora_weights == "loftq" else ()))

    def rank_of_linear(self) -> float | None:
        return self.r

    def uses_loaded_weights(self) -> bool:
        return self.use_dora or self.init_lora_weights in ("pissa", "pissa_niter_16", "olora", "loftq")

    def peft_settings(self, run: "Run") -> dict[str, Any]:
        settings = super().peft_settings(run)
        if self.init_lora_weights == "loftq":
            import peft

            settings["loftq_config"] = peft.LoftQConfig()  # peft asks for it, and has defaults: 4 bits, one iteration
        return settings

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if self.init_lora_weights == "loftq" and hardware.device == "cpu":
            return (
                "peft quantises on the GPU for LoftQ (Torch not compiled with CUDA enabled): use true or pissa on a CPU"
            )
        return None
