"""Every figure of the report, by grammar (Vega-Lite): what to draw is said here, nothing is drawn by hand."""

import math
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert

from finetune_study.config import Config
from finetune_study.recommend import Recommendation
from finetune_study.report.tables import STATES, how_it_failed
from finetune_study.table import TIMES, Row, completed_everywhere, count, devices, micro_batch_order, on_nodes, show

INK, MUTED, LINE, BAR, MEMORY, PAPER = "#1f2328", "#5f6872", "#d5d9de", "#3f7cac", "#b4431f", "#fffffe"
"""Colours of a figure; the page puts its own in their place. Blue and vermilion stay apart for colour-blind readers."""
FILLS = {"good": "#cfe3f3", "memory": "#f9dccd", "limit": "#f4e9c3", "problem": "#f0d5e3", "none": "#f1f2f4"}
"""Cells of a map by the tone of their state; symbol and words say the same."""
SERIES = ("#0072b1", "#d55e01", "#009e74", "#cc79a8", "#8c6d00", "#56b4ea", "#6f42c2", "#5a5a5a")
"""Lines: Okabe and Ito's palette for colour-blind readers, its yellow darkened; each has a mark of its own, too."""
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left")
SHARES = {"in tensors": "#3f7cad", "held by the allocator, unused": "#8fb8d9", "beside the allocator": "#c9cdd3"}
PNG_SCALE = 2
FONT = "Helvetica, Arial, sans-serif"
MAX_PAIRS = 12
"""Pairs of target and hardware that are drawn, those with most runs first; all others are in the tables."""
_LINK_BASE = "https://vega.github.io/vega-datasets/"
"""What the converter puts before an address that is a mere anchor."""


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    kind: str
    """The part of the report that it belongs to."""
    target: str
    hardware: str
    title: str
    caption: str
    spec: dict[str, Any]
    """Vega-Lite."""

    @property
    def name(self) -> str:
        """File name without its ending."""
        return "_".join(filter(None, (self.kind, self.target, self.hardware)))

    def svg(self) -> str:
        return str(vl_convert.vegalite_to_svg(self.spec)).replace(_LINK_BASE, "")


Devices = tuple[int, int]
"""How many devices, and the nodes that they are on."""


@dataclass(frozen=True)
class Pair:
    """All that is known of a target on some hardware."""

    target: str
    hardware: str
    device: str
    limit: float
    """Memory of a device, GiB."""
    rows: list[Row]
    """Configurations (`table.SCHEMA`)."""
    recommendations: list[Recommendation]
    recipes: list[str] = field(default_factory=list)

    @property
    def where(self) -> str:
        return f"{self.target} on {self.hardware}"

    @property
    def planned_devices(self) -> Devices:
        """The largest number of devices that a run asks for, on as few nodes as one does."""
        return _most(map(_devices, self.rows))

    @property
    def most_devices(self) -> Devices:
        """The largest number of devices with a completed run; else the largest that was planned."""
        done = [_devices(row) for row in self.rows if row["num_completed"]]
        return _most(done) if done else self.planned_devices

    @property
    def shortest(self) -> int:
        """The shortest context with a completed run on these devices; else the shortest that was planned."""
        at = [row for row in self.rows if _devices(row) == self.most_devices]
        done = [int(row["sequence_length"]) for row in at if row["num_completed"]]
        return min(done or [int(row["sequence_length"]) for row in at])

    def best_rows(self, *, devices: Devices | None = None, sequence_length: int | None = None) -> list[Row]:
        """Each recipe of each setting at its fastest micro-batch that fits, else at its smallest."""
        chosen: dict[tuple[Any, ...], Row] = {}
        for row in self.rows:
            if devices not in (None, _devices(row)) or sequence_length not in (None, row["sequence_length"]):
                continue
            key = *_devices(row), row["sequence_length"], row["recipe"]
            if key not in chosen or _rank(row) < _rank(chosen[key]):
                chosen[key] = row
        return list(chosen.values())


def _devices(row: Row) -> Devices:
    return int(row["num_gpus"]), int(row["nodes"])


def _most(counts: Iterable[Devices]) -> Devices:
    return max(counts, key=lambda one: (one[0], -one[1]))


