"""Activations wait in the memory of the host."""

import functools
from typing import TYPE_CHECKING, Any, ClassVar

from finetune_study.techniques.base import Kind, Technique

if TYPE_CHECKING:
    from finetune_study.run import Run


class ActivationOffload(Technique):
    """What the backward pass needs is moved to the host in the forward pass and fetched back (torch's save_on_cpu)."""

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
            # Weights are saved for the backward pass too, and stay on the device anyway.
            return tensor if isinstance(tensor, torch.nn.Parameter) else mover.pack_hook(tensor)

        def unpack(packed: Any) -> Any:
            return packed if isinstance(packed, torch.Tensor) else mover.unpack_hook(packed)

        forward = model.forward

        @functools.wraps(forward)
        def offloaded(*arguments: Any, **keywords: Any) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
                return forward(*arguments, **keywords)

        model.forward = offloaded
        return model
