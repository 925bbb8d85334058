"""Which recipe, where, and how sure that is; a tie is called a tie."""

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import polars as pl

from finetune_study import table
from finetune_study.cells import FAILED, of_outcomes
from finetune_study.claims import LITTLE
from finetune_study.config import Config
from finetune_study.errors import StudyError
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun
from finetune_study.ratio import Repeat, ratio, student
from finetune_study.record import write_atomically
from finetune_study.section import Section
from finetune_study.states import OPEN, ended_without, in_words
from finetune_study.table import show, show_ratio

FORMAT = 6
"""Version of recommendations.json."""
MIN_REPEATS = 3
"""Completed runs that each compared recipe needs before one is ranked above another."""
PLAIN = frozenset({"ddp", "eager"})
"""Techniques that save nothing: naming them is no advice."""
MAX_NAMES = 8
"""Recipes that a sentence names; a table has all of them."""
MIN_NODES = 2
"""Nodes that the runs of two compared recipes must come from: nodes of one kind differ, often by several per cent."""

Lack = Literal["repeats", "nodes", "starts", "order"]
"""Runs of each recipe, nodes that tell recipes and nodes apart, when runs started, runs in random order."""
Verdict = Literal[
    "ranked", "tie", "too_few_data", "only_one_fits", "contradictory", "not_comparable", "nothing_fits", "no_data"
]
VERDICTS: dict[Verdict, str] = {
    "ranked": "Fastest: the interval of its step time's ratio to every other recipe's leaves out 1.",
    "tie": "For at least one other recipe the interval of the step time's ratio to the fastest's holds 1. Of those at "
    f"most {LITTLE:.0%} slower by median, and shown to be slower than none of the tie, the one is named that fits in "
    "more settings of the model on this hardware than the others, of the settings in which each of them has an "
    "outcome; then the one that is the fastest or as fast in more of those, so that the recipe changes with the "
    f"setting no more than it must; of what is left the fastest, unless one takes at least {LITTLE:.0%} less peak "
    "memory. Another one is tied with it where the interval of their ratio holds 1 and differences of at most "
    f"{LITTLE:.0%} alone; where it is wider, the two are not told apart yet.",
    "too_few_data": f"Fastest so far; a ranking needs {MIN_REPEATS} completed runs of each recipe, in random order, "
    f"over at least {MIN_NODES} nodes, so that the ratio has an interval; to be the only one that fits takes "
    f"{MIN_REPEATS} completed runs, too, and no other one that merely ran out of time.",
    "only_one_fits": f"It completed {MIN_REPEATS} times or more; every other recipe did not fit, at least once, and "
    "never completed.",
    "contradictory": "At most one recipe fits, and repeats of another contradict each other: some completed, some did "
    "not.",
    "not_comparable": "Runs with different software, devices, weights, data or effective batch are not compared; "
    "measure them again.",
    "nothing_fits": "Every recipe has an outcome, and none completed.",
    "no_data": "No recipe is known to fit, and some have no outcome yet, or ran out of time, which proves nothing.",
}
"""Each verdict and what it means."""


class Evidence(Section):
    """A recipe in one setting, at its fastest micro-batch that fits; numbers are over completed repeats."""

    recipe: str
    micro_batch: str
    """As the config asks for it: a number, or `max`."""
    per_device_train_batch_size: int | None
    """Null where the largest that fits is not known."""
    states: list[str]
    run_ids: list[str]
    num_completed: int
    step_time_seconds_median: float | None
    step_time_seconds_min: float | None
    step_time_seconds_max: float | None
    peak_memory_column: str | None
    peak_memory_gib_median: float | None
    predicted_peak_memory_gib: float | None
    oom_requested_gib: float | None
    """Size of the allocation that failed, where a repeat ran out of memory."""
    oom_held_gib: float | None
    tokens_per_second_per_gpu_median: float | None
    real_tokens_per_second_median: float | None
    """Without padding, of all devices."""
    epoch_hours_median: float | None
    cost_usd_per_epoch_median: float | None
    provenance: list[str]
    techniques: str | None
    nodes_of_repeats: list[str]
    starts_of_repeats: list[str | None]
    step_time_seconds_repeats: list[float]

    @property
    def fits(self) -> bool:
        """Every repeat that ended has completed; one out-of-memory among completed repeats is not a fit."""
        return self.num_completed > 0 and not self.ended_without

    @property
    def ended_without(self) -> list[str]:
        """run_ids of the repeats that ended and did not complete; where there is one, it can't fit any more."""
        return [i for i, state in zip(self.run_ids, self.states, strict=True) if ended_without([state])]

    @property
    def contradictory(self) -> bool:
        """Some repeats completed, some ended without."""
        return self.num_completed > 0 and bool(self.ended_without)

    @property
    def pending(self) -> bool:
        """No answer yet: no repeat has an outcome."""
        return {*self.states} <= OPEN

    @property
    def timed_out(self) -> bool:
        """Nothing but its time ran out: with more of it the recipe may fit."""
        return self.num_completed == 0 and {*ended_without(self.states)} == {"timeout"}

    @property
    def missing(self) -> list[str]:
        """run_ids of the repeats that are planned and have no outcome."""
        return [run_id for run_id, state in zip(self.run_ids, self.states, strict=True) if state in OPEN]

    @property
    def repeats(self) -> list[Repeat]:
        pairs = zip(self.nodes_of_repeats, self.step_time_seconds_repeats, strict=True)
        return [Repeat(node, seconds) for node, seconds in pairs]