def _rank(row: Row) -> tuple[bool, float]:
    seconds = row["step_time_seconds_median"]
    fits = completed_everywhere(row) and seconds is not None
    return not fits, seconds if fits else micro_batch_order(row)


def pairs(config: Config, rows: Iterable[Row], recommendations: Iterable[Recommendation]) -> list[Pair]:
    """Targets on hardware, in the order of the comparisons."""
    found: dict[tuple[str, str], Pair] = {}
    for row in rows:
        key = row["target"], row["hardware"]
        if key not in found:
            entry = config.hardware[row["hardware"]]
            found[key] = Pair(*key, entry.device, entry.memory_gib, [], [], [*config.recipes])
        found[key].rows.append(row)
    for one in recommendations:
        found[one.target, one.hardware].recommendations.append(one)
    return list(found.values())


def drawn_pairs(all_pairs: list[Pair]) -> list[Pair]:
    """Those that are drawn, in their order."""
    kept = sorted(all_pairs, key=lambda pair: -sum(row["num_repeats"] for row in pair.rows))[:MAX_PAIRS]
    return [pair for pair in all_pairs if any(pair is one for one in kept)]


def draw(all_pairs: list[Pair]) -> list[Figure]:
    """Every figure, in the order of the page."""
    figures = [figure for pair in drawn_pairs(all_pairs) for figure in _of_pair(pair)]
    return [*figures, *_very_large(all_pairs)]


def _of_pair(pair: Pair) -> list[Figure]:
    makers = (feasibility, recipes, pareto, context, gpus, long_context)
    return [figure for maker in makers if (figure := maker(pair)) is not None]


def save(figures: Sequence[Figure], svgs: Sequence[str], folder: Path) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    for figure, svg in zip(figures, svgs, strict=True):
        # A file of its own has no page to link into, and no page's colours.
        alone = re.sub(r"</?a\b[^>]*>", "", svg)
        (folder / f"{figure.name}.svg").write_text(alone, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(alone, scale=PNG_SCALE))


def run_link(row: Row) -> str:
    """Anchor of the panel of a run: of the first one that completed, else of the first."""
    ids, states = row["run_ids"], row["states"]
    return f"#run={next((i for i, state in zip(ids, states, strict=True) if state == 'completed'), ids[0])}"


def feasibility(pair: Pair) -> Figure | None:
    """Context against GPUs: the fastest recipe that fits, or how it fails."""
    cells = [_cell(pair, one) for one in pair.recommendations]
    contexts = sorted({one.sequence_length for one in pair.recommendations})
    places = sorted({(one.num_gpus, one.nodes) for one in pair.recommendations}, reverse=True)
    counts: list[Any] = [_count(*place) for place in places]
    base = alt.Chart(alt.NamedData("cells")).encode(
        x=alt.X("context:O", sort=contexts, title="Context (tokens)", axis=_axis(orient="top", labelAngle=0)),
        y=alt.Y("gpus:O", sort=counts, title="GPUs" if pair.device == "cuda" else "Processes", axis=_axis()),
    )
    tones = {"domain": [*FILLS], "range": [*FILLS.values()]}
    chart = alt.layer(
        base.mark_rect(stroke=PAPER, strokeWidth=3).encode(
            color=alt.Color("tone:N", scale=tones, legend=None), description="tip:N", href="link:N"
        ),
        base.mark_text(dy=-8, fontWeight="bold", fontSize=11).encode(text="first:N"),
        base.mark_text(dy=7, fontSize=10.5, color=MUTED).encode(text="second:N"),
    )
    return _figure(
        "feasibility",
        pair,
        chart,
        f"What fits: {pair.where}",
        "",
        {"cells": cells},
        width=max(1, len(contexts)) * 132,
        height=max(1, len(counts)) * 44,
    )


def _count(num_gpus: int, nodes: int) -> int | str:
    return num_gpus if nodes == 1 else count(num_gpus, nodes)


