"""Methods of peft that train the beginning of the sequence instead of layers."""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from finetune_study.techniques.peft_method import PeftMethod

if TYPE_CHECKING:
    from finetune_study.run import Run

_NO_POSITIONS = "peft: Position ids are not supported for parameter efficient tuning, so packed examples see each other"


class _Prompt(PeftMethod):
    excludes: ClassVar[dict[str, str]] = {"packing": _NO_POSITIONS}

    num_virtual_tokens: PositiveInt = 20
    """Trained tokens before each sequence; they take room beside its context."""


class PromptTuning(_Prompt):
    """Trains the embeddings of tokens that stand before every sequence."""

    name: ClassVar[str] = "prompt_tuning"
    method: ClassVar[str] = "PROMPT_TUNING"
    effect: ClassVar[str] = (
        "memory: some ten thousand trained weights, activations as full fine-tuning; "
        "speed: longer sequences by the trained tokens; "
        "quality: weak on small models"
    )
    source: ClassVar[str] = "Lester et al., arXiv 2104.08691"

    def peft_settings(self, run: "Run") -> dict[str, Any]:
        return self.model_dump() | {"prompt_tuning_init": "RANDOM"}


class PTuning(_Prompt):
    """Trains a small network that makes the embeddings of the tokens before every sequence."""

    name: ClassVar[str] = "p_tuning"
    method: ClassVar[str] = "P_TUNING"
    effect: ClassVar[str] = (
        "memory: as prompt_tuning, with a small network more; "
        "speed: as prompt_tuning; "
        "quality: steadier in training than prompt_tuning"
    )
    source: ClassVar[str] = "Liu et al., arXiv 2103.10385"

    encoder_reparameterization_type: Literal["MLP", "LSTM"] = "MLP"
    """The network."""
    encoder_hidden_size: PositiveInt | None = None
    """Its width; null: the model's."""
    encoder_num_layers: PositiveInt = 2
    """Layers of an LSTM; peft gives an MLP always two."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout in an LSTM; peft gives an MLP none."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.encoder_reparameterization_type == "MLP" and (self.encoder_num_layers != 2 or self.encoder_dropout):
            raise ValueError("encoder_num_layers and encoder_dropout are an LSTM's; peft gives an MLP two and none")
        return self

    def rank_of_linear(self) -> float | None:
        return math.inf  # as wide as the model


class PrefixTuning(_Prompt):
    """Trains keys and values that every layer's attention sees before the sequence."""

    name: ClassVar[str] = "prefix_tuning"
    method: ClassVar[str] = "PREFIX_TUNING"
    excludes: ClassVar[dict[str, str]] = {
        "packing": (
            "transformers tells packed examples apart only where no keys come before them, so behind peft's prefixes "
            "they see each other, silently"
        )
    }
    effect: ClassVar[str] = (
        "memory: fewer trained weights than lora, longer keys and values, no gradient checkpointing; "
        "speed: longer attention by the trained tokens; "
        "quality: below lora on most tasks, depends on the number of tokens"
    )
    source: ClassVar[str] = "Li and Liang, arXiv 2101.00190"

    prefix_projection: bool = False
    """Make them by a small network."""
    encoder_hidden_size: PositiveInt | None = None
    """Width of this network; null: the model's."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.encoder_hidden_size is not None and not self.prefix_projection:
            raise ValueError("encoder_hidden_size is the width of the network of prefix_projection, which is off")
        return self

    def rank_of_linear(self) -> float | None:
        return math.inf if self.prefix_projection else None
