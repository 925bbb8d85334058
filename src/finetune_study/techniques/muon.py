"""Muon, by torch."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, PositiveInt

from finetune_study.techniques.base import Kind, Technique
from finetune_study.techniques.joined import joined

if TYPE_CHECKING:
    from finetune_study.run import Run

_ITS_OWN = (
    "use ddp; the Muon that DeepSpeed brings for ZeRO (MuonWithAuxAdam) has other settings in a configuration of its "
    "own, and is not offered"
)
_FLAT = (
    "torch: Param gradient must be a 2D matrix, and under ZeRO torch.optim.Muon gets flat pieces of weights: "
    f"{_ITS_OWN}"
)
_EMPTY = (
    "under ZeRO-3 weights are empty until their layer's turn, so that none is a matrix and all would be AdamW's, "
    f"silently: {_ITS_OWN}"
)


class Muon(Technique):
    """torch.optim.Muon for the matrices of the layers, torch.optim.AdamW for embeddings, output layer and norms."""

    name: ClassVar[str] = "muon"
    kind: ClassVar[Kind] = "optimizer"
    excludes: ClassVar[dict[str, str]] = {**dict.fromkeys(("zero1", "zero2"), _FLAT), "zero3": _EMPTY}
    effect: ClassVar[str] = (
        "memory: 4 bytes of states instead of 8 for most weights; "
        "speed: a step costs matrix products; "
        "quality: learns faster than AdamW in pretraining, less is known of fine-tuning"
    )
    source: ClassVar[str] = "Jordan et al., https://kellerjordan.github.io/posts/muon; Liu et al., arXiv 2502.16982"

    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay of the first moment."""
    nesterov: bool = True
    """Look ahead by one step."""
    ns_steps: PositiveInt = 5
    """Newton-Schulz iterations that make an update orthogonal."""
    adjust_lr_fn: Literal["original", "match_rms_adamw"] = "match_rms_adamw"
    """How the rate depends on a matrix's shape; `match_rms_adamw` lets AdamW's learning rate be used."""

    def is_exported(self) -> bool:
        return False

    def optimizer(self, run: "Run", arguments: Any) -> tuple[Any, dict[str, Any]]:
        rates = {"lr": arguments.learning_rate, "weight_decay": arguments.weight_decay}
        return lambda: muon_with_adamw, {**self.model_dump(), **rates}


def muon_with_adamw(model: Any, **settings: Any) -> Any:
    """Muon and AdamW as one optimizer over all trained weights of a model."""
    import torch

    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    of_ends = {id(p) for module in ends if module is not None for p in module.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.ndim == 2 and id(p) not in of_ends]
    chosen = {id(p) for p in matrices}
    rest = [p for p in trained if id(p) not in chosen]
    rates = {name: settings[name] for name in ("lr", "weight_decay")}

    parts: list[Any] = [torch.optim.Muon(matrices, **settings)] if matrices else []
    parts += [torch.optim.AdamW(rest, **rates)] if rest else []
    return joined(parts)
