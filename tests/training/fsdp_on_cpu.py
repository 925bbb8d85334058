"""accelerate gives FSDP to ranks with GPUs alone: here it is told that those of a CPU had some. The rest is real."""

from typing import Any


def allow() -> None:
    """From now on accelerate shards by FSDP where it is asked to, on a CPU too; torch's FSDP2 runs over gloo."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    begin = AcceleratorState.__init__

    def with_fsdp(self: Any, *arguments: Any, fsdp_plugin: Any = None, **keywords: Any) -> None:
        if fsdp_plugin is not None and PartialState().distributed_type == DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **keywords)

    AcceleratorState.__init__ = with_fsdp
