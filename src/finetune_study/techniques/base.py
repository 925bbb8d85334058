"""What every technique says of itself, and where it takes hold of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from finetune_study.section import Section

if TYPE_CHECKING:  # config imports this package
    from finetune_study.config import Hardware

Kind = Literal["precision", "attention", "peft", "activations", "sharding", "offload", "optimizer", "sequences"]
"""In the order of application: precision and attention choose how the model is loaded, peft wraps the loaded model,
activations, sharding, offload and the optimizer are arguments that the trainer acts on when training starts, sequences
is how the data was laid out. A recipe holds at most one technique of a kind."""


class Technique(Section):
    """One optimization. Its fields are its settings, in the spelling of the library that applies it.

    Modules of techniques import torch, peft and the like only inside functions: planning needs none of them.
    """

    name: ClassVar[str]
    """The word for it in recipes, tables and run ids."""
    kind: ClassVar[Kind]
    """What it is an alternative to."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """It means nothing without one of these."""
    freezes_weights: ClassVar[bool] = False
    """The model's own weights are not trained, and can be held in 16 bit."""
    is_deepspeed: ClassVar[bool] = False
    """DeepSpeed's engine runs the steps."""
    effect: ClassVar[str]
    """What it is expected to do to memory, speed and quality, in one line."""
    source: ClassVar[str]
    """Where it comes from."""

    def why_not(self, hardware: "Hardware", recipe: "Recipe") -> str | None:
        """Why it can't run on this hardware beside the other techniques of the recipe; None when it can."""
        return None

    def load_arguments(self, recipe: "Recipe") -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` and `from_config`; dtypes are names."""
        return {}

    def training_arguments(self) -> dict[str, Any]:
        """Fields of transformers' `TrainingArguments`."""
        return {}

    def deepspeed(self, device: str) -> dict[str, Any]:
        """Parts of DeepSpeed's configuration on `cuda` or `cpu`; any part at all makes the run a DeepSpeed run."""
        return {}

    def wrap(self, model: Any) -> Any:
        """The model to train, made of the model that was loaded."""
        return model


Recipe = Mapping[str, Technique]
"""A recipe, parsed: technique by name, in the order of application."""
