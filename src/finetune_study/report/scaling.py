"""Memory and time against context and against the number of GPUs, with the points that failed."""

import itertools
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from finetune_study.recommend import MAX_NAMES
from finetune_study.report.grammar import (
    DASHES,
    MUTED,
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
    width_of,
)
from finetune_study.report.pair import Pair
from finetune_study.report.tables import how_it_failed, some
from finetune_study.states import STATES
from finetune_study.table import TIMES, Row, count, on_nodes

WIDTH, HEIGHT, CROSS = 225, 210, 13
"""Of a panel, and of a row of symbols of failures above it, pixels."""
PADDING, GAP = 14, 9
"""Between the ends of the axis along the bottom and those of the panel, and of a name from the middle of a symbol."""
MAX_SERIES = 32
"""Lines that are drawn over the figures of a pair, and recipes that completed nowhere."""
MEMORY_COLUMN, TIME_COLUMN = "peak_memory_gib_median", "step_time_seconds_median"


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x by least squares; None for fewer than three points."""
    if len({x for x, _ in points}) < 3:
        return None
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def context(pair: Pair) -> list[Figure]:
    """Memory and time against context, with the fitted exponents and the lengths that failed."""
    rows = pair.best_rows(devices=pair.most_devices)
    return _scaling(
        "context", pair, rows, _CONTEXT, f"Against context: {pair.where} {TIMES} {count(*pair.most_devices)}"
    )


def gpus(pair: Pair) -> list[Figure]:
    """Memory and time against the number of GPUs."""
    rows = pair.best_rows(sequence_length=pair.shortest)
    return _scaling("gpus", pair, rows, _GPUS, f"Against the number of GPUs: {pair.where}, context {pair.shortest}")


def long_context(pair: Pair) -> list[Figure]:
    """The same recipe with and without FlashAttention over the contexts."""
    rows = pair.best_rows(devices=pair.most_devices)
    flash = {row["recipe"]: _without_attention(row) for row in rows if "flash_attention" in (row["techniques"] or "")}
    plain = {row["recipe"]: _without_attention(row) for row in rows if row["recipe"] not in flash}
    chosen = {*flash, *(name for name, rest in plain.items() if rest in flash.values())}
    if not any(plain.get(name) for name in chosen):
        return []
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


def _scaling(kind: str, pair: Pair, rows: list[Row], along: _Axis, heading: str) -> list[Figure]:
    """As many figures as it takes that none has more lines than there are colours; their axes are the same.

    Below the last one stand the recipes that completed nowhere, with how they ended.
    """
    names = _names(pair, rows)
    of = {name: [row for row in rows if _series(row) == name] for name in names}
    lines = [name for name in names if any(map(_has_number, of[name]))]
    nowhere = [name for name in names if name not in lines and any(map(_stands_above, of[name]))]
    if len({row[along.column] for row in rows}) < 2 or not lines:
        return []
    groups = _groups(lines[:MAX_SERIES])
    crosses = max(len(_failing(rows, group)) for group in groups)
    figures = []
    for number, group in enumerate(groups, start=1):
        panels, datasets = _panels(pair, rows, group, crosses, along)
        chart: Spec = {"hconcat": panels, "spacing": 26, "resolve": {"scale": {"color": "shared", "shape": "shared"}}}
        last = number == len(groups)
        if last and nowhere:
            datasets["nowhere"] = [_ending(row, along) for name in nowhere[:MAX_SERIES] for row in of[name]]
            chart = {"vconcat": [chart, _strip(datasets["nowhere"], along)], "spacing": 16}
        part = f" ({number} of {len(groups)})" if len(groups) > 1 else ""
        caption = _left_out(names, lines, nowhere) if last else ""
        figures.append(figure(kind, pair, chart, heading + part, datasets, caption, part=number))
    return figures


def _groups(names: list[str]) -> list[list[str]]:
    """In their order, as few groups as there can be, of about the same size."""
    number = -(-len(names) // len(SERIES))
    ends = [round(len(names) * share / number) for share in range(number + 1)]
    return [names[low:high] for low, high in itertools.pairwise(ends)]


def _panels(
    pair: Pair, rows: list[Row], group: list[str], crosses: int, along: _Axis
) -> tuple[list[Spec], dict[str, list[Row]]]:
    """A panel of memory and one of time, of those that have a number in them."""
    titles = {name: _legend(rows, name, along.column) for name in group}
    looks, limit = _looks(pair, rows, titles), pair.limit
    datasets: dict[str, list[Row]] = {"limit": [{"limit": limit}]}
    panels = []
    for name, column, title, most in (
        ("memory", MEMORY_COLUMN, "Peak memory per device (GiB)", limit),
        ("time", TIME_COLUMN, "Step time (s)", None),
    ):
        values = [row[column] for row in rows if row[column]] + ([most] if most else [])
        if any(row[column] and _series(row) in titles for row in rows):
            ends = log_scale(values)
            datasets[name] = _points(rows, titles, ends, along.column, column, most)
            top = _above(ends, most, crosses + 0.4) if crosses else ends[1]
            shown = ends[0], max(ends[1], top)
            panels.append(_panel(name, datasets[name], shown, looks, along.title, title, crosses))
    return panels, datasets


def _looks(pair: Pair, rows: list[Row], titles: dict[str, str]) -> dict[str, Spec]:
    """Scales of the series of a figure: a recipe has one colour, shape and dash over all figures of the study."""
    order = {name: number for number, name in enumerate(pair.recipes)}
    of = {_series(row): order[row["recipe"]] + len(order) * (row["nodes"] - 1) for row in rows}
    # Of two with the same colour the shapes and dashes differ.
    rounds = [divmod(of[name], len(SERIES)) for name in titles]
    ranges: dict[str, list[Any]] = {
        "color": [SERIES[place] for _, place in rounds],
        "shape": [SHAPES[(place + turn) % len(SHAPES)] for turn, place in rounds],
        "strokeDash": [DASHES[turn % len(DASHES)] for turn, _ in rounds],
    }
    return {channel: {"domain": [*titles.values()], "range": values} for channel, values in ranges.items()}


def _ending(row: Row, along: _Axis) -> Row:
    found = {"x": row[along.column], "recipe": _series(row), "symbol": _symbol(row)}
    return found | {"tip": tip(row), "link": run_link(row)}


def _symbol(row: Row) -> str:
    state, _ = how_it_failed([row["states"]])
    return STATES[state].symbol


def _strip(points: list[Row], along: _Axis) -> Spec:
    """A row for each recipe that completed nowhere: how it ended, by its symbol."""
    names = [*dict.fromkeys(point["recipe"] for point in points)]
    y = field("recipe", "N", sort=names, title=None, axis=axis(orient="right"))  # below the second panel is room
    x = field("x", "O", title=f"Completed nowhere, by {along.title}", axis=axis(labelAngle=0))
    marks = layer("nowhere", {"type": "text"}, x=x, y=y, text=field("symbol", "N"), **SAYS)
    return marks | {"width": WIDTH, "height": {"step": CROSS + 3}}


def _left_out(names: list[str], lines: list[str], nowhere: list[str]) -> str:
    parts = []
    if unknown := [name for name in names if name not in (*lines, *nowhere)]:
        parts.append(f"No outcome here yet: {some(unknown, MAX_NAMES)}.")
    if beyond := lines[MAX_SERIES:] + nowhere[MAX_SERIES:]:
        parts.append(f"Not drawn: {some(beyond, MAX_NAMES)}.")
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


def _failing(rows: list[Row], group: Iterable[str]) -> list[str]:
    """Series with a point that failed: each has a row of crosses."""
    return [name for name in group if any(_series(row) == name and _stands_above(row) for row in rows)]


def _above(ends: tuple[float, float], limit: float | None, number: float) -> float:
    """Where a row of crosses stands, on a logarithmic axis: above the device's memory, else above all points."""
    low, top = ends
    return float((limit or top) * (top / low) ** (CROSS / HEIGHT * number))


