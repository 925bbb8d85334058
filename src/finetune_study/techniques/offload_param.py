"""Weights outside the device."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from finetune_study.techniques.base import MODEL_STATES, Kind, ModelState, Recipe, Technique
from finetune_study.techniques.offload_optimizer import check_path, why_not_nvme

if TYPE_CHECKING:
    from finetune_study.config import Hardware


class OffloadParam(Technique):
    """Weights wait in host memory or on NVMe until their layer's turn (DeepSpeed; under FSDP2 states do too)."""

    name: ClassVar[str] = "offload_param"
    kind: ClassVar[Kind] = "parameter offload"
    needs: ClassVar[frozenset[str]] = frozenset({"zero3", "fsdp"})
    effect: ClassVar[str] = (
        "memory: one layer's weights on the device at a time; "
        "speed: every pass waits for PCIe or the drive; "
        "quality: unchanged"
    )
    source: ClassVar[str] = "Rajbhandari et al., arXiv 2104.07857"

    device: Literal["cpu", "nvme"] = "cpu"
    """Where the weights go; `nvme` needs zero3, and an op of DeepSpeed that a CPU study does not compile."""
    pin_memory: bool = False
    """Page-locked host memory: faster transfers, but it can't be swapped."""
    nvme_path: str | None = None
    """Folder on a local NVMe drive, for `nvme`."""

    @model_validator(mode="after")
    def _has_path(self) -> Self:
        check_path(self.device, self.nvme_path)
        return self

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        return why_not_nvme(self.device, hardware, recipe)

    def offloads(self, recipe: Recipe) -> frozenset[ModelState]:
        return MODEL_STATES if "fsdp" in recipe else frozenset({"weights"})

    def deepspeed(self, device: str) -> dict[str, Any]:
        return {"zero_optimization": {"offload_param": self.model_dump(exclude_none=True)}}
