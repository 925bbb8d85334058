"""Memory and time against context and against the number of GPUs, with the points that failed."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from finetune_study.report.grammar import (
    INK,
    SAYS,
    SERIES,
    SHAPES,
    Figure,
    Spec,
    axis,
    field,
    figure,
    layer,
    limit_rule,
    log_axis,
    log_scale,
    only,
    run_link,
    tip,
)
from finetune_study.report.pair import Pair
from finetune_study.table import TIMES, Row, count, on_nodes

WIDTH, HEIGHT, CROSS = 225, 210, 13
"""Of a panel, and of a row of crosses above it, pixels."""
MEMORY_COLUMN, TIME_COLUMN = "peak_memory_gib_median", "step_time_seconds_median"


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x by least squares; None for fewer than three points."""
    if len({x for x, _ in points}) < 3:
        return None
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def context(pair: Pair) -> Figure | None:
    """Memory and time against context, with the fitted exponents and the lengths that failed."""
    rows = pair.best_rows(devices=pair.most_devices)
    return _scaling(
        "context", pair, rows, _CONTEXT, f"Against context: {pair.where} {TIMES} {count(*pair.most_devices)}"
    )


def gpus(pair: Pair) -> Figure | None:
    """Memory and time against the number of GPUs."""
    rows = pair.best_rows(sequence_length=pair.shortest)
    return _scaling("gpus", pair, rows, _GPUS, f"Against the number of GPUs: {pair.where}, context {pair.shortest}")


def long_context(pair: Pair) -> Figure | None:
    """The same recipe with and without FlashAttention over the contexts."""
    rows = pair.best_rows(devices=pair.most_devices)
    flash = {row["recipe"]: _without_attention(row) for row in rows if "flash_attention" in (row["techniques"] or "")}
    plain = {row["recipe"]: _without_attention(row) for row in rows if row["recipe"] not in flash}
    chosen = {*flash, *(name for name, rest in plain.items() if rest in flash.values())}
    if not any(plain.get(name) for name in chosen):
        return None
    return _scaling(
        "flash",
        pair,
        [row for row in rows if row["recipe"] in chosen],
        _CONTEXT,
        f"Long context with and without FlashAttention: {pair.where} {TIMES} {count(*pair.most_devices)}",
    )


def _without_attention(row: Row) -> tuple[str, ...]:
    names = (row["techniques"] or "").split("+")
    return tuple(n for n in names if n not in ("eager", "sdpa") and not n.startswith("flash_attention"))


@dataclass(frozen=True)
class _Axis:
    column: str
    title: str


_CONTEXT, _GPUS = _Axis("sequence_length", "Context (tokens)"), _Axis("num_gpus", "GPUs")


def _scaling(kind: str, pair: Pair, rows: list[Row], along: _Axis, heading: str) -> Figure | None:
    names = _names(pair, rows)
    done = {name: sum(1 for r in rows if _series(r) == name and r["num_completed"]) for name in names}
    somewhere = [name for name in names if done[name]]
    most = sorted(somewhere, key=lambda name: -done[name])[: len(SERIES)]
    shown = [name for name in names if name in most]
    if len({row[along.column] for row in rows}) < 2 or not shown:
        return None
    titles = {name: _legend(rows, name, along.column) for name in shown}
    drawn = [row for row in rows if _series(row) in titles]
    failing = [name for name in shown if any(_series(row) == name and _stands_above(row) for row in drawn)]
    panels, datasets = [], {"limit": [{"limit": pair.limit}]}
    for name, column, title, limit in (
        ("memory", MEMORY_COLUMN, "Peak memory per device (GiB)", pair.limit),
        ("time", TIME_COLUMN, "Step time (s)", None),
    ):
        points, ends = _points(drawn, titles, failing, along.column, column, limit)
        datasets[name] = points
        panels.append(_panel(name, points, ends, [*titles.values()], along.title, title, len(failing)))
    chart = {"hconcat": panels, "spacing": 26, "resolve": {"scale": {"color": "shared", "shape": "shared"}}}
    return figure(kind, pair, chart, heading, datasets, _left_out(names, somewhere, shown))


