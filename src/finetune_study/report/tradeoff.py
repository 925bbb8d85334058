"""Memory against step time: which recipes nothing beats in both."""

import itertools
import math
from typing import Any

from finetune_study.report.grammar import (
    BAR,
    FONT_SIZE,
    INK,
    MUTED,
    PAPER,
    SAYS,
    Figure,
    field,
    figure,
    layer,
    log_axis,
    log_scale,
    only,
    run_link,
    tip,
    width_of,
)
from finetune_study.report.pair import Pair
from finetune_study.table import TIMES, Row, count, one_kind, padded

WIDTH, HEIGHT, DOT = 500, 280, 6
"""Of the panel and of half a point, pixels."""
MAX_NAMED = 20
"""Points that all have a name; of more, those that lie in a crowd have none."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom, pixels."""


def pareto_front(rows: list[Row]) -> list[Row]:
    """Configurations that no other one beats in both step time and memory, from the fastest on.

    None where software, weights or data differ among them: their numbers are not compared.
    """
    front: list[Row] = []
    usable = [r for r in rows if r["step_time_seconds_median"] is not None and r["peak_memory_gib_median"] is not None]
    if not one_kind(usable):
        return []
    for row in sorted(usable, key=lambda r: (r["step_time_seconds_median"], r["peak_memory_gib_median"])):
        if not front or row["peak_memory_gib_median"] < front[-1]["peak_memory_gib_median"]:
            front.append(row)
    return front


def pareto(pair: Pair) -> list[Figure]:
    """Memory against step time; the recipes that nothing beats in both are joined, and all of them are labelled."""
    every = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    rows = padded(every)
    front = {row["recipe"] for row in pareto_front(rows)}
    points = [
        {
            "time": row["step_time_seconds_median"],
            "memory": row["peak_memory_gib_median"],
            "recipe": row["recipe"],
            "front": row["recipe"] in front,
            "tip": tip(row),
            "link": run_link(row),
        }
        for row in rows
        if row["step_time_seconds_median"] is not None and row["peak_memory_gib_median"] is not None
    ]
    if len(points) < 2:
        return []
    points.sort(key=lambda point: (not point["front"], point["time"]))
    times, memories = log_scale([p["time"] for p in points]), log_scale([p["memory"] for p in points])
    place = {
        "x": field("time", **log_axis(times, "Time of an optimizer step (s)")),
        "y": field("memory", **log_axis(memories, "Peak memory per device (GiB)")),
    }
    shape = field("front", "N", legend=None, scale={"domain": [True, False], "range": ["circle", "diamond"]})
    colour = {"condition": {"test": "datum.front", "value": BAR}, "value": MUTED}
    point = {"type": "point", "filled": True, "size": 80, "stroke": PAPER, "opacity": 1}
    name = {"type": "text", "align": "left", "baseline": "middle"}
    chart = {
        "layer": [
            only(
                "datum.front",
                layer(
                    "points",
                    {"type": "line", "color": BAR, "strokeWidth": 1.5, "interpolate": "step-after"},
                    **place,
                ),
            ),
            layer("points", point, **place, **SAYS, shape=shape, color=colour),
            only("datum.away", layer("names", {"type": "rule", "color": MUTED}, **_leader(place))),
            only("datum.front", layer("names", name | {"fontWeight": "bold", "color": INK}, **place, text=_TEXT)),
            only("!datum.front", layer("names", name | {"color": MUTED}, **place, text=_TEXT)),
        ],
        "width": WIDTH,
        "height": HEIGHT,
    }
    title = f"Memory against time: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}"
    caption = "" if front else "No front: software, weights or data differ among these runs, see the environment."
    if len(rows) < len(every):
        caption += " Packed recipes are left out: their steps hold more of the examples."
    above = sorted(points, key=lambda point: (point["front"], point["time"]))  # what is drawn last covers the others
    datasets = {"points": above, "names": names(points, times, memories)}
    return [figure("pareto", pair, chart, title, datasets, caption.strip())]


_TEXT = field("recipe", "N")


def _leader(place: dict[str, Any]) -> dict[str, Any]:
    """Channels of the line from a name to its point."""
    names = {"x": "from_time", "y": "from_memory"}
    starts = {channel: place[channel] | {"field": name} for channel, name in names.items()}
    return starts | {"x2": {"field": "to_time"}, "y2": {"field": "to_memory"}}


