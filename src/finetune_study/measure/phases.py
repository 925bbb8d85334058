"""What a run is doing right now; memory and failures are attributed to it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from finetune_study.record import Phase


class Phases:
    """The current phase of a rank, switched by hooks on model and optimizer."""

    def __init__(self) -> None:
        self.current: Phase = "load"
        self._listeners: list[Callable[[Phase], None]] = []

    def listen(self, listener: Callable[[Phase], None]) -> None:
        """Calls back with the phase that is left, before another one begins."""
        self._listeners.append(listener)

    def enter(self, phase: Phase) -> None:
        if phase != self.current:
            for listener in self._listeners:
                listener(self.current)
            self.current = phase

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        """Comes back to the phase before, unless an error leaves the block: then it stays, to say where it happened."""
        before = self.current
        self.enter(phase)
        yield
        self.enter(before)

    def follow_model(self, model: Any) -> None:
        """Forward begins when the model is called, backward when it returns."""

        def before(*_: object) -> None:
            if self.current != "evaluate":
                self.enter("forward")

        def after(*_: object) -> None:
            if self.current != "evaluate":
                self.enter("backward")

        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)

    def follow_optimizer(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """The same step, during which the phase is `optimizer`."""

        def stepped(*arguments: Any, **keywords: Any) -> Any:
            with self.during("optimizer"):
                return step(*arguments, **keywords)

        return stepped
