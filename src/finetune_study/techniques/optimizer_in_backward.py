"""The optimizer steps while the backward pass runs."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Technique
from finetune_study.techniques.joined import bare, joined

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
        "ddp": "gradients would be used before DDP has summed them over the devices: use one device, or fsdp",
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
        if why_not := why_not_accumulate(run.gradient_accumulation_steps):
            return why_not
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

    def callbacks(self, model: Any) -> list[Any]:
        from transformers import TrainerCallback

        class StepInBackward(TrainerCallback):
            def on_train_begin(self, *_: Any, optimizer: Any, **__: Any) -> None:
                """By now accelerate has wrapped the optimizer, and FSDP2 has put shards in the place of weights."""
                step_in_backward(bare(optimizer))

        return [StepInBackward()]


def why_not_accumulate(steps: int) -> str | None:
    """Why so many micro-batches can't make a step; None where nothing is accumulated."""
    if steps == 1:
        return None
    return (
        "optimizer_in_backward makes a step of every micro-batch, so it can't accumulate "
        f"{steps} of them: raise per_device_train_batch_size"
    )


def in_backward(model: Any, kind: Any, settings: dict[str, Any], weight_decay: float) -> Any:
    """An optimizer for each trained weight, as one that steps them only after `step_in_backward`."""
    import torch

    weights = [weight for weight in model.parameters() if weight.requires_grad]
    # Trainer keeps bitsandbytes' states of embeddings in 32 bit.
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    full = settings | ({"optim_bits": 32} if "optim_bits" in settings else {})
    # Trainer spares norms and biases as well.
    decays = [weight_decay if weight.ndim > 1 else 0.0 for weight in weights]
    parts = [
        kind([{"params": [weight], "weight_decay": decay}], **(full if id(weight) in embeddings else settings))
        for weight, decay in zip(weights, decays, strict=True)
    ]
    return joined(parts, steps=False)


def step_in_backward(together: Any) -> None:
    """Lets autograd call each part of `in_backward` as soon as the gradient of its weight is whole."""
    together.follow_schedule()

    def steps(part: Any) -> Callable[[Any], None]:
        def step(_: Any) -> None:
            part.step()
            part.zero_grad()

        return step

    for part in together.parts:
        for group in part.param_groups:
            for weight in group["params"]:
                weight.register_post_accumulate_grad_hook(steps(part))