class Versus(Section):
    """A recipe, in a recommendation the fastest, against another one."""

    recipe: str
    """The other one."""
    ratio: float
    """Step time of the other one over the recipe's."""
    low: float | None
    """Lower bound of the interval of 95 %; null where nodes and recipes can't be told apart."""
    high: float | None
    freedom: int
    """Degrees of freedom of the interval; 0 without one."""
    num_nodes: int
    differs: bool
    """The interval leaves out 1."""
    lacks: Lack | None
    """What a ranking of these two lacks."""
    too_few: str | None
    """The same in words."""

    @property
    def is_faster(self) -> bool:
        return self.differs and self.ratio < 1

    @property
    def is_slower(self) -> bool:
        return self.differs and self.ratio > 1

    @property
    def alike(self) -> bool:
        """A tie that rests on data: the interval holds 1 and little differences alone. Else it is too wide to say."""
        little = 1 + LITTLE
        return self.low is not None and self.high is not None and 1 / little <= self.low <= 1 <= self.high <= little

    @property
    def numbers(self) -> str:
        ratio, low, high = show_ratio(self.ratio, self.low, self.high)
        return f"{self.recipe} × {ratio}, {low} to {high}"


class OfPair(Section):
    """What is said of a target on some hardware."""

    target: str
    hardware: str

    @property
    def pair(self) -> tuple[str, str]:
        return self.target, self.hardware


class Recommendation(OfPair):
    """The fastest recipe that fits in one setting, and what that rests on."""

    num_gpus: int
    nodes: int
    sequence_length: int
    verdict: Verdict
    recipe: str | None
    """The fastest, in a tie one nearly as fast (`VERDICTS`); null where none can be named."""
    per_device_train_batch_size: int | None
    fastest: str | None
    """The fastest by median, or what is shown to be faster than that: what `versus` compares the others with."""
    tied_with: list[str]
    """The others of a tie, those that the named one is shown to be faster than left out; the fastest first."""
    not_told_apart: list[str]
    """Of those tied, the ones of which the repeats scatter too much to tell whether the named one is as fast."""
    reason: str
    settled_by: list[str]
    """What would settle an open question: run_ids of planned runs first, then what to add."""
    versus: list[Versus]
    evidence: list[Evidence]

    def evidence_of(self, recipe: str | None) -> Evidence | None:
        return next((one for one in self.evidence if one.recipe == recipe), None)

    @property
    def alike(self) -> list[str]:
        """Of those tied, the ones that are as fast as the named one, or nearly so."""
        return [name for name in self.tied_with if name not in self.not_told_apart]

    @property
    def as_fast(self) -> set[str]:
        """The fastest recipe, and those as fast; empty where none can be named."""
        return {self.fastest, *(one.recipe for one in self.versus if one.alike)} if self.fastest else set()

    @property
    def tie_in_words(self) -> str:
        """The others of a tie; empty where there is none."""
        same = f"a tie with {', '.join(self.alike)}" if self.alike else ""
        apart = f"not told apart from {', '.join(self.not_told_apart)} yet" if self.not_told_apart else ""
        return "; ".join(filter(None, (same, apart)))

    @property
    def best(self) -> Evidence | None:
        """The evidence of the recipe that is named."""
        return self.evidence_of(self.recipe)


