"""What the page and the terminal say of each run, as text."""

import io
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from finetune_study.states import STATES, in_words, that_count
from finetune_study.table import Row, joined, peak_memory, runs, show


def some(parts: Sequence[str], most: int, separator: str = ", ") -> str:
    """The first of many texts, and how many more there are."""
    rest = [f"{len(parts) - most:,} more"] if len(parts) > most else []
    return separator.join([*parts[:most], *rest])


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
    sizes = asked_and_held(row)
    parts = [", ".join(part) for part in (where, sizes) if part]
    parts += ["fragmented: more was free than was asked for"] if row["oom_fragmented"] else []
    return "; ".join(parts) or (row["reason"] or "")


OOM_SIZES = (("oom_requested_gib", "asked for"), ("oom_held_gib", "held"))


def asked_and_held(row: Row) -> list[str]:
    """What was asked for and what was held when memory ran out, as far as it is known."""
    return [f"{size(row[name])} {word}" for name, word in OOM_SIZES if row[name] is not None]


def against_limit(row: Row, limit: float) -> str:
    """Memory of a configuration beside the device's, in numbers; empty where none is known.

    Args:
        row: a configuration (`table.SCHEMA`), or a recipe's evidence.
        limit: memory of the device, GiB.
    """
    peak, predicted = row["peak_memory_gib_median"], row["predicted_peak_memory_gib"]
    parts = [f"peak {show(peak, 'GiB')}"] if peak is not None else asked_and_held(row)
    parts += [f"{show(predicted, 'GiB')} predicted"] if predicted is not None else []
    return f"{', '.join(parts)}, of the device's {show(limit, 'GiB')}" if parts else ""


def size(gib: float) -> str:
    """A memory size in the unit that reads best."""
    return f"{show(gib)} GiB" if gib >= 0.1 else f"{show(gib * 1024)} MiB" if gib * 1024 >= 0.1 else "under 0.1 MiB"


def how_it_failed(configurations: Iterable[list[str]]) -> tuple[str, str]:
    """The state that stands for configurations that did not fit, and how often each occurs, by its symbol.

    What is still open comes first, since more runs may change it; then a configuration of which only the time ran out,
    which with more of it may fit; then what happened most often. A missing repeat of a configuration that did not
    complete once changes nothing, and is left out.

    Args:
        configurations: how the repeats of each ended.
    """
    counted = [that_count(states) for states in configurations]
    told = Counter(state for states in counted for state in states)
    found = told if set(told) == {"completed"} else Counter({s: n for s, n in told.items() if s != "completed"})
    found = found or Counter(["not_run"])
    may_change = [one for one in ("failed", "not_run") if found[one]]
    may_change += ["timeout"] if any({*states} == {"timeout"} for states in counted) else []
    state = may_change[0] if may_change else found.most_common(1)[0][0]
    several = len(told) > 1
    return state, " ".join(f"{number} {STATES[name].symbol}" for name, number in told.items()) if several else ""


def headline(cells: pl.DataFrame) -> str:
    """For example `12 runs: 9 completed, 3 out of memory`."""
    if not cells.height:
        return "no runs"
    return f"{runs(cells.height)}: {in_words(cells['state'])}"


def flat(frame: pl.DataFrame) -> pl.DataFrame:
    """A table that CSV can hold: lists become texts with `;` between their items."""
    lists = [name for name, dtype in frame.schema.items() if isinstance(dtype, pl.List)]
    return frame.with_columns(pl.col(name).cast(pl.List(pl.String)).list.join(";") for name in lists)


PREDICTED = "predicted"
"""Heading of a prediction and its error, beside what was measured; a table without one leaves it out."""


def predicted(value: float | None, error_percent: float | None) -> str:
    """A prediction in the unit of what stands beside it, and its error where that was measured: `2.88 (+5.0 %)`."""
    return show(value) + ("" if error_percent is None else f" ({error_percent:+.1f} %)")


def predicted_if_any(table: Sequence[Sequence[str]]) -> list[list[str]]:
    """A table, heading first, without those columns of predictions that hold none."""
    heading, *rows = table
    shown = [i for i, title in enumerate(heading) if title != PREDICTED or any(row[i] for row in rows)]
    return [[row[i] for i in shown] for row in table]


def errors_in_words(cells: pl.DataFrame) -> str:
    """Mean absolute errors over all runs whose prediction was frozen before they started; empty where none was.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
    """
    errors = {
        what: cells[f"predicted_{column}_error_percent"].drop_nulls().abs().to_list()
        for what, column in (("peak memory", "memory"), ("step time", "step_time"))
    }
    parts = [f"{what} {statistics.fmean(e):.1f} % over {runs(len(e))}" for what, e in errors.items() if e]
    return f"Mean absolute error of what was predicted before the runs: {joined(parts)}." if parts else ""


MAX_RUNS = 200
"""Runs that the terminal lists; of more it says the counts, and the page has them all."""


_IN_SUMMARY = ("run", "status", "step time", PREDICTED, "peak memory", PREDICTED)


def _in_summary(row: Row) -> tuple[str, ...]:
    return (
        row["run_id"],
        row["state"],
        show(row["step_time_seconds_median"], "s"),
        predicted(row["predicted_step_time_seconds"], row["predicted_step_time_error_percent"]),
        show(row["peak"], "GiB"),
        predicted(row["predicted_peak_memory_allocated_gib"], row["predicted_memory_error_percent"]),
    )


def summary_text(cells: pl.DataFrame, width: int = 120) -> str:
    """The study in a few lines for a terminal: a table of all runs where they are few, then the counts.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
        width: columns of the terminal.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, highlight=False)
    titles, *rows = predicted_if_any(
        [_IN_SUMMARY, *map(_in_summary, cells.with_columns(peak=peak_memory()).iter_rows(named=True))]
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for number, title in enumerate(titles):
        numeric = number >= _IN_SUMMARY.index("step time")
        table.add_column(title, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in rows:
        table.add_row(*row)
    if 0 < cells.height <= MAX_RUNS:
        console.print(table)
    console.print(headline(cells), markup=False)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n") + "\n"
