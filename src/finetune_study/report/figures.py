"""Every figure of the report, by grammar (Vega-Lite): what to draw is said, nothing is drawn by hand."""

import re
from collections.abc import Sequence
from pathlib import Path

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
OF_A_PAIR = (feasibility, recipes, parts, phases, pareto, context, gpus, long_context)


def draw(all_pairs: list[Pair]) -> list[Figure]:
    """Every figure, in the order of the page."""
    return [*(figure for pair in pair_module.drawn(all_pairs) for figure in of_pair(pair)), *very_large(all_pairs)]


def of_pair(pair: Pair) -> list[Figure]:
    """Every figure of a target on some hardware."""
    return [figure for maker in OF_A_PAIR if (figure := maker(pair)) is not None]


def save(figures: Sequence[Figure], svgs: Sequence[str], folder: Path) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    write(figures, svgs, folder)


def write(figures: Sequence[Figure], svgs: Sequence[str], folder: Path) -> list[Path]:
    """Writes each figure as .svg and .png; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for figure, svg in zip(figures, svgs, strict=True):
        # A file of its own has no page to link into, and no page's colours.
        alone = re.sub(r"</?a\b[^>]*>", "", svg)
        svg_file, png_file = folder / f"{figure.name}.svg", folder / f"{figure.name}.png"
        svg_file.write_text(alone, encoding="utf-8")
        png_file.write_bytes(vl_convert.svg_to_png(alone, scale=PNG_SCALE))
        files += [svg_file, png_file]
    return files
