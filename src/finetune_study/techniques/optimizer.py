"""Optimizers, by the names of transformers' `optim`."""

from typing import Annotated, Any, ClassVar

from pydantic import Field, PositiveFloat

from finetune_study.techniques.base import Kind, Technique


class AdamwTorch(Technique):
    """torch.optim.AdamW: two states of the weights' own precision for each trained weight."""

    name: ClassVar[str] = "adamw_torch"
    kind: ClassVar[Kind] = "optimizer"
    effect: ClassVar[str] = "8 bytes of states for each trained fp32 weight; the default"
    source: ClassVar[str] = "Loshchilov and Hutter, arXiv 1711.05101"

    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Keeps the division finite."""

    def training_arguments(self) -> dict[str, Any]:
        return {"optim": self.name, **self.model_dump()}
