"""Optimizer states outside the device."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from finetune_study.section import LATER
from finetune_study.techniques.base import Kind, ModelState, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware


class OffloadOptimizer(Technique):
    """DeepSpeed keeps optimizer states in host memory or on NVMe and updates the weights on the host."""

    name: ClassVar[str] = "offload_optimizer"
    kind: ClassVar[Kind] = "offload"
    needs: ClassVar[frozenset[str]] = frozenset({"zero1", "zero2", "zero3"})
    effect: ClassVar[str] = (
        "memory: no optimizer states on the device; speed: every step waits for PCIe and the CPU; quality: unchanged"
    )
    source: ClassVar[str] = "Ren et al., arXiv 2101.06840; on NVMe Rajbhandari et al., arXiv 2104.07857"

    device: Literal["cpu", "nvme"] = "cpu"
    """Where the states go; `nvme` needs zero3, and an op of DeepSpeed that a CPU study does not compile."""
    pin_memory: bool = False
    """Page-locked host memory: faster transfers, but it can't be swapped."""
    nvme_path: str | None = Field(default=None, json_schema_extra=LATER)
    """Folder on a local NVMe drive, for `nvme`."""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        check_path(self.device, self.nvme_path)
        return self

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        other = next((name for name, t in recipe.items() if t.kind == "optimizer" and name != "adamw_torch"), None)
        if hardware.device == "cuda" and other:
            return (
                "DeepSpeed updates offloaded states by its own AdamW for CPUs, not by "
                f"{other} (You are using ZeRO-Offload with a client provided optimizer): use adamw_torch"
            )
        if hardware.device == "cpu" and "bf16_pure" in recipe:
            return (
                "DeepSpeed: Master weights feature requires DeepSpeedCPUAdam, an op that a CPU study does not compile"
            )
        return why_not_nvme(self.device, hardware, recipe)

    def offloads(self, recipe: Recipe) -> frozenset[ModelState]:
        # Gradients follow the states that they update (deepspeed/runtime/zero/stage_1_and_2.py, stage3.py).
        return frozenset({"optimizer states", "gradients"})

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


def check_path(device: str, path: str | None) -> None:
    """
    Raises:
        ValueError: for NVMe without a folder, and for a folder without NVMe.
    """
    if device == "nvme" and path is None:
        raise ValueError("device: nvme needs nvme_path, a folder on a local drive")
    if device != "nvme" and path is not None:
        raise ValueError(f"nvme_path is the folder of device: nvme, and device is {device}")


def why_not_nvme(device: str, hardware: "Hardware", recipe: Recipe) -> str | None:
    """Why DeepSpeed can't swap to NVMe there; None when it can, or need not."""
    if device != "nvme":
        return None
    if "zero3" not in recipe:
        return (
            "DeepSpeed swaps to NVMe under ZeRO-3 alone, else it takes host memory, silently: use zero3, or device: cpu"
        )
    if hardware.device == "cpu":
        return (
            "DeepSpeed: Unable to JIT load the async_io op, which a CPU study does not compile (it needs libaio): use "
            "device: cpu"
        )
    return None
