"""Low-rank adaptation, by peft."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from finetune_study.techniques.base import Kind, Technique


class Lora(Technique):
    """Freezes the weights and trains a low-rank update of chosen linear layers."""

    name: ClassVar[str] = "lora"
    kind: ClassVar[Kind] = "peft"
    freezes_weights: ClassVar[bool] = True
    effect: ClassVar[str] = "gradients and optimizer states for a few per cent of the weights; about as fast, or faster"
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

    def wrap(self, model: Any) -> Any:
        import peft

        return peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **self.model_dump()))
