"""`per_device_train_batch_size: max`: the largest micro-batch of a run that fits, found in the run's own job.

Sizes are those that make up the effective batch exactly, so that recipes are compared at equal effective batch. Each
size that is tried is trained for two optimizer steps by processes of its own, as many as the run has ranks: the second
step sees what stays from the first (optimizer states, gradients beside the activations of the next micro-batch). So a
size that does not fit is an observed outcome, and leaves nothing behind for the next one. The run itself is trained at
the largest that fitted; should it run out of memory after all, a smaller one is taken.

Where the search starts is the forecast's word, made on the node in seconds; without one it starts at the smallest size.

Memory grows with the size as long as gradients are accumulated. The one size that is a whole step in a single pass
holds no gradients beside its activations, and so is asked by itself: it is tried when the next smaller one fits, when
the forecast does not rule it out, and always before a run is said to fit at no size.

    python -m finetune_study.micro_batch RUN_YAML --results RESULTS [--memory-gib GIB]

prints the forecast's word for each size as JSON; launch calls it.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from finetune_study import run as run_module
from finetune_study import signals
from finetune_study.config import Hardware
from finetune_study.errors import RunFailedError, StudyError
from finetune_study.paths import Results
from finetune_study.ranks import LOG_TAIL_LINES, prepare_child, tail
from finetune_study.record import Ending
from finetune_study.run import Run

if TYPE_CHECKING:
    from finetune_study.forecast.predict import Question
    from finetune_study.forecast.profile import Profile

MAX = "max"

FACT = "micro_batch"
"""In the environment of a record: what was tried, and what was chosen."""

FORECAST_SECONDS = 120.0
"""Tracing a model takes seconds; devices are held meanwhile."""

SHORT_STEPS = 2
"""Optimizer states appear in the first step; the second one needs them beside its activations."""

OUT_OF_MEMORY = ("device_oom", "host_oom")
"""Endings of a try that mean that its size does not fit."""


def is_searched(run: Run) -> bool:
    """Whether the run's micro-batch is to be found."""
    return run.per_device_train_batch_size == MAX


def sizes(run: Run) -> list[int]:
    """Micro-batches with which the run's devices make up its effective batch, the smallest first."""
    each, rest = divmod(run.training.effective_batch_size, run.num_gpus)
    return [size for size in range(1, each + 1) if each % size == 0] if rest == 0 else []


def at(run: Run, size: int) -> Run:
    """The run with its micro-batch settled."""
    return _changed(run, per_device_train_batch_size=size, gradient_accumulation_steps=_accumulation(run, size))


