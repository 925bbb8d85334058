"""Memory and time of each recipe, predicted beside measured."""

from typing import Any

from finetune_study.report.grammar import (
    BAR,
    IN_TONE,
    INK,
    MEMORY,
    MUTED,
    PAPER,
    SAYS,
    SHARES,
    Figure,
    Spec,
    axis,
    axis_along,
    brief,
    field,
    figure,
    layer,
    limit_rule,
    run_link,
    tip,
)
from finetune_study.report.pair import Pair
from finetune_study.table import TIMES, Row, count, show

MEMORY_WIDTH, TIME_WIDTH, STEP, THICK = 140, 94, 24, 13
"""Of the panels, of a row and of its bar, pixels; numbers stand right of a panel, where nothing crosses them."""
ROOM = 1.03
"""A panel is wider than its longest bar by this."""
PREDICTED = {
    "type": "point",
    "shape": "diamond",
    "filled": True,
    "size": 55,
    "color": INK,
    "stroke": PAPER,
    "opacity": 1,
}
LABEL = {"type": "text", "align": "left", "dx": 5}


def recipes(pair: Pair) -> list[Figure]:
    """Peak memory, broken down, and step time of each recipe, on most devices at the shortest context.

    A panel in which no recipe has anything to draw is left out.
    """
    rows = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    slowest = _slowest(rows)
    marks = [_mark(pair, row, slowest) for row in rows]
    order = order_of(pair, marks)
    shares = [mark | share for mark, row in zip(marks, rows, strict=True) for share in shares_of(row)]
    largest = max([pair.limit, *(mark["memory_end"] for mark in marks)])
    panels = [_memory(order, shares, largest)] if any(mark["memory_end"] for mark in marks) else []
    if any(mark["time"] or mark["predicted_time"] for mark in marks):
        panels.append(_time(order, slowest, alone=not panels))
    if not panels:
        return []
    chart = {
        "hconcat": panels,
        "spacing": 14,
        "resolve": {"scale": {"color": "shared"}},
    }
    columns = sorted({row["peak_memory_column"] for row in rows if row["peak_memory_column"]})
    predicted = any(mark["predicted_memory"] or mark["predicted_time"] for mark in marks)
    one = figure(
        "recipes",
        pair,
        chart,
        f"Memory and time per recipe: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}",
        {"marks": marks, "shares": shares, "limit": [{"limit": pair.limit}]},
        f"{'Memory that tensors take' if pair.device == 'cuda' else 'Memory in use'}"
        f"{''.join(f' ({name})' for name in columns)}; dashed: the device's {show(pair.limit, 'GiB')}."
        + (" Diamonds: predicted before the run." if predicted else ""),
    )
    return [one]


def order_of(pair: Pair, marks: list[dict[str, Any]]) -> list[str]:
    """Recipes that are drawn, as the study lists them."""
    there = {mark["recipe"] for mark in marks}
    return [name for name in pair.recipes if name in there]


def _memory(order: list[str], shares: list[dict[str, Any]], largest: float) -> Spec:
    y = field("recipe", "N", sort=order, title=None, axis=axis())
    x = field(
        "low",
        title="Peak memory per device (GiB)",
        axis=axis_along(MEMORY_WIDTH),
        scale={"domain": [0, largest * ROOM], "nice": False},
    )
    parted = len({share["share"] for share in shares}) > 1
    colour = field(
        "share",
        "N",
        title=None,
        scale={"domain": [*SHARES], "range": [*SHARES.values()]},
        legend={"orient": "top", "direction": "horizontal"} if parted else None,
    )
    empty = {"type": "bar", "filled": False, "stroke": MEMORY, "strokeDash": [2, 2], "height": THICK}
    layers = [
        layer("shares", {"type": "bar", "height": THICK}, y=y, x=x, x2={"field": "high"}, color=colour, **SAYS),
        layer("marks", empty, y=y, x=field("ran_out"), **SAYS),
        limit_rule("x"),
        layer("marks", PREDICTED, y=y, x=field("predicted_memory"), **SAYS),
        layer("marks", LABEL, y=y, x={"value": MEMORY_WIDTH}, text=field("memory_label", "N"), color=IN_TONE),
    ]
    return {"layer": layers, "width": MEMORY_WIDTH, "height": {"step": STEP}}


def _time(order: list[str], slowest: float, *, alone: bool) -> Spec:
    y = field("recipe", "N", sort=order, title=None, axis=axis() if alone else None)
    x = field(
        "time",
        title="Time of an optimizer step (s)",
        axis=axis_along(TIME_WIDTH),
        scale={"domain": [0, slowest * ROOM], "nice": False},
    )
    spread = {"type": "rule", "color": INK, "strokeWidth": 1.5}
    layers = [
        layer("marks", {"type": "bar", "color": BAR, "height": THICK}, y=y, x=x, **SAYS),
        layer("marks", spread, y=y, x=field("time_low"), x2={"field": "time_high"}),
        layer("marks", PREDICTED, y=y, x=field("predicted_time"), **SAYS),
        layer("marks", LABEL, y=y, x={"value": TIME_WIDTH}, text=field("time_label", "N")),
    ]
    return {"layer": layers, "width": TIME_WIDTH, "height": {"step": STEP}}


def _slowest(rows: list[Row]) -> float:
    """The longest step time, measured, or predicted of what was measured; where nothing was, predicted."""
    done = [row for row in rows if row["step_time_seconds_median"] is not None]
    ends = [row["step_time_seconds_max"] for row in done]
    ends += [row["predicted_step_time_seconds"] or 0.0 for row in done or rows]
    return max(ends, default=0.0) or 1.0


def _mark(pair: Pair, row: Row, slowest: float) -> dict[str, Any]:
    memory, seconds = row["peak_memory_gib_median"], row["step_time_seconds_median"]
    several = row["num_completed"] > 1
    ran_out = memory is None and any("oom" in state for state in row["states"])
    predicted = _within(row["predicted_peak_memory_gib"], pair.limit)
    predicted_time = _within(row["predicted_step_time_seconds"], slowest)
    end = max([share["high"] for share in shares_of(row)] + [predicted or 0, pair.limit if ran_out else 0])
    return {
        "recipe": row["recipe"],
        "memory_end": end,
        "ran_out": pair.limit if ran_out else None,
        "predicted_memory": predicted,
        "memory_label": brief(row, memory, "GiB"),
        "time": seconds,
        "time_low": row["step_time_seconds_min"] if several else None,
        "time_high": row["step_time_seconds_max"] if several else None,
        "predicted_time": predicted_time,
        "time_label": show(seconds, "s"),
        "tone": None if memory is not None else MEMORY if ran_out else MUTED,
        "tip": tip(row),
        "link": run_link(row),
    }


def _within(value: float | None, limit: float) -> float | None:
    return value if value is not None and value <= limit else None


def shares_of(row: Row) -> list[dict[str, Any]]:
    """Peak memory in its parts, each from `low` to `high` GiB; the peaks of the parts may lie at different moments."""
    ends = [row["peak_memory_gib_median"]]
    if row["peak_memory_column"] == "peak_memory_allocated_gib":
        ends += [row["peak_memory_reserved_gib_median"], row["peak_device_used_gib_median"]]
    parts, low = [], 0.0
    for name, end in zip(SHARES, ends, strict=False):
        if end is not None and end > low:
            parts.append({"share": name, "low": low, "high": end})
            low = end
    return parts