def _cell(pair: Pair, one: Recommendation) -> dict[str, Any]:
    here = {"context": one.sequence_length, "gpus": _count(one.num_gpus, one.nodes)}
    places = f"{one.target}, {devices(one.hardware, one.num_gpus, one.nodes)}, context {one.sequence_length}: "
    best = one.best
    if best is not None:
        sure = {"tie": "≈ ", "too_few_data": "? "}.get(one.verdict, "")
        numbers = [show(best.step_time_seconds_median, "s"), show(best.peak_memory_gib_median, "GiB")]
        size = best.per_device_train_batch_size or 1
        micro = f" b{size}" if size > 1 else ""
        return here | {
            "tone": "good",
            "first": sure + best.recipe + micro,
            "second": ", ".join(filter(None, numbers)),
            "tip": places + one.reason,
            "link": run_link(best.model_dump()),
        }
    state, words = how_it_failed([state for e in one.evidence for state in e.states])
    first = one.evidence[0] if one.evidence else None
    return here | {
        "tone": STATES[state].tone,
        "first": f"{STATES[state].symbol} {STATES[state].words}",
        "second": words,
        "tip": places + one.reason,
        "link": run_link(first.model_dump()) if first else "#runs",
    }


def recipes(pair: Pair) -> Figure | None:
    """Peak memory, broken down, and step time of each recipe, predicted beside measured."""
    rows = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
    marks = [_recipe_mark(pair, row, _slowest(rows)) for row in rows]
    order = [name for name in pair.recipes if any(m["recipe"] == name for m in marks)]
    shares = [mark | share for mark, row in zip(marks, rows, strict=True) for share in _shares(row)]
    parted = len({share["share"] for share in shares}) > 1
    largest = max([pair.limit, *(m["memory_end"] or 0 for m in marks)]) * 1.02
    slowest = _slowest(rows) * 1.5
    y = alt.Y("recipe:N", sort=order, title=None, axis=_axis())
    base = alt.Chart(alt.NamedData("marks")).encode(y=y, description="tip:N", href="link:N")
    share = alt.Color(
        "share:N",
        title=None,
        scale={"domain": [*SHARES], "range": [*SHARES.values()]},
        legend={"orient": "top", "direction": "horizontal"} if parted else None,
    )
    memory = alt.layer(
        alt.Chart(alt.NamedData("shares"))
        .mark_bar(height=13)
        .encode(
            y=y,
            x=alt.X(
                "low:Q",
                axis=_axis(tickCount=5),
                title="Peak memory per device (GiB)",
                scale={"domain": [0, largest * 1.35], "nice": False},
            ),
            x2="high:Q",
            color=share,
            description="tip:N",
            href="link:N",
        ),
        base.mark_bar(filled=False, stroke=MEMORY, strokeDash=[2, 2], height=13).encode(x="ran_out:Q"),
        alt.Chart(alt.NamedData("limit")).mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x="limit:Q"),
        base.mark_point(shape="diamond", filled=True, size=55, color=INK, stroke=PAPER).encode(x="predicted_memory:Q"),
        base.mark_text(align="left", dx=5).encode(x="memory_end:Q", text="memory_label:N", color=_tone()),
    ).properties(width=300, height=alt.Step(25))
    timed = alt.Chart(alt.NamedData("marks")).encode(
        y=alt.Y("recipe:N", sort=order, title=None, axis=None), description="tip:N", href="link:N"
    )
    time = alt.layer(
        timed.mark_bar(color=BAR, height=13).encode(
            x=alt.X(
                "time:Q",
                title="Time of an optimizer step (s)",
                axis=_axis(tickCount=5),
                scale={"domain": [0, slowest], "nice": False},
            ),
        ),
        timed.mark_rule(color=INK, strokeWidth=1.5).encode(x="time_low:Q", x2="time_high:Q"),
        timed.mark_point(shape="diamond", filled=True, size=55, color=INK, stroke=PAPER).encode(x="predicted_time:Q"),
        timed.mark_text(align="left", dx=5).encode(x="time_end:Q", text="time_label:N", color=_tone()),
    ).properties(width=230, height=alt.Step(25))
    columns = sorted({row["peak_memory_column"] for row in rows if row["peak_memory_column"]})
    predicted = any(m["predicted_memory"] is not None or m["predicted_time"] is not None for m in marks)
    return _figure(
        "recipes",
        pair,
        alt.hconcat(memory, time, spacing=14),
        f"Memory and time per recipe: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}",
        f"{' and '.join(columns)}{'; ' if columns else ''}dashed: the device's {show(pair.limit, 'GiB')}."
        + (" Diamonds: predicted before the run." if predicted else ""),
        {"marks": marks, "shares": shares, "limit": [{"limit": pair.limit}]},
    )