def _accumulation(run: Run, size: int) -> int:
    return max(1, run.training.effective_batch_size // run.num_gpus // size)


def short(run: Run, size: int) -> Run:
    """What is trained to see whether a size fits: two steps, each of at most two micro-batches, without evaluation."""
    settled = at(run, size)
    assert settled.gradient_accumulation_steps is not None
    protocol = settled.protocol.model_copy(
        update={"num_untimed_steps": SHORT_STEPS - 1, "num_timed_steps": 1, "evaluates": False}
    )
    steps = min(2, settled.gradient_accumulation_steps)
    return _changed(settled, gradient_accumulation_steps=steps, protocol=protocol)


def _changed(run: Run, **changes: Any) -> Run:
    kept = {name: getattr(run, name) for name in type(run).model_fields if name not in ("run_id", *changes)}
    return run_module.make(**kept, **changes)


@dataclass(frozen=True)
class Try:
    """A size that was tried."""

    per_device_train_batch_size: int
    steps: str
    """`short`, or `all` for the run itself."""
    status: str
    """How it ended, as a run does."""
    phase: str | None
    bytes_requested: int | None
    bytes_held: int | None
    seconds: float

    @classmethod
    def of(cls, size: int, ending: Ending, seconds: float, *, is_short: bool) -> Self:
        """A training that completed or ran out of memory."""
        told = (ending.status, ending.phase, ending.bytes_requested, ending.bytes_held)
        return cls(size, "short" if is_short else "all", *told, seconds)

    @property
    def words(self) -> str:
        """For a reader."""
        what = "a short run" if self.steps == "short" else "the run"
        return f"{what} {'fits' if self.status == 'completed' else f'ended as {self.status}'} ({self.seconds:.0f} s)"


@dataclass
class Search:
    """Which size comes next, and what is known so far; it asks for nothing and starts nothing."""

    sizes: list[int]
    """The smallest first."""
    forecast: Mapping[int, str] = field(default_factory=dict)
    """`fits`, `tight` or `does not fit` by size; empty where nothing could be predicted."""
    no_forecast: str | None = None
    """Why nothing could."""
    tried: list[Try] = field(default_factory=list)

    @property
    def chosen(self) -> int | None:
        """The largest size that fitted, once no other is worth a try."""
        return max(self._fitting, default=None) if self.next_size is None else None

    @property
    def next_size(self) -> int | None:
        """The size to try next; None when the search is over."""
        *accumulating, single = self.sizes
        low = max((n for n, size in enumerate(accumulating) if size in self._fitting), default=-1)
        high = min((n for n, size in enumerate(accumulating) if size in self._failed), default=len(accumulating))
        if single in self._fitting:
            return None
        word = None if single in self._failed else self.forecast.get(single, "unknown")
        if word == "fits":
            return single
        if high - low > 1:
            return accumulating[self._between(low, high)]
        is_ruled_out = word == "does not fit" and low >= 0 and high < len(accumulating)
        return None if word is None or is_ruled_out else single

    def _between(self, low: int, high: int) -> int:
        """The largest that the forecast lets fit, then its neighbour; halves where the forecast was wrong twice."""
        words = [self.forecast.get(size) for size in self.sizes[:-1]]
        guess = max((n for n, word in enumerate(words) if word == "fits"), default=0)
        if low < guess < high:
            return guess
        nearest = low + 1 if guess <= low else high - 1
        return nearest if len(self.tried) < 2 else (low + high) // 2

    @property
    def _fitting(self) -> set[int]:
        return {one.per_device_train_batch_size for one in self.tried if one.status == "completed"} - self._failed

    @property
    def _failed(self) -> set[int]:
        """A size whose short run completed may still have been too large for the whole one."""
        return {one.per_device_train_batch_size for one in self.tried if one.status in OUT_OF_MEMORY}

    def report(self) -> dict[str, Any]:
        """For the record, where `chosen` is null as long as the search goes on, and where nothing fits."""
        return {
            "sizes": self.sizes,
            "forecast": {str(size): word for size, word in self.forecast.items()},
            "no_forecast": self.no_forecast,
            "tried": [asdict(one) for one in self.tried],
            "chosen": self.chosen,
        }


def chosen(environment: Mapping[str, Any]) -> int | None:
    """The size that a record's environment names; None where none is named."""
    size = environment.get(FACT, {}).get("chosen")
    return None if size is None else int(size)


def is_unsettled(environment: Mapping[str, Any]) -> bool:
    """Whether what ranks told was told in a search that had not come to its end."""
    return FACT in environment and chosen(environment) is None


# --- the forecast's word ---------------------------------------------------------------------------------------------


def words(run: Run, question: "Question", profile: "Profile") -> dict[int, str]:
    """The forecast's word for each size: `fits`, `tight`, `does not fit`.

    Args:
        run: whose micro-batch is to be found.
        question: about the run, at any size.
        profile: of its layout, which is the same for all sizes.
    """
    from finetune_study.forecast import predict

    return {size: str(predict.word(_of_size(run, question, size), profile)) for size in sizes(run)}


def expected(run: Run, question: "Question", profile: "Profile") -> "Question":
    """The question about a run at the size that the forecast expects to be found; about any other run, as it is."""
    if not is_searched(run):
        return question
    fitting = [size for size, word in words(run, question, profile).items() if word == "fits"]
    return _of_size(run, question, max(fitting, default=1))


def _of_size(run: Run, question: "Question", size: int) -> "Question":
    return replace(question, batch=size, accumulation=_accumulation(run, size))


def predict_words(run: Run, results: Results, memory_gib: float | None) -> dict[int, str]:
    """The same, from the run alone.

    Args:
        run: whose micro-batch is to be found.
        results: where its prepared model lies, and traces are kept.
        memory_gib: of a device.

    Raises:
        StudyError: where nothing can be predicted.
    """
    from finetune_study.forecast import predict
    from finetune_study.forecast import study as forecast_study

    memory = run.hardware.memory_budget_gib or memory_gib
    if memory is None:
        raise RunFailedError("The memory of the device is not known", where=run.hardware.name)
    entry = Hardware(device="cpu" if run.hardware.device == "cpu" else "cuda", gpu=run.hardware.gpu, memory_gib=memory)
    device = forecast_study.device_of(run.hardware.name, entry)
    question = forecast_study.question_of(at(run, 1), device, results)
    profile = predict.Traces(results.traces).of(question)
    return words(run, question, profile)


def ask(
    run_yaml: Path, results: Results, memory_gib: float | None, scratch: Path, environment: Mapping[str, str]
) -> tuple[dict[int, str], str | None]:
    """The same, from a process of its own: the supervisor stays small, and ends it when it is asked to end itself.

    Args:
        run_yaml: the run.
        results: the study's.
        memory_gib: of a device, where somebody said it.
        scratch: takes what the process prints.
        environment: its variables.

    Returns:
        The words, and where there are none, why.

    Raises:
        StoppedError: when a signal asks for the end.
    """
    memory = [] if memory_gib is None else ["--memory-gib", str(memory_gib)]
    command = [sys.executable, "-m", "finetune_study.micro_batch", str(run_yaml), "--results", str(results.root)]
    printed = scratch / "forecast.txt"
    with printed.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            [*command, *memory],
            env={**environment, "CUDA_VISIBLE_DEVICES": ""},  # it traces on fake tensors
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            preexec_fn=prepare_child,
        )
        try:
            until = time.monotonic() + FORECAST_SECONDS
            while process.poll() is None and time.monotonic() < until:
                signals.sleep(until - time.monotonic())
        finally:
            process.kill()
            process.wait()
    lines = tail(printed, LOG_TAIL_LINES)
    try:
        return {int(size): str(word) for size, word in json.loads(lines[-1]).items()}, None
    except (IndexError, ValueError, AttributeError):
        return {}, "\n".join(lines) or f"none after {FORECAST_SECONDS:g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description="What the forecast says of each micro-batch of a run.")
    parser.add_argument("run_yaml", type=Path)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--memory-gib", type=float)
    given = parser.parse_args()
    try:
        found = predict_words(run_module.load(given.run_yaml), Results(given.results), given.memory_gib)
    except StudyError as error:
        raise SystemExit(str(error)) from None
    print(json.dumps(found))


if __name__ == "__main__":
    main()
