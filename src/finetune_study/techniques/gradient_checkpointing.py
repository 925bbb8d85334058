"""Activations are computed twice instead of kept."""

import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

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
    effect: ClassVar[str] = (
        "memory: activations of one layer, or one group, instead of all; "
        "speed: about 30 % slower at an equal micro-batch, for a second forward pass; "
        "quality: unchanged"
    )
    source: ClassVar[str] = "Chen et al., arXiv 1604.06174"

    use_reentrant: bool = False
    """torch's older implementation; False is what torch recommends."""
    every: PositiveInt | Literal["sqrt"] = Field(default=1, json_schema_extra=LATER)
    """Which layers. A number k: every k-th layer computes its activations again, the others keep theirs (torchtitan's
    selective checkpointing). `sqrt`: all of n layers, in groups of about √n, each of which keeps its input alone; not
    beside fsdp, which gathers the weights of one layer at a time."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if self.every == "sqrt" and "fsdp" in recipe:
            return (
                "torch: aten.mul.Tensor got mixed torch.Tensor and DTensor, since FSDP2 gathers a layer's weights "
                "around the call of this layer, and a group runs as one: use every: 1"
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
                    join(layers, math.isqrt(len(layers)), use_reentrant)
                else:
                    for number, layer in enumerate(layers):
                        layer.gradient_checkpointing = number % every == 0

        return [ChooseLayers()]


def checkpointed_layers(model: Any) -> list[Any]:
    """Layers of a model that transformers can checkpoint, from the first to the last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def join(layers: list[Any], size: int, use_reentrant: bool) -> None:
    """Makes each `size` layers, called one after the other, compute as one checkpoint.

    transformers gives every checkpointed layer's call, in training alone, to its `_gradient_checkpointing_func`. Here
    all but the last of a group only note it and hand on what they were given; the last runs them all. So each gets its
    own arguments (attention masks can differ), and neither model nor weights change their names.
    """
    import torch
    from torch.utils.checkpoint import checkpoint

    calls: list[tuple[Any, tuple[Any, ...]]] = []
    wrappers: list[Any] = []

    def run(noted: list[tuple[Any, tuple[Any, ...]]], hidden: Any) -> Any:
        for function, arguments in noted:
            returned = function(hidden, *arguments)
            hidden = returned[0] if isinstance(returned, tuple) else returned
        return hidden

    def note(function: Any, hidden: Any, *arguments: Any) -> Any:
        if not wrappers and torch.compiler.is_compiling():
            # A trial would be compiled as well, and what it finds can't be kept without compiling once more: in each
            # pass the first layer, a checkpoint of its own, says it anew.
            returned = checkpoint(function, hidden, *arguments, use_reentrant=use_reentrant)
            wrappers.append(_wrapper(returned))
            return returned
        if not wrappers:
            wrappers.append(_wrapper(_tried(function, hidden, arguments)))
        calls.append((function, arguments))
        return wrappers[0](hidden)

    def run_all(function: Any, hidden: Any, *arguments: Any) -> Any:
        returned = note(function, hidden, *arguments)
        if calls:
            noted = calls.copy()
            calls.clear()
            returned = wrappers[0](checkpoint(lambda hidden: run(noted, hidden), hidden, use_reentrant=use_reentrant))
        return returned

    def run_last(function: Any, hidden: Any, *arguments: Any) -> Any:
        returned = run_all(function, hidden, *arguments)
        if torch.compiler.is_compiling():
            wrappers.clear()
        return returned

    for number, layer in enumerate(layers, start=1):
        layer._gradient_checkpointing_func = run_all if number % size == 0 else note
    layers[-1]._gradient_checkpointing_func = run_last


def _tried(function: Any, hidden: Any, arguments: tuple[Any, ...]) -> Any:
    """What a layer returns, by one forward pass that keeps nothing and leaves the random numbers as they were."""
    import torch

    with torch.no_grad(), torch.random.fork_rng([hidden.device] if hidden.is_cuda else []):
        return function(hidden, *arguments)


def _wrapper(returned: Any) -> Any:
    """What puts hidden states into the form in which a layer returned them: themselves, or the first of a tuple.

    Falcon's layers return their attention weights too, which nobody asks for in training.
    """
    if not isinstance(returned, tuple):
        return lambda hidden: hidden
    others = (None,) * (len(returned) - 1)
    return lambda hidden: (hidden, *others)
