"""Less traffic between the devices of ZeRO-3."""

from typing import TYPE_CHECKING, Any, ClassVar, Self

from pydantic import PositiveInt, model_validator

from finetune_study.techniques.base import Kind, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class Zeropp(Technique):
    """ZeRO++: weights and gradients travel quantised, and a second copy of the weights stays within a node."""

    name: ClassVar[str] = "zeropp"
    kind: ClassVar[Kind] = "communication"
    needs: ClassVar[frozenset[str]] = frozenset({"zero3"})
    effect: ClassVar[str] = (
        "memory: hpZ takes a second copy of the weights for each node; "
        "speed: a quarter of ZeRO-3's traffic; "
        "quality: weights and gradients are rounded on their way, close to ZeRO-3"
    )
    source: ClassVar[str] = "Wang et al., arXiv 2306.10209"

    zero_quantized_weights: bool = True
    """Weights are gathered in 8 bit."""
    zero_quantized_gradients: bool = True
    """Gradients are scattered in 4 bit."""
    zero_hpz_partition_size: PositiveInt = 1
    """Devices that share a second copy of the weights: those of one node; 1 makes none."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if not (self.zero_quantized_weights or self.zero_quantized_gradients) and self.zero_hpz_partition_size == 1:
            raise ValueError(
                "without zero_quantized_weights, zero_quantized_gradients and a zero_hpz_partition_size above 1 "
                "nothing of ZeRO++ is left: take zeropp out"
            )
        return self

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu" and (self.zero_quantized_weights or self.zero_quantized_gradients):
            return "DeepSpeed: This op had not been implemented on CPU backend; only zero_hpz_partition_size works"
        return None

    def why_not_run(self, run: "Run") -> str | None:
        size = self.zero_hpz_partition_size
        if size > run.num_gpus:
            return (
                f"DeepSpeed takes zeropp.zero_hpz_partition_size: {size} for {run.num_gpus}, silently, where there are "
                "no more devices: set it to those of one node, or take zeropp out"
            )
        if run.num_gpus % size:
            return f"DeepSpeed: {run.num_gpus} is not divisible by {size}, zeropp.zero_hpz_partition_size: set another"
        return None

    def deepspeed(self, device: str) -> dict[str, Any]:
        return {"zero_optimization": self.model_dump()}