class Elsewhere(Section):
    """A setting in which the default recipe does not fit, and what does."""

    num_gpus: int
    nodes: int
    sequence_length: int
    ended: list[str]
    """How the default's repeats ended there."""
    verdict: Verdict
    recipe: str | None
    """What to use instead; null where nothing is known to fit."""
    added: list[str]
    """Its techniques that the default lacks."""
    left_out: list[str]
    """The default's techniques that it lacks."""
    step_time_seconds_median: float | None
    peak_memory_gib_median: float | None
    cost_usd_per_epoch_median: float | None
    epoch_hours_median: float | None
    settled_by: list[str]


class Default(OfPair):
    """The default recipe of a target on some hardware: the fastest that fits on most GPUs at the shortest context."""

    recommendation: Recommendation
    """In the setting that the default is chosen in."""
    fits_in: int
    """Settings in which the default fits."""
    fastest_in: int
    """Settings in which it is the fastest, or as fast."""
    of: int
    """Settings of this target on this hardware."""
    elsewhere: list[Elsewhere]
    """Settings where it was tried and does not fit."""


def recommend(comparisons: pl.DataFrame, given_up: Mapping[str, int] | None = None) -> list[Recommendation]:
    """One recommendation per setting, in the order of the comparisons.

    Args:
        comparisons: configurations (`table.SCHEMA`).
        given_up: runs that no call tries again, and how often each was tried; default: none.
    """
    needed = comparisons.select(*table.SETTING, *Evidence.model_fields)
    groups = needed.group_by(table.SETTING, maintain_order=True)
    found = [_setting(group.to_dicts(), given_up or {}) for _, group in groups]
    pairs = by_pair(found)
    standings = {
        pair: [_Standing.of(one) for one in group]
        for pair, group in pairs.items()
        if any(one.verdict == "tie" for one in group)
    }
    return [_named(one, standings[one.pair]) if one.verdict == "tie" else one for one in found]


def by_pair(recommendations: Iterable[Recommendation]) -> dict[tuple[str, str], list[Recommendation]]:
    """The settings of each target on each hardware."""
    groups: dict[tuple[str, str], list[Recommendation]] = {}
    for one in recommendations:
        groups.setdefault(one.pair, []).append(one)
    return groups


def of_cells(cells: pl.DataFrame, config: Config) -> tuple[pl.DataFrame, list[Recommendation]]:
    """A study's configurations (`table.SCHEMA`), and a recommendation for each of its settings.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
        config: of the study.
    """
    comparisons = table.compare(cells, table.baseline_of(config))
    failed = cells.filter(pl.col("state") == FAILED).select("run_id", "attempts").drop_nulls()
    given_up = {run_id: attempts for run_id, attempts in failed.iter_rows() if config.protocol.gives_up(attempts)}
    return comparisons, recommend(comparisons, given_up)


def aggregate(config: Config, planned: list[PlannedRun], results: Results) -> None:
    """Writes comparisons.parquet and recommendations.json from outcomes.parquet."""
    cells = of_outcomes(planned, results)
    comparisons, recommendations = of_cells(cells, config)
    comparisons.write_parquet(results.comparisons)
    facts = {"format": FORMAT, "min_repeats": MIN_REPEATS, "min_nodes": MIN_NODES}
    members = [f'"{name}": {json.dumps(value)}' for name, value in facts.items()]
    members += [f'"defaults": {_lines(defaults(recommendations))}', f'"recommendations": {_lines(recommendations)}']
    write_atomically(results.recommendations, "{\n" + ",\n".join(members) + "\n}\n")


def _lines(sections: Iterable[Section]) -> str:
    """A JSON array with an element in each line: an indented one takes six times as long to write."""
    lines = [json.dumps(one.model_dump(mode="json"), ensure_ascii=False) for one in sections]
    return "[\n" + ",\n".join(lines) + "\n]"


def defaults(recommendations: list[Recommendation]) -> list[Default]:
    """The default of every target on every hardware, in the order of the recommendations."""
    return [_default(group) for group in by_pair(recommendations).values()]


def no_such_pair(target: str, hardware: str, pairs: Iterable[tuple[str, str]]) -> StudyError:
    """What to raise where a study has no such target on such hardware, but these."""
    return StudyError(
        "The study has no such target on such hardware",
        given=f"{target} on {hardware}",
        allowed="; ".join(f"{name} on {kind}" for name, kind in pairs) or "nothing: its grid is empty",
    )


