"""What every figure has in common, in the grammar of Vega-Lite: colours, axes, and what a mark says of its run."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import vl_convert

from finetune_study.report.pair import Pair
from finetune_study.states import STATES
from finetune_study.table import Row, devices, show

Spec = dict[str, Any]
"""A part of a Vega-Lite specification (vega.github.io/vega-lite/docs)."""

INK, MUTED, LINE, BAR, MEMORY, PAPER = "#1f2328", "#5f6872", "#d5d9de", "#3f7cac", "#b4431f", "#fffffe"
"""Colours of a figure; the page puts its own in their place. Blue and vermilion stay apart for colour-blind readers."""
FILLS = {"good": "#cfe3f3", "memory": "#f9dccd", "limit": "#f4e9c3", "problem": "#f0d5e3", "none": "#f1f2f4"}
"""Cells of a map by the tone of their state; symbol and words say the same."""
SERIES = ("#0072b1", "#d55e01", "#009e74", "#cc79a8", "#8c6d00", "#56b4ea", "#6f42c2", "#5a5a5a")
"""Lines: Okabe and Ito's palette for colour-blind readers, its yellow darkened; each has a mark of its own, too."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])
"""Lines of the same colour: on and off, pixels."""
SHARES = {"in tensors": "#3f7cad", "held by the allocator, unused": "#8fb8d9", "beside the allocator": "#c9cdd3"}
FONT = "Helvetica, Arial, DejaVu Sans, sans-serif"
FONT_SIZE = 11
TICK_ROOM = 45
"""Of a label of an axis and what is free beside it, pixels: Vega takes up to twice as many ticks as it is asked for."""
ONE_VALUE = 0.001
"""Values whose logarithms differ by no more: labels between them would have too many digits."""
LETTER = 0.52
"""Mean width of a letter over the size of its font, in Helvetica; bold is a tenth wider."""
_LINK_BASE = "https://vega.github.io/vega-datasets/"
"""What the converter puts before an address that is a mere anchor."""
_TYPES = {"N": "nominal", "O": "ordinal", "Q": "quantitative"}


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    kind: str
    """The part of the report that it belongs to."""
    target: str
    hardware: str
    title: str
    caption: str
    spec: Spec
    """Vega-Lite."""
    part: int = 1
    """Of figures of one kind, from 1."""

    @property
    def name(self) -> str:
        """File name without its ending."""
        return "_".join(filter(None, (self.kind, self.target, self.hardware, str(self.part) if self.part > 1 else "")))

    def svg(self) -> str:
        return str(vl_convert.vegalite_to_svg(self.spec)).replace(_LINK_BASE, "")


def field(name: str, kind: str = "Q", **more: Any) -> Spec:
    """A channel that shows a column: `N` by name, `O` in order, `Q` by size."""
    return {"field": name, "type": _TYPES[kind], **more}


def axis(**settings: Any) -> Spec:
    return {"domain": False, "ticks": False, "labelPadding": 6, "grid": False} | settings


