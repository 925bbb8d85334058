"""Memory broken down: what the forecast says it is for, beside what was measured; and the peak of each phase."""

from typing import Any

from finetune_study.forecast import CATEGORIES
from finetune_study.outcome import PHASES
from finetune_study.report.bars import LABEL, order_of, shares_of
from finetune_study.report.grammar import (
    BAR,
    PAPER,
    SAYS,
    SERIES,
    SHARES,
    Figure,
    Spec,
    axis,
    axis_along,
    field,
    figure,
    label,
    layer,
    limit_rule,
    run_link,
    tip,
    told,
)
from finetune_study.report.pair import Pair
from finetune_study.table import TIMES, Row, count, show

WIDTH, STEP, THICK, APART = 270, 34, 12, 7
"""Of the panel of parts, of a row and of each of its two bars, and of those from its middle, pixels."""
BEYOND = 1.25
"""A prediction is drawn up to this share of the device's memory: how much more it is, the number says."""
PHASE_WIDTH, PHASE_STEP, PHASE_THICK = 92, 22, 12
LABEL_ROOM = 1.75
"""A panel of a phase is wider than its longest bar by this, for the number beside it."""
LIGHT = [*SHARES.values()][1]
"""Of a bar that is not the longest of its row."""


def parts(pair: Pair) -> list[Figure]:
    """Predicted memory by what it is for, with what was measured below it; nothing where nothing was predicted."""
    found = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    rows = [row for row in found if row[_predicted("parameters")] is not None]
    if not rows:
        return []
    most = max([BEYOND * pair.limit, *(share["high"] for row in rows for share in shares_of(row))])
    marks = [_mark(row, most) for row in rows]
    predicted = [category for row in rows for category in _categories(row, most)]
    measured = [_of_row(row) | share for row in rows for share in shares_of(row)]
    y = field("recipe", "N", sort=order_of(pair, marks), title=None, axis=axis())
    scale = {"domain": [0, most], "nice": False}
    x = field("low", title="Memory per device (GiB)", axis=axis_along(WIDTH), scale=scale)
    there = {category["share"] for category in predicted}
    colours = {name: colour for name, colour in zip(CATEGORIES, SERIES, strict=True) if name in there}
    span = {"y": y, "x": x, "x2": {"field": "high"}}
    chart = {
        "layer": [
            layer("predicted", _bar(-APART), **span, color=_legend("Predicted", colours, "top"), **SAYS),
            layer("measured", _bar(APART), **span, color=_legend("Measured", SHARES, "bottom"), **SAYS),
            limit_rule("x"),
            layer("marks", LABEL | {"yOffset": -APART}, y=y, x={"value": WIDTH}, text=field("predicted", "N")),
            layer("marks", LABEL | {"yOffset": APART}, y=y, x={"value": WIDTH}, text=field("measured", "N")),
        ],
        "resolve": {"scale": {"color": "independent"}},
        "width": WIDTH,
        "height": {"step": STEP},
    }
    one = figure(
        "parts",
        pair,
        chart,
        f"What memory is for: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}",
        {"marks": marks, "predicted": predicted, "measured": measured, "limit": [{"limit": pair.limit}]},
        "Upper bar: predicted before the run, at the moment of its peak; one that is cut off is as long as its number "
        f"says. Lower bar: measured. Dashed: the device's {show(pair.limit, 'GiB')}. The numbers are of "
        + ("what tensors take." if pair.device == "cuda" else "all that is in use."),
    )
    return [one]


def phases(pair: Pair) -> list[Figure]:
    """The measured peak of loading and of each phase of a step; nothing where no run says so."""
    found = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    rows = [row for row in found if any(row[_measured(phase)] is not None for phase in PHASES)]
    if not rows:
        return []
    marks = [_of_row(row) | _peaks(row) for row in rows]
    order = order_of(pair, marks)
    largest = max(mark[phase] or 0.0 for mark in marks for phase in PHASES)
    one = figure(
        "phases",
        pair,
        {
            "hconcat": [_phase(phase, order, largest, first=number == 0) for number, phase in enumerate(PHASES)],
            "spacing": 10,
        },
        f"Peak of each phase: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}",
        {"marks": marks},
        f"Measured, GiB per device, of {'what tensors take' if pair.device == 'cuda' else 'all that is in use'}. "
        "In full colour: the phase in which the recipe's peak lies.",
    )
    return [one]


def _phase(phase: str, order: list[str], largest: float, *, first: bool) -> Spec:
    y = field("recipe", "N", sort=order, title=None, axis=axis() if first else None)
    scale = {"domain": [0, largest * LABEL_ROOM or 1.0], "nice": False}
    x = field(phase, title=phase.capitalize(), axis=axis(labels=False, orient="top", titleAnchor="start"), scale=scale)
    colour = {"condition": {"test": f"datum.peak == '{phase}'", "value": BAR}, "value": LIGHT}
    layers = [
        layer("marks", {"type": "bar", "height": PHASE_THICK}, y=y, x=x, color=colour, **SAYS),
        layer("marks", LABEL, y=y, x=x, text=field(f"{phase}_label", "N")),
    ]
    return {"layer": layers, "width": PHASE_WIDTH, "height": {"step": PHASE_STEP}}


def _peaks(row: Row) -> dict[str, Any]:
    values = {phase: row[_measured(phase)] for phase in PHASES}
    labels = {f"{phase}_label": show(value) for phase, value in values.items()}
    said = tip(row, *((phase.capitalize(), show(value, "GiB")) for phase, value in values.items() if value is not None))
    return values | labels | {"tip": said, "peak": max(PHASES, key=lambda phase: values[phase] or 0.0)}


def _mark(row: Row, most: float) -> dict[str, Any]:
    beyond = "\N{RIGHTWARDS ARROW} " if sum(_each(row).values()) > most else ""
    measured = row["peak_memory_gib_median"]
    return _of_row(row) | {
        "predicted": f"{beyond}{show(row['predicted_peak_memory_gib'], 'GiB')} predicted",
        "measured": label(row, None, "") if measured is None else f"{show(measured, 'GiB')} measured",
    }


def _categories(row: Row, most: float) -> list[dict[str, Any]]:
    """Parts of the predicted peak one after the other, each from `low` to `high` GiB, up to `most`."""
    each = _each(row)
    whole = [(name.capitalize(), show(gib, "GiB")) for name, gib in each.items()]
    found, low = [], 0.0
    for name, gib in each.items():
        if low < most:
            said = told(f"{row['recipe']}, predicted: {name} {show(gib, 'GiB')}", whole)
            high = min(low + gib, most)
            found.append(_of_row(row) | {"share": name, "low": low, "high": high, "tip": said})
        low += gib
    return found


def _each(row: Row) -> dict[str, float]:
    """GiB of each category that takes some."""
    return {name: row[_predicted(name)] for name in CATEGORIES if row[_predicted(name)]}


def _of_row(row: Row) -> dict[str, Any]:
    return {"recipe": row["recipe"], "tip": tip(row), "link": run_link(row)}


def _predicted(category: str) -> str:
    return f"predicted_memory_{category}_gib"


def _measured(phase: str) -> str:
    return f"peak_memory_{phase}_gib_median"


def _bar(offset: int) -> Spec:
    return {"type": "bar", "height": THICK, "yOffset": offset, "stroke": PAPER, "strokeWidth": 0.5}


def _legend(title: str, colours: dict[str, str], orient: str) -> Spec:
    return field(
        "share",
        "N",
        title=title,
        scale={"domain": [*colours], "range": [*colours.values()]},
        legend={"orient": orient, "direction": "horizontal", "columns": 4},
    )