def _default(group: list[Recommendation]) -> Default:
    # A default is asked for where there is most to choose from: all GPUs, on few nodes, a short context.
    chosen = min(group, key=lambda one: (one.recipe is None, -one.num_gpus, one.nodes, one.sequence_length))
    there = [(one, one.evidence_of(chosen.recipe)) for one in group]
    return Default(
        target=chosen.target,
        hardware=chosen.hardware,
        recommendation=chosen,
        fits_in=sum(found is not None and found.fits for _, found in there),
        fastest_in=sum(chosen.recipe in one.as_fast for one in group),
        of=len(group),
        elsewhere=[
            _elsewhere(chosen, one, found)
            for one, found in there
            if found and not (found.fits or found.pending or found.timed_out)
        ],
    )


def _elsewhere(default: Recommendation, here: Recommendation, found: Evidence) -> Elsewhere:
    own, other = _techniques(default.best), _techniques(here.best)
    best = here.best
    return Elsewhere(
        num_gpus=here.num_gpus,
        nodes=here.nodes,
        sequence_length=here.sequence_length,
        ended=found.states,
        verdict=here.verdict,
        recipe=here.recipe,
        added=[name for name in other if name not in own and name not in PLAIN],
        left_out=[name for name in own if name not in other and name not in PLAIN] if best else [],
        step_time_seconds_median=best.step_time_seconds_median if best else None,
        peak_memory_gib_median=best.peak_memory_gib_median if best else None,
        cost_usd_per_epoch_median=best.cost_usd_per_epoch_median if best else None,
        epoch_hours_median=best.epoch_hours_median if best else None,
        settled_by=here.settled_by,
    )


def _techniques(one: Evidence | None) -> list[str]:
    return one.techniques.split("+") if one and one.techniques else []


def _setting(rows: list[dict[str, Any]], given_up: Mapping[str, int]) -> Recommendation:
    by_recipe: dict[str, list[Evidence]] = {}
    for row in rows:
        by_recipe.setdefault(row["recipe"], []).append(Evidence(**{name: row[name] for name in Evidence.model_fields}))
    packed = _packed(by_recipe)
    told = [_chosen(by_recipe.pop(recipe)) for recipe in packed]
    evidence = [_chosen(options) for options in by_recipe.values()]
    mixed = [one for options in by_recipe.values() for one in options if one.fits]
    verdict, named, reason, versus = _judge(evidence, [] if _one_kind(mixed) else mixed)
    return Recommendation(
        **{name: rows[0][name] for name in table.SETTING},
        verdict=verdict,
        recipe=named[0].recipe if named else None,
        per_device_train_batch_size=named[0].per_device_train_batch_size if named else None,
        fastest=named[0].recipe if named else None,
        tied_with=[other.recipe for other in named[1:]],
        not_told_apart=[],
        reason=reason + _beside(told, named[0] if named else None),
        settled_by=_settled_by(verdict, evidence, versus, named[0].recipe if named else None, given_up),
        versus=versus,
        evidence=[*evidence, *told],
    )


def _packed(by_recipe: dict[str, list[Evidence]]) -> list[str]:
    """Recipes that pack examples where others pad them: a step holds more then, and its time says nothing."""
    packed = [
        name
        for name, options in by_recipe.items()
        if any("packing" in (one.techniques or "").split("+") for one in options)
    ]
    return packed if len(packed) < len(by_recipe) else []


def _beside(packed: list[Evidence], best: Evidence | None) -> str:
    """What packing is judged by, beside the recipe that is named."""
    if not packed:
        return ""
    ones = [one for one in (*packed, best) if one is not None and one.fits]
    rates = ", ".join(f"{one.recipe} {show(one.real_tokens_per_second_median)}" for one in ones)
    numbers = f": {rates} tokens a second that are not padding" if rates else f": {_endings(packed)}"
    return f" Not ranked by the step, since examples are packed{numbers}."


def _one_kind(group: list[Evidence]) -> bool:
    """Whether all had the same software, device, weights, data and effective batch."""
    return len({kind for one in group for kind in one.provenance}) <= 1


def _chosen(options: list[Evidence]) -> Evidence:
    """A recipe at one of its micro-batches; the times of two kinds are not compared: then the smallest that fits."""
    fitting = [one for one in options if one.fits]
    if not _one_kind(fitting):
        return min(fitting, key=lambda one: one.per_device_train_batch_size or 0)
    return min(options, key=_preference)


