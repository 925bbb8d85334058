"""The page: one HTML file that holds everything it shows."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2
import polars as pl
from markupsafe import Markup

from finetune_study import claims, states, table
from finetune_study.cells import COLUMNS, FAILED, NOT_RUN
from finetune_study.changes import Earlier
from finetune_study.claims import Claim, Walk
from finetune_study.config import Config
from finetune_study.recommend import MIN_NODES, MIN_REPEATS, VERDICTS, Default, Elsewhere, Recommendation
from finetune_study.report import costs, embedded, grammar, tables
from finetune_study.report import pair as pair_module
from finetune_study.report.answer import QUESTION, answer, longest
from finetune_study.report.grammar import Figure
from finetune_study.report.pair import Pair
from finetune_study.table import SETTING, Row, show

TEMPLATE = "page.html.j2"
SCRIPT = "page.js"

COLUMN = 604
"""Width that a figure has beside another one in a window of 1280, pixels; a wider one has a line of its own, since text
that is made smaller can't be read."""
MAX_ROWS = 200
"""Rows of a table that is written out; the whole is a file."""
PAPER_ROWS = 12
"""Of those, rows of a table that is folded away on the screen and open on paper."""
OPEN_WALKS = 12
"""Decision trees that are not folded away."""

_PAGE_COLOURS = {
    grammar.INK: "var(--ink)",
    grammar.MUTED: "var(--muted)",
    grammar.LINE: "var(--line)",
    grammar.BAR: "var(--bar)",
    grammar.MEMORY: "var(--memory)",
    grammar.PAPER: "var(--paper)",
    **{colour: f"var(--fill-{tone})" for tone, colour in grammar.FILLS.items()},
    **{colour: f"var(--s{number})" for number, colour in enumerate(grammar.SERIES, start=1)},
    **{colour: f"var(--share{number})" for number, colour in enumerate(grammar.SHARES.values(), start=1)},
}
_COLOUR = re.compile("|".join(_PAGE_COLOURS))
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

_VERSIONS = {
    "gpu_name": "",
    "torch_version": "torch",
    "transformers_version": "transformers",
    "deepspeed_version": "DeepSpeed",
}
"""Columns that are named at the top of the page, and the words before them."""


@dataclass(frozen=True)
class Contents:
    """Everything that the page shows."""

    config: Config
    options: str
    """Of the commands `finetune-study` that are shown (`Study.options`)."""
    cells: pl.DataFrame
    """One row per planned run (`cells.SCHEMA`)."""
    compared: pl.DataFrame
    """One row per configuration (`table.SCHEMA`)."""
    comparisons: list[Row]
    """The same, row by row."""
    recommendations: list[Recommendation]
    defaults: list[Default]
    pairs: list[Pair]
    claims: list[Claim]
    walks: list[Walk]
    costs: list[Row]
    earlier: Earlier | None


@dataclass(frozen=True)
class Beyond:
    """What to use where a default does not fit."""

    default: Default

    @property
    def saved(self) -> list[Elsewhere]:
        return [other for other in self.default.elsewhere if other.recipe]

    @property
    def instead(self) -> list[tuple[str, int]]:
        """Recipes that do fit, and in how many settings."""
        return Counter(str(other.recipe) for other in self.saved).most_common()

    @property
    def lost(self) -> list[tuple[str, str, list[int]]]:
        """Where none is named: how many devices, why, and the contexts."""
        found: dict[tuple[str, str], list[int]] = {}
        for other in self.default.elsewhere:
            if not other.recipe:
                found.setdefault((table.count(other.num_gpus, other.nodes), other.verdict), []).append(
                    other.sequence_length
                )
        return [(*key, contexts) for key, contexts in found.items()]