def names(
    points: list[dict[str, Any]], times: tuple[float, float], memories: tuple[float, float]
) -> list[dict[str, Any]]:
    """Where the name of each point stands, beside no other one.

    Each point gets one, if need be farther off, with a line to it (`away`). Of more than `MAX_NAMED` points those of
    the front do; another one that lies too deep in a crowd gets none.

    Args:
        points: the most important first.
        times: ends of the axis of step times.
        memories: ends of the axis of memory.
    """
    spots = [(_along(p["time"], times) * WIDTH, (1 - _along(p["memory"], memories)) * HEIGHT) for p in points]
    taken: list[Box] = [(x - DOT, y - DOT, x + DOT, y + DOT) for x, y in spots]
    taken += _line([spot for point, spot in zip(points, spots, strict=True) if point["front"]])
    found = []
    for point, spot in zip(points, spots, strict=True):
        anywhere = point["front"] or len(points) <= MAX_NAMED
        width = width_of(point["recipe"], bold=point["front"])
        for box in [*_beside(spot, width), *(_around(spot, width) if anywhere else [])]:
            inside = box[0] >= 0 and box[1] >= 0 and box[2] <= WIDTH and box[3] <= HEIGHT
            if not inside or any(_overlap(box, other) for other in taken):
                continue
            # Nearer to another point than to its own, it would be taken for that one's.
            away = _gap(box, spot) > min(2 * DOT, *(_gap(box, other) for other in spots))
            if away and not anywhere:
                continue
            taken.append(box)
            edge = _edge(box, spot)
            found.append(
                {
                    "recipe": point["recipe"],
                    "front": point["front"],
                    "away": away,
                    "time": _at(box[0] / WIDTH, times),
                    "memory": _at(1 - (box[1] + box[3]) / 2 / HEIGHT, memories),
                    "from_time": _at(edge[0] / WIDTH, times),
                    "from_memory": _at(1 - edge[1] / HEIGHT, memories),
                    "to_time": point["time"],
                    "to_memory": point["memory"],
                }
            )
            break
    return found


def _edge(box: Box, spot: tuple[float, float]) -> tuple[float, float]:
    """Of a box what is nearest to a spot."""
    left, top, right, bottom = box
    return min(max(spot[0], left), right), min(max(spot[1], top), bottom)


def _gap(box: Box, spot: tuple[float, float]) -> float:
    return math.dist(_edge(box, spot), spot)


def _line(spots: list[tuple[float, float]]) -> list[Box]:
    """Where the line through the front runs: level from each point, then down or up to the next."""
    boxes: list[Box] = []
    for (x, y), (next_x, next_y) in itertools.pairwise(spots):
        boxes += [(x, y - 1, next_x, y + 1), (next_x - 1, min(y, next_y), next_x + 1, max(y, next_y))]
    return boxes


def _beside(spot: tuple[float, float], width: float) -> list[Box]:
    """Where a name may stand, best first: right and left of its point, level, above and below, then farther off."""
    x, y = spot
    gap, height = DOT + 3, FONT_SIZE + 1
    lefts = (x + gap, x - gap - width)
    shifts = (0, -0.8 * height, 0.8 * height, -1.6 * height, 1.6 * height)
    return [(left, y + s - height / 2, left + width, y + s + height / 2) for s in shifts for left in lefts]


def _around(spot: tuple[float, float], width: float) -> list[Box]:
    """Farther off in all directions, the nearest first."""
    (x, y), height = spot, FONT_SIZE + 1
    steps = range(-WIDTH // 10, WIDTH // 10 + 1)
    places = [
        (x + 10 * across, y + height * down) for across in steps for down in range(-WIDTH // height, WIDTH // height)
    ]
    places.sort(key=lambda place: math.dist(place, spot))
    return [(left, middle - height / 2, left + width, middle + height / 2) for left, middle in places]


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _along(value: float, ends: tuple[float, float]) -> float:
    low, high = map(math.log, ends)
    return (math.log(value) - low) / (high - low)


def _at(share: float, ends: tuple[float, float]) -> float:
    low, high = map(math.log, ends)
    return math.exp(low + share * (high - low))
