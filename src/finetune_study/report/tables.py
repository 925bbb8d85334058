"""What the page and the terminal say of each run, as text."""

import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from finetune_study.table import Row, peak_memory, show


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
        "predicted out of memory", "≈", "memory", "The forecast is beyond the device by the margin asked; not trained."
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


def what_happened(row: Row) -> str:
    """Why a run did not complete, with the numbers that are known; empty for one that did and lost nothing."""
    state = row["state"]
    if state == "completed":
        skipped = row["num_skipped_steps"]
        return f"{skipped} steps skipped by loss scaling" if skipped else ""
    if state == "device_oom":
        return _out_of_memory(row)
    if state == "failed":
        tries = f" ({row['attempts']} tries)" if (row["attempts"] or 0) > 1 else ""
        return f"{row['failure_cause']}{tries}"
    partial = row["num_timed_steps"]
    kept = f" {partial} timed steps are kept." if state == "timeout" and partial else ""
    return f"{row['reason'] or ''}{kept}".strip()


def _out_of_memory(row: Row) -> str:
    where = [f"in {row['oom_phase']}"] if row["oom_phase"] else []
    where += [f"step {row['oom_step']}"] if row["oom_step"] else []
    where += [f"rank {row['oom_rank']}"] if row["oom_rank"] is not None and row["num_gpus"] > 1 else []
    sizes = [f"{size(row[name])} {word}" for name, word in _OOM_SIZES if row[name] is not None]
    parts = [", ".join(part) for part in (where, sizes) if part]
    parts += ["fragmented: more was free than was asked for"] if row["oom_fragmented"] else []
    return "; ".join(parts) or (row["reason"] or "")


_OOM_SIZES = (("oom_requested_gib", "asked for"), ("oom_held_gib", "held"))


def size(gib: float) -> str:
    """A memory size in the unit that reads best."""
    return f"{show(gib)} GiB" if gib >= 0.1 else f"{show(gib * 1024)} MiB" if gib * 1024 >= 0.1 else "under 0.1 MiB"


def how_it_failed(states: list[str]) -> tuple[str, str]:
    """The state that stands for several that did not fit, and how often each occurs, by its symbol.

    What is still open comes first, since more runs may change it; then what happened most often.
    """
    found = Counter(state for state in states if state != "completed") or Counter(["not_run"])
    open_ones = [state for state in ("failed", "not_run") if found[state]]
    state = open_ones[0] if open_ones else found.most_common(1)[0][0]
    return state, " ".join(f"{number} {STATES[name].symbol}" for name, number in found.items()) if len(
        found
    ) > 1 else ""


def counts(states: Iterable[str]) -> list[tuple[str, int]]:
    """How often each state occurs that does, in the order of STATES."""
    found = Counter(states)
    return [(state, found[state]) for state in STATES if found[state]]


def in_words(states: Iterable[str]) -> str:
    """For example `2 completed, 1 out of memory`; a single one without its number."""
    found = counts(states)
    if [number for _, number in found] == [1]:
        return STATES[found[0][0]].words
    return ", ".join(f"{number} {STATES[state].words}" for state, number in found)


def headline(cells: pl.DataFrame) -> str:
    """For example `12 runs: 9 completed, 3 out of memory`."""
    if not cells.height:
        return "no runs"
    return f"{cells.height} {'run' if cells.height == 1 else 'runs'}: {in_words(cells['state'])}"


def flat(frame: pl.DataFrame) -> pl.DataFrame:
    """A table that CSV can hold: lists become texts with `;` between their items."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(";") for name in lists)


MAX_RUNS = 200
"""Runs that the terminal lists; of more it says the counts, and the page has them all."""


def summary_text(cells: pl.DataFrame, width: int = 120) -> str:
    """The study in a few lines for a terminal: a table of all runs where they are few, then the counts.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
        width: columns of the terminal.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, highlight=False)
    predicted = cells["predicted_peak_memory_allocated_gib"].is_not_null().any()
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("run", overflow="fold")
    table.add_column("status")
    for title in ("step time", "peak memory", *(["predicted"] if predicted else [])):
        table.add_column(title, justify="right", no_wrap=True)
    for row in cells.with_columns(peak=peak_memory()).iter_rows(named=True):
        numbers = [show(row["step_time_seconds_median"], "s"), show(row["peak"], "GiB")]
        numbers += [show(row["predicted_peak_memory_allocated_gib"], "GiB")] if predicted else []
        table.add_row(row["run_id"], row["state"], *(number.strip() for number in numbers))
    if 0 < cells.height <= MAX_RUNS:
        console.print(table)
    console.print(headline(cells), markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n") + "\n"