def _preference(option: Evidence) -> tuple[int, float]:
    """Among micro-batches: the fastest that fits, else one that is still open or unclear, else the smallest."""
    if option.fits and option.step_time_seconds_median is not None:
        return 0, option.step_time_seconds_median
    rank = 1 if option.fits else 2 if option.pending else 3 if option.contradictory else 4
    return rank, option.per_device_train_batch_size or 0


def _judge(evidence: list[Evidence], mixed: list[Evidence]) -> tuple[Verdict, list[Evidence], str, list[Versus]]:
    """Verdict, the fastest recipe followed by those tied with it, the reason in a sentence, and the ratios.

    Args:
        evidence: each recipe at the micro-batch that counts.
        mixed: recipes and micro-batches that fit, where they are not all of one kind; else nothing.
    """
    fitting = [one for one in evidence if one.fits]
    others = [one for one in evidence if not one.fits]
    pending = [one for one in others if one.pending]
    unclear = [one for one in others if one.contradictory]
    late = [one for one in others if one.timed_out]
    beside = f" Not compared: {_endings(others)}." if others else ""
    if not fitting:
        # What may yet fit is told first: of many recipes a sentence names the first alone.
        endings = _endings(sorted(others, key=lambda one: (not one.timed_out, not one.pending)))
        if pending:
            some = "No recipe fits so far" if len(pending) < len(others) else "Nothing completed yet"
            return "no_data", [], f"{some}: {endings}.", []
        if unclear:
            return "contradictory", [], f"Nothing is known to fit; {_contradict(unclear)}: {endings}.", []
        if late:
            number = f"of {len(late)} of {len(others)} recipes" if len(late) < len(others) else "of each recipe"
            return "no_data", [], f"Nothing is known to fit; {number} only the time ran out: {endings}.", []
        return "nothing_fits", [], f"Nothing fits: {_endings(others)}.", []
    if mixed:
        sizes = len({one.recipe for one in mixed}) < len(mixed)
        names = ", ".join(one.recipe + (f" at micro-batch {one.micro_batch}" if sizes else "") for one in mixed)
        differ = "not all with the same software, device, weights, data and effective batch"
        return "not_comparable", [], f"{names} completed, but {differ}.{beside}", []
    best, rivals, versus = _fastest_of(fitting)
    if not rivals:
        verdict, why = _alone(best, others)
        return verdict, [best], f"{_timing(best)}{why}.{beside}", []
    told = [_timing(best), *(_timing(one, _of(versus, one.recipe)) for one in rivals[:MAX_NAMES])]
    told += [f"{len(rivals) - MAX_NAMES} slower ones"] if len(rivals) > MAX_NAMES else []
    numbers = "; ".join(told)
    slower = {one.recipe for one in versus if one.is_slower}
    if despite := [one.recipe for one in rivals if one.recipe in slower and _seconds(one) < _seconds(best)]:
        numbers += f". By the ratio {best.recipe} is faster than {_names(despite)}, although by median it is not"
    lacking = [one.too_few for one in versus if one.too_few]
    lacking += [f"No outcome yet: {_endings(pending)}"] if pending else []
    if lacking or len(versus) < len(rivals):
        why = lacking[0] if lacking else f"A ranking needs {MIN_REPEATS} runs of each"
        return "too_few_data", [best], f"{numbers}. {why}.{beside}", versus
    tied = [rival for rival in rivals if not _of(versus, rival.recipe).is_slower]
    if tied:
        return "tie", [best, *tied], f"{numbers}. {_tie(best, tied, versus)}{beside}", versus
    return "ranked", [best], f"{numbers}. Every interval leaves out 1.{beside}", versus


def _fastest_of(fitting: list[Evidence]) -> tuple[Evidence, list[Evidence], list[Versus]]:
    """The fastest of recipes, the others, and what they are to it where both have repeats.

    It is the first by median, unless another one is shown to be faster: on the same nodes the slower median can be the
    faster recipe, when it ran on the slow node more often. Should each of some be shown to be slower than another one,
    which chance allows, the first of them is taken, and is not told apart from what is shown to be faster than it.
    """
    order = sorted(fitting, key=_seconds)
    best, seen = order[0], set[str]()
    while True:
        rivals = [one for one in order if one is not best]
        versus = [_versus(best, rival) for rival in rivals if best.repeats and rival.repeats]
        seen.add(best.recipe)
        faster = min((one for one in versus if one.is_faster and one.recipe not in seen), key=_ratio_of, default=None)
        if faster is None:
            return best, rivals, versus
        best = next(one for one in rivals if one.recipe == faster.recipe)