def axis_along(width: int) -> Spec:
    """An axis with as many labels as that many pixels have room for, each in the middle of its tick."""
    return axis(tickCount=width // TICK_ROOM, labelFlush=False, labelSeparation=4)


SAYS = {"description": field("tip", "N"), "href": field("link", "N")}
"""What a mark says on hovering and to a screen reader, and the run that it leads to."""
IN_TONE = {"condition": {"test": "datum.tone", "value": {"expr": "datum.tone"}}, "value": INK}
TONES = {"domain": [*FILLS], "range": [*FILLS.values()]}


def layer(data: str, mark: Spec, **encoding: Spec) -> Spec:
    """Marks of one dataset; those that say nothing of a run are silent to a screen reader, too."""
    silent = {} if "description" in encoding else {"aria": False}
    return {"data": {"name": data}, "mark": mark | silent, "encoding": encoding}


def only(test: str, marks: Spec) -> Spec:
    """Those marks for which the expression holds."""
    return {"transform": [{"filter": test}]} | marks


def limit_rule(channel: str) -> Spec:
    """The dashed line of the device's memory."""
    return layer("limit", {"type": "rule", "color": MUTED, "strokeDash": [4, 3]}, **{channel: field("limit")})


def log_scale(values: Iterable[float], room: float = 0.08) -> tuple[float, float]:
    """Ends of a logarithmic axis: a little more than the values; what is as good as one value stands in the middle."""
    some = [*values]
    low, high = math.log(min(some)), math.log(max(some))
    margin = room * (high - low) if high - low > ONE_VALUE else 0.35
    return math.exp(low - margin), math.exp(high + margin)


def log_axis(ends: tuple[float, float], title: str) -> Spec:
    """Axis and scale of a channel between two ends, with few ticks at round numbers."""
    low, high = ends
    steps: tuple[tuple[float, ...], ...] = ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks: list[float] = []
    for step in steps:
        ticks = [v for v in (float(f"{s}e{p}") for p in powers for s in step) if low <= v <= high]
        if len(ticks) >= 3:
            break
    if len(ticks) < 3:  # a short piece of a logarithmic axis is nearly even
        ticks = _even(low, high)
    return {
        "title": title,
        "scale": {"type": "log", "nice": False, "domain": [low, high]},
        "axis": axis(grid=True, values=ticks, format=",~g"),
    }


def _even(low: float, high: float) -> list[float]:
    """Three to seven numbers between two, in steps of 1, 2 or 5 times a power of ten."""
    most = (high - low) / 3
    power = math.floor(math.log10(most))
    step = max(one for one in (float(f"{s}e{p}") for p in (power - 1, power) for s in (1, 2, 5)) if one <= most)
    return [round(number * step, 1 - power) for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def size_of(svg: str) -> tuple[int, int]:
    """Width and height of a figure, pixels."""
    found = re.search(r'\bwidth="([\d.]+)" height="([\d.]+)"', svg)
    return (round(float(found[1])), round(float(found[2]))) if found else (0, 0)


def width_of(text: str, *, bold: bool = False) -> float:
    """How wide a text is, about, pixels."""
    return len(text) * FONT_SIZE * LETTER * (1.1 if bold else 1)


def run_link(row: Row) -> str:
    """Anchor of the panel of a run: of the first one that completed, else of the first."""
    ids, states = row["run_ids"], row["states"]
    return f"#run={next((i for i, state in zip(ids, states, strict=True) if state == 'completed'), ids[0])}"


def label(row: Row, value: float | None, unit: str) -> str:
    """A number, and every repeat that has none."""
    total = len(row["states"])
    parts = [show(value, unit)] if value is not None else []
    if value is None and row["num_completed"]:
        parts.append("not shown: " + (row["not_compared"] or "no timed step"))
    for state, number in _without_number(row).items():
        mixed = f"{number} of {total} " if number < total else ""
        parts.append(f"{STATES[state].symbol} {mixed}{STATES[state].words}")
    return ", ".join(parts)


def brief(row: Row, value: float | None, unit: str) -> str:
    """The same where there is little room: symbols beside a number, and of several states."""
    counts = [f"{number} {STATES[state].symbol}" for state, number in _without_number(row).items()]
    if value is None and (row["num_completed"] or len(counts) < 2):
        return label(row, value, unit)
    return " ".join(filter(None, (show(value, unit), *counts)))


def _without_number(row: Row) -> dict[str, int]:
    return {state: row["states"].count(state) for state in STATES if state != "completed" and state in row["states"]}


def told(name: str, facts: Iterable[tuple[str, str]]) -> str:
    """What a mark says: a name, then a line for each fact that is known."""
    return "\n".join([name, *(f"{label}: {value}" for label, value in facts if value)])


def tip(row: Row, *more: tuple[str, str]) -> str:
    """Everything about a configuration, for hovering and for screen readers."""
    seconds, memory = row["predicted_step_time_seconds"], row["predicted_peak_memory_gib"]
    micro_batch = row["per_device_train_batch_size"] or row["micro_batch"]
    place = devices(row["hardware"], row["num_gpus"], row["nodes"])
    return told(
        f"{row['recipe']}, {place}, context {row['sequence_length']}, micro-batch {micro_batch}",
        [
            ("Step time", label(row, row["step_time_seconds_median"], "s")),
            ("Peak memory", show(row["peak_memory_gib_median"], "GiB")),
            ("Throughput", show(row["tokens_per_second_per_gpu_median"], "tokens/s per device")),
            ("Predicted", ", ".join(filter(None, (show(seconds, "s"), show(memory, "GiB"))))),
            ("Completed", f"{row['num_completed']} of {row['num_repeats']} repeats"),
            *more,
        ],
    )


def figure(
    kind: str,
    pair: Pair,
    chart: Spec,
    title: str,
    datasets: dict[str, list[Row]],
    caption: str = "",
    *,
    whole: bool = False,
    part: int = 1,
) -> Figure:
    """A figure in the report's style; `whole`: of all targets on the hardware."""
    style = {
        "$schema": "https://vega.github.io/schema/vega-lite/v6.json",
        "config": {
            "font": FONT,
            "background": PAPER,
            "view": {"stroke": None},
            "axis": {
                "labelColor": INK,
                "titleColor": MUTED,
                "gridColor": LINE,
                "titleFontWeight": "normal",
                "labelFontSize": FONT_SIZE,
                "labelLimit": 170,
            },
            "legend": {
                "labelColor": INK,
                "titleColor": MUTED,
                "titleFontWeight": "normal",
                "labelFontSize": FONT_SIZE,
                "symbolSize": 60,
                "labelLimit": 260,
                "titleLimit": 400,
            },
            "text": {"fontSize": FONT_SIZE, "color": INK},
        },
    }
    target = "" if whole else pair.target
    return Figure(kind, target, pair.hardware, title, caption, style | chart | {"datasets": datasets}, part)