def _points(
    rows: list[Row], titles: dict[str, str], ends: tuple[float, float], along: str, column: str, limit: float | None
) -> list[dict[str, Any]]:
    """A point for each configuration; those that failed stand above, a row for each series, as symbols of how."""
    rank = {name: number for number, name in enumerate(_failing(rows, titles))}
    points = [
        {
            "x": row[along],
            "y": row[column] or _above(ends, limit, rank[_series(row)] + 0.8),
            "recipe": _series(row),
            "series": titles[_series(row)],
            "failed": None if row[column] else _symbol(row),
            "tip": tip(row),
            "link": run_link(row),
        }
        for row in rows
        if _series(row) in titles and (row[column] or _stands_above(row))
    ]
    _name_rows(points)
    return points


def _name_rows(points: list[dict[str, Any]]) -> None:
    """Gives each row of symbols its recipe's name, `before` the first or `behind` the last one, where there is room."""
    low, high = (math.log(end(point["x"] for point in points)) for end in (min, max))
    per_unit = (WIDTH - 2 * PADDING) / (high - low or 1)
    rows: dict[str, list[dict[str, Any]]] = {}
    for point in points:
        if point["failed"]:
            rows.setdefault(point["recipe"], []).append(point)
    for name, row in rows.items():
        first, last = (end(row, key=lambda point: point["x"]) for end in (min, max))
        wanted = GAP + width_of(name)
        if PADDING + (math.log(first["x"]) - low) * per_unit >= wanted:
            first["before"] = name
        elif PADDING + (high - math.log(last["x"])) * per_unit >= wanted:
            last["behind"] = name


