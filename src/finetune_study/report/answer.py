"""The question, and its answer in three sentences, each with what supports it."""

from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from finetune_study.recommend import Default, Recommendation, Verdict
from finetune_study.table import devices, joined, show

QUESTION = "Which fine-tuning recipe should be our default, what do we add when it does not fit, and what does it cost?"
MAX_NAMED = 4
"""Recipes that a sentence names with their targets, where not all pairs are listed; of a tie, so many others."""
MAX_DETAILED = 3
"""Pairs of model and hardware of which the answer says all; of more the table below it does."""
MAX_LISTED = 8
"""Pairs that the answer names at all, those alike together; of more it says how many."""
MAX_STEPS = 3
"""Missing runs, and other things to do, that a sentence names."""


_DOUBT: dict[Verdict, str] = {
    "tie": "as fast as others",
    "too_few_data": "too few data for a ranking",
    "contradictory": "repeats of others contradict each other",
}
"""Beside defaults that are not sure, by verdict."""
NOT_TOLD_APART = "not told apart from others yet"
FASTEST = "It is the fastest that fits at the shortest context, on the most GPUs"
ALONE = "No other recipe was planned"
IN_A_TIE = "; in a tie, of those nearly as fast, what fits and is fast in more settings, then what takes less memory"


class Sentence(NamedTuple):
    """A sentence of the answer, and what supports it: a few more, or none."""

    text: str
    support: str = ""


def _doubt(at: Recommendation) -> str:
    """What makes a default unsure, without names; empty where nothing does."""
    return NOT_TOLD_APART if at.not_told_apart else _DOUBT.get(at.verdict, "")


def answer(recommendations: list[Recommendation], defaults: list[Default]) -> list[Sentence]:
    """Three sentences: the default; what to add where it does not fit; the cost. Of a study without runs, one.

    How sure the defaults are, how long a context fits, and what would settle what is open, support them.
    """
    if not recommendations:
        return [Sentence("The study has no runs: its grid is empty.")]
    return [
        _default(defaults),
        _beyond(defaults, recommendations),
        Sentence(_cost(defaults), _sureness(defaults, recommendations)),
    ]


def _default(defaults: list[Default]) -> Sentence:
    named = [one for one in defaults if one.recommendation.recipe]
    if not named:
        return Sentence(f"No recipe can be recommended yet {_why_none(defaults)}.")
    groups: dict[str, list[Default]] = {}
    for one in named:
        groups.setdefault(str(one.recommendation.recipe), []).append(one)
    ranked = sorted(groups.items(), key=lambda item: -len(item[1]))
    told = ranked if len(defaults) <= MAX_LISTED else ranked[:MAX_NAMED]
    parts = [f"{recipe} for {_these(some, len(defaults))}" for recipe, some in told]
    rest = len(named) - sum(len(some) for _, some in told)
    others = f"; and others in {rest} more {'case' if rest == 1 else 'cases'}" if rest else ""
    none = [one for one in defaults if not one.recommendation.recipe]
    beside = f"; none can be named {_why_none(none)}" if none else ""
    ties = any(one.recommendation.verdict == "tie" for one in named)
    why = ALONE if all(len(one.recommendation.evidence) == 1 for one in named) else FASTEST
    return Sentence(f"The default should be {'; '.join(parts)}{others}{beside}.", f"{why}{IN_A_TIE if ties else ''}.")


def _these(some: list[Default], of: int) -> str:
    if of <= MAX_DETAILED:
        return joined(map(_where_and_how_sure, some))
    return _together(some) if of <= MAX_LISTED or len(some) == 1 else _counted(some)


def _together(some: list[Default]) -> str:
    """Models and hardware of one recipe, those that are as sure as each other together."""
    sure: dict[str, list[Default]] = {}
    for one in some:
        sure.setdefault(_doubt(one.recommendation), []).append(one)
    every = {1: "", 2: "both "}
    return joined(
        _places(one.pair for one in ones) + (f" ({every.get(len(ones), 'all ')}{doubt})" if doubt else "")
        for doubt, ones in sure.items()
    )


def _counted(some: list[Default]) -> str:
    """How many models and hardware one recipe is the default of, and how many of these are how sure."""
    doubts = Counter(filter(None, (_doubt(one.recommendation) for one in some)))
    sure = ", ".join(f"{'all' if n == len(some) else n} {doubt}" for doubt, n in doubts.items())
    return f"{len(some)} pairs of model and hardware" + (f" ({sure})" if sure else "")


