"""Optimizers, by the names of transformers' `optim`."""

import math
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from finetune_study.errors import RunFailedError
from finetune_study.techniques.base import Kind, Recipe, Technique
from finetune_study.techniques.joined import bare
from finetune_study.techniques.peft_method import WIDTH, PeftMethod, written_size

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class Optimizer(Technique):
    """An optimizer that transformers has a name for."""

    kind: ClassVar[Kind] = "optimizer"

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"optim": self.name, **self.model_dump()}


class _Adam(Optimizer):
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the first moment."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the second moment."""
    adam_epsilon: PositiveFloat = 1e-8
    """Keeps the division finite."""


class AdamwTorch(_Adam):
    """torch.optim.AdamW: two states of the weights' own precision for each trained weight."""

    name: ClassVar[str] = "adamw_torch"
    effect: ClassVar[str] = (
        "memory: 8 bytes of states for each trained fp32 weight; speed: the default; quality: the reference"
    )
    source: ClassVar[str] = "Loshchilov and Hutter, arXiv 1711.05101"


class AdamwTorchFused(_Adam):
    """torch.optim.AdamW(fused=True): the whole step is one kernel."""

    name: ClassVar[str] = "adamw_torch_fused"
    effect: ClassVar[str] = (
        "memory: states as adamw_torch, without its temporary copy; speed: the fastest step; quality: as adamw_torch"
    )
    source: ClassVar[str] = "https://docs.pytorch.org/docs/stable/generated/torch.optim.AdamW.html"


class _Torchao(_Adam):
    packages: ClassVar[tuple[str, ...]] = ("torchao",)


class AdamwTorch8bit(_Torchao):
    """torchao's AdamW with states in 8 bit, quantised in blocks."""

    name: ClassVar[str] = "adamw_torch_8bit"
    effect: ClassVar[str] = (
        "memory: 2 bytes of states for each trained weight; "
        "speed: compiled at its first step, which is slow; "
        "quality: close to adamw_torch"
    )
    source: ClassVar[str] = "https://github.com/pytorch/ao (torchao.optim)"


class AdamwTorch4bit(_Torchao):
    """torchao's AdamW with states in 4 bit, quantised in blocks."""

    name: ClassVar[str] = "adamw_torch_4bit"
    effect: ClassVar[str] = (
        "memory: 1 byte of states for each trained weight; "
        "speed: compiled at its first step, which is slow; "
        "quality: a little below adamw_torch"
    )
    source: ClassVar[str] = "Li et al., arXiv 2309.01507; https://github.com/pytorch/ao (torchao.optim)"


class _Bitsandbytes(_Adam):
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    excludes: ClassVar[dict[str, str]] = {
        "fsdp": (
            "torch knows of no way in which bitsandbytes' optimizers take FSDP2's shards (does not have a sharding "
            "strategy registered): use adamw_torch_8bit"
        )
    }


class Adamw8bit(_Bitsandbytes):
    """bitsandbytes' AdamW with states in 8 bit, quantised in blocks; without ZeRO those of embeddings are in 32 bit."""

    name: ClassVar[str] = "adamw_8bit"
    effect: ClassVar[str] = (
        "memory: 2 bytes of states for each trained weight instead of 8; "
        "speed: a step about as adamw_torch; "
        "quality: as adamw_torch within noise"
    )
    source: ClassVar[str] = "Dettmers et al., arXiv 2110.02861"


class _Paged(_Bitsandbytes):
    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu":
            return (
                "bitsandbytes: Paged optimizers are not supported on CPU. Falling back to non-paged optimizer "
                "behavior: use adamw_torch or adamw_8bit"
            )
        return super().why_not(hardware, recipe)


class PagedAdamw32bit(_Paged):
    """bitsandbytes' AdamW with states in unified memory, which moves to the host when the device is full."""

    name: ClassVar[str] = "paged_adamw_32bit"
    effect: ClassVar[str] = (
        "memory: states as adamw_torch, in unified memory, so that peaks go to the host; "
        "speed: as adamw_torch, at PCIe's speed where states are on the host; "
        "quality: as adamw_torch"
    )
    source: ClassVar[str] = "Dettmers et al., arXiv 2305.14314, section 3"


class PagedAdamw8bit(_Paged):
    """bitsandbytes' 8-bit AdamW with states in unified memory."""

    name: ClassVar[str] = "paged_adamw_8bit"
    effect: ClassVar[str] = (
        "memory: states as adamw_8bit, in unified memory, so that peaks go to the host; "
        "speed: as adamw_8bit, at PCIe's speed where states are on the host; "
        "quality: as adamw_8bit"
    )
    source: ClassVar[str] = "Dettmers et al., arXiv 2305.14314, section 3"


_ONE_DIMENSION = (
    "projects gradients of whole matrices (tuple index out of range), and DeepSpeed gives an optimizer flat pieces of "
    "all weights: use ddp"
)


