"""The answer as text: Markdown to paste into an issue or a chat, and a summary for a terminal."""

import io
from collections.abc import Mapping

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from finetune_study.outcome import error_percent
from finetune_study.recommend import Default
from finetune_study.report import tables
from finetune_study.report.answer import QUESTION, answer
from finetune_study.report.page import Contents
from finetune_study.report.tables import PREDICTED
from finetune_study.table import Row, devices, show

MAX_DEFAULTS = 40
"""Rows of the table; more would not fit a chat."""
_HEADINGS = (
    "model and hardware", "default", "verdict", "step time", PREDICTED, "peak memory", PREDICTED, "GPU-hours an epoch",
    "US dollars",
)  # fmt: skip


def markdown(contents: Contents) -> str:
    """results/report/summary.md."""
    config = contents.config
    lines = [f"## {_plain(config.report.title)}", ""]
    lines += [f"**{_plain(config.report.notice)}**", ""] if config.report.notice else []
    lines += [f"*{QUESTION}*", ""]
    for text, support in answer(contents.recommendations, contents.defaults):
        lines += [f"- **{_plain(text)}**", *([f"  {_plain(support)}"] if support else [])]
    lines += ["", f"{tables.headline(contents.cells)}.", ""]
    if contents.defaults:
        headings, *rows = _table(contents)
        lines += [f"| {' | '.join(headings)} |", f"|{'---|' * len(headings)}"]
        lines += [f"| {' | '.join(map(_plain, row))} |" for row in rows]
        rest = len(contents.defaults) - MAX_DEFAULTS
        lines += [f"\nand {rest} more in tables/recommendations.csv"] if rest > 0 else []
        lines.append("")
    errors = tables.errors_in_words(contents.cells)
    lines += [errors, ""] if errors else []
    decided = [claim for claim in contents.claims if claim.deciding]
    if decided:
        lines += ["Claims of the literature:", ""]
        lines += [f"- **{c.answer}** ({c.tally}): {c.statement}" for c in decided]
        lines.append("")
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Text of a user in Markdown: shown, not taken for markup."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")


def _table(contents: Contents) -> list[list[str]]:
    """The defaults, heading first."""
    compared = {tuple(row["run_ids"]): row for row in contents.comparisons}
    return tables.predicted_if_any([_HEADINGS, *(_cells(one, compared) for one in contents.defaults[:MAX_DEFAULTS])])


def _cells(one: Default, compared: Mapping[tuple[str, ...], Row]) -> list[str]:
    at, best = one.recommendation, one.recommendation.best
    place = f"{one.target} on {devices(one.hardware, at.num_gpus, at.nodes)}, context {at.sequence_length}"
    verdict = at.tie_in_words or at.verdict.replace("_", " ")
    if best is None:
        return [place, "none", verdict, *[""] * (len(_HEADINGS) - 3)]
    hours = best.epoch_hours_median
    row = compared[tuple(best.run_ids)]
    return [
        place,
        best.recipe
        + (f", micro-batch {best.per_device_train_batch_size}" if (best.per_device_train_batch_size or 1) > 1 else ""),
        verdict,
        show(best.step_time_seconds_median, "s"),
        _predicted(row["predicted_step_time_seconds"], best.step_time_seconds_median),
        show(best.peak_memory_gib_median, "GiB"),
        _predicted(best.predicted_peak_memory_gib, best.peak_memory_gib_median),
        show(None if hours is None else hours * at.num_gpus),
        show(best.cost_usd_per_epoch_median),
    ]


def _predicted(value: float | None, measured: float | None) -> str:
    return tables.predicted(value, error_percent(value, measured))


def terminal(contents: Contents, width: int = 120, *, colour: bool = False) -> str:
    """What `finetune-study summary` prints below the table of runs: the answer, and the defaults.

    Args:
        contents: of the report.
        width: columns of the terminal.
        colour: write escape sequences.
    """
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=colour or None, no_color=not colour, highlight=False)
    if contents.config.report.notice:
        console.print(Text(contents.config.report.notice, style="bold red"))
    for text, support in answer(contents.recommendations, contents.defaults):
        console.print(Text(text, style="bold"))
        if support:
            console.print(Padding(Text(support), (0, 0, 0, 2)))
    if contents.defaults:
        headings, *rows = _table(contents)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for number, title in enumerate(headings):
            table.add_column(title, justify="right" if number > 2 else "left", overflow="fold")
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    if errors := tables.errors_in_words(contents.cells):
        console.print(Text(errors))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()).strip("\n") + "\n"