def _where(one: Default) -> str:
    return f"{one.target} on {one.hardware}"


def _places(pairs: Iterable[tuple[str, str]]) -> str:
    """Models and hardware, those on the same hardware named together."""
    hardware: dict[str, list[str]] = {}
    for target, name in pairs:
        hardware.setdefault(target, []).append(name)
    targets: dict[tuple[str, ...], list[str]] = {}
    for target, names in hardware.items():
        targets.setdefault(tuple(names), []).append(target)
    return ", ".join(f"{_named(some)} on {_named([*names])}" for names, some in targets.items())


def _where_and_how_sure(one: Default) -> str:
    at = one.recommendation
    doubts = {
        "tie": [f"a tie with {_named(at.alike)}"] * bool(at.alike)
        + [f"not told apart from {_named(at.not_told_apart)} yet"] * bool(at.not_told_apart),
    }.get(at.verdict, [_DOUBT[at.verdict]] if at.verdict in _DOUBT else [])
    place = f"{one.target} on {devices(one.hardware, at.num_gpus, at.nodes)} at context {at.sequence_length}"
    return place + (f" ({', '.join(doubts)})" if doubts else "")


def _named(recipes: list[str]) -> str:
    rest = len(recipes) - MAX_NAMED
    return joined([*recipes[:MAX_NAMED], *([f"{rest} more"] if rest > 0 else [])])


def _more(rest: list[Default]) -> str:
    return f" and {len(rest)} more" if rest else ""


_NONE = {
    "nothing_fits": "nothing that was planned fits",
    "no_data": "nothing is known to fit yet",
    "contradictory": "repeats contradict each other",
    "not_comparable": "the runs differ in software, device, weights or data",
}
"""Why no recipe is named, by verdict."""


def _why_none(defaults: list[Default]) -> str:
    groups: dict[str, list[Default]] = {}
    for one in defaults:
        groups.setdefault(one.recommendation.verdict, []).append(one)
    return joined(
        f"for {joined(map(_where, some[:3]))}{_more(some[3:])} ({_NONE[verdict]})" for verdict, some in groups.items()
    )


def _beyond(defaults: list[Default], recommendations: list[Recommendation]) -> Sentence:
    beyond = [other for one in defaults for other in one.elsewhere]
    nothing = sum(one.verdict == "nothing_fits" for one in recommendations)
    number = len(recommendations)
    settings = f"{number} {'setting' if number == 1 else 'settings'} of context and GPUs"
    if beyond:
        added = Counter(name for other in beyond for name in other.added)
        saved = sum(other.recipe is not None for other in beyond)
        what = joined(f"{name} ({n} times)" if n < saved else name for name, n in added.most_common(3))
        where = "" if saved == len(beyond) else f" in {saved} of them"
        how = (
            f", by adding {what}"
            if added
            else f": {_named(sorted({other.recipe for other in beyond if other.recipe}))}"
        )
        helps = f"another recipe does{where}{how}" if saved else "no other recipe is known to"
        text = f"Where a default does not fit ({len(beyond)} of {settings}), {helps}."
    elif any(one.recommendation.recipe for one in defaults):
        text = "No setting is known in which a default stops fitting."
    else:
        text = "What to add is not known."
    none = f"Nothing that was planned fits in {nothing} of {settings}." if nothing else ""
    return Sentence(text, " ".join(filter(None, [_longest(recommendations), none])))


class Longest(NamedTuple):
    """The longest context that fits a model on some hardware, on the fewest GPUs that it does on."""

    at: Recommendation
    recipe: str
    """One that fits there."""
    none_longer_tried: bool
    """No longer one has an outcome: it may fit."""

    @property
    def in_words(self) -> str:
        return f"{self.at.sequence_length}{' (the longest tried)' if self.none_longer_tried else ''}"