def _seconds(one: Evidence) -> float:
    return one.step_time_seconds_median or float("inf")


def _ratio_of(one: Versus) -> float:
    return one.ratio


class _Standing(NamedTuple):
    """What is known of the recipes in a setting."""

    fits: dict[str, bool]
    """Of those that have an outcome; that the time ran out is none."""
    as_fast: set[str]

    @classmethod
    def of(cls, one: Recommendation) -> "_Standing":
        known = {e.recipe: e.fits for e in one.evidence if not (e.pending or e.timed_out)}
        return cls(known, one.as_fast)


def _named(tie: Recommendation, standings: list[_Standing]) -> Recommendation:
    """A tie whose recipe is the one to name (`VERDICTS`), and why.

    A wide interval holds much slower ones, too: those are tied for want of data, and not named.
    """
    tied = [one for one in map(tie.evidence_of, (tie.recipe, *tie.tied_with)) if one is not None]
    slowest = _seconds(tied[0]) * (1 + LITTLE)
    near = [tied[0]] + [
        one
        for one in tied[1:]
        if _seconds(one) <= slowest and not any(_versus(one, other).is_faster for other in tied if other is not one)
    ]
    names = {one.recipe for one in near}
    compared = [standing for standing in standings if names <= standing.fits.keys()]
    settings = f"{len(compared)} {'setting' if len(compared) == 1 else 'settings'}"
    why: list[str] = []
    for what, number in (
        ("fits", Counter(name for there in compared for name in names if there.fits[name])),
        ("is the fastest or as fast", Counter(name for there in compared for name in names & there.as_fast)),
    ):
        most = max(number[one.recipe] for one in near)
        if fewer := [f"{one.recipe} {number[one.recipe]}" for one in near if number[one.recipe] < most]:
            near = [one for one in near if number[one.recipe] == most]
            why.append(f"{what} in {most} of {settings} ({_names(fewer)})")
    chosen = _least_memory(near)
    gib = f", {show(chosen.peak_memory_gib_median, 'GiB')}" if chosen.peak_memory_gib_median is not None else ""
    if chosen is not near[0]:
        why.append(f"takes least memory{gib}")
    elif not why:
        why.append(f"is the fastest by median, and none takes {LITTLE:.0%} less memory{gib}")
    versus = [_versus(chosen, other) for other in tied if other is not chosen]
    versus = [one for one in versus if not one.is_slower]
    return tie.model_copy(
        update={
            "recipe": chosen.recipe,
            "per_device_train_batch_size": chosen.per_device_train_batch_size,
            "tied_with": [one.recipe for one in versus],
            "not_told_apart": [one.recipe for one in versus if not one.alike],
            "reason": f"{tie.reason} Of those at most {LITTLE:.0%} slower {chosen.recipe} is named: it "
            f"{', and '.join(why)}.",
            "settled_by": tie.settled_by or _more_repeats(tie, chosen, versus),
        }
    )


def _least_memory(near: list[Evidence]) -> Evidence:
    """Of recipes that are nearly as fast as each other: the first, unless another one takes much less memory."""
    most = (near[0].peak_memory_gib_median or float("inf")) * (1 - LITTLE)

    def memory(one: Evidence) -> float:
        return float("inf") if one.peak_memory_gib_median is None else one.peak_memory_gib_median

    return min((one for one in near if memory(one) <= most), key=memory, default=near[0])


def _tie(best: Evidence, tied: list[Evidence], versus: list[Versus]) -> str:
    found = [_of(versus, one.recipe) for one in tied]
    alike = [one.recipe for one in found if one.alike]
    wide = [one.numbers for one in found if not one.alike]
    same = (
        f"A tie: by their intervals {table.joined(alike)} within {LITTLE:.0%} of {best.recipe}: any will do."
        if alike
        else ""
    )
    apart = f"The repeats scatter too much to tell {best.recipe} from {table.joined(wide)}." if wide else ""
    return " ".join(filter(None, (same, apart)))