def _panel(
    name: str,
    points: list[dict[str, Any]],
    ends: tuple[float, float],
    looks: dict[str, Spec],
    along: str,
    heading: str,
    crosses: int,
) -> Spec:
    titles = looks["color"]["domain"]
    legend = {
        "orient": "bottom",
        "columns": 3 if max(map(len, titles)) < 26 else 2,
        "symbolOpacity": 1,
        "title": "Recipe (exponent of memory, of time)" if any("(" in title for title in titles) else None,
    }
    shared = {"title": legend["title"], "sort": titles, "legend": legend}
    colour = field("series", "N", scale=looks["color"], **shared)
    shape = field("series", "N", scale=looks["shape"], **shared)
    dash = field("series", "N", scale=looks["strokeDash"], legend=None)
    ticks = sorted({point["x"] for point in points})
    place = {
        "x": field(
            "x",
            title=along,
            scale={"type": "log", "nice": False, "padding": PADDING},
            axis=axis(values=ticks, grid=True, format="d"),
        ),
        "y": field("y", **log_axis(ends, heading)),
    }
    symbol = {"type": "text", "fontWeight": "bold"}
    name_of_row = {"type": "text", "color": MUTED}
    layers = [
        only(
            "!datum.failed", layer(name, {"type": "line", "strokeWidth": 1.6}, **place, color=colour, strokeDash=dash)
        ),
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
        only("datum.failed", layer(name, symbol, **place, **SAYS, color=colour, text=field("failed", "N"))),
        *(
            only(f"datum.{at}", layer(name, name_of_row | {"align": align, "dx": dx}, **place, text=field(at, "N")))
            for at, align, dx in (("before", "right", -GAP), ("behind", "left", GAP))
            if any(at in point for point in points)
        ),
    ]
    limits = [limit_rule("y")] if name == "memory" else []
    return {"layer": [*layers, *limits], "width": WIDTH, "height": HEIGHT + CROSS * crosses}


def _has_number(row: Row) -> bool:
    return bool(row[MEMORY_COLUMN] or row[TIME_COLUMN])


def _stands_above(row: Row) -> bool:
    """It has an outcome, and no number."""
    return row[TIME_COLUMN] is None and bool({*row["states"]} - {"completed", "not_run", "failed"})
