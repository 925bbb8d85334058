"""Maps: what fits where, and which mix a model needs."""

from collections.abc import Iterable, Sequence
from typing import Any

from finetune_study.recommend import Evidence, Recommendation, Versus
from finetune_study.report.grammar import (
    MUTED,
    PAPER,
    SAYS,
    TONES,
    Figure,
    Spec,
    axis,
    field,
    figure,
    layer,
    only,
    run_link,
    tip,
    told,
    width_of,
)
from finetune_study.report.pair import MAX_PAIRS, Pair
from finetune_study.report.tables import against_limit, how_it_failed, some
from finetune_study.states import STATES, in_words
from finetune_study.table import Row, count, devices, runs, show, show_ratio

MIN_WIDTH, PADDING = 84, 18
"""Of a cell, and beside its text, pixels."""
MAX_LETTERS = 28
"""A longer text is cut, and whole on hovering; the longest of the states' words is shorter."""
MAX_TOLD = 5
"""Recipes that a cell tells of on hovering, of those beside the fastest."""


def feasibility(pair: Pair) -> list[Figure]:
    """Context against GPUs: the fastest recipe that fits, or how it fails."""
    cells = [_cell(one, pair.limit) for one in pair.recommendations]
    contexts = sorted({one.sequence_length for one in pair.recommendations})
    places = sorted({(one.num_gpus, one.nodes) for one in pair.recommendations}, reverse=True)
    chart = _map(
        cells,
        x=field("context", "O", sort=contexts, title="Context (tokens)"),
        y=field(
            "gpus",
            "O",
            sort=[_count(*place) for place in places],
            title="GPUs" if pair.device == "cuda" else "Processes",
        ),
        columns=len(contexts),
        height=44 * max(1, len(places)),
    )
    return [figure("feasibility", pair, chart, f"What fits: {pair.where}", {"cells": cells})]


def _map(cells: Sequence[Row], *, x: Spec, y: Spec, columns: int, height: int) -> Spec:
    """Cells of two lines, `first` and `second`, wide enough for what they say."""
    widths = [max(width_of(one["first"], bold=True), width_of(one["second"])) for one in cells]
    width = max(MIN_WIDTH, max(widths, default=0) + PADDING)
    place = {
        "x": x | {"axis": axis(orient="top", labelAngle=0, labelLimit=width)},
        "y": y | {"axis": axis()},
    }
    text = {"type": "text"}
    first = text | {"fontWeight": "bold"}
    return {
        "layer": [
            layer(
                "cells",
                {"type": "rect", "stroke": PAPER, "strokeWidth": 3},
                **place,
                **SAYS,
                color=field("tone", "N", scale=TONES, legend=None),
            ),
            only("datum.second", layer("cells", first | {"dy": -8}, **place, text=field("first", "N"))),
            only("!datum.second", layer("cells", first, **place, text=field("first", "N"))),
            layer("cells", text | {"dy": 7, "color": MUTED}, **place, text=field("second", "N")),
        ],
        "width": round(max(1, columns) * width),
        "height": height,
    }


