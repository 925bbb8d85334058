"""Methods of peft beside LoRA that change layers."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from finetune_study.errors import RunFailedError
from finetune_study.techniques.base import Recipe
from finetune_study.techniques.peft_method import (
    DEPTH,
    MIXED,
    WIDTH,
    PeftMethod,
    in_format_of_training,
    model_type,
    written_size,
)

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run

TargetModules = Literal["all-linear"] | list[str]

ADAPTION_PROMPT_MODELS = frozenset({"llama", "mistral", "gpt2"})
"""Model types of which peft knows the attention (peft.tuners.adaption_prompt.config.TRANSFORMERS_MODEL_CONFIG)."""


class Adalora(PeftMethod):
    """LoRA whose ranks are taken from unimportant layers while it trains."""

    name: ClassVar[str] = "adalora"
    method: ClassVar[str] = "ADALORA"
    excludes: ClassVar[dict[str, str]] = {
        "zero3": "peft needs whole weights to move ranks, and ZeRO-3 leaves none (The size of tensor a (0) must match)",
        "fsdp": (
            "peft's penalty takes whole matrices outside their layers, where FSDP2 has shards (The size of tensor a "
            "must match the size of tensor b)"
        ),
        "optimizer_in_backward": (
            "peft moves ranks by the gradients after a step, and here they are gone by then (unsupported operand "
            "type(s) for *: 'Parameter' and 'NoneType')"
        ),
    }
    effect: ClassVar[str] = (
        "memory: as lora of init_r; "
        "speed: slower than lora by its bookkeeping; "
        "quality: better than lora at an equal budget"
    )
    source: ClassVar[str] = "Zhang et al., arXiv 2303.10512"

    init_r: PositiveInt = 12
    """Rank at the start."""
    target_r: PositiveInt = 8
    """Average rank at the end, below init_r."""
    tinit: NonNegativeInt = 0
    """Steps before ranks are taken away."""
    tfinal: NonNegativeInt = 0
    """Steps at the end with fixed ranks."""
    deltaT: PositiveInt = 1  # noqa: N815, peft's name
    """Steps between two changes of the ranks."""
    beta1: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Decay of the average importance."""
    beta2: Annotated[float, Field(gt=0, lt=1)] = 0.85
    """Decay of the uncertainty about it."""
    orth_reg_weight: Annotated[float, Field(gt=0)] = 0.5
    """Weight of the term of the loss that keeps directions orthogonal."""
    lora_alpha: PositiveInt = 8
    """The update is scaled by lora_alpha / r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout before the update."""
    target_modules: TargetModules = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the output layer."""

    @model_validator(mode="after")
    def _has_ranks_to_take(self) -> Self:
        if self.init_r <= self.target_r:  # peft fails at the first change (kthvalue(): selected number k out of range)
            raise ValueError(
                f"init_r {self.init_r} is not above target_r {self.target_r}, and ranks are only taken away"
            )
        return self

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        # States on the host are stepped there, and DeepSpeed keeps the gradients.
        if {"zero1", "zero2"} & recipe.keys() and "offload_optimizer" not in recipe:
            return (
                "peft moves ranks by the gradients after a step, and DeepSpeed has none by then (Gradients are only "
                "available immediately after backward and before engine step): use ddp, or offload_optimizer"
            )
        return None

    def why_not_run(self, run: "Run") -> str | None:
        if self.tinit >= run.num_steps - self.tfinal:
            return (
                f"peft: The supplied schedule values don't allow for a budgeting phase: adalora.tinit {self.tinit} and "
                f"tfinal {self.tfinal} leave none of the run's {run.num_steps} steps: lower them, or train longer"
            )
        return super().why_not_run(run)

    def is_exported(self) -> bool:
        return False

    def peft_settings(self, run: "Run") -> dict[str, Any]:
        return self.model_dump() | {"total_step": run.num_steps}

    def wrap(self, model: Any, run: "Run") -> Any:
        model = super().wrap(model, run)
        tuner = model.base_model
        with_penalty = tuner.forward

        def forward(*arguments: Any, **keywords: Any) -> Any:
            # peft adds its penalty to the loss in evaluation too, where losses of different recipes are compared.
            return with_penalty(*arguments, **keywords) if tuner.training else tuner.model(*arguments, **keywords)

        tuner.forward = forward
        return model

    def callbacks(self, model: Any) -> list[Any]:
        from transformers import TrainerCallback

        class Allocate(TrainerCallback):
            """peft leaves it to the training loop to move ranks after each step.

            A step that loss scaling skipped is none: its gradients are not finite, and what peft averages of them would
            never be again.
            """

            num_stepped = 0

            def on_optimizer_step(self, args: Any, state: Any, control: Any, *, optimizer: Any, **_: Any) -> None:
                if not optimizer.step_was_skipped:
                    model.base_model.update_and_allocate(self.num_stepped)
                    self.num_stepped += 1

        return [Allocate()]


class Ia3(PeftMethod):
    """Trains one factor for each output of keys and values, and each input of the feed-forward's last layer."""

    name: ClassVar[str] = "ia3"
    method: ClassVar[str] = "IA3"
    effect: ClassVar[str] = (
        "memory: a hundred times fewer trained weights than lora, activations as full fine-tuning; "
        "speed: about as lora; "
        "quality: below lora with much data, good with few examples"
    )
    source: ClassVar[str] = "Liu et al., arXiv 2205.05638"

    target_modules: list[str] | None = None
    """Names of the layers; null: what peft knows of the architecture."""
    feedforward_modules: list[str] | None = None
    """Those of them that are scaled at their input; null: what peft knows of the architecture."""


