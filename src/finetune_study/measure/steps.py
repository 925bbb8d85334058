"""Time of optimizer steps, their tokens and their loss."""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, default_data_collator

from finetune_study.sequences import IGNORED


def finite(loss: float) -> float | None:
    """The loss, or None where training diverged: JSON has no word for what is not a number."""
    return loss if math.isfinite(loss) else None


def collate(rows: list[dict[str, Any]], *, flattens: bool = False) -> dict[str, Any]:
    """A micro-batch of sequences, as the model takes it.

    Args:
        rows: sequences of one length.
        flattens: packed sequences become one, [1, batch × context], as transformers' DataCollatorWithFlattening makes
            it: with FlashAttention transformers tells examples apart in a single sequence alone
            (modeling_flash_attention_utils.py, _is_packed_sequence). No example's first token carries loss.
    """
    batch: dict[str, Any] = default_data_collator(rows)
    if "position_ids" in batch:
        # Packed examples are told apart by their positions, as long as no mask speaks for the whole sequence.
        del batch["attention_mask"]
        if flattens:
            batch = {name: tensor.reshape(1, -1) for name, tensor in batch.items()}
    return batch


def flattens(model: Any) -> bool:
    """Whether packed sequences of a micro-batch have to become one, for this model's attention."""
    return "flash" in str(model.config._attn_implementation)


class StepMeter(TrainerCallback):
    """One entry per optimizer step, from the end of the step before to its own end, the device's queue drained.

    A step that fp16's loss scaling skipped is neither timed nor counted; training goes on until enough steps were.
    """

    def __init__(
        self,
        num_untimed_steps: int,
        num_timed_steps: int,
        synchronize: Callable[[], None],
        was_skipped: Callable[[], bool],
        on_step: Callable[[dict[str, Any]], None],
    ) -> None:
        """
        Args:
            num_untimed_steps: steps before timing starts.
            num_timed_steps: steps to time.
            synchronize: waits until the device has done what it was given.
            was_skipped: whether the last optimizer step changed nothing.
            on_step: called with each finished step, its loss included.
        """
        self._untimed, self._timed = num_untimed_steps, num_timed_steps
        self._synchronize, self._was_skipped, self._on_step = synchronize, was_skipped, on_step
        self._since: float | None = None
        self._entry: dict[str, Any] = {}
        self._counts: deque[tuple[int, int]] = deque()
        self._real_tokens = 0
        self._loss_tokens = 0
        self.num_stepped = 0
        self.flattens = False
        """Whether packed sequences of a micro-batch become one; see `collate`."""
        self.on_timing: Callable[[bool], None] = lambda _: None
        """Called with True when timing starts and with False when it ends."""

    def collate(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """A micro-batch, its tokens counted while they are still in the host's memory."""
        real = sum(int(row["attention_mask"].sum()) for row in rows)
        self._counts.append((real, sum(int((row["labels"] != IGNORED).sum()) for row in rows)))
        return collate(rows, flattens=self.flattens)

    def count(self, *_: Any) -> None:
        """A forward pre-hook of the model: batches are fetched ahead, so tokens count when their batch is used."""
        if self._since is not None and self._counts:
            real, loss = self._counts.popleft()
            self._real_tokens += real
            self._loss_tokens += loss

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        if self._since is None:
            self._synchronize()
            self._since = time.perf_counter()
            if self._untimed == 0:
                self.on_timing(True)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        assert self._since is not None
        self._synchronize()
        now = time.perf_counter()
        stepped = not self._was_skipped()
        timed = stepped and self.num_stepped >= self._untimed
        self._entry = {
            "step": state.global_step,
            "seconds": now - self._since,
            "stepped": stepped,
            "timed": timed,
            "real_tokens": self._real_tokens,
            "loss_tokens": self._loss_tokens,
        }
        self.num_stepped += stepped
        self._real_tokens, self._loss_tokens = 0, 0
        if stepped and self.num_stepped == self._untimed:
            self.on_timing(True)
        if self.num_stepped == self._untimed + self._timed:
            self.on_timing(False)
            control.should_training_stop = True
        self._since = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if self._entry and logs and "loss" in logs:
            self._on_step({**self._entry, "loss": finite(float(logs["loss"]))})
            self._entry = {}
