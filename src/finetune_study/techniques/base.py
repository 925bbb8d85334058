"""What every technique says of itself, and where it takes hold of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from finetune_study.section import Section

if TYPE_CHECKING:  # both import this package
    from finetune_study.config import Hardware
    from finetune_study.run import Run

Kind = Literal[
    "precision",
    "attention",
    "kernels",
    "peft",
    "activations",
    "activation offload",
    "sharding",
    "communication",
    "offload",
    "parameter offload",
    "optimizer",
    "optimizer step",
    "compilation",
    "sequences",
]
"""In the order of application: precision and attention choose how the model is loaded, peft wraps the loaded model,
activations are told to the wrapped model, everything from sharding to compilation is an argument that the trainer acts
on when training starts, sequences is how the data was laid out. A recipe holds at most one technique of a kind, but for
methods that the library itself puts side by side (`beside`)."""

WHY_ONE: Mapping[Kind, str] = {
    "precision": "weights are held in one number format, and transformers takes one of mixed precision "
    "(At most one of fp16 and bf16 can be True, but not both)",
    "attention": "a model has one `attn_implementation`, and transformers takes one name for it "
    "(is not supported. The only possible arguments are)",
    "peft": "peft puts one method on a model (Cannot combine adapters with different peft types), and together only "
    "what its mixed model takes and trains (is not compatible with the `PeftMixedModel`)",
    "sharding": "DDP, FSDP2 or DeepSpeed holds the model, and the `stage` of DeepSpeed's ZeRO is one number "
    "(Input should be 0, 1, 2, 3)",
    "optimizer": "a weight is stepped by one optimizer, and transformers' `optim` takes one name "
    "(is not a valid OptimizerNames)",
}
"""Why a recipe holds one technique of a kind, of each kind that has several; in brackets the library's own words."""


ModelState = Literal["weights", "gradients", "optimizer states"]

MODEL_STATES: frozenset[ModelState] = frozenset(get_args(ModelState))


class Technique(Section):
    """One optimization. Its fields are its settings, in the spelling of the library that applies them.

    Modules of techniques import torch, peft and the like only inside functions: planning needs none of them.
    """

    name: ClassVar[str]
    """The word for it in recipes, tables and run ids."""
    kind: ClassVar[Kind]
    """What it is an alternative to."""
    beside: ClassVar[frozenset[str]] = frozenset()
    """Others of its kind that it can work together with."""
    needs: ClassVar[frozenset[str]] = frozenset()
    """It means nothing without one of these."""
    excludes: ClassVar[Mapping[str, str]] = {}
    """Other techniques that it can't run beside, and why: what the library says, or what the hardware lacks."""
    packages: ClassVar[tuple[str, ...]] = ()
    """What it imports beside the packages that all training uses."""
    freezes_weights: ClassVar[bool] = False
    """The model's own weights are not trained, and can be held in 16 bit."""
    shards: ClassVar[frozenset[ModelState]] = frozenset()
    """Of these each device holds a part: the smaller, the more devices there are."""
    is_deepspeed: ClassVar[bool] = False
    """DeepSpeed's engine runs the steps."""
    effect: ClassVar[str]
    """What it is expected to do, in one line: `memory: ...; speed: ...; quality: ...`."""
    source: ClassVar[str]
    """Where it comes from."""

    def why_not(self, hardware: "Hardware", recipe: "Recipe") -> str | None:
        """Why it can't run on this hardware beside the other techniques of the recipe; None when it can."""
        return None

    def why_not_run(self, run: "Run") -> str | None:
        """Why it can't do this run, where that depends on more than hardware and recipe; None when it can."""
        return None

    def offloads(self, recipe: "Recipe") -> frozenset[ModelState]:
        """What stays outside the device."""
        return frozenset()

    def packages_needed(self) -> tuple[str, ...]:
        """What has to be importable where it runs, by the names of imports."""
        return self.packages

    def is_exported(self) -> bool:
        """Whether the exported train.py, which knows transformers, peft and DeepSpeed alone, can do it."""
        return True

    def number_format(self) -> str | None:
        """Of what is multiplied in linear layers, by the names in `measure.peaks`; None where it decides nothing."""
        return None

    def uses_loaded_weights(self) -> bool:
        """Whether something is made of the weights as they were loaded, before training begins."""
        return False

    def load_arguments(self, recipe: "Recipe") -> dict[str, Any]:
        """Keyword arguments of `from_pretrained` and `from_config`, as JSON would hold them; dtypes are names."""
        return {}

    def training_arguments(self, recipe: "Recipe") -> dict[str, Any]:
        """Fields of transformers' `TrainingArguments`."""
        return {}

    def deepspeed(self, device: str) -> dict[str, Any]:
        """Parts of DeepSpeed's configuration on `cuda` or `cpu`, for runs that are DeepSpeed's."""
        return {}

    def wrap(self, model: Any, run: "Run") -> Any:
        """The model to train, made of the model that was loaded."""
        return model

    def optimizer(self, run: "Run", arguments: Any) -> tuple[Any, dict[str, Any]] | None:
        """`optimizer_cls_and_kwargs` of transformers' `Trainer`, for an optimizer that its `optim` has no name for.

        Args:
            run: what is trained.
            arguments: its `TrainingArguments`.
        """
        return None

    def callbacks(self, model: Any) -> list[Any]:
        """transformers' `TrainerCallback`s that have to see the training of this model."""
        return []


Recipe = Mapping[str, Technique]
"""A recipe, parsed: technique by name, in the order of application."""
