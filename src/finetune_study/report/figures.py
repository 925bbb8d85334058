"""Peak memory and step time per recipe, a pair of figures for each target, hardware, number of devices and of nodes."""

import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import polars as pl
import vl_convert

from finetune_study.config import Config
from finetune_study.report.tables import STATES
from finetune_study.table import TIMES, devices, show

INK, MUTED, LINE, BAR, MEMORY, PAPER = "#1f2328", "#5f6872", "#d5d9de", "#3f7cac", "#b4431f", "#fffffe"
"""Colours of a figure; the page puts its own in their place. Blue and vermilion stay apart for colour-blind readers."""
PNG_SCALE = 2

_PANEL_WIDTH = 330
_ROW_HEIGHT = 24


@dataclass(frozen=True)
class Figure:
    """A figure of the report."""

    name: str
    """File name without its ending."""
    title: str
    caption: str
    svg: str


@dataclass(frozen=True)
class Quantity:
    """What a figure shows on its x axis."""

    name: str
    prefix: str
    """Of the columns of comparisons with median, min and max."""
    axis: str
    unit: str
    limited: bool = False
    """The device's memory is a limit, which is drawn."""


QUANTITIES = (
    Quantity("memory", "peak_memory_gib", "Peak memory per device (GiB)", "GiB", limited=True),
    Quantity("step_time", "step_time_seconds", "Time of an optimizer step (s)", "s"),
)


def draw(config: Config, comparisons: pl.DataFrame) -> list[Figure]:
    """Two figures for each target, hardware, number of devices and of nodes, in the order of the comparisons."""
    groups = comparisons.group_by("target", "hardware", "num_gpus", "nodes", maintain_order=True)
    return [_figure(config, group.to_dicts(), quantity) for _, group in groups for quantity in QUANTITIES]


def save(figures: list[Figure], folder: Path) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    for figure in figures:
        (folder / f"{figure.name}.svg").write_text(figure.svg, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(figure.svg, scale=PNG_SCALE))


def _figure(config: Config, rows: list[dict[str, Any]], quantity: Quantity) -> Figure:
    first = rows[0]
    where = f"{first['target']}, {devices(first['hardware'], first['num_gpus'], first['nodes'])}"
    nodes = f"n{first['nodes']}" if first["nodes"] > 1 else ""
    limit = config.hardware[first["hardware"]].memory_gib if quantity.limited else None
    marks = _marks(rows, quantity, limit)
    stream = io.StringIO()
    _chart(marks, [*config.recipes], quantity, limit).save(stream, format="svg")
    return Figure(
        name=f"{quantity.name}_{first['target']}_{first['hardware']}x{first['num_gpus']}{nodes}",
        title=f"{quantity.axis.partition(' (')[0]}: {where}",
        caption=_caption(rows, limit),
        svg=stream.getvalue(),
    )


def _caption(rows: list[dict[str, Any]], limit: float | None) -> str:
    """Which memory a memory figure shows, and the limit; nothing for the step time."""
    columns = sorted({row["peak_memory_column"] for row in rows if row["peak_memory_column"]})
    parts = [" and ".join(columns)] if columns and limit is not None else []
    parts += [f"limit {show(limit, 'GiB')}"] if limit is not None else []
    return "; ".join(parts)


def _marks(rows: list[dict[str, Any]], quantity: Quantity, limit: float | None) -> list[dict[str, Any]]:
    several = len({row["per_device_train_batch_size"] for row in rows}) > 1
    marks = []
    for row in rows:
        value = row[f"{quantity.prefix}_median"]
        ran_out = "device_oom" in row["states"] and value is None
        marks.append(
            {
                "context": f"Context {row['sequence_length']}",
                "length": row["sequence_length"],
                "recipe": row["recipe"],
                "row": row["recipe"] + (f", micro-batch {row['per_device_train_batch_size']}" if several else ""),
                "value": value,
                "low": row[f"{quantity.prefix}_min"] if row["num_completed"] > 1 else None,
                "high": row[f"{quantity.prefix}_max"] if row["num_completed"] > 1 else None,
                "end": row[f"{quantity.prefix}_max"] or 0,
                "empty": limit if ran_out else None,
                "label": label(row, value, quantity.unit),
                "tone": "number" if value is not None else "memory" if ran_out else "other",
            }
        )
    return marks


def label(row: dict[str, Any], value: float | None, unit: str) -> str:
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


def _chart(marks: list[dict[str, Any]], recipes: list[str], quantity: Quantity, limit: float | None) -> alt.FacetChart:
    """Bars per recipe, one panel per context; what has no number stands there in words."""
    order = {recipe: place for place, recipe in enumerate(recipes)}
    names = [mark["row"] for mark in sorted(marks, key=lambda mark: order[mark["recipe"]])]
    contexts = [mark["context"] for mark in sorted(marks, key=lambda mark: mark["length"])]
    # Room for the longest label to the right of the longest bar.
    largest = max([mark["end"] for mark in marks] + [limit or 0, 1e-9]) * 1.45
    y = alt.Y(
        "row:N", sort=[*dict.fromkeys(names)], title=None, axis=alt.Axis(domain=False, ticks=False, labelPadding=6)
    )
    x_axis = alt.Axis(tickCount=5, domain=False, ticks=False)
    x = alt.X("value:Q", title=quantity.axis, scale=alt.Scale(domain=[0, largest], nice=False), axis=x_axis)
    colour = alt.Color(
        "tone:N", legend=None, scale=alt.Scale(domain=["number", "memory", "other"], range=[INK, MEMORY, MUTED])
    )
    base = alt.Chart().encode(y=y)
    layers = [
        base.mark_bar(color=BAR, height=12).encode(x=x),
        base.mark_bar(filled=False, stroke=MEMORY, strokeDash=[2, 2], strokeWidth=1, height=16).encode(x="empty:Q"),
        base.mark_rule(color=INK, strokeWidth=1.5).encode(x="low:Q", x2="high:Q"),
    ]
    if limit is not None:
        layers.append(alt.Chart().mark_rule(color=MUTED, strokeDash=[4, 3]).encode(x=alt.datum(limit)))
    text = base.mark_text(align="left", baseline="middle", dx=6).encode(x="end:Q", text="label:N")
    halo = text.mark_text(align="left", baseline="middle", dx=6, stroke=PAPER, strokeWidth=6, strokeJoin="round")
    layers += [halo, text.encode(color=colour)]
    chart: alt.FacetChart = (
        alt.layer(*layers, data=alt.InlineData(values=marks))
        .properties(width=_PANEL_WIDTH, height=alt.Step(_ROW_HEIGHT))
        .facet(
            row=alt.Row(
                "context:N",
                sort=[*dict.fromkeys(contexts)],
                title=None,
                header=alt.Header(labelOrient="top", labelAnchor="start", labelFontWeight="bold", labelPadding=2),
            ),
            spacing=10,
        )
        .resolve_scale(y="independent")
        .configure(font="Helvetica, Arial, sans-serif", background=PAPER, aria=False)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=INK, titleColor=MUTED, gridColor=LINE, titleFontWeight="normal", labelFontSize=11, labelLimit=220
        )
        .configure_header(labelColor=INK, labelFontSize=11)
        .configure_text(fontSize=11)
    )
    return chart
