"""Which recipe, where, and how sure that is; a tie is called a tie."""

import json
from collections import Counter
from typing import Any, Literal

import polars as pl

from finetune_study import table
from finetune_study.cells import FAILED, NOT_RUN, complete
from finetune_study.config import Config
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun
from finetune_study.record import write_atomically
from finetune_study.section import Section
from finetune_study.table import show

FORMAT = 1
"""Version of recommendations.json."""
MIN_REPEATS = 3
"""Completed runs that each compared recipe needs before one is ranked above another."""

Verdict = Literal["ranked", "tie", "too_few_data", "only_one_fits", "not_comparable", "nothing_fits", "no_data"]
VERDICTS: dict[Verdict, str] = {
    "ranked": "Fastest by more than the spread of the repeats.",
    "tie": "Fastest by median, but its spread over repeats overlaps with another recipe's.",
    "too_few_data": f"Fastest so far; a ranking needs {MIN_REPEATS} completed runs of each recipe.",
    "only_one_fits": "All other recipes were tried and did not complete.",
    "not_comparable": "Runs with different software, weights or data are not compared; measure them again.",
    "nothing_fits": "Every recipe was tried and none completed.",
    "no_data": "No recipe has completed, and some have no outcome yet.",
}
"""Each verdict and what it means."""

_PENDING = {FAILED, NOT_RUN}


class Evidence(Section):
    """A recipe in one setting, at its fastest micro-batch that fits; numbers are over completed repeats."""

    recipe: str
    per_device_train_batch_size: int
    states: list[str]
    num_completed: int
    step_time_seconds_median: float | None
    step_time_seconds_min: float | None
    step_time_seconds_max: float | None
    peak_memory_column: str | None
    peak_memory_gib_median: float | None
    provenance: list[str]

    @property
    def fits(self) -> bool:
        """Every repeat that ended has completed; one out-of-memory among completed repeats is not a fit."""
        return self.num_completed > 0 and {*self.states} <= {"completed", *_PENDING}

    @property
    def pending(self) -> bool:
        """No answer yet: a repeat without an outcome might still tell."""
        return not self.fits and bool({*self.states} & _PENDING)


class Recommendation(Section):
    """The fastest recipe that fits in one setting, and what that rests on."""

    target: str
    hardware: str
    num_gpus: int
    nodes: int
    sequence_length: int
    verdict: Verdict
    recipe: str | None
    """The fastest by median; null where none can be named."""
    per_device_train_batch_size: int | None
    tied_with: list[str]
    reason: str
    evidence: list[Evidence]


def recommend(comparisons: pl.DataFrame) -> list[Recommendation]:
    """One recommendation per setting, in the order of the comparisons (`table.SCHEMA`)."""
    return [_setting(group.to_dicts()) for _, group in comparisons.group_by(table.SETTING, maintain_order=True)]


def aggregate(config: Config, planned: list[PlannedRun], results: Results) -> None:
    """Writes comparisons.parquet and recommendations.json from outcomes.parquet."""
    cells = complete(pl.read_parquet(results.outcomes_parquet), planned, results)
    comparisons = table.compare(cells, table.baseline_of(config))
    comparisons.write_parquet(results.comparisons)
    document = {"format": FORMAT, "min_repeats": MIN_REPEATS, "recommendations": _dump(recommend(comparisons))}
    write_atomically(results.recommendations, json.dumps(document, indent=1, ensure_ascii=False) + "\n")


def _dump(recommendations: list[Recommendation]) -> list[dict[str, Any]]:
    return [recommendation.model_dump(mode="json") for recommendation in recommendations]


def _setting(rows: list[dict[str, Any]]) -> Recommendation:
    by_recipe: dict[str, list[Evidence]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(Evidence(**{name: row[name] for name in Evidence.model_fields}))
    evidence = [min(options, key=_preference) for options in by_recipe.values()]
    verdict, named, reason = _judge(evidence)
    return Recommendation(
        **{name: rows[0][name] for name in table.SETTING},
        verdict=verdict,
        recipe=named[0].recipe if named else None,
        per_device_train_batch_size=named[0].per_device_train_batch_size if named else None,
        tied_with=[other.recipe for other in named[1:]],
        reason=reason,
        evidence=evidence,
    )


def _preference(option: Evidence) -> tuple[int, float]:
    """Among micro-batches: the fastest that fits, else one that is still open, else the smallest."""
    if option.fits and option.step_time_seconds_median is not None:
        return 0, option.step_time_seconds_median
    return (1 if option.fits else 2 if option.pending else 3), option.per_device_train_batch_size


def _judge(evidence: list[Evidence]) -> tuple[Verdict, list[Evidence], str]:
    """Verdict, the recipe it names followed by those tied with it, and the reason in a sentence."""
    fitting = [one for one in evidence if one.fits]
    others = [one for one in evidence if not one.fits]
    pending = [one for one in others if one.pending]
    beside = f" Not compared: {_endings(others)}." if others else ""
    if not fitting:
        if pending:
            return "no_data", [], f"Nothing completed yet: {_endings(others)}."
        return "nothing_fits", [], f"Nothing fits: {_endings(others)}."
    if len({digest for one in fitting for digest in one.provenance}) > 1:
        names = ", ".join(one.recipe for one in fitting)
        return "not_comparable", [], f"{names} completed, but not all with the same software, weights and data.{beside}"
    best, *rivals = sorted(fitting, key=lambda one: one.step_time_seconds_median or float("inf"))
    if not rivals:
        if pending or not others:
            missing = "no other recipe completed yet" if pending else "no other recipe is planned here"
            return "too_few_data", [best], f"{_timing(best)}; {missing}.{beside}"
        return "only_one_fits", [best], f"{_timing(best)} is the only one that fits.{beside}"
    numbers = "; ".join(_timing(one) for one in (best, *rivals))
    if min(one.num_completed for one in fitting) < MIN_REPEATS:
        return "too_few_data", [best], f"{numbers}. A ranking needs {MIN_REPEATS} runs of each.{beside}"
    slowest = best.step_time_seconds_max or 0.0
    tied = [one for one in rivals if (one.step_time_seconds_min or 0.0) <= slowest]
    if tied:
        return "tie", [best, *tied], f"{numbers}. The spreads over repeats overlap.{beside}"
    return "ranked", [best], f"{numbers}. The spreads over repeats do not overlap.{beside}"


def _timing(one: Evidence) -> str:
    runs = "1 run" if one.num_completed == 1 else f"{one.num_completed} runs"
    spread = ""
    if one.num_completed > 1:
        spread = f", {show(one.step_time_seconds_min)} to {show(one.step_time_seconds_max)}"
    return f"{one.recipe} {show(one.step_time_seconds_median, 's')} a step ({runs}{spread})"


def _endings(group: list[Evidence]) -> str:
    return ", ".join(f"{one.recipe} ({count_states(one.states)})" for one in group)


def count_states(states: list[str]) -> str:
    """States of repeats in words, for example `2 completed, 1 device_oom`; a single one by its name."""
    counts = Counter(states)
    return next(iter(counts)) if len(states) == 1 else ", ".join(f"{n} {state}" for state, n in counts.items())
