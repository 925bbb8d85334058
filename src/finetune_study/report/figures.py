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
from finetune_study.report.scaling import context, gpus, long_context
from finetune_study.report.tradeoff import pareto

PNG_SCALE = 2
OF_A_PAIR = (feasibility, recipes, pareto, context, gpus, long_context)


def draw(all_pairs: list[Pair]) -> list[Figure]:
    """Every figure, in the order of the page."""
    made = (maker(pair) for pair in pair_module.drawn(all_pairs) for maker in OF_A_PAIR)
    return [*(figure for figure in made if figure is not None), *very_large(all_pairs)]


def save(figures: Sequence[Figure], svgs: Sequence[str], folder: Path) -> None:
    """Writes each figure as .svg and .png, and removes those of an earlier study."""
    folder.mkdir(parents=True, exist_ok=True)
    for stale in (*folder.glob("*.svg"), *folder.glob("*.png")):
        stale.unlink()
    for figure, svg in zip(figures, svgs, strict=True):
        # A file of its own has no page to link into, and no page's colours.
        alone = re.sub(r"</?a\b[^>]*>", "", svg)
        (folder / f"{figure.name}.svg").write_text(alone, encoding="utf-8")
        (folder / f"{figure.name}.png").write_bytes(vl_convert.svg_to_png(alone, scale=PNG_SCALE))
