"""What all methods of peft have in common."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.errors import RunFailedError, StudyError
from finetune_study.techniques.base import Kind, Technique
from finetune_study.techniques.precision import Bf16Pure, is_deepspeed

if TYPE_CHECKING:
    from finetune_study.run import Run
    from finetune_study.techniques.base import Recipe

MIXED = frozenset({"lora", "loha", "lokr", "oft"})
"""Those that peft trains together on one model (peft.tuners.mixed.COMPATIBLE_TUNER_TYPES; AdaLoRA stands there too, but
the mixed model never moves its ranks)."""

CONV1D = frozenset({"gpt2", "openai-gpt"})
"""Types of causal language models whose layers are transformers' Conv1D (transformers.pytorch_utils), not Linear."""


class PeftMethod(Technique):
    """Freezes the weights and trains what peft adds to them. Settings are those of the method's `PeftConfig`."""

    kind: ClassVar[Kind] = "peft"
    freezes_weights: ClassVar[bool] = True
    method: ClassVar[str]
    """Name in `peft.PeftType`."""
    takes_conv1d: ClassVar[bool] = True
    """Whether peft has it for transformers' Conv1D."""

    def why_not_run(self, run: "Run") -> str | None:
        if not self.takes_conv1d and (found := model_type(run)) in CONV1D:
            return f"peft: Target module Conv1D() is not supported by {self.name}, and a {found} has no other: use lora"
        return None

    def rank_of_linear(self) -> float | None:
        """The least side of the linear layers that are trained; None where it trains none."""
        return None

    def peft_settings(self, run: "Run") -> dict[str, Any]:
        """Fields of the method's `PeftConfig` for a run."""
        return self.model_dump()

    def peft_config(self, run: "Run") -> Any:
        """The method's `PeftConfig` for a run."""
        import peft

        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType[self.method]]
        return config(task_type="CAUSAL_LM", **self.peft_settings(run))

    def wrap(self, model: Any, run: "Run") -> Any:
        import peft

        self._check_saved(model)
        names = [name for name, other in run.parsed_techniques.items() if isinstance(other, PeftMethod)]
        if len(names) == 1:
            return in_format_of_training(peft.get_peft_model(model, self.peft_config(run)), run)
        if self.name == names[0]:
            mixed = peft.get_peft_model(model, self.peft_config(run), adapter_name=self.name, mixed=True)
            return in_format_of_training(mixed, run)
        config = self.peft_config(run)
        if getattr(config, "target_modules", None) == "all-linear":
            # By now peft would count the linear layers of the first method's adapters among them.
            config.target_modules = model.peft_config[names[0]].target_modules
        model.add_adapter(self.name, config)
        model.set_adapter(names[: names.index(self.name) + 1])
        return in_format_of_training(model, run)

    def _check_saved(self, model: Any) -> None:
        """peft passes over names in `modules_to_save` that no module has, without a word.

        Raises:
            RunFailedError: naming them.
        """
        asked = getattr(self, "modules_to_save", None) or ()
        modules = [name for name, _ in model.named_modules()]
        if unknown := [name for name in asked if not any(module.endswith(name) for module in modules)]:
            raise RunFailedError(
                "The model has no such modules",
                where=f"{self.name}.modules_to_save",
                given=", ".join(unknown),
                allowed=", ".join(sorted({module.rpartition(".")[2] for module in modules} - {""})),
            )


def format_of_training(recipe: "Recipe") -> str | None:
    """torch's name for the format of trained weights beside peft; None where DeepSpeed steps copies of its own."""
    if is_deepspeed(recipe):
        return None
    return "bfloat16" if Bf16Pure.name in recipe else "float32"


def in_format_of_training(model: Any, run: "Run") -> Any:
    """The model with what is trained in fp32, or in bf16 where that is pure: peft makes some of it one way, some the
    other, and torch scales no losses of weights in fp16 (Attempting to unscale FP16 gradients).
    """
    import torch

    if asked := format_of_training(run.parsed_techniques):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, asked))
    return model


WIDTH = ("hidden_size", "n_embd", "d_model")
"""Names that configurations of transformers have for the width of a model."""
DEPTH = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
"""The same, for the number of its layers."""


def written_size(run: "Run", names: tuple[str, ...]) -> int | None:
    """A size of a run's model under the first of the names that its architecture has; None where none is written."""
    written = run.model.architecture or {}
    return next((size for name in names if isinstance(size := written.get(name), int)), None)


def model_type(run: "Run") -> str | None:
    """transformers' word for the architecture of a run's model; None where it is known only when it was fetched."""
    if run.model.architecture is not None:
        return str(run.model.architecture["model_type"])
    from finetune_study.forecast import predict

    try:
        return predict.model_config({"model": run.model.name_or_path}).get("model_type")
    except StudyError:
        return None