def _alone(best: Evidence, others: list[Evidence]) -> tuple[Verdict, str]:
    """Verdict on the one recipe that fits, and why, to follow its step time."""
    unclear = [one for one in others if one.contradictory]
    late = [one.recipe for one in others if one.timed_out]
    if not others:
        return "too_few_data", "; no other recipe is planned here"
    if any(one.pending for one in others):
        return "too_few_data", "; no other recipe completed yet"
    if unclear:
        return "contradictory", f"; {_contradict(unclear)}"
    if late:
        return "too_few_data", f"; whether {_names(late)} would fit is not known, since only the time ran out"
    if best.num_completed < MIN_REPEATS:
        return "too_few_data", f"; that no other one fits takes {MIN_REPEATS} runs of it"
    return "only_one_fits", " is the only one that fits"


def _contradict(unclear: list[Evidence]) -> str:
    return f"repeats of {', '.join(one.recipe for one in unclear)} contradict each other"


def _of(versus: list[Versus], recipe: str) -> Versus:
    return next(one for one in versus if one.recipe == recipe)


def _versus(best: Evidence, rival: Evidence) -> Versus:
    found = ratio(rival.repeats, best.repeats)
    lacks, too_few = _lacks(best, rival, found.bounded)
    return Versus(
        recipe=rival.recipe,
        ratio=found.value,
        low=found.low,
        high=found.high,
        freedom=found.freedom,
        num_nodes=len({*best.nodes_of_repeats, *rival.nodes_of_repeats}),
        differs=found.leaves_out_one,
        lacks=lacks,
        too_few=too_few,
    )


def _lacks(best: Evidence, rival: Evidence, has_interval: bool) -> tuple[Lack | None, str | None]:
    """What a ranking of two recipes lacks, also in words."""
    if min(len(best.repeats), len(rival.repeats)) < MIN_REPEATS:
        return "repeats", f"A ranking needs {MIN_REPEATS} runs of each"
    if len({*best.nodes_of_repeats, *rival.nodes_of_repeats}) < MIN_NODES:
        return "nodes", f"All ran on one node; a ranking needs {MIN_NODES}"
    unknown = [one.recipe for one in (best, rival) if None in one.starts_of_repeats]
    if unknown:
        return "starts", f"When {' and '.join(unknown)} started is not known; a ranking needs runs in random order"
    if _in_blocks(best.starts_of_repeats, rival.starts_of_repeats):
        return "order", (
            f"All runs of one of {best.recipe}, {rival.recipe} were before those of the other; a ranking needs them "
            "in random order"
        )
    if not has_interval:
        names = f"{best.recipe} and {rival.recipe}"
        return "nodes", f"No interval: what the nodes do can't be told from what {names} do"
    return None, None


def _in_blocks(first: list[str | None], second: list[str | None]) -> bool:
    """Whether all of one started before all of the other, so that time may be what differs."""
    one, two = ([start for start in starts if start is not None] for starts in (first, second))
    return max(one) < min(two) or max(two) < min(one)


def _settled_by(
    verdict: Verdict,
    evidence: list[Evidence],
    versus: list[Versus],
    fastest: str | None,
    given_up: Mapping[str, int],
) -> list[str]:
    """Runs that are planned and missing and can change the verdict, then what else to add."""
    if verdict in ("ranked", "only_one_fits", "nothing_fits"):
        return []
    fitting = [one for one in evidence if one.fits]
    if verdict == "not_comparable":  # no missing run makes those comparable that are there
        return [f"remeasure {_names([one.recipe for one in fitting])} with one set of software, on one kind of device"]
    if verdict == "contradictory":
        unclear = [one for one in evidence if one.contradictory]
        return [
            *(f"another repeat of {one.recipe}: remeasure {i}" for one in unclear for i in one.ended_without),
            *_more_time(evidence),
        ]
    # A recipe that ended without completing once does not fit, whatever its missing repeats do.
    missing = [run_id for one in evidence if one.fits or one.pending for run_id in one.missing]
    steps = [run_id for run_id in missing if run_id not in given_up]
    steps += [
        f"{run_id}: given up after {table.tries(given_up[run_id])}; the next call tries it again once its failure.json "
        "is deleted, or remeasure it"
        for run_id in missing
        if run_id in given_up
    ]
    steps += _more_time(evidence)
    if len(evidence) == 1:
        steps.append("another recipe in the grid: there is nothing to compare this one with")
    short = [one.recipe for one in fitting if len(one.run_ids) < MIN_REPEATS]
    if short and len(evidence) > 1:
        steps.append(f"repeats: {MIN_REPEATS}, in the grid or the protocol, adds runs of {_names(short)}")
    lacking: dict[Lack | None, list[str]] = defaultdict(list)
    for one in versus:
        lacking[one.lacks].append(one.recipe)
    lonely: set[str | None] = {*lacking["nodes"]}
    if lonely:
        lonely.add(fastest)
        steps.append(
            f"remeasure {', '.join(_last(one) for one in fitting if one.recipe in lonely)} on another node, the same "
            f"for all, so that all were on at least {MIN_NODES} (slurm.extra: --nodelist=... names it)"
        )
    if blocked := lacking["order"]:
        steps.append(f"remeasure {_names((str(fastest), *blocked))} in one call, which mixes their runs")
    undated = [one.recipe for one in fitting if None in one.starts_of_repeats]
    if undated and lacking["starts"]:
        steps.append(f"remeasure {_names(undated)}: when they started is not known")
    return steps


