"""How the devices of a run share the work and the model states."""

from typing import Any, ClassVar, Literal

from pydantic import PositiveInt

from finetune_study.techniques.base import MODEL_STATES, Kind, ModelState, Recipe, Technique


class Ddp(Technique):
    """torch's DistributedDataParallel: every device holds everything, gradients are summed."""

    name: ClassVar[str] = "ddp"
    kind: ClassVar[Kind] = "sharding"
    effect: ClassVar[str] = "memory: none saved; speed: the least communication; quality: unchanged"
    source: ClassVar[str] = "Li et al., arXiv 2006.15704"

    def training_arguments(self, recipe: Recipe) -> dict[str, Any]:
        # All weights that ask for gradients get one in a causal language model; looking for others costs time.
        return {"ddp_find_unused_parameters": False}


BucketSize = PositiveInt | Literal["auto"]
"""Elements; `auto` follows the model's width, as transformers' DeepSpeed integration fills it in.

DeepSpeed's own default, 5e8, makes a buffer of 1 to 2 GB however small the model is."""


class _Zero(Technique):
    kind: ClassVar[Kind] = "sharding"
    is_deepspeed: ClassVar[bool] = True
    stage: ClassVar[int]
    source: ClassVar[str] = "Rajbhandari et al., arXiv 1910.02054"

    reduce_bucket_size: BucketSize = "auto"
    """Elements of gradients that are reduced at once."""

    def deepspeed(self, device: str) -> dict[str, Any]:
        return {"zero_optimization": {"stage": self.stage, **self.model_dump()}}


class Zero1(_Zero):
    """DeepSpeed ZeRO stage 1: optimizer states are sharded."""

    name: ClassVar[str] = "zero1"
    stage: ClassVar[int] = 1
    shards: ClassVar[frozenset[ModelState]] = frozenset({"optimizer states"})
    effect: ClassVar[str] = (
        "memory: optimizer states divided by the number of devices; speed: about as ddp; quality: unchanged"
    )


class Zero2(_Zero):
    """DeepSpeed ZeRO stage 2: optimizer states and gradients are sharded."""

    name: ClassVar[str] = "zero2"
    stage: ClassVar[int] = 2
    shards: ClassVar[frozenset[ModelState]] = frozenset({"optimizer states", "gradients"})
    effect: ClassVar[str] = (
        "memory: optimizer states and gradients divided by the number of devices, plus buckets; "
        "speed: about as ddp; "
        "quality: unchanged"
    )


class Zero3(_Zero):
    """DeepSpeed ZeRO stage 3: optimizer states, gradients and weights are sharded."""

    name: ClassVar[str] = "zero3"
    stage: ClassVar[int] = 3
    shards: ClassVar[frozenset[ModelState]] = MODEL_STATES
    effect: ClassVar[str] = (
        "memory: everything divided by the number of devices; "
        "speed: slower, since weights travel in every pass; "
        "quality: unchanged"
    )

    stage3_prefetch_bucket_size: BucketSize = "auto"
    """Elements of weights that are fetched ahead."""
    stage3_param_persistence_threshold: BucketSize = "auto"
    """Weights with fewer elements stay whole on every device."""