class Loha(PeftMethod):
    """Updates linear layers by the element-wise product of two low-rank matrices."""

    name: ClassVar[str] = "loha"
    method: ClassVar[str] = "LOHA"
    takes_conv1d: ClassVar[bool] = False
    beside: ClassVar[frozenset[str]] = MIXED - {"loha"}
    excludes: ClassVar[dict[str, str]] = {
        "zero3": "peft makes its matrices by the weights' shape, and ZeRO-3 leaves none (tuple index out of range)"
    }
    effect: ClassVar[str] = (
        "memory: twice lora's trained weights, for a rank of r squared; "
        "speed: slower than lora; "
        "quality: as lora, or better where updates need a high rank"
    )
    source: ClassVar[str] = "Hyeon-Woo et al., arXiv 2108.06098"

    r: PositiveInt = 8
    """Rank of each of the two matrices."""
    alpha: PositiveInt = 8
    """The update is scaled by alpha / r."""
    target_modules: TargetModules = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the output layer."""


class Lokr(PeftMethod):
    """Updates linear layers by the Kronecker product of a small and a low-rank matrix."""

    name: ClassVar[str] = "lokr"
    method: ClassVar[str] = "LOKR"
    takes_conv1d: ClassVar[bool] = False
    beside: ClassVar[frozenset[str]] = MIXED - {"lokr"}
    effect: ClassVar[str] = (
        "memory: fewer trained weights than lora; "
        "speed: slower than lora; "
        "quality: as lora with fewer weights, or below it"
    )
    source: ClassVar[str] = "Edalati et al., arXiv 2212.10650"

    r: PositiveInt = 8
    """Rank of the larger factor."""
    alpha: PositiveInt = 8
    """The update is scaled by alpha / r."""
    target_modules: TargetModules = "all-linear"
    """Names of the layers that get an update, or `all-linear`: all but the output layer."""


class Oft(PeftMethod):
    """Rotates the inputs of linear layers by trained orthogonal matrices."""

    name: ClassVar[str] = "oft"
    method: ClassVar[str] = "OFT"
    takes_conv1d: ClassVar[bool] = False
    beside: ClassVar[frozenset[str]] = MIXED - {"oft"}
    effect: ClassVar[str] = (
        "memory: trained weights as lora; "
        "speed: slower than lora; "
        "quality: close to lora, keeps the angles between neurons"
    )
    source: ClassVar[str] = "Qiu et al., arXiv 2306.07280"

    oft_block_size: PositiveInt = 32
    """Inputs that are rotated together; it divides the width of every layer."""
    target_modules: TargetModules = "all-linear"
    """Names of the layers that are rotated, or `all-linear`: all but the output layer."""

    def why_not_run(self, run: "Run") -> str | None:
        width = written_size(run, WIDTH)
        if self.target_modules == "all-linear" and width is not None and width % self.oft_block_size:
            return (
                f"peft: Invalid `oft_block_size` ({self.oft_block_size}), it would take another, for layers that are "
                f"{width} wide: choose one that divides it"
            )
        return super().why_not_run(run)

    def wrap(self, model: Any, run: "Run") -> Any:
        model = super().wrap(model, run)
        sizes = (getattr(module, "oft_block_size", {}) for module in model.modules())
        taken = {size for of_layer in sizes if isinstance(of_layer, dict) for size in of_layer.values()}
        if others := taken - {self.oft_block_size}:  # peft takes the nearest that divides the width, and goes on
            raise RunFailedError(
                "The blocks do not divide the width of every layer",
                where="oft.oft_block_size",
                given=self.oft_block_size,
                allowed=f"a number that does; peft would take {', '.join(map(str, sorted(others)))} instead",
            )
        return model


class AdaptionPrompt(PeftMethod):
    """LLaMA-Adapter: trained tokens beside the attention of the last layers, opened by a gate that starts at zero."""

    name: ClassVar[str] = "adaption_prompt"
    method: ClassVar[str] = "ADAPTION_PROMPT"
    effect: ClassVar[str] = (
        "memory: about a million trained weights for a 7B model; "
        "speed: a second attention over a few tokens for each layer; "
        "quality: begins as the base model, below lora on hard tasks"
    )
    source: ClassVar[str] = "Zhang et al., arXiv 2303.16199"

    adapter_len: PositiveInt = 10
    """Trained tokens of a layer."""
    adapter_layers: PositiveInt | None = None
    """How many layers from the last on; null: all."""

    def why_not_run(self, run: "Run") -> str | None:
        found = model_type(run)
        if found is not None and found not in ADAPTION_PROMPT_MODELS:
            known = ", ".join(sorted(ADAPTION_PROMPT_MODELS))
            return f"peft: Unsupported model type for adaption prompt: '{found}'. It knows {known}: use another method"
        depth = written_size(run, DEPTH)
        if self.adapter_layers is not None and depth is not None and self.adapter_layers > depth:
            return (
                f"peft: Config specifies more adapter layers '{self.adapter_layers}' than the model has '{depth}': "
                "lower adaption_prompt.adapter_layers, or leave it out for all"
            )
        return None

    def is_exported(self) -> bool:
        return False

    def wrap(self, model: Any, run: "Run") -> Any:
        import peft

        layers = self.adapter_layers or model.config.num_hidden_layers
        config = peft.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=self.adapter_len, adapter_layers=layers)
        return in_format_of_training(peft.get_peft_model(model, config), run)
