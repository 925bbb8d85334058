"""The optimizer steps while the backward pass runs."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Technique
from finetune_study.techniques.joined import joined

if TYPE_CHECKING:
    from finetune_study.run import Run

_OWN_STEP = (
    "DeepSpeed makes the step itself, after the whole backward pass, and misses the states of its own copies of the "
    "weights (KeyError in lazy_init_hp_params_optimizer_state): use one device, or leave one out"
)


class OptimizerInBackward(Technique):
    """Each weight is updated as soon as its gradient is there, which is then given back."""

    name: ClassVar[str] = "optimizer_in_backward"
    kind: ClassVar[Kind] = "optimizer step"
    excludes: ClassVar[dict[str, str]] = {
        **dict.fromkeys(("zero1", "zero2"), _OWN_STEP),
        "zero3": "DeepSpeed's ZeRO-3 keeps all gradients, and no weight would be updated, silently: leave one out",
        "ddp": "gradients would be used before DDP has summed them over the devices: use one device",
        "fsdp": "gradients would be used before they are summed over the devices: use one device",
        "fp16": (
            "torch's loss scaling looks at all gradients before a step, and here they are gone by then (No inf checks "
            "were recorded for this optimizer): use bf16"
        ),
        **dict.fromkeys(
            ("galore_adamw", "apollo_adamw"),
            "transformers makes it for a whole model, not for a weight (You need to pass a model): use another one",
        ),
        "muon": "torch: Muon only supports 2D parameters, and here each weight has an optimizer alone: use another one",
    }
    effect: ClassVar[str] = (
        "memory: gradients of one layer instead of all; "
        "speed: as fast; "
        "quality: unchanged, but without clipping and gradient accumulation"
    )
    source: ClassVar[str] = (
        "Lv et al., arXiv 2306.09782; https://docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html"
    )

    def why_not_run(self, run: "Run") -> str | None:
        if run.gradient_accumulation_steps is None:
            return (
                "optimizer_in_backward makes a step of every micro-batch, so one size alone is possible: name it in "
                "per_device_train_batch_size, instead of `max`"
            )
        if run.gradient_accumulation_steps > 1:
            return (
                "optimizer_in_backward makes a step of every micro-batch, so it can't accumulate "
                f"{run.gradient_accumulation_steps} of them: raise per_device_train_batch_size"
            )
        if run.training.max_grad_norm:
            return (
                "optimizer_in_backward never sees all gradients, so it can't clip them: set training.max_grad_norm: 0"
            )
        return None

    def is_exported(self) -> bool:
        return False

    def optimizer(self, run: "Run", arguments: Any) -> tuple[Any, dict[str, Any]]:
        from transformers import Trainer

        kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments)
        return lambda: in_backward, {"kind": kind, "settings": settings, "weight_decay": arguments.weight_decay}


def in_backward(model: Any, kind: Any, settings: dict[str, Any], weight_decay: float) -> Any:
    """An optimizer for each trained weight, which autograd calls as soon as the weight's gradient is whole."""
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # Trainer spares norms and biases as well.
    decays = [weight_decay if weight.ndim > 1 else 0.0 for weight in weights]
    parts = {
        weight: kind([{"params": [weight], "weight_decay": decay}], **settings)
        for weight, decay in zip(weights, decays, strict=True)
    }
    together = joined(list(parts.values()), steps=False)
    is_first = True

    def step(weight: Any) -> None:
        nonlocal is_first
        if is_first:  # by now accelerate has wrapped it
            together.follow_schedule()
            is_first = False
        parts[weight].step()
        parts[weight].zero_grad()

    for weight in weights:
        weight.register_post_accumulate_grad_hook(step)
    return together
