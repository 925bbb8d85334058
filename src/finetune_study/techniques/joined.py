"""Several optimizers behind one interface."""

from typing import Any


def bare(optimizer: Any) -> Any:
    """An optimizer without what accelerate and DeepSpeed put around it."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def joined(parts: list[Any], *, steps: bool = True) -> Any:
    """One optimizer for Trainer, made of others for different weights; each keeps its own arithmetic and states.

    Args:
        parts: torch optimizers without a weight in common.
        steps: a step is one of every part; otherwise somebody else calls the parts.
    """
    import torch

    class Joined(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.parts = parts
            groups = [group | {"part": number} for number, part in enumerate(parts) for group in part.param_groups]
            super().__init__(groups, {})

        @property
        def state(self) -> Any:
            return {weight: state for part in self.parts for weight, state in part.state.items()}

        @state.setter
        def state(self, _: Any) -> None:
            """The states are those of the parts."""

        def follow_schedule(self) -> None:
            """A schedule writes to this optimizer's groups, which accelerate replaced when it wrapped it.

            There may be less of them: DeepSpeed steps one group at a time."""
            for part in self.parts:
                part.param_groups = []
            for group in self.param_groups:
                self.parts[group["part"]].param_groups.append(group)

        def step(self, closure: Any = None) -> None:
            self.follow_schedule()
            if steps:
                for part in self.parts:
                    part.step()

    return Joined()
