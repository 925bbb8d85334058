"""What others read of the report, held by golden files: figure specifications, summaries, recommendations.

A change on purpose: `RENEW_GOLDEN=1 python -m pytest tests/unit/test_golden_report.py`, and look at what is different.
"""

import json
import os
from pathlib import Path
from typing import Any

import altair
import pytest

from finetune_study import report
from finetune_study.forecast import CATEGORIES
from finetune_study.paths import Results
from finetune_study.record import Failure, Record
from finetune_study.report import figures, page, summary
from tests.unit import handmade

GOLDEN = Path(__file__).parent / "golden"
GPU = {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0, "price_usd_per_gpu_hour": 5.12}
RECIPES: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "zero2-lora": {"zero2": {}, "lora": {}}}

PRIOR = {
    "predicted_peak_memory_allocated_gib": 21.0,
    **{
        f"predicted_memory_{name}_gib": gib
        for name, gib in zip(CATEGORIES, (9, 4, 3, 2, 1.5, 1, 0.5, 0.4), strict=True)
    },
}


def contents(root: Path) -> page.Contents:
    """Two contexts, two numbers of GPUs, three recipes, three repeats; each kind of ending is there."""
    grid = {
        "targets": "tiny",
        "hardware": "a100",
        "num_gpus": [1, 2],
        "sequence_length": [256, 1024],
        "recipes": [*RECIPES],
    }
    protocol = {"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 3}
    config = handmade.study(
        hardware={"a100": GPU}, recipes=RECIPES, grid=[grid], protocol=protocol, training={"effective_batch_size": 2}
    )
    documents: list[Record | Failure] = []
    for planned in handmade.planned(config):
        run = planned.run
        if run.recipe == "full" and run.sequence_length == 1024:
            documents.append(handmade.out_of_memory(run))
        elif run.recipe == "zero2-lora" and run.num_gpus == 1:
            if run.repeat == 1:
                documents.append(handmade.failure(run, cause="a lost node"))
        else:
            seconds = (
                {"full": 2.0, "lora": 1.0, "zero2-lora": 1.01}[run.recipe] * run.sequence_length / 256 / run.num_gpus
            )
            done = handmade.completed(run, seconds * (1 + 0.01 * run.repeat), host=f"node-{run.repeat}")
            allocated = {"full": 40, "lora": 20, "zero2-lora": 15}[run.recipe]
            phases = {
                "load": allocated - 5,
                "forward": allocated - 1,
                "backward": allocated,
                "optimizer": allocated - 3,
            }
            memory = {
                "peak_allocated_bytes": allocated * 2**30,
                "peak_reserved_bytes": (allocated + 2) * 2**30,
                "peak_allocated_bytes_by_phase": {phase: gib * 2**30 for phase, gib in phases.items()},
            }
            for rank in done.ranks:
                rank["memory"] = memory
            documents.append(done)
    for planned in handmade.planned(config):
        prior = Results(root).run(planned.run.run_id).prior
        prior.parent.mkdir(parents=True)
        prior.write_text(json.dumps(PRIOR))
    return report.gather(config, handmade.frame(config, root, *documents))


def same(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get("RENEW_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8"), f"{path} differs; if on purpose: RENEW_GOLDEN=1, and look at it"


@pytest.fixture(scope="module")
def gathered(tmp_path_factory: pytest.TempPathFactory) -> page.Contents:
    return contents(tmp_path_factory.mktemp("golden"))


@pytest.fixture(scope="module")
def large_and_long(tmp_path_factory: pytest.TempPathFactory) -> page.Contents:
    """Two models, with and without FlashAttention: the larger one needs it at the longer context."""
    recipes: dict[str, Any] = {"lora": {"bf16": {}, "lora": {}}}
    recipes["lora-flash"] = recipes["lora"] | {"flash_attention_2": {}}
    models = {"small": handmade.LLAMA, "large": handmade.LLAMA}
    grid = {"targets": [*models], "hardware": "a100", "sequence_length": [256, 1024], "recipes": [*recipes]}
    config = handmade.study(models=models, hardware={"a100": GPU}, recipes=recipes, grid=[grid])
    documents: list[Record | Failure] = []
    for run in (planned.run for planned in handmade.planned(config)):
        seconds = {"lora": 2.0, "lora-flash": 1.0}[run.recipe] * (run.sequence_length / 256) ** (
            2 - ("flash" in run.recipe)
        )
        fits = run.target == "small" or "flash" in run.recipe or run.sequence_length == 256
        documents.append(handmade.completed(run, seconds) if fits else handmade.out_of_memory(run))
    root = tmp_path_factory.mktemp("golden")
    return report.gather(config, handmade.frame(config, root, *documents))


@pytest.mark.parametrize("kind", ["flash", "models"])
def test_the_specification_of_a_figure_of_large_models_and_long_contexts(
    large_and_long: page.Contents, kind: str
) -> None:
    figure = next(figure for figure in figures.draw(large_and_long.pairs) if figure.kind == kind)
    same(f"{kind}.vl.json", json.dumps(figure.spec, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


@pytest.mark.parametrize("kind", ["feasibility", "recipes", "parts", "phases", "pareto", "context", "gpus"])
def test_the_specification_of_a_figure(gathered: page.Contents, kind: str) -> None:
    (figure,) = (figure for figure in figures.draw(gathered.pairs) if figure.kind == kind)
    same(f"{kind}.vl.json", json.dumps(figure.spec, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


def test_every_specification_is_valid_vega_lite(gathered: page.Contents) -> None:
    """By the schema that Altair carries; the converter itself is silent about a key that it does not know."""
    assert {figure.kind for figure in figures.draw(gathered.pairs)} >= {
        "feasibility",
        "recipes",
        "pareto",
        "context",
        "gpus",
    }
    for figure in figures.draw(gathered.pairs):
        altair.Chart.from_dict(figure.spec)
    with pytest.raises(Exception, match="colour"):
        altair.Chart.from_dict(figures.draw(gathered.pairs)[0].spec | {"colour": "red"})


def test_the_summary_to_paste(gathered: page.Contents) -> None:
    same("summary.md", summary.markdown(gathered))


def test_the_summary_of_the_terminal(gathered: page.Contents) -> None:
    same("summary.txt", summary.terminal(gathered, 160))


def test_the_table_of_recommendations(gathered: page.Contents, tmp_path: Path) -> None:
    report.save_tables(gathered, Results(tmp_path).tables)
    same("recommendations.csv", (Results(tmp_path).tables / "recommendations.csv").read_text())
