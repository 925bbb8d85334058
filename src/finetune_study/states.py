"""How runs end, in words: what the texts, the page and the terminal call each state of a run."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from finetune_study.cells import FAILED, NOT_RUN

OPEN = frozenset({FAILED, NOT_RUN})
"""States without an outcome: another try may still complete."""


@dataclass(frozen=True)
class State:
    """How a run's ending is shown; the words and the symbol say it without colour."""

    words: str
    symbol: str
    tone: str
    """`good`, `memory`, `limit`, `problem` or `none`: the colour on the page."""
    meaning: str


STATES: dict[str, State] = {
    "completed": State("completed", "✓", "good", "All timed steps were done."),
    "device_oom": State(
        "out of memory",
        "✕",
        "memory",
        "The device's memory ran out (on a CPU study: the device budget, enforced by the operating system). A result: "
        "it is not run again.",
    ),
    "host_oom": State("out of host memory", "⊠", "memory", "The node's memory ran out. A result: it is not run again."),
    "timeout": State(
        "timeout", "◷", "limit", "The run's time ran out; what was measured until then is kept. It is not run again."
    ),
    "unsupported": State("unsupported", "⊘", "limit", "It can't run here, for the reason given; it was not tried."),
    "implied_oom": State(
        "implied out of memory", "⇒", "memory", "An easier run of the same kind ran out of memory; not trained."
    ),
    "predicted_oom": State(
        "predicted out of memory", "≫", "memory", "The forecast is beyond the device by the margin asked; not trained."
    ),
    "failed": State(
        "failed",
        "!",
        "problem",
        "The last try left no outcome (a bug, a lost node); the next call tries again, until max_attempts.",
    ),
    "not_run": State("not run", "○", "none", "There was no try yet."),
}
"""Every state of a cell: the statuses of an outcome, and the two states without one."""


def ended_without(states: Iterable[str]) -> list[str]:
    """The outcomes that are not a completion: a configuration that has one does not fit, whatever else comes."""
    return [state for state in states if state != "completed" and state not in OPEN]


def that_count(states: list[str]) -> list[str]:
    """The states of a configuration that say whether it fits: where one did not complete, the open ones do not."""
    return [state for state in states if state not in OPEN] if ended_without(states) else states


def counts(states: Iterable[str]) -> list[tuple[str, int]]:
    """How often each state occurs that does, in the order of STATES."""
    found = Counter(states)
    return [(state, found[state]) for state in STATES if found[state]]


def in_words(states: Iterable[str]) -> str:
    """For example `2 completed, 1 out of memory`; a single one without its number."""
    found = counts(states)
    if [number for _, number in found] == [1]:
        return STATES[found[0][0]].words
    return ", ".join(f"{number:,} {STATES[state].words}" for state, number in found)