def _slowest(rows: list[Row]) -> float:
    """The longest step time, measured, or predicted of what was measured; where nothing was, predicted."""
    done = [row for row in rows if row["step_time_seconds_median"] is not None]
    ends = [row["step_time_seconds_max"] for row in done]
    ends += [row["predicted_step_time_seconds"] or 0.0 for row in done or rows]
    return max(ends, default=0.0) or 1.0


def _recipe_mark(pair: Pair, row: Row, slowest: float) -> dict[str, Any]:
    several = row["num_completed"] > 1
    ran_out = row["peak_memory_gib_median"] is None and any("oom" in state for state in row["states"])
    memory, seconds = row["peak_memory_gib_median"], row["step_time_seconds_median"]
    shares = _shares(row)
    predicted = _within(row["predicted_peak_memory_gib"], pair.limit)
    predicted_time = _within(row["predicted_step_time_seconds"], slowest)
    return {
        "recipe": row["recipe"],
        "memory_end": max([s["high"] for s in shares] + [predicted or 0, pair.limit if ran_out else 0]),
        "ran_out": pair.limit if ran_out else None,
        "predicted_memory": predicted,
        "memory_label": label(row, memory, "GiB"),
        "time": seconds,
        "time_low": row["step_time_seconds_min"] if several else None,
        "time_high": row["step_time_seconds_max"] if several else None,
        "time_end": max(row["step_time_seconds_max"] or 0, predicted_time or 0),
        "predicted_time": predicted_time,
        "time_label": show(seconds, "s"),
        "tone": INK if memory is not None else MEMORY if ran_out else MUTED,
        "tip": tip(row),
        "link": run_link(row),
    }


def _within(value: float | None, limit: float) -> float | None:
    return value if value is not None and value <= limit else None


def _shares(row: Row) -> list[dict[str, Any]]:
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


def label(row: Row, value: float | None, unit: str) -> str:
    """What stands beside a bar: its number, and every repeat that has none."""
    total = len(row["states"])
    without = {state: row["states"].count(state) for state in STATES if state != "completed" and state in row["states"]}
    parts = [show(value, unit)] if value is not None else []
    if value is None and row["num_completed"]:
        parts.append("not shown: " + (row["not_compared"] or "no timed step"))
    for state, number in without.items():
        mixed = f"{number} of {total} " if number < total else ""
        parts.append(f"{TIMES + ' ' if 'oom' in state else ''}{mixed}{STATES[state].words}")
    return ", ".join(parts)


def tip(row: Row) -> str:
    """Everything about a configuration in a line, for hovering and for screen readers."""
    parts = [
        f"{row['recipe']}, {devices(row['hardware'], row['num_gpus'], row['nodes'])}, "
        f"context {row['sequence_length']}, micro-batch {row['per_device_train_batch_size'] or row['micro_batch']}",
        label(row, row["step_time_seconds_median"], "s"),
        show(row["peak_memory_gib_median"], "GiB"),
        f"{show(row['tokens_per_second_per_gpu_median'])} tokens/s per device" if row["num_completed"] else "",
        _predicted(row),
        f"{row['num_completed']} of {row['num_repeats']} repeats completed",
    ]
    return "; ".join(filter(None, parts))


def _predicted(row: Row) -> str:
    seconds, memory = row["predicted_step_time_seconds"], row["predicted_peak_memory_gib"]
    numbers = filter(None, (show(seconds, "s"), show(memory, "GiB")))
    return f"predicted {' and '.join(numbers)}" if seconds or memory else ""


def pareto_front(rows: list[Row]) -> list[Row]:
    """Configurations that no other one beats in both step time and memory, from the fastest on."""
    front: list[Row] = []
    usable = [r for r in rows if r["step_time_seconds_median"] is not None and r["peak_memory_gib_median"] is not None]
    for row in sorted(usable, key=lambda r: (r["step_time_seconds_median"], r["peak_memory_gib_median"])):
        if not front or row["peak_memory_gib_median"] < front[-1]["peak_memory_gib_median"]:
            front.append(row)
    return front


