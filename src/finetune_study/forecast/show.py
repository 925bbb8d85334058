"""The forecast of a study as text: a line for each run, what is not known, and the bill."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from typing import Any

from finetune_study.forecast.study import BETWEEN_WARNINGS, TO_TRAIN, totals
from finetune_study.table import runs, show

Row = dict[str, Any]

HEADING = ("run", "state", "peak memory", "fits", "step", "epoch", "GPU-hours", "dollars", "waits for")
AS_TEXT = ("run", "state", "fits", "waits for")
"""Columns that begin at the left; numbers end at the right."""
MAX_NOTES = 12
"""Of what is not known of runs; forecast.csv has all of it."""


def table(rows: list[Row], width: int = 160) -> str:
    """What is predicted of each run, and the totals.

    Args:
        rows: of a forecast (`study.COLUMNS`).
        width: columns of the terminal; where a line would be longer, the run stands on a line of its own.
    """
    lines = [*_lines([HEADING, *map(_cells, rows)], width), "", *_notes(rows, width)]
    return "\n".join([*lines, *(_wrapped(_total(name, sums), width) for name, sums in totals(rows).items())])


def _cells(row: Row) -> tuple[str, ...]:
    cost = row["predicted_cost_usd"]
    return (
        row["run_id"],
        row["state"],
        memory(row["predicted_peak_memory_allocated_gib"], row["predicted_peak_memory_reserved_gib"]),
        row["fits"] or "",
        show(row["predicted_step_time_seconds"], "s"),
        show(row["predicted_epoch_hours"], "h"),
        show(row["predicted_gpu_hours"]),
        "" if cost is None else f"{cost:,.2f}",
        row["bottleneck"] or "",
    )


def memory(allocated: float | None, reserved: float | None) -> str:
    """The interval from what tensors take to what the allocator may hold, or one number where these are the same."""
    if allocated is None or reserved is None:
        return "not predicted"
    low, high = (show(allocated), show(reserved))
    return f"{low} GiB" if low == high else f"{low} to {high} GiB"


def _lines(cells: Sequence[Sequence[str]], width: int) -> list[str]:
    """Columns below each other, without those in which nothing is known."""
    heading = cells[0]
    shown = [i for i in range(len(heading)) if any(row[i] for row in cells[1:])]
    widths = {i: max(len(row[i]) for row in cells) for i in shown}
    first, *others = shown or [0]
    texts = ["  ".join(_padded(row[i], heading[i], widths[i]) for i in others) for row in cells]
    if sum(widths.values()) + 2 * len(others) <= width:
        lines = [f"{row[first]:{widths[first]}}  {text}" for row, text in zip(cells, texts, strict=True)]
    else:
        lines = [line for row, text in zip(cells, texts, strict=True) for line in (row[first], f"  {text}")]
    return [line.rstrip() for line in lines]


def _padded(text: str, heading: str, width: int) -> str:
    return text.ljust(width) if heading in AS_TEXT else text.rjust(width)


def _notes(rows: list[Row], width: int) -> list[str]:
    """Warnings about runs to train, each with the number of runs that it is about."""
    counts = Counter(warning for row in rows if row["state"] == TO_TRAIN for warning in _warnings(row)).most_common()
    notes = [_wrapped(f"{runs(number)}: {warning}", width) for warning, number in counts[:MAX_NOTES]]
    more = [f"and {len(counts) - MAX_NOTES} more warnings in forecast.csv"] if len(counts) > MAX_NOTES else []
    return [*notes, *more, ""] if notes else []


def _wrapped(text: str, width: int) -> str:
    return textwrap.fill(text, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _warnings(row: Row) -> list[str]:
    """Of what was not predicted the warning is an error, whole."""
    told = row["warnings"] or ""
    is_whole = row["predicted_peak_memory_allocated_gib"] is None
    return [*filter(None, [told] if is_whole else told.split(BETWEEN_WARNINGS))]


def _total(name: str, sums: Row) -> str:
    parts = [f"{runs(sums['runs'])} to train"]
    charged = sums["runs"] - sums["do_not_fit"]
    if sums["not_predicted"] < charged:
        cost = sums["cost_usd"]
        parts.append(f"{show(sums['gpu_hours'])} GPU-hours" + ("" if cost is None else f", {cost:,.2f} US dollars"))
    if sums["not_predicted"]:
        parts.append(f"{sums['not_predicted']} without a predicted time, and not in the sums")
    if sums["do_not_fit"]:
        parts.append(f"{sums['do_not_fit']} do not fit, and are not in the sums")
    if sums["measured"]:
        parts.append(f"{sums['measured']} measured already, and reused")
    others = {
        "unsupported": "not supported",
        "not_tried": "not tried, since they would not fit",
        "given_up": "given up",
    }
    parts += [f"{sums[state]} {words}" for state, words in others.items() if sums[state]]
    return f"{name}: {'; '.join(parts)}"
