"""Every figure of the report, by grammar (Vega-Lite): what to draw is said, nothing is drawn by hand."""

import multiprocessing
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from xml.sax.saxutils import escape

import vl_convert

from finetune_study.report import pair as pair_module
from finetune_study.report.bars import recipes
from finetune_study.report.grammar import FONT, INK, MEMORY, PAPER, Figure, size_of
from finetune_study.report.maps import feasibility, very_large
from finetune_study.report.pair import Pair
from finetune_study.report.parts import parts, phases
from finetune_study.report.scaling import context, gpus, long_context
from finetune_study.report.tradeoff import pareto

PNG_SCALE = 2
WIDEST_LETTER = 0.65
"""Mean width of a letter over the size of its font in DejaVu Sans Bold, the widest of `FONT`: no title is cut."""
TITLE_SIZE, LINE_HEIGHT, MARGIN = 13, 18, 6
"""Of the title of a file: its font, a line of it, and what is left free beside it, pixels."""
WORTH_PROCESSES = 40
"""So many figures take longer to convert, a third of a second each, than other processes take to start."""

OF_A_PAIR = (feasibility, recipes, parts, phases, pareto, context, gpus, long_context)


def draw(all_pairs: list[Pair]) -> list[Figure]:
    """Every figure, in the order of the page."""
    return [*(figure for pair in pair_module.drawn(all_pairs) for figure in of_pair(pair)), *very_large(all_pairs)]


def of_pair(pair: Pair) -> list[Figure]:
    """Every figure of a target on some hardware."""
    return [figure for maker in OF_A_PAIR for figure in maker(pair)]


@contextmanager
def converting(figures: Sequence[Figure], folder: Path, notice: str | None) -> Iterator[Iterator[str]]:
    """Files of figures, .svg and .png, and the SVG of each for the page in turn, when all of them were taken.

    Many are at work in other processes from the start, since the converter holds the interpreter's lock; those files
    and texts are there at the end of the block at the latest.

    Args:
        figures: in the order of the page.
        folder: of the files.
        notice: of the study; it stands below each title.
    """
    folder.mkdir(parents=True, exist_ok=True)
    convert = partial(_convert, folder=folder, notice=notice)
    if len(figures) < WORTH_PROCESSES:
        yield map(convert, figures)
        return
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        yield pool.map(convert, figures, chunksize=4)


def files_of(figures: Sequence[Figure], folder: Path) -> list[Path]:
    """Where `converting` writes them."""
    return [folder / f"{figure.name}{suffix}" for figure in figures for suffix in (".svg", ".png")]


def _convert(figure: Figure, folder: Path, notice: str | None) -> str:
    svg = figure.svg()
    alone = _alone(svg, figure.title, notice)
    svg_file, png_file = files_of([figure], folder)
    svg_file.write_text(alone, encoding="utf-8")
    png_file.write_bytes(vl_convert.svg_to_png(alone, scale=PNG_SCALE))
    return svg


def _alone(svg: str, title: str, notice: str | None) -> str:
    """A figure for a file of its own: no page to link into, and no caption around it, so that it has its title.

    It is put around what is drawn already, since a conversion with the title would take as long again; as a group: an
    <svg> within another makes the PNG take twice as long.
    """
    marks = re.sub(r"^.*?<svg\b[^>]*>|</?a\b[^>]*>|</svg>\s*$", "", svg, flags=re.DOTALL)
    width, height = size_of(svg)
    lines = _lines(title, width, bold=True, fill=INK) + _lines(notice or "", width, bold=False, fill=MEMORY)
    top = LINE_HEIGHT * len(lines) + LINE_HEIGHT // 2
    texts = "".join(
        f'<text x="{MARGIN}" y="{LINE_HEIGHT * number}" {style}>{escape(line)}</text>'
        for number, (line, style) in enumerate(lines, start=1)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height + top}" '
        f'viewBox="0 0 {width} {height + top}"><rect width="100%" height="100%" fill="{PAPER}"/>'
        f'<g font-family="{FONT}" font-size="{TITLE_SIZE}">{texts}</g>'
        f'<g transform="translate(0,{top})">{marks}</g></svg>'
    )


def _lines(text: str, width: int, *, bold: bool, fill: str) -> list[tuple[str, str]]:
    """Lines of a text that are no wider than a figure, each with its style."""
    letter = WIDEST_LETTER * TITLE_SIZE
    style = f'fill="{fill}"' + (' font-weight="bold"' if bold else "")
    return [(line, style) for line in textwrap.wrap(text, max(20, int((width - 2 * MARGIN) / letter)))]