def pareto(pair: Pair) -> Figure | None:
    """Memory against step time; the recipes that nothing beats in both are labelled and joined."""
    rows = pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
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
        return None
    points.sort(key=lambda point: (not point["front"], point["time"]))
    _label_apart(points)
    axis = {"type": "log", "nice": False, "padding": 24}
    base = alt.Chart(alt.NamedData("points")).encode(
        x=alt.X("time:Q", title="Time of an optimizer step (s)", axis=_axis(grid=True, tickCount=6), scale=axis),
        y=alt.Y("memory:Q", title="Peak memory per device (GiB)", axis=_axis(grid=True, tickCount=6), scale=axis),
    )
    on_front = alt.datum.front == True  # noqa: E712
    chart = alt.layer(
        base.transform_filter(on_front).mark_line(color=BAR, strokeWidth=1.5, interpolate="step-after"),
        base.mark_point(filled=True, size=75, stroke=PAPER, opacity=1).encode(
            shape=alt.Shape("front:N", legend=None, scale={"domain": [True, False], "range": ["circle", "diamond"]}),
            color=alt.condition(on_front, alt.value(BAR), alt.value(MUTED)),
            description="tip:N",
            href="link:N",
        ),
        base.transform_filter(on_front).mark_text(align="left", dx=7, dy=-7, fontWeight="bold").encode(text="label:N"),
        base.transform_filter("!datum.front")
        .mark_text(align="left", dx=7, dy=9, color=MUTED, fontSize=10)
        .encode(text="label:N"),
    )
    return _figure(
        "pareto",
        pair,
        chart,
        f"Memory against time: {pair.where} {TIMES} {count(*pair.most_devices)}, context {pair.shortest}",
        "",
        {"points": points},
        width=470,
        height=270,
    )


def _label_apart(points: list[dict[str, Any]]) -> None:
    """Names the points from the first on; one that lies where a name already stands gets none."""
    spans = {axis: [math.log(point[axis]) for point in points] for axis in ("time", "memory")}
    width, height = (max(values) - min(values) or 1.0 for values in spans.values())
    named: list[tuple[float, float]] = []
    for point in points:
        x, y = math.log(point["time"]) / width, math.log(point["memory"]) / height
        free = all(abs(x - other_x) > 0.27 or abs(y - other_y) > 0.055 for other_x, other_y in named)
        point["label"] = point["recipe"] if free else ""
        named += [(x, y)] if free else []


def exponent(points: Sequence[tuple[float, float]]) -> float | None:
    """The slope of log y over log x by least squares; None for fewer than three points."""
    if len({x for x, _ in points}) < 3:
        return None
    return statistics.linear_regression([math.log(x) for x, _ in points], [math.log(y) for _, y in points]).slope


def context(pair: Pair) -> Figure | None:
    """Memory and time against context, with the fitted exponents and the lengths that failed."""
    rows = pair.best_rows(devices=pair.most_devices)
    return _scaling(
        "context",
        pair,
        rows,
        "sequence_length",
        "Context (tokens)",
        f"Against context: {pair.where} {TIMES} {count(*pair.most_devices)}",
    )


def gpus(pair: Pair) -> Figure | None:
    """Memory and time against the number of GPUs."""
    rows = pair.best_rows(sequence_length=pair.shortest)
    return _scaling(
        "gpus", pair, rows, "num_gpus", "GPUs", f"Against the number of GPUs: {pair.where}, context {pair.shortest}"
    )


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
        "sequence_length",
        "Context (tokens)",
        f"Long context with and without FlashAttention: {pair.where} {TIMES} {count(*pair.most_devices)}",
    )


def _without_attention(row: Row) -> tuple[str, ...]:
    names = (row["techniques"] or "").split("+")
    return tuple(n for n in names if n not in ("eager", "sdpa") and not n.startswith("flash_attention"))