def longest(recommendations: list[Recommendation]) -> dict[tuple[str, str], Longest]:
    """The longest context that fits, of each model on each hardware that one fits on."""
    found: dict[tuple[str, str], Recommendation] = {}
    tried: dict[tuple[str, str], int] = {}
    for one in recommendations:
        if not all(evidence.pending for evidence in one.evidence):
            tried[one.pair] = max(one.sequence_length, tried.get(one.pair, 0))
        if any(evidence.fits for evidence in one.evidence):
            best = found.get(one.pair, one)
            found[one.pair] = min(best, one, key=lambda at: (-at.sequence_length, at.num_gpus, at.nodes))
    # Where none can be named, as of runs that are not compared, the first that fits shows that one does.
    return {
        pair: Longest(
            at,
            at.recipe or next(evidence.recipe for evidence in at.evidence if evidence.fits),
            tried[pair] <= at.sequence_length,
        )
        for pair, at in found.items()
    }


def _longest(recommendations: list[Recommendation]) -> str:
    found = longest(recommendations)
    if not found:
        return ""
    if len(found) <= MAX_DETAILED:
        named = [
            f"{one.in_words} for {target} on {devices(hardware, one.at.num_gpus, one.at.nodes)} ({one.recipe})"
            for (target, hardware), one in found.items()
        ]
    else:
        contexts: dict[str, list[tuple[str, str]]] = {}
        for pair, one in sorted(found.items(), key=lambda item: -item[1].at.sequence_length):
            contexts.setdefault(one.in_words, []).append(pair)
        listed = len(found) <= MAX_LISTED
        named = [
            f"{length} for {_places(pairs) if listed or len(pairs) == 1 else f'{len(pairs)} pairs'}"
            for length, pairs in contexts.items()
        ]
    return f"The longest context that is known to fit is {'; '.join(named)}."


def _cost(defaults: list[Default]) -> str:
    bests = [(one, one.recommendation.best) for one in defaults]
    dollars = sorted(
        (b.cost_usd_per_epoch_median, _where(one)) for one, b in bests if b and b.cost_usd_per_epoch_median is not None
    )
    hours = sorted(
        (b.epoch_hours_median * one.recommendation.num_gpus, _where(one))
        for one, b in bests
        if b and b.epoch_hours_median is not None
    )
    if dollars:
        cost = _range([(f"{show(value)} US dollars", place) for value, place in dollars])
    elif hours:
        cost = _range([(f"{show(value)} GPU-hours", place) for value, place in hours])
    else:
        return "What an epoch costs is not known yet."
    return f"With the default, an epoch, one pass over the training data, costs {cost}."


def _sureness(defaults: list[Default], recommendations: list[Recommendation]) -> str:
    """How many verdicts are clear, and what would settle those of the defaults that are not."""
    verdicts = Counter(one.verdict for one in recommendations)
    apart = sum(bool(one.not_told_apart) for one in recommendations)
    counts = {
        "clear": verdicts["ranked"] + verdicts["only_one_fits"],
        "tied": verdicts["tie"] - apart,
        "not told apart yet": apart,
        "open for want of data": verdicts["too_few_data"] + verdicts["no_data"] + verdicts["not_comparable"],
        "open since repeats contradict each other": verdicts["contradictory"],
        "that nothing fits": verdicts["nothing_fits"],
    }
    found = ", ".join(f"{n} {words}" for words, n in counts.items() if n)
    number = len(recommendations)
    return f"{number} {'verdict' if number == 1 else 'verdicts'}: {found}.{_settled_by(defaults)}"


_OPEN = frozenset({"too_few_data", "no_data", "contradictory", "not_comparable"})
"""Verdicts that more runs may change, as they may a tie whose intervals are wide."""


def _run_ids(one: Default) -> set[str]:
    return {run_id for evidence in one.recommendation.evidence for run_id in evidence.run_ids}


def _settled_by(defaults: list[Default]) -> str:
    """What would settle the defaults that are open: runs that are planned, by name, and what else to add."""
    open_ones = [one for one in defaults if one.recommendation.verdict in _OPEN or one.recommendation.not_told_apart]
    steps = [
        step if step in _run_ids(one) else f"for {_where(one)}, {step}"
        for one in open_ones
        for step in one.recommendation.settled_by
    ]
    if not steps:
        return ""
    rest = f"; and {len(steps) - MAX_STEPS} more" if len(steps) > MAX_STEPS else ""
    return f" What would settle the defaults that are open: {'; '.join(steps[:MAX_STEPS])}{rest}."


def _range(values: list[tuple[str, str]]) -> str:
    (low, place), (high, there) = values[0], values[-1]
    if len(values) == 1 or low != high:
        return f"{low} ({place})" + (f" to {high} ({there})" if len(values) > 1 else "")
    return f"{low} on each model and hardware"
