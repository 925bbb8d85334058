"""Activations wait in the memory of the host."""

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Technique

if TYPE_CHECKING:
    from finetune_study.run import Run


class ActivationOffload(Technique):
    """What the backward pass needs is moved to the host in the forward pass and fetched back (torch's save_on_cpu).

    Weights stay where they are. The 16-bit copies that autocast makes of them do move: kept, they would be on the
    device until the backward pass is over.
    """

    name: ClassVar[str] = "activation_offload"
    kind: ClassVar[Kind] = "activation offload"
    effect: ClassVar[str] = (
        "memory: no activations of earlier layers on the device; speed: every pass waits for PCIe; quality: unchanged"
    )
    source: ClassVar[str] = "https://docs.pytorch.org/docs/stable/autograd.html, torch.autograd.graph.save_on_cpu"

    pin_memory: bool = False
    """Page-locked host memory: faster transfers, but it can't be swapped."""

    def is_exported(self) -> bool:
        return False

    def wrap(self, model: Any, run: "Run") -> Any:
        import torch

        mover = torch.autograd.graph.save_on_cpu(pin_memory=self.pin_memory)

        def pack(tensor: Any) -> Any:
            weight = tensor if tensor._base is None else tensor._base
            if not isinstance(weight, torch.nn.Parameter):
                return mover.pack_hook(tensor)
            # A weight is saved as a view of it. It is the view that is made again in the backward pass: ZeRO-3 takes
            # the weight's values away in between, and a view would keep them.
            return weight, tensor.size(), tensor.stride(), tensor.storage_offset() - weight.storage_offset()

        def unpack(packed: Any) -> Any:
            if not isinstance(packed[0], torch.nn.Parameter):
                return mover.unpack_hook(packed)
            weight, size, stride, offset = packed
            return weight.detach().as_strided(size, stride, weight.storage_offset() + offset)

        forward = model.forward

        @functools.wraps(forward)
        def offloaded(*arguments: Any, **keywords: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*arguments, **keywords)

        model.forward = offloaded
        return model
