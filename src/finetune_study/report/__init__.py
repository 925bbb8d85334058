"""The report: one page for a person who was not there, and every figure and table as a file of its own."""

from finetune_study import recommend, table
from finetune_study.cells import cells
from finetune_study.config import Config
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun
from finetune_study.record import write_atomically
from finetune_study.report import figures, page, tables


def build(config: Config, planned: list[PlannedRun], results: Results) -> None:
    """Writes report/index.html, report/figures and report/tables from whatever records are there.

    Args:
        config: the study.
        planned: its runs.
        results: where their records lie, and where the report goes.
    """
    frame = cells(planned, results, config.hardware)
    comparisons = table.compare(frame, table.baseline_of(config))
    drawn = figures.draw(config, comparisons)
    figures.save(drawn, results.figures)
    folder = results.report.parent / "tables"
    write_atomically(folder / "runs.csv", tables.flat(frame).write_csv())
    write_atomically(folder / "comparisons.csv", tables.flat(comparisons).write_csv())
    html = page.render(config, frame, comparisons, recommend.recommend(comparisons), drawn)
    write_atomically(results.report, html)
