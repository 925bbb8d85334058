"""Every figure of the report, by grammar (Vega-Lite): what to draw is said, nothing is drawn by hand."""

import multiprocessing
import os
import re
import textwrap
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar
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

T = TypeVar("T")
U = TypeVar("U")
OF_A_PAIR = (feasibility, recipes, parts, phases, pareto, context, gpus, long_context)


def draw(all_pairs: list[Pair]) -> list[Figure]:
    """Every figure, in the order of the page."""
    return [*(figure for pair in pair_module.drawn(all_pairs) for figure in of_pair(pair)), *very_large(all_pairs)]


def of_pair(pair: Pair) -> list[Figure]:
    """Every figure of a target on some hardware."""
    return [figure for maker in OF_A_PAIR for figure in maker(pair)]


def svgs(figures: Sequence[Figure]) -> list[str]:
    """Each as SVG."""
    return _each(Figure.svg, figures)


def _each(convert: Callable[[T], U], given: Sequence[T]) -> list[U]:
    """The converter holds the interpreter's lock, so that threads would take turns."""
    if len(given) < WORTH_PROCESSES:
        return list(map(convert, given))
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores, multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(convert, given, chunksize=4))


def _png(svg: str) -> bytes:
    return bytes(vl_convert.svg_to_png(svg, scale=PNG_SCALE))


def save(figures: Sequence[Figure], drawn: Sequence[str], folder: Path, notice: str | None) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    write(figures, drawn, folder, notice)


def write(figures: Sequence[Figure], drawn: Sequence[str], folder: Path, notice: str | None) -> list[Path]:
    """Writes each figure as .svg and .png, with its title and below that the study's notice; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    alone = [_alone(svg, figure.title, notice) for figure, svg in zip(figures, drawn, strict=True)]
    files = []
    for figure, svg, png in zip(figures, alone, _each(_png, alone), strict=True):
        svg_file, png_file = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg_file.write_text(svg, encoding="utf-8")
        png_file.write_bytes(png)
        files += [svg_file, png_file]
    return files


def _alone(svg: str, title: str, notice: str | None) -> str:
    """A figure for a file of its own: no page to link into, and no caption around it, so that it has its title.

    It is put around what is drawn already, since a conversion with the title would take as long again.
    """
    inner = re.sub(r"^<\?xml[^>]*>\s*|</?a\b[^>]*>", "", svg)
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
        f'{inner.replace("<svg ", f"""<svg y="{top}" """, 1)}</svg>'
    )


def _lines(text: str, width: int, *, bold: bool, fill: str) -> list[tuple[str, str]]:
    """Lines of a text that are no wider than a figure, each with its style."""
    letter = WIDEST_LETTER * TITLE_SIZE
    style = f'fill="{fill}"' + (' font-weight="bold"' if bold else "")
    return [(line, style) for line in textwrap.wrap(text, max(20, int((width - 2 * MARGIN) / letter)))]
