"""Activations are computed twice instead of kept."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from finetune_study.errors import RunFailedError
from finetune_study.section import LATER
from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class GradientCheckpointing(Technique):
    """Keeps each layer's input alone and computes the rest again in the backward pass."""

    name: ClassVar[str] = "gradient_checkpointing"
    kind: ClassVar[Kind] = "activations"
    excludes: ClassVar[dict[str, str]] = {
        "prefix_tuning": "peft: PREFIX_TUNING does not work with gradient checkpointing",
    }
    effect: ClassVar[str] = "activations of one layer instead of all; about 30 % slower at an equal micro-batch"
    source: ClassVar[str] = "Chen et al., arXiv 1604.06174"

    use_reentrant: bool = False
    """torch's older implementation; False is what torch recommends."""
    every: PositiveInt | Literal["sqrt"] = Field(default=1, json_schema_extra=LATER)
    """Which layers. A number k: every k-th layer computes its activations again, the others keep theirs (torchtitan's
    selective checkpointing). `sqrt`: all of n layers, in groups of about √n, each of which keeps its input alone."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if self.every == "sqrt" and "fsdp" in recipe:
            return (
                "FSDP2 gathers a layer's weights around the call of this layer, and a group runs as one: use every: 1"
            )
        return None

    def is_exported(self) -> bool:
        return self.every == 1

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        kwargs = {"use_reentrant": self.use_reentrant}
        return {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}

    def wrap(self, model: Any, run: "Run") -> Any:
        # Below a frozen embedding nothing asks for gradients, and a checkpointed layer would get none.
        model.enable_input_require_grads()
        return model

    def callbacks(self, model: Any) -> list[Any]:
        if self.every == 1:
            return []
        from transformers import TrainerCallback

        every, use_reentrant = self.every, self.use_reentrant

        class ChooseLayers(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                """By now the trainer has switched on checkpointing in all layers."""
                layers = checkpointed_layers(model)
                if every == "sqrt":
                    size = math.isqrt(len(layers))
                    for start in range(0, len(layers), size):
                        _join(layers[start : start + size], use_reentrant)
                else:
                    for number, layer in enumerate(layers):
                        layer.gradient_checkpointing = number % every == 0

        return [ChooseLayers()]


def checkpointed_layers(model: Any) -> list[Any]:
    """Layers of a model that transformers can checkpoint, from the first to the last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _join(layers: list[Any], use_reentrant: bool) -> None:
    """Makes layers, called one after the other, compute as one checkpoint.

    All but the last only note what they are called with and hand on what they were given; the last runs them all. So
    each gets its own arguments (attention masks can differ), and neither model nor weights change their names.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def run(noted: list[tuple[Any, tuple[Any, ...], dict[str, Any]]], hidden: Any) -> Any:
        for forward, arguments, keywords in noted:
            hidden = forward(hidden, *arguments, **keywords)
            if not isinstance(hidden, torch.Tensor):
                raise RunFailedError(
                    "The layers of this model return more than hidden states, so they can't be checkpointed in groups",
                    given="gradient_checkpointing: {every: sqrt}",
                    do="use a number for `every`",
                )
        return hidden

    def follow(layer: Any, is_last: bool) -> None:
        original = layer.forward
        layer.gradient_checkpointing = False

        def forward(hidden: Any, *arguments: Any, **keywords: Any) -> Any:
            calls.append((original, arguments, keywords))
            if not is_last:
                return hidden
            noted = calls.copy()
            calls.clear()
            if not layer.training:
                return run(noted, hidden)
            return checkpoint(run, noted, hidden, use_reentrant=use_reentrant)

        layer.forward = forward

    for layer in layers:
        follow(layer, layer is layers[-1])