def _left_out(names: list[str], somewhere: list[str], shown: list[str]) -> str:
    parts = []
    if nowhere := [name for name in names if name not in somewhere]:
        parts.append(f"Completed nowhere here: {', '.join(nowhere)}.")
    if beyond := [name for name in somewhere if name not in shown]:
        parts.append(f"Not drawn, with fewer points: {', '.join(beyond)}.")
    return " ".join(parts)


def _names(pair: Pair, rows: list[Row]) -> list[str]:
    """The series, recipes in the order of the config, on few nodes before those on many."""
    order = {name: number for number, name in enumerate(pair.recipes)}
    ordered = sorted(rows, key=lambda row: (order[row["recipe"]], row["nodes"]))
    return [*dict.fromkeys(map(_series, ordered))]


def _series(row: Row) -> str:
    """A line of a figure: a recipe on one number of nodes."""
    return str(row["recipe"]) + on_nodes(row["nodes"])


def _legend(rows: list[Row], name: str, along: str) -> str:
    """The name of a series with its exponents, where there are points enough."""
    memory, time = (
        exponent([(r[along], r[column]) for r in rows if _series(r) == name and r[column]])
        for column in (MEMORY_COLUMN, TIME_COLUMN)
    )
    return name if memory is None and time is None else f"{name} ({_power(memory)}, {_power(time)})"


def _power(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}".replace("-0.00", "0.00").replace("-", "−")


def _points(
    rows: list[Row], titles: dict[str, str], failing: list[str], along: str, column: str, limit: float | None
) -> tuple[list[dict[str, Any]], tuple[float, float]]:
    """A point for each configuration, and the ends of the axis; those that failed stand above, a row each."""
    values = [row[column] for row in rows if row[column]]
    low, top = log_scale([*values, limit] if limit else values)
    step = (top / low) ** (CROSS / HEIGHT)
    base = limit or top
    rank = {name: number for number, name in enumerate(failing)}
    points = [
        {
            "x": row[along],
            "y": row[column] or base * step ** (rank[_series(row)] + 0.8),
            "recipe": _series(row),
            "series": titles[_series(row)],
            "failed": not row[column],
            "tip": tip(row),
            "link": run_link(row),
        }
        for row in rows
        if row[column] or _stands_above(row)
    ]
    return points, (low, max(top, base * step ** (len(failing) + 0.4) if failing else top))


def _panel(
    name: str,
    points: list[dict[str, Any]],
    ends: tuple[float, float],
    titles: list[str],
    along: str,
    heading: str,
    crosses: int,
) -> Spec:
    legend = {
        "orient": "bottom",
        "columns": 3 if max(map(len, titles)) < 26 else 2,
        "symbolOpacity": 1,
        "title": "Recipe (exponent of memory, of time)" if any("(" in title for title in titles) else None,
    }
    shared = {"title": legend["title"], "sort": titles, "legend": legend}
    colour = field("series", "N", scale={"domain": titles, "range": [*SERIES[: len(titles)]]}, **shared)
    shape = field("series", "N", scale={"domain": titles, "range": [*SHAPES[: len(titles)]]}, **shared)
    ticks = sorted({point["x"] for point in points})
    place = {
        "x": field(
            "x",
            title=along,
            scale={"type": "log", "nice": False, "padding": 14},
            axis=axis(values=ticks, grid=True, format="d"),
        ),
        "y": field("y", **log_axis(ends, heading)),
    }
    cross = {"type": "text", "text": "✕", "fontSize": 11, "fontWeight": "bold", "color": INK}
    layers = [
        only("!datum.failed", layer(name, {"type": "line", "strokeWidth": 1.6}, **place, color=colour)),
        only(
            "!datum.failed",
            layer(
                name,
                {"type": "point", "filled": True, "size": 48, "opacity": 1},
                **place,
                **SAYS,
                color=colour,
                shape=shape,
            ),
        ),
        only("datum.failed", layer(name, cross, **place, **SAYS, color=colour)),
    ]
    limits = [limit_rule("y")] if name == "memory" else []
    return {"layer": [*layers, *limits], "width": WIDTH, "height": HEIGHT + CROSS * crosses}


def _stands_above(row: Row) -> bool:
    """It has an outcome, and no number."""
    return row[TIME_COLUMN] is None and bool({*row["states"]} - {"completed", "not_run", "failed"})
