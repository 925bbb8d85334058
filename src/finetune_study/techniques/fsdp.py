"""torch's own sharding of everything, as the peer of ZeRO-3."""

from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import MODEL_STATES, Kind, ModelState, Recipe, Technique

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


class Fsdp(Technique):
    """FSDP2 (`torch.distributed.fsdp.fully_shard`): weights, gradients and states are sharded, layer by layer."""

    name: ClassVar[str] = "fsdp"
    kind: ClassVar[Kind] = "sharding"
    shards: ClassVar[frozenset[ModelState]] = MODEL_STATES
    effect: ClassVar[str] = (
        "memory: everything divided by the number of devices; "
        "speed: weights travel in every pass; "
        "quality: unchanged, but in 16 bit gradients are summed and losses returned in it, as accelerate sets it up"
    )
    source: ClassVar[str] = (
        "Zhao et al., arXiv 2304.11277; https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html"
    )

    reshard_after_forward: bool = True
    """Give gathered weights back after the forward pass too; false keeps them for the backward pass, as ZeRO-2 does."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if hardware.device == "cpu":
            return "accelerate silently leaves FSDP out on a CPU and trains with DDP: use ddp, or zero1 to zero3"
        return None

    def why_not_run(self, run: "Run") -> str | None:
        if run.num_gpus == 1:
            return "transformers: Using fsdp only works in distributed training: use two devices or more"
        return None

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "reshard_after_forward": self.reshard_after_forward,
            "cpu_offload": "offload_param" in recipe,
        }
        # The norm of gradients on the host is summed there, which NCCL can't; accelerate chooses the same pair for it
        # (accelerate/state.py), but from variables that transformers sets later.
        backend = {"ddp_backend": "cuda:nccl,cpu:gloo"} if "offload_param" in recipe else {}
        return {"fsdp": True, "fsdp_config": config, **backend}
