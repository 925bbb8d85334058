"""The report: one page for a person who was not there, and every figure and table as a file of its own."""

from pathlib import Path
from typing import Any

import polars as pl

from finetune_study import changes, claims, recommend
from finetune_study.changes import Earlier
from finetune_study.config import Config
from finetune_study.paths import Results
from finetune_study.record import write_atomically
from finetune_study.report import costs, figures, page, summary, tables
from finetune_study.report import pair as pair_module
from finetune_study.report.pair import Pair
from finetune_study.table import Row


def build(config: Config, cells: pl.DataFrame, results: Results, options: str = "") -> None:
    """Writes report/index.html, report/summary.md, report/figures and report/tables.

    Args:
        config: the study.
        cells: one row per planned run (`cells.SCHEMA`).
        results: where the report goes.
        options: of the commands that the report shows (`Study.options`).
    """
    contents = gather(config, cells, options)
    drawn = figures.draw(contents.pairs)
    for stale in (*results.figures.glob("*.svg"), *results.figures.glob("*.png")):
        stale.unlink()
    with figures.converting(drawn, results.figures, config.report.notice) as svgs:
        save_tables(contents, results.tables)
        write_atomically(results.summary, summary.markdown(contents))
        write_atomically(results.report, page.render(contents, drawn, svgs))


def gather(config: Config, cells: pl.DataFrame, options: str = "") -> page.Contents:
    """Everything that the report says of a study; its figures are drawn from that."""
    comparisons, recommendations = recommend.of_cells(cells, config)
    rows = comparisons.to_dicts()
    defaults = recommend.defaults(recommendations)
    pairs = pair_module.pairs(config, rows, recommendations)
    return page.Contents(
        config=config,
        options=options,
        cells=cells,
        compared=comparisons,
        comparisons=rows,
        recommendations=recommendations,
        defaults=defaults,
        pairs=pairs,
        claims=claims.check(rows),
        walks=_walks(pairs, defaults),
        costs=costs.costs(config, defaults, recommendations, rows),
        earlier=_earlier(config, rows),
    )


def _walks(pairs: list[Pair], defaults: list[recommend.Default]) -> list[claims.Walk]:
    """The decision tree of each pair, in the setting that its default is chosen in."""
    settings = {(one.target, one.hardware): one.recommendation for one in defaults}
    at = [(pair, settings[pair.target, pair.hardware]) for pair in pairs]
    return [
        claims.walk(
            pair.rows, one.num_gpus, one.nodes, pair.limit, one.sequence_length, _named(pair, one.num_gpus, one.nodes)
        )
        for pair, one in at
    ]


def _named(pair: Pair, num_gpus: int, nodes: int) -> dict[int, tuple[str, str]]:
    """Recipe and micro-batch that are recommended on so many devices, by context."""
    there = [one for one in pair.recommendations if (one.num_gpus, one.nodes) == (num_gpus, nodes)]
    return {one.sequence_length: (one.best.recipe, one.best.micro_batch) for one in there if one.best}


def draw_pair(config: Config, cells: pl.DataFrame, target: str, hardware: str, folder: Path) -> list[Path]:
    """Writes the figures of a target on some hardware, of a study with too many pairs to draw them all.

    Args:
        config: the study.
        cells: one row per planned run (`cells.SCHEMA`).
        target: of the study.
        hardware: of the study.
        folder: where to.

    Returns:
        The files.

    Raises:
        StudyError: when the study has no such pair.
    """
    comparisons, recommendations = recommend.of_cells(cells, config)
    every = {
        (pair.target, pair.hardware): pair
        for pair in pair_module.pairs(config, comparisons.to_dicts(), recommendations)
    }
    if (target, hardware) not in every:
        raise recommend.no_such_pair(target, hardware, every)
    drawn = figures.of_pair(every[target, hardware])
    with figures.converting(drawn, folder, config.report.notice) as svgs:
        list(svgs)
    return figures.files_of(drawn, folder)


def _earlier(config: Config, rows: list[Row]) -> Earlier | None:
    path = config.report.earlier_outcomes
    return None if path is None else changes.compare(rows, changes.read(Path(path).expanduser()), path)


def save_tables(contents: page.Contents, folder: Path) -> None:
    """Writes every table of the page whole, as CSV; one that has no rows has no file."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("*.csv"):
        stale.unlink()
    written: dict[str, pl.DataFrame | list[dict[str, Any]]] = {
        "runs": contents.cells,
        "comparisons": contents.compared,
        "recommendations": [
            one.model_dump(mode="json", exclude={"evidence", "versus"}) for one in contents.recommendations
        ],
        "costs": contents.costs,
        "claims": [
            {"claim": claim.name, "answer": claim.answer, "where": one.where, "what": one.what, "for": one.speaks_for}
            for claim in contents.claims
            for one in claim.comparisons
        ],
        "changes": contents.earlier.changed if contents.earlier else [],
    }
    for name, rows in written.items():
        frame = rows if isinstance(rows, pl.DataFrame) else pl.DataFrame(rows, infer_schema_length=None)
        if frame.width:
            write_atomically(folder / f"{name}.csv", tables.flat(frame).write_csv())
