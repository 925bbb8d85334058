"""Every figure of the report, by grammar (Vega-Lite): what to draw is said, nothing is drawn by hand."""

import multiprocessing
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import vl_convert

from finetune_study.report import pair as pair_module
from finetune_study.report.bars import recipes
from finetune_study.report.grammar import Figure
from finetune_study.report.maps import feasibility, very_large
from finetune_study.report.pair import Pair
from finetune_study.report.parts import parts, phases
from finetune_study.report.scaling import context, gpus, long_context
from finetune_study.report.tradeoff import pareto

PNG_SCALE = 2
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


def save(figures: Sequence[Figure], drawn: Sequence[str], folder: Path) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    write(figures, drawn, folder)


def write(figures: Sequence[Figure], drawn: Sequence[str], folder: Path) -> list[Path]:
    """Writes each figure as .svg and .png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    # A file of its own has no page to link into, and no page's colours.
    without_links = [re.sub(r"</?a\b[^>]*>", "", svg) for svg in drawn]
    files = []
    for figure, svg, png in zip(figures, without_links, _each(_png, without_links), strict=True):
        svg_file, png_file = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg_file.write_text(svg, encoding="utf-8")
        png_file.write_bytes(png)
        files += [svg_file, png_file]
    return files
