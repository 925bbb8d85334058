"""The page: one HTML file that holds everything it shows."""

import base64
import hashlib
import re
from collections import Counter
from importlib import resources
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from finetune_study import table
from finetune_study.cells import COLUMNS
from finetune_study.config import Config
from finetune_study.recommend import MIN_REPEATS, VERDICTS, Recommendation
from finetune_study.report import figures, tables
from finetune_study.report.figures import Figure
from finetune_study.table import SETTING, show

TEMPLATE = "page.html.j2"
SCRIPT = "page.js"

_PAGE_COLOURS = {
    figures.INK: "var(--ink)",
    figures.MUTED: "var(--muted)",
    figures.LINE: "var(--line)",
    figures.BAR: "var(--bar)",
    figures.MEMORY: "var(--memory)",
    figures.PAPER: "var(--paper)",
}
_ENVIRONMENT = [
    "hardware",
    "gpu_name",
    "host",
    "torch_version",
    "transformers_version",
    "deepspeed_version",
    "software_sha256",
    "lock_sha256",
    "commit",
]


def render(
    config: Config,
    cells: pl.DataFrame,
    comparisons: pl.DataFrame,
    recommendations: list[Recommendation],
    drawn: list[Figure],
) -> str:
    """The page as HTML; every text that comes from a run, a name or a log is escaped.

    Args:
        config: the study.
        cells: one row per planned run (`cells.SCHEMA`).
        comparisons: one row per configuration (`table.SCHEMA`).
        recommendations: one per setting.
        drawn: the figures.
    """
    package = resources.files(__package__)
    template = _templates().from_string((package / TEMPLATE).read_text(encoding="utf-8"))
    script = (package / SCRIPT).read_text(encoding="utf-8")
    rows = cells.to_dicts()
    return template.render(
        title=config.report.title,
        answer=answer(cells, recommendations),
        states=tables.STATES,
        counts=tables.counts(cells["state"]),
        recommendations=recommendations,
        verdicts=VERDICTS,
        min_repeats=MIN_REPEATS,
        figures=[(figure, Markup(for_page(figure.svg))) for figure in drawn],  # Vega escapes what it writes
        settings=_settings(comparisons),
        baseline=table.baseline_of(config),
        columns=tables.columns_for(rows),
        rows=rows,
        what_happened=tables.what_happened,
        config=config,
        environments=_environments(cells),
        mixed_provenance=mixed_provenance(cells),
        stacks=stacks(cells),
        sources=_sources(cells),
        definitions={name: meaning for name, (_, meaning) in COLUMNS.items()},
        comparison_definitions={name: meaning for name, (_, meaning) in table.COLUMNS.items()},
        script=Markup(script),  # a file of this package
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "in_words": tables.in_words}
    environment.globals["devices"] = table.devices
    return environment


def answer(cells: pl.DataFrame, recommendations: list[Recommendation]) -> str:
    """What came out, in a paragraph: how the runs ended, then what is recommended and how sure that is."""
    if not cells.height:
        return "The study has no runs: its grid is empty."
    sentences = [f"{tables.headline(cells).capitalize()}."]
    named = [one for one in recommendations if one.recipe]
    if not named:
        return " ".join([*sentences, "No recipe can be recommended yet; the recommendations say why."])
    if len(named) == 1:
        sentences.append(f"The fastest recipe that fits is {named[0].recipe}.")
    else:
        wins = Counter(one.recipe for one in named).most_common()
        best = ", ".join(f"{recipe} in {number}" for recipe, number in wins)
        sentences.append(f"The fastest recipe that fits, over {len(named)} settings: {best}.")
    return " ".join([*sentences, _how_sure(recommendations)])


def _how_sure(recommendations: list[Recommendation]) -> str:
    verdicts = Counter(one.verdict for one in recommendations)
    if [*verdicts] == ["too_few_data"]:
        return f"That is no ranking yet: it needs {MIN_REPEATS} completed runs of each recipe."
    return "Verdicts: " + ", ".join(f"{verdict.replace('_', ' ')} in {n}" for verdict, n in verdicts.items()) + "."


def for_page(svg: str) -> str:
    """A figure to put into the page: its colours follow the page's, light or dark."""
    for colour, variable in _PAGE_COLOURS.items():
        svg = svg.replace(colour, variable)
    return re.sub(r"^<\?xml[^>]*>\s*", "", svg)


def mixed_provenance(cells: pl.DataFrame) -> list[dict[str, Any]]:
    """Settings whose completed runs differ in software, weights or data, with what each of them was."""
    completed = cells.filter(pl.col("state") == "completed")
    seen = completed.group_by(SETTING, maintain_order=True).agg(
        pl.col("software_sha256", "model_source", "data_sha256").fill_null("unknown").unique(maintain_order=True),
        differs=table.provenance().n_unique() > 1,
    )
    return seen.filter("differs").to_dicts()


def stacks(cells: pl.DataFrame) -> list[dict[str, Any]]:
    """Software of the completed runs: every pair of installed versions and lock, with the hardware it was seen on."""
    completed = cells.filter(pl.col("state") == "completed")
    return (
        completed.with_columns(pl.col("software_sha256", "lock_sha256").fill_null("unknown"))
        .group_by("software_sha256", "lock_sha256", maintain_order=True)
        .agg(pl.col("hardware").unique(maintain_order=True), num_runs=pl.len())
        .to_dicts()
    )


def _settings(comparisons: pl.DataFrame) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    groups = comparisons.group_by(SETTING, maintain_order=True)
    return [(dict(zip(SETTING, key, strict=True)), group.to_dicts()) for key, group in groups]


def _environments(cells: pl.DataFrame) -> list[dict[str, Any]]:
    known = cells.filter(pl.any_horizontal(pl.col("gpu_name", "host", "software_sha256").is_not_null()))
    return known.group_by(_ENVIRONMENT, maintain_order=True).agg(num_runs=pl.len()).to_dicts()


def _sources(cells: pl.DataFrame) -> dict[str, list[str]]:
    """Model sources by target."""
    known = cells.filter(pl.col("model_source").is_not_null())
    groups = known.group_by("target", maintain_order=True).agg(pl.col("model_source").unique(maintain_order=True))
    return {row["target"]: row["model_source"] for row in groups.iter_rows(named=True)}