def _count(num_gpus: int, nodes: int) -> int | str:
    return num_gpus if nodes == 1 else count(num_gpus, nodes)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else text[: MAX_LETTERS - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _cell(one: Recommendation, limit: float) -> dict[str, Any]:
    here = {"context": one.sequence_length, "gpus": _count(one.num_gpus, one.nodes)}
    place = f"{one.target}, {devices(one.hardware, one.num_gpus, one.nodes)}, context {one.sequence_length}"
    best = one.evidence_of(one.fastest)
    if best is not None:
        doubt = bool(one.not_told_apart) or one.verdict in ("too_few_data", "contradictory")
        sure = "? " if doubt else "≈ " if one.verdict == "tie" else ""
        numbers = [show(best.step_time_seconds_median, "s"), show(best.peak_memory_gib_median, "GiB")]
        micro = best.per_device_train_batch_size or 1
        return here | {
            "tone": "good",
            "first": _cut(sure + best.recipe),
            "second": ", ".join(filter(None, [*numbers, f"b{micro}" if micro > 1 else ""])),
            "tip": told(place, _why(one, best, limit)),
            "link": run_link(best.model_dump()),
        }
    state, words = how_it_failed(e.states for e in one.evidence)
    first = one.evidence[0] if one.evidence else None
    doubt = one.verdict in ("not_comparable", "contradictory")
    return here | {
        "tone": "none" if doubt else STATES[state].tone,
        "first": f"? {one.verdict.replace('_', ' ')}" if doubt else f"{STATES[state].symbol} {STATES[state].words}",
        "second": _cut(words),
        "tip": told(place, [("Verdict", _verdict(one)), *_endings(one.evidence, limit)]),
        "link": run_link(first.model_dump()) if first else "#runs",
    }


def _verdict(one: Recommendation) -> str:
    return one.tie_in_words or one.verdict.replace("_", " ")


def _why(one: Recommendation, best: Evidence, limit: float) -> list[tuple[str, str]]:
    """What a recommendation rests on; the whole reason is in a table of the page."""
    micro, is_named = best.per_device_train_batch_size or 1, best is one.best
    spread = f", {show(best.step_time_seconds_min)} to {show(best.step_time_seconds_max)}"
    completed = runs(best.num_completed) + (spread if best.num_completed > 1 else "")
    return [
        ("Recommended" if is_named else "Fastest", best.recipe + (f", micro-batch {micro}" if micro > 1 else "")),
        ("Recommended", "" if is_named else str(one.recipe)),
        ("Verdict", _verdict(one)),
        ("Step time", f"{show(best.step_time_seconds_median, 's')} ({completed})"),
        ("Memory", against_limit(best.model_dump(), limit)),
        ("Ratio to the fastest", some([_ratio(versus) for versus in one.versus], MAX_TOLD, "; ")),
        (
            "Not compared",
            some(
                [f"{other.recipe} ({in_words(other.states)})" for other in one.evidence if not other.fits],
                MAX_TOLD,
                "; ",
            ),
        ),
        ("To settle it", some(one.settled_by, MAX_TOLD, "; ")),
    ]


def _ratio(versus: Versus) -> str:
    ratio, low, high = show_ratio(versus.ratio, versus.low, versus.high)
    return f"{versus.recipe} {ratio}" + (f" ({low} to {high})" if low else "")


def _endings(evidence: list[Evidence], limit: float) -> list[tuple[str, str]]:
    """How each recipe ended, and its memory beside the device's."""
    found = [
        (one.recipe, "; ".join(filter(None, (in_words(one.states), against_limit(one.model_dump(), limit)))))
        for one in evidence
    ]
    rest = [("And", f"{len(found) - MAX_TOLD} more")] if len(found) > MAX_TOLD else []
    return found[:MAX_TOLD] + rest


def very_large(all_pairs: list[Pair]) -> list[Figure]:
    """Recipes against models, from the smallest to the largest, on most GPUs at the shortest context."""
    # Where nothing fits, no run has counted a model's weights; another kind of hardware may have.
    sizes: dict[str, int] = {}
    for pair in all_pairs:
        sizes[pair.target] = max([sizes.get(pair.target, 0), *(row["total_parameters"] or 0 for row in pair.rows)])
    figures = []
    for hardware in dict.fromkeys(pair.hardware for pair in all_pairs):
        found = sorted((pair for pair in all_pairs if pair.hardware == hardware), key=lambda pair: sizes[pair.target])
        figures.append(_models(hardware, found[-MAX_PAIRS:]))
    return figures


def _models(hardware: str, found: list[Pair]) -> Figure:
    cells = [
        _size_cell(pair, row)
        for pair in found
        for row in pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    ]
    rows = _planned(found[0].recipes, cells)
    chart = _map(
        cells,
        x=field("target", "N", sort=[pair.target for pair in found], title=None),
        y=field("recipe", "N", sort=rows, title=None),
        columns=len(found),
        height=36 * len(rows),
    )
    places = {pair.most_devices for pair in found}
    there = devices(hardware, *found[0].most_devices) if len(places) == 1 else f"{hardware}, most devices"
    return figure("models", found[0], chart, f"Which mix a model needs: {there}", {"cells": cells}, whole=True)


def _planned(recipes: Iterable[str], cells: list[dict[str, Any]]) -> list[str]:
    there = {cell["recipe"] for cell in cells}
    return [name for name in recipes if name in there]


def _size_cell(pair: Pair, row: Row) -> dict[str, Any]:
    words = tip(row, ("Memory", against_limit(row, pair.limit)))
    common = {"target": pair.target, "recipe": row["recipe"], "tip": words, "link": run_link(row)}
    if row["step_time_seconds_median"] is not None:
        seconds, memory = show(row["step_time_seconds_median"], "s"), show(row["peak_memory_gib_median"], "GiB")
        return common | {"tone": "good", "first": seconds, "second": memory}
    state, counts = how_it_failed([row["states"]])
    return common | {
        "tone": STATES[state].tone,
        "first": f"{STATES[state].symbol} {STATES[state].words}",
        "second": _cut(counts),
    }