def _scaling(kind: str, pair: Pair, rows: list[Row], axis: str, title: str, heading: str) -> Figure | None:
    values = sorted({row[axis] for row in rows})
    names = _names(pair, rows)
    done = {name: sum(1 for r in rows if _series(r) == name and r["num_completed"]) for name in names}
    most = sorted(names, key=lambda name: -done[name])[: len(SERIES)]
    shown = [name for name in names if name in most]
    if len(values) < 2 or not any(done.values()):
        return None
    memory = _points(rows, shown, axis, "peak_memory_gib_median", pair.limit)
    time = _points(rows, shown, axis, "step_time_seconds_median", None)
    panels = [
        _panel("memory", memory, shown, title, "Peak memory per device (GiB)", limited=True),
        _panel("time", time, shown, title, "Step time (s)", limited=False),
    ]
    powers: list[tuple[str, float | None, float | None]] = [
        (name, _power(rows, name, axis, "peak_memory_gib_median"), _power(rows, name, axis, "step_time_seconds_median"))
        for name in shown
    ]
    fitted = "; ".join(
        f"{n} {_power_text(m)}, {_power_text(t)}" for n, m, t in powers if m is not None or t is not None
    )
    return _figure(
        kind,
        pair,
        alt.hconcat(*panels, spacing=28),
        heading,
        f"Fitted exponents of memory and time: {fitted}." if fitted else "",
        {"memory": memory, "time": time, "limit": [{"limit": pair.limit}]},
    )


def _names(pair: Pair, rows: list[Row]) -> list[str]:
    """The series, recipes in the order of the config, on few nodes before those on many."""
    ordered = sorted(rows, key=lambda row: (pair.recipes.index(row["recipe"]), row["nodes"]))
    return [*dict.fromkeys(map(_series, ordered))]


def _series(row: Row) -> str:
    """A line of a figure: a recipe on one number of nodes."""
    return str(row["recipe"]) + on_nodes(row["nodes"])


def _power(rows: list[Row], name: str, axis: str, column: str) -> float | None:
    return exponent([(r[axis], r[column]) for r in rows if _series(r) == name and r[column]])


def _power_text(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}".replace("-", "−")


def _points(rows: list[Row], names: list[str], axis: str, column: str, limit: float | None) -> list[dict[str, Any]]:
    """A point for each configuration; one that failed stands at the limit, or above all others."""
    top = limit or max((row[column] for row in rows if row[column]), default=1.0) * 1.6
    points = [
        {
            "x": row[axis],
            "y": row[column] or (top if _failed(row) else None),
            "recipe": _series(row),
            "failed": not row[column],
            "tip": tip(row),
            "link": run_link(row),
        }
        for row in rows
        if _series(row) in names
    ]
    return [point for point in points if point["y"] is not None]


def _panel(
    name: str, points: list[dict[str, Any]], names: list[str], title: str, heading: str, *, limited: bool
) -> Any:
    ticks = sorted({point["x"] for point in points})
    colour = alt.Color(
        "recipe:N",
        title=None,
        sort=names,
        scale={"domain": names, "range": [*SERIES[: len(names)]]},
        legend={"orient": "bottom", "columns": 4, "symbolOpacity": 1},
    )
    shape = alt.Shape(
        "recipe:N",
        title=None,
        sort=names,
        scale={"domain": names, "range": [*SHAPES[: len(names)]]},
        legend={"orient": "bottom", "columns": 4},
    )
    base = alt.Chart(alt.NamedData(name)).encode(
        x=alt.X(
            "x:Q",
            title=title,
            scale={"type": "log", "nice": False, "padding": 14},
            axis=_axis(values=ticks, grid=True, format="d"),
        ),
        y=alt.Y(
            "y:Q",
            title=heading,
            scale={"type": "log", "nice": False, "padding": 14},
            axis=_axis(grid=True, tickCount=5),
        ),
    )
    done = base.transform_filter("!datum.failed")
    layers = [
        done.mark_line(strokeWidth=1.6).encode(color=colour),
        done.mark_point(filled=True, size=48, opacity=1).encode(
            color=colour, shape=shape, description="tip:N", href="link:N"
        ),
        base.transform_filter("datum.failed")
        .mark_text(text="✕", fontSize=12, fontWeight="bold")
        .encode(color=colour, description="tip:N", href="link:N"),
    ]
    if limited:
        line = alt.Chart(alt.NamedData("limit")).mark_rule(color=MUTED, strokeDash=[4, 3])
        layers.append(line.encode(y="limit:Q"))
    return alt.layer(*layers).properties(width=265, height=230)