def _last(one: Evidence) -> str:
    """run_id of the last repeat that completed."""
    return [i for i, state in zip(one.run_ids, one.states, strict=True) if state == "completed"][-1]


def _more_time(evidence: list[Evidence]) -> list[str]:
    """What shows whether recipes fit whose time ran out; where two fit, a ranking does without them."""
    late = [run_id for one in evidence if one.timed_out for run_id in one.ended_without]
    if not late or sum(one.fits for one in evidence) > 1:
        return []
    return [f"raise protocol.time_limit_minutes, then remeasure what ran out of time: {_names(late)}"]


def _more_repeats(tie: Recommendation, named: Evidence, versus: list[Versus]) -> list[str]:
    """How many repeats would tell the named recipe of a tie from the others: an interval narrows with their root.

    They do where the interval, about the ratio of now, leaves out 1 or holds little differences alone.

    Args:
        tie: the setting.
        named: the recipe.
        versus: it against the others that are tied with it.
    """
    apart = [one for one in versus if not one.alike]
    found = [named, *(other for other in map(tie.evidence_of, (one.recipe for one in apart)) if other is not None)]
    num_repeats = max(one.num_completed for one in found)
    wanted: dict[str, int] = {}
    for one in apart:
        if one.low is None or one.high is None:
            continue
        half, effect = (math.log(one.high) - math.log(one.low)) / 2, abs(math.log(one.ratio))
        narrow = max(effect, math.log(1 + LITTLE) - effect)
        wanted[one.recipe] = _repeats_for(narrow / half, num_repeats, one.freedom)
    if not wanted:
        return []
    repeats = max(wanted.values())
    more = sum(repeats - one.num_completed for one in found)
    names = [one.recipe + (f" (micro-batch {one.micro_batch})" if one.micro_batch != "1" else "") for one in found]
    return [
        f"another block in the grid, for this setting alone, with repeats: {repeats} and the recipes {_names(names)}: "
        f"{table.runs(more)} more, about what it takes"
    ]


def _names(recipes: Sequence[str]) -> str:
    rest = len(recipes) - MAX_NAMES
    return ", ".join(recipes[:MAX_NAMES]) + (f" and {rest} more" if rest > 0 else "")


def _repeats_for(share: float, num_repeats: int, freedom: int) -> int:
    """How many repeats narrow an interval to this share of what it is with so many; each adds a run to both sides."""
    now = student(freedom) / math.sqrt(num_repeats)
    more = 1
    while student(freedom + 2 * more) / math.sqrt(num_repeats + more) > share * now:
        more += 1
    return num_repeats + more


def _timing(one: Evidence, versus: Versus | None = None) -> str:
    spread = ""
    if one.num_completed > 1:
        spread = f", {show(one.step_time_seconds_min)} to {show(one.step_time_seconds_max)}"
    completed = f"{table.runs(one.num_completed)}{spread}{_ratio(versus)}"
    return f"{one.recipe} {show(one.step_time_seconds_median, 's')} a step ({completed})"


def _ratio(versus: Versus | None) -> str:
    if versus is None or versus.low is None or versus.high is None:
        return ""
    value, low, high = show_ratio(versus.ratio, versus.low, versus.high)
    return f"; ratio {value}, {low} to {high}"


def _endings(group: list[Evidence]) -> str:
    return _names([f"{one.recipe} ({in_words(one.states)})" for one in group])
