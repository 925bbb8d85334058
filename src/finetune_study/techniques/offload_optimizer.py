"""Optimizer states in the memory of the host."""

from typing import Any, ClassVar, Literal

from finetune_study.techniques.base import Kind, Technique


class OffloadOptimizer(Technique):
    """DeepSpeed keeps optimizer states in host memory and updates the weights there."""

    name: ClassVar[str] = "offload_optimizer"
    kind: ClassVar[Kind] = "offload"
    needs: ClassVar[frozenset[str]] = frozenset({"zero1", "zero2", "zero3"})
    effect: ClassVar[str] = "no optimizer states on the device; every step waits for PCIe and the CPU"
    source: ClassVar[str] = "Ren et al., arXiv 2101.06840"

    device: Literal["cpu"] = "cpu"
    """Where the states go."""
    pin_memory: bool = False
    """Page-locked host memory: faster transfers, but it can't be swapped."""

    def deepspeed(self, device: str) -> dict[str, Any]:
        part: dict[str, Any] = {"zero_optimization": {"offload_optimizer": self.model_dump()}}
        if device == "cuda":
            # DeepSpeed's own Adam for CPUs: vectorised, and what it insists on for offloaded states.
            betas_and_rates = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
            part["optimizer"] = {"type": "AdamW", "params": betas_and_rates}
        else:
            # It would have to be compiled; on a machine without a GPU torch's AdamW does the same work.
            part["zero_force_ds_cpu_optimizer"] = False
        return part