def _failed(row: Row) -> bool:
    return bool({*row["states"]} - {"completed", "not_run", "failed"})


def _very_large(all_pairs: list[Pair]) -> list[Figure]:
    """Recipes against models, from the smallest to the largest, on most GPUs at the shortest context."""
    figures = []
    # Where nothing fits, no run has counted a model's weights; another kind of hardware may have.
    sizes: dict[str, int] = {}
    for pair in all_pairs:
        sizes[pair.target] = max([sizes.get(pair.target, 0), *(row["total_parameters"] or 0 for row in pair.rows)])
    for hardware in dict.fromkeys(pair.hardware for pair in all_pairs):
        found = [pair for pair in all_pairs if pair.hardware == hardware]
        found.sort(key=lambda pair: sizes[pair.target])
        if len(found) < 2:
            continue
        found = found[-MAX_PAIRS:]
        cells = [
            _size_cell(pair, row)
            for pair in found
            for row in pair.best_rows(devices=pair.most_devices, sequence_length=pair.shortest)
        ]
        columns = [pair.target for pair in found]
        rows = [name for name in found[0].recipes if any(cell["recipe"] == name for cell in cells)]
        base = alt.Chart(alt.NamedData("cells")).encode(
            x=alt.X("target:N", sort=columns, title=None, axis=_axis(orient="top", labelAngle=0)),
            y=alt.Y("recipe:N", sort=rows, title=None, axis=_axis()),
        )
        chart = alt.layer(
            base.mark_rect(stroke=PAPER, strokeWidth=2).encode(
                color=alt.Color("tone:N", legend=None, scale={"domain": [*FILLS], "range": [*FILLS.values()]}),
                description="tip:N",
                href="link:N",
            ),
            base.mark_text(fontSize=10.5).encode(text="text:N"),
        )
        sizes_of_found = {pair.most_devices for pair in found}
        there = devices(hardware, *found[0].most_devices) if len(sizes_of_found) == 1 else f"{hardware}, most devices"
        figures.append(
            _figure(
                "models",
                found[0],
                chart,
                f"Which mix a model needs: {there}",
                "",
                {"cells": cells},
                width=132 * len(columns),
                height=26 * len(rows),
                target="",
            )
        )
    return figures


def _size_cell(pair: Pair, row: Row) -> dict[str, Any]:
    common = {"target": pair.target, "recipe": row["recipe"], "tip": tip(row), "link": run_link(row)}
    if row["step_time_seconds_median"] is not None:
        text = f"{show(row['step_time_seconds_median'], 's')}, {show(row['peak_memory_gib_median'], 'GiB')}"
        return common | {"tone": "good", "text": text}
    state, _ = how_it_failed(row["states"])
    return common | {"tone": STATES[state].tone, "text": f"{STATES[state].symbol} {STATES[state].words}"}


def _tone() -> alt.Color:
    """The colour stands in the data: a scale of its own would be merged with that of the bars."""
    return alt.Color("tone:N", legend=None, scale=None)


def _axis(**settings: Any) -> dict[str, Any]:
    """Plain, as scales and legends are: Altair copies its own classes, with all their fields, time and again."""
    return {"domain": False, "ticks": False, "labelPadding": 6, "grid": False} | settings


def _figure(
    kind: str,
    pair: Pair,
    chart: Any,
    title: str,
    caption: str,
    datasets: dict[str, list[dict[str, Any]]],
    target: str | None = None,
    **size: int,
) -> Figure:
    """A figure in the report's style. Charts name their data, added here: Altair copies what they hold."""
    if size:
        chart = chart.properties(**size)
    if isinstance(chart, alt.HConcatChart):
        chart = chart.resolve_scale(color="shared", shape="shared")
    styled = (
        chart.configure(font=FONT, background=PAPER)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK, titleColor=MUTED, gridColor=LINE, titleFontWeight="normal", labelFontSize=11, labelLimit=220
        )
        .configure_legend(labelColor=INK, labelFontSize=11, symbolSize=60, labelLimit=220)
        .configure_text(fontSize=11, color=INK)
    )
    return Figure(
        kind,
        pair.target if target is None else target,
        pair.hardware,
        title,
        caption,
        styled.to_dict(validate=False) | {"datasets": datasets},
    )