class Adafactor(Optimizer):
    """transformers' Adafactor: of the second moment sums of rows and columns alone, and no first moment."""

    name: ClassVar[str] = "adafactor"
    excludes: ClassVar[dict[str, str]] = {
        **dict.fromkeys(
            ("zero1", "zero2", "zero3"),
            "Adafactor sums rows and columns of matrices; of DeepSpeed's flat pieces it keeps whole states: use ddp",
        ),
        "fsdp": "Adafactor mixes tensors of its own with FSDP2's shards (got mixed torch.Tensor and DTensor)",
    }
    effect: ClassVar[str] = (
        "memory: hardly any states; "
        "speed: a step somewhat slower than adamw_torch; "
        "quality: another update than AdamW's, so another learning rate"
    )
    source: ClassVar[str] = "Shazeer and Stern, arXiv 1804.04235"


class _LowRank(Optimizer):
    """An optimizer whose states live in a low-rank projection of the gradients of linear layers."""

    rank: PositiveInt = 128
    """Rank of the projection."""
    update_proj_gap: PositiveInt = 200
    """Steps between two projections."""
    scale: PositiveFloat = 0.25
    """Factor of the projected update."""
    optim_target_modules: Literal["all-linear"] | list[str] = "all-linear"
    """Layers whose gradients are projected."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        methods = [technique for technique in recipe.values() if isinstance(technique, PeftMethod)]
        ranks = [rank for method in methods if (rank := method.rank_of_linear()) is not None]
        if methods and not ranks:
            return (
                f"{self.name} projects gradients of torch's linear layers, and {methods[0].name} trains none: every "
                "weight would be stepped by plain AdamW, silently: use adamw_torch"
            )
        if ranks and self.rank >= max(ranks):
            return (
                f"{self.name} projects to rank {self.rank}, and the trained matrices have rank {max(ranks)}: nothing "
                "would become smaller, silently: choose a lower rank, or use adamw_torch"
            )
        return None

    def why_not_run(self, run: "Run") -> str | None:
        if run.training.weight_decay:
            return (
                f"transformers hands no weight decay to {self.name} (trainer_optimizer.py, _setup_low_rank_optimizer): "
                "set training.weight_decay: 0"
            )
        width = written_size(run, WIDTH)
        trains_layers = not any(technique.freezes_weights for technique in run.parsed_techniques.values())
        if trains_layers and width is not None and self.rank >= width:  # one side of every layer at least is the width
            return (
                f"{self.name} projects to rank {self.rank}, and the model's layers are {width} wide: nothing would "
                "become smaller, silently: choose a lower rank, or use adamw_torch"
            )
        return None

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        adam = self.model_dump(include=set(_Adam.model_fields))
        projection = ",".join(f"{name}={getattr(self, name)}" for name in ("rank", "update_proj_gap", "scale"))
        return {
            "optim": self.name,
            "optim_args": projection,
            "optim_target_modules": self.optim_target_modules,
            **adam,
        }

    def callbacks(self, model: Any) -> list[Any]:
        from transformers import TrainerCallback

        check = self.check_projected

        class CheckProjection(TrainerCallback):
            def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
                """By now transformers has chosen what is projected."""
                check(bare(optimizer))

        return [CheckProjection()]

    def check_projected(self, optimizer: Any) -> None:
        """
        Raises:
            RunFailedError: where no matrix becomes smaller; the libraries say nothing, and take more memory than AdamW.
        """
        projected = [p for group in optimizer.param_groups if "rank" in group for p in group["params"]]
        sides = {min(weight.shape) for weight in projected if weight.requires_grad}
        if self.rank >= max(sides, default=math.inf):  # the plan refuses what trains no linear layer
            raise RunFailedError(
                "No projected matrix is larger than the rank, so none would become smaller",
                where=f"{self.name}.rank",
                given=self.rank,
                allowed=f"less than {max(sides)}, the shorter side of the largest",
                do="choose a lower rank, or use adamw_torch",
            )


class GaloreAdamw(_LowRank):
    """AdamW on gradients that are projected to a low rank by SVD, by galore-torch, with the moments' usual decays."""

    name: ClassVar[str] = "galore_adamw"
    packages: ClassVar[tuple[str, ...]] = ("galore_torch",)
    excludes: ClassVar[dict[str, str]] = dict.fromkeys(("zero1", "zero2", "zero3"), f"GaLore {_ONE_DIMENSION}")
    effect: ClassVar[str] = (
        "memory: states of rank times width instead of whole matrices; "
        "speed: an SVD every update_proj_gap steps; "
        "quality: close to adamw_torch at a sufficient rank"
    )
    source: ClassVar[str] = "Zhao et al., arXiv 2403.03507"


class ApolloAdamw(_LowRank, _Adam):
    """AdamW's learning rates for whole channels, learned in a random low-rank projection, by apollo-torch."""

    name: ClassVar[str] = "apollo_adamw"
    packages: ClassVar[tuple[str, ...]] = ("apollo_torch",)
    excludes: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("zero1", "zero2", "zero3"), f"APOLLO {_ONE_DIMENSION}"),
        "fsdp": "apollo-torch numbers the weights it is given, and FSDP2 puts others in their place (KeyError: 'seed')",
    }
    effect: ClassVar[str] = (
        "memory: states as galore_adamw; speed: no SVD, so faster than galore_adamw; quality: close to adamw_torch"
    )
    source: ClassVar[str] = "Zhu et al., arXiv 2412.05270"

    scale: PositiveFloat = 1.0
    """Factor of the projected update."""