def render(contents: Contents, figures: Sequence[Figure], svgs: Iterable[str]) -> str:
    """The page as HTML; every text that comes from a run, a name or a log is escaped.

    Args:
        contents: what it says.
        figures: in its order.
        svgs: of each figure; asked for last, since they may still be drawn.
    """
    package = resources.files(__package__)
    template = _templates().from_string((package / TEMPLATE).read_text(encoding="utf-8"))
    script = (package / SCRIPT).read_text(encoding="utf-8")
    config, cells = contents.config, contents.cells
    return template.render(
        title=config.report.title,
        notice=config.report.notice,
        options=contents.options,
        question=QUESTION,
        answer=answer(contents.recommendations, contents.defaults),
        headline=tables.headline(cells),
        cells_total=cells.height,
        states=states.STATES,
        counts=states.counts(cells["state"]),
        defaults=contents.defaults,
        longest=longest(contents.recommendations),
        beyond=[Beyond(one) for one in contents.defaults if one.elsewhere],
        recommendations=contents.recommendations,
        verdicts=VERDICTS,
        min_repeats=MIN_REPEATS,
        min_nodes=MIN_NODES,
        column=COLUMN,
        max_rows=MAX_ROWS,
        paper_rows=PAPER_ROWS,
        open_walks=OPEN_WALKS,
        num_pairs=len(contents.pairs),
        num_drawn=len(pair_module.drawn(contents.pairs)),
        targets=[*dict.fromkeys(pair.target for pair in contents.pairs)],
        hardware=[*dict.fromkeys(pair.hardware for pair in contents.pairs)],
        comparisons=contents.comparisons,
        baseline=table.baseline_of(config),
        spent=costs.spent(cells),
        costs=contents.costs,
        priced=any(entry.price_usd_per_gpu_hour is not None for entry in config.hardware.values()),
        billed=any(one["billing_unit_hours"] is not None for one in contents.costs),
        powered=any(one["kwh"] is not None for one in contents.costs),
        claims=contents.claims,
        support=claims.SUPPORT,
        walks=contents.walks,
        earlier=contents.earlier,
        data=Markup(embedded.embed(cells)),  # base64
        run_ids=frozenset(cells["run_id"]),
        failed=cells.filter(pl.col("state") == FAILED).to_dicts(),
        not_run=cells.filter(pl.col("state") == NOT_RUN).to_dicts(),
        what_happened=tables.what_happened,
        config=config,
        environments=_environments(cells),
        mixed_provenance=mixed_provenance(cells),
        stacks=stacks(cells),
        versions=versions(cells),
        sources=_sources(cells),
        definitions={name: meaning for name, (_, meaning) in COLUMNS.items()},
        comparison_definitions={name: meaning for name, (_, meaning) in table.COLUMNS.items()},
        script=Markup(script),  # a file of this package
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        # Vega escapes what it writes.
        figures=[
            (figure, Markup(for_page(svg)), grammar.size_of(svg)) for figure, svg in zip(figures, svgs, strict=True)
        ],
    )


def _templates() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"show": show, "whole": "{:,}".format, "in_words": states.in_words}
    environment.filters |= {"micro_batch": table.micro_batch, "of_each_pair": of_each_pair}
    environment.globals |= {"devices": table.devices, "count": table.count}
    return environment


def of_each_pair(comparisons: list[claims.Comparison], most: int = MAX_ROWS) -> list[claims.Comparison]:
    """The first ones of each model and hardware, so that a table that is cut has some of whichever is chosen."""
    seen = Counter[tuple[str, str]]()
    ranked: list[tuple[int, int]] = []
    for position, one in enumerate(comparisons):
        pair = one.target, one.hardware
        ranked.append((seen[pair], position))
        seen[pair] += 1
    return [comparisons[position] for position in sorted(position for _, position in sorted(ranked)[:most])]


def for_page(svg: str) -> str:
    """A figure to put into the page: its colours follow the page's, light or dark; Tab stops at its first mark."""
    inline = _COLOUR.sub(lambda found: _PAGE_COLOURS[found[0]], svg)
    before, link, marks = re.sub(r"^<\?xml[^>]*>\s*", "", inline).partition("<a ")
    return before + link.replace("<a ", '<a tabindex="0" ') + marks.replace("<a ", '<a tabindex="-1" ')


def mixed_provenance(cells: pl.DataFrame) -> list[dict[str, Any]]:
    """Settings whose completed runs differ in software, device, weights or data, with what each of them was."""
    completed = cells.filter(pl.col("state") == "completed")
    seen = completed.group_by(SETTING, maintain_order=True).agg(
        pl.col("software_sha256", "gpu_name", "model_source", "data_sha256")
        .fill_null("unknown")
        .unique(maintain_order=True),
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


def versions(cells: pl.DataFrame) -> list[str]:
    """Kinds of device and versions of the libraries that completed runs were measured with."""
    completed = cells.filter(pl.col("state") == "completed")
    seen = {
        words: completed[name].drop_nulls().unique(maintain_order=True).to_list() for name, words in _VERSIONS.items()
    }
    return [f"{words} {' and '.join(values)}".strip() for words, values in seen.items() if values]


def _environments(cells: pl.DataFrame) -> list[dict[str, Any]]:
    known = cells.filter(pl.any_horizontal(pl.col("gpu_name", "host", "software_sha256").is_not_null()))
    return known.group_by(_ENVIRONMENT, maintain_order=True).agg(num_runs=pl.len()).to_dicts()


def _sources(cells: pl.DataFrame) -> dict[str, list[str]]:
    """Model sources by target."""
    known = cells.filter(pl.col("model_source").is_not_null())
    groups = known.group_by("target", maintain_order=True).agg(pl.col("model_source").unique(maintain_order=True))
    return {row["target"]: row["model_source"] for row in groups.iter_rows(named=True)}
