import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_study import outcome, recommend
from finetune_study.config import Config
from finetune_study.recommend import Recommendation
from finetune_study.record import Failure, Record
from finetune_study.report.answer import answer
from finetune_study.run import Run
from tests.unit import handmade


def repeats(number: int, **changes: Any) -> Config:
    return handmade.study(protocol={"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": number}, **changes)


def timed(study: Config, **seconds: tuple[float, ...]) -> list[Record]:
    """Completed repeats of each recipe, with these step times."""
    runs = handmade.runs(study)
    return [
        handmade.completed(runs[recipe, repeat], value, value, value, host=f"node-{repeat}")
        for recipe, values in seconds.items()
        for repeat, value in enumerate(values, start=1)
    ]


Try = tuple[str, float]
"""Node and step time of a repeat."""


def placed(study: Config, **tries: list[Try]) -> list[Record]:
    """Completed repeats of each recipe on these nodes; the repeats of one number start together."""
    runs = handmade.runs(study)
    return [
        handmade.completed(runs[recipe, repeat], seconds, host=node).model_copy(
            update={"started_at": f"2025-01-0{repeat}T00:00:00Z"}
        )
        for recipe, values in tries.items()
        for repeat, (node, seconds) in enumerate(values, start=1)
    ]


def the_only(study: Config, root: Path, *documents: Record | Failure) -> Recommendation:
    (one,) = recommend.recommend(handmade.compared(study, root, *documents))
    return one


def test_three_repeats_that_do_not_overlap_are_ranked(tmp_path: Path) -> None:
    study = repeats(3)
    one = the_only(study, tmp_path, *timed(study, full=(2.0, 2.1, 2.2), lora=(1.0, 1.1, 1.05)))
    assert (one.verdict, one.recipe, one.tied_with) == ("ranked", "lora", [])
    assert one.reason == (
        "lora 1.05 s a step (3 runs, 1.00 to 1.10); full 2.10 s a step (3 runs, 2.00 to 2.20; ratio 2.00, "
        "1.78 to 2.25). Every interval leaves out 1."
    )
    assert one.settled_by == []
    (versus,) = one.versus
    assert (versus.recipe, versus.num_nodes, versus.differs, versus.too_few) == ("full", 3, True, None)


def test_a_ranking_by_little_shows_how_little(tmp_path: Path) -> None:
    study = repeats(3)
    seconds = {"full": 1.001, "lora": 1.0}
    one = the_only(
        study, tmp_path, *placed(study, **{name: [(node, s) for node in "abc"] for name, s in seconds.items()})
    )
    assert (one.verdict, one.recipe) == ("ranked", "lora")
    assert "; ratio 1.001, 1.001 to 1.001)" in one.reason


def test_overlapping_spreads_are_a_tie(tmp_path: Path) -> None:
    study = repeats(3)
    one = the_only(study, tmp_path, *timed(study, full=(1.0, 1.1, 1.2), lora=(0.95, 1.0, 1.05)))
    assert (one.verdict, one.recipe, one.tied_with) == ("tie", "lora", ["full"])


def tied(study: Config, **recipes: tuple[tuple[float, ...], float | None]) -> list[Record]:
    """Completed repeats of each recipe, with these step times and this peak memory, GiB."""
    records = timed(study, **{name: seconds for name, (seconds, _) in recipes.items()})
    for record in records:
        gib = recipes[record.run.recipe][1]
        for rank in record.ranks:
            rank["memory"] = {} if gib is None else {"peak_allocated_bytes": int(gib * outcome.GIB)}
    return records


LEAST = "Of those at most 10% slower lora is named: it takes least memory, 0.500 GiB."
QUICK, ALIKE, SLOW = (1.0, 1.1, 1.2), (1.02, 1.11, 1.21), (2.0, 2.1, 2.2)


@pytest.mark.parametrize(
    ("memory", "named", "others", "why"),
    [
        (
            (0.9, 0.5, 0.7),
            "lora",
            ["full", "ia3"],
            LEAST,
        ),
        (
            (0.5, 0.47, 0.7),
            "full",
            ["lora", "ia3"],
            "full is named: it is the fastest by median, and none takes 10% less memory, 0.500 GiB.",
        ),
        (
            (None, 0.5, 0.7),
            "lora",
            ["full", "ia3"],
            LEAST,
        ),
        (
            (None, None, None),
            "full",
            ["lora", "ia3"],
            "full is named: it is the fastest by median, and none takes 10% less memory.",
        ),
    ],
)
def test_of_a_tie_the_one_with_least_memory_is_named(
    tmp_path: Path, memory: tuple[float | None, ...], named: str, others: list[str], why: str
) -> None:
    """Little less memory leaves the fastest; the slow one is in no tie with them."""
    recipes = {"full": [], "lora": ["lora"], "ia3": ["ia3"], "slow": ["gradient_checkpointing"]}
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": 128}]
    study = repeats(3, recipes=recipes, grid=grid)
    full, lora, ia3 = memory
    records = tied(study, full=(QUICK, full), lora=(ALIKE, lora), ia3=(ALIKE, ia3), slow=(SLOW, 0.1))
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe, one.tied_with) == ("tie", named, others)
    assert "A tie: by their intervals lora and ia3 within 10% of full: any will do. " in one.reason
    assert why in one.reason
    assert one.settled_by == []
    assert {versus.recipe: versus.differs for versus in one.versus} == {"lora": False, "ia3": False, "slow": True}
    (default,) = recommend.defaults([one])
    (sentence, *_) = answer([one], [default])
    assert sentence.text == (
        f"The default should be {named} for tiny on cpu × 1 at context 128 (a tie with {others[0]} and {others[1]})."
    )
    assert sentence.support.endswith(
        "in a tie, of those nearly as fast, what fits and is fast in more settings, then what takes less memory."
    )


def test_of_a_tie_the_one_that_fits_and_is_fast_in_most_settings_is_named(tmp_path: Path) -> None:
    """What is tied but ends at the next context, or is slow there, is no default, however little memory it takes."""
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora", "ia3"], "sequence_length": [64, 128]}]
    recipes = {"full": [], "lora": ["lora"], "ia3": ["ia3"]}
    study = repeats(3, recipes=recipes, grid=grid)
    times = {64: {"full": QUICK, "lora": ALIKE, "ia3": ALIKE}, 128: {"full": QUICK, "ia3": SLOW}}
    records = []
    for planned in handmade.planned(study):
        run, at = planned.run, times[planned.run.sequence_length]
        if run.recipe in at:
            seconds = at[run.recipe][run.repeat - 1]
            records.append(handmade.completed(run, seconds, seconds, seconds, host=f"node-{run.repeat}"))
            for rank in records[-1].ranks:
                rank["memory"] = {"peak_allocated_bytes": {"full": 3, "ia3": 2, "lora": 1}[run.recipe] * outcome.GIB}
        else:
            records.append(handmade.out_of_memory(run))
    short, long = recommend.recommend(handmade.compared(study, tmp_path, *records))
    assert (short.verdict, short.recipe, short.tied_with) == ("tie", "full", ["lora", "ia3"])
    assert short.reason.endswith(
        "Of those at most 10% slower full is named: it fits in 2 of 2 settings (lora 1), and is the fastest or as "
        "fast in 2 of 2 settings (ia3 1)."
    )
    assert (long.verdict, long.recipe) == ("ranked", "full")


def test_a_wide_interval_makes_no_slow_recipe_the_default(tmp_path: Path) -> None:
    """Half as slow again is tied where the repeats scatter, but not for want of memory."""
    study = repeats(3)
    records = tied(study, full=((1.0, 1.1, 2.6), 0.9), lora=((1.6, 1.65, 1.7), 0.5))
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe, one.tied_with) == ("tie", "full", ["lora"])
    assert one.not_told_apart == ["lora"]
    assert "The repeats scatter too much to tell full from lora × 1." in one.reason
    (step,) = one.settled_by
    found = re.fullmatch(
        r"another block in the grid, for this setting alone, with repeats: (\d+) and the recipes full, lora: "
        r"(\d+) runs more, about what it takes",
        step,
    )
    assert found
    assert int(found[2]) == 2 * (int(found[1]) - 3)
    (sentence, *_) = answer([one], recommend.defaults([one]))
    assert "full for tiny on cpu × 1 at context 128 (not told apart from lora yet)." in sentence.text


def test_of_a_tie_what_is_named_and_the_fastest_may_not_be_told_apart(tmp_path: Path) -> None:
    """lora alone fits at the next context, but scatters at this one: it is not known to be as fast as the others."""
    recipes = {"full": [], "lora": ["lora"], "ia3": ["ia3"]}
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": [64, 128]}]
    study = repeats(3, recipes=recipes, grid=grid)
    times = {"full": QUICK, "lora": (0.8, 1.15, 1.9), "ia3": ALIKE}
    records = []
    for run in (planned.run for planned in handmade.planned(study)):
        seconds = times[run.recipe][run.repeat - 1]
        fits = run.sequence_length == 64 or run.recipe == "lora"
        done = handmade.completed(run, seconds, seconds, seconds, host=f"node-{run.repeat}")
        records.append(done if fits else handmade.out_of_memory(run))
    one, _ = recommend.recommend(handmade.compared(study, tmp_path, *records))
    assert (one.verdict, one.recipe, one.fastest) == ("tie", "lora", "full")
    assert one.reason.endswith(" lora is named: it fits in 2 of 2 settings (full 1, ia3 1).")
    assert (one.tied_with, one.not_told_apart, one.alike) == (["full", "ia3"], ["full", "ia3"], [])
    assert one.tie_in_words == "not told apart from full, ia3 yet"
    assert one.as_fast == {"full", "ia3"}
    (step,) = one.settled_by
    assert " the recipes lora, full, ia3: " in step
    (default,) = recommend.defaults([one])
    assert default.fastest_in == 0
    first, _, cost = answer([one], [default])
    assert "lora for tiny on cpu × 1 at context 64 (not told apart from full and ia3 yet)." in first.text
    assert "1 verdict: 1 not told apart yet. What would settle the defaults that are open: for tiny on" in cost.support


def test_what_is_shown_to_be_slower_than_another_one_of_a_tie_is_not_named(tmp_path: Path) -> None:
    """lora takes least memory, and the fastest by median scatters; but ia3 is shown to be faster than lora."""
    recipes = {"full": [], "lora": ["lora"], "ia3": ["ia3"]}
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": 128}]
    study = repeats(3, recipes=recipes, grid=grid)
    times = {"full": (1.0, 1.1, 2.6), "lora": (1.15, 1.16, 1.17), "ia3": (1.12, 1.13, 1.14)}
    one = the_only(
        study, tmp_path, *tied(study, **{name: (s, 0.5 if name == "lora" else 0.9) for name, s in times.items()})
    )
    assert (one.verdict, one.recipe, one.tied_with) == ("tie", "full", ["ia3", "lora"])
    assert one.not_told_apart == ["ia3", "lora"]


def test_a_missing_run_elsewhere_does_not_count_against_a_recipe(tmp_path: Path) -> None:
    """lora has no outcome at the next context, where full completed: that is no reason to name full."""
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": [64, 128]}]
    study = repeats(3, grid=grid)
    records = []
    for run in (planned.run for planned in handmade.planned(study)):
        if run.sequence_length == 64 or run.recipe == "full":
            seconds = {"full": QUICK, "lora": ALIKE}[run.recipe][run.repeat - 1]
            records.append(handmade.completed(run, seconds, seconds, seconds, host=f"node-{run.repeat}"))
            for rank in records[-1].ranks:
                rank["memory"] = {"peak_allocated_bytes": {"full": 2, "lora": 1}[run.recipe] * outcome.GIB}
    short, _ = recommend.recommend(handmade.compared(study, tmp_path, *records))
    assert (short.recipe, short.tied_with) == ("lora", ["full"])
    assert short.reason.endswith("lora is named: it takes least memory, 1.00 GiB.")


def test_the_faster_by_the_ratio_is_ranked_though_its_median_is_higher(tmp_path: Path) -> None:
    """lora is 2 % faster on each node, and ran on the slow one more often."""
    study = repeats(3)
    lora = [("a", 0.98), ("b", 0.98 * NODE_EFFECT), ("b", 0.981 * NODE_EFFECT)]
    full = [("b", NODE_EFFECT), ("a", 1.0), ("a", 1.001)]
    one = the_only(study, tmp_path, *placed(study, lora=lora, full=full))
    assert (one.verdict, one.recipe, one.fastest, one.tied_with) == ("ranked", "lora", "lora", [])
    assert ". By the ratio lora is faster than full, although by median it is not. " in one.reason
    (versus,) = one.versus
    assert (versus.recipe, versus.is_slower) == ("full", True)


NODE_EFFECT = 1.08
"""The second node is slower by this, whatever runs there."""
EIGHT_PER_CENT = {
    "each recipe mostly on another node": (
        [("a", 1.0), ("a", 1.001), ("b", NODE_EFFECT)], [("a", 1.002), ("b", NODE_EFFECT), ("b", NODE_EFFECT * 1.001)]
    ),
    "each recipe on a node of its own": (
        [("a", 1.0), ("a", 1.001), ("a", 1.002)], [("b", NODE_EFFECT), ("b", NODE_EFFECT * 1.001), ("b", NODE_EFFECT)]
    ),
    "one recipe on one node": (
        [("a", 1.0), ("a", 1.001), ("a", 1.002)], [("a", 1.0), ("b", NODE_EFFECT), ("b", NODE_EFFECT)]
    ),
    "no node in common": (
        [("a", 1.0), ("a", 1.001), ("b", NODE_EFFECT)], [("c", 1.002), ("d", NODE_EFFECT), ("d", NODE_EFFECT)]
    ),
    "each recipe on nodes of its own, all of one slow": (
        [("a", 1.0), ("b", 1.001), ("a", 1.002)], [("c", NODE_EFFECT), ("d", NODE_EFFECT), ("c", NODE_EFFECT * 1.001)]
    ),
    "three nodes each, all of one slow": (
        [("a", 1.0), ("b", 1.001), ("c", 1.002)], [("d", NODE_EFFECT), ("e", NODE_EFFECT), ("f", NODE_EFFECT * 1.001)]
    ),
}  # fmt: skip


NO_INTERVAL = ("each recipe on a node of its own", "one recipe on one node")


def another_node(study: Config) -> str:
    runs = handmade.runs(study)
    return (
        f"remeasure {runs['full', 3].run_id}, {runs['lora', 3].run_id} on another node, the same for all, so that all "
        "were on at least 2 (slurm.extra: --nodelist=... names it)"
    )


@pytest.mark.parametrize("lora", [["a"] * 3, ["a", "a", "b"]])
def test_runs_measured_again_on_another_node_as_advised_give_an_interval(tmp_path: Path, lora: list[str]) -> None:
    study = repeats(3)
    full = ["b" if node == "a" and "b" in lora else node for node in lora]
    before = {"lora": [(node, 1.0) for node in lora], "full": [(node, 2.0) for node in full]}
    after = {recipe: [*tries[:2], ("c", tries[0][1] * NODE_EFFECT)] for recipe, tries in before.items()}
    assert the_only(study, tmp_path / "before", *placed(study, **before)).settled_by == [another_node(study)]
    assert the_only(study, tmp_path / "after", *placed(study, **after)).versus[0].low is not None


@pytest.mark.parametrize("case", EIGHT_PER_CENT)
def test_a_node_effect_of_eight_per_cent_is_never_ranked(tmp_path: Path, case: str) -> None:
    """A tie where the ratio has an interval; it holds 1. Without one nothing is known of the noise."""
    study = repeats(3)
    lora, full = EIGHT_PER_CENT[case]
    one = the_only(study, tmp_path, *placed(study, lora=lora, full=full))
    (versus,) = one.versus
    if case in NO_INTERVAL:
        assert (one.verdict, one.recipe, one.tied_with) == ("too_few_data", "lora", [])
        assert (versus.low, versus.high) == (None, None)
        assert "No interval: what the nodes do can't be told from what lora and full do." in one.reason
        assert one.settled_by == [another_node(study)]
    else:
        assert (one.verdict, one.recipe, one.tied_with) == ("tie", "lora", ["full"])
        assert versus.low is not None
        assert versus.high is not None
        assert versus.low <= 1 <= versus.high
        assert bool(one.settled_by) != versus.alike


def test_a_difference_of_four_per_cent_is_found_under_a_node_effect_of_eight(tmp_path: Path) -> None:
    """Both recipes were on both nodes, so that what a node does is known and taken out."""
    study = repeats(3)
    lora = [("a", 1.0), ("b", NODE_EFFECT * 1.001), ("a", 1.002)]
    full = [("b", NODE_EFFECT * 1.04), ("a", 1.041), ("b", NODE_EFFECT * 1.042)]
    one = the_only(study, tmp_path, *placed(study, lora=lora, full=full))
    assert (one.verdict, one.recipe) == ("ranked", "lora")
    assert one.versus[0].ratio == pytest.approx(1.04, abs=0.003)


def test_one_node_ranks_nothing(tmp_path: Path) -> None:
    study = repeats(3)
    one = the_only(study, tmp_path, *placed(study, lora=[("a", 1.0)] * 3, full=[("a", 2.0)] * 3))
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert one.reason.endswith("All ran on one node; a ranking needs 2.")
    assert one.settled_by == [another_node(study)]


def test_a_node_without_a_name_is_no_second_node(tmp_path: Path) -> None:
    study = repeats(3)
    records = placed(study, lora=[("a", 1.0)] * 3, full=[("a", 2.0)] * 3)
    nameless = [r.model_copy(update={"environment": {**r.environment, "host": None}}) for r in records]
    assert the_only(study, tmp_path, *nameless).verdict == "too_few_data"


@pytest.mark.parametrize("name", ["lora", "started-on-a-node"])
def test_runs_that_were_not_in_random_order_rank_nothing(tmp_path: Path, name: str) -> None:
    """What is advised does not hang on words that a recipe's name may hold."""
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", name], "sequence_length": 128}
    study = repeats(3, recipes={"full": [], name: ["lora"]}, grid=[block])
    records = timed(study, **{name: (1.0, 1.01, 1.02), "full": (2.0, 2.01, 2.02)})
    early = [
        r.model_copy(update={"started_at": "2024-12-31T00:00:00Z"}) if r.run.recipe == name else r for r in records
    ]
    one = the_only(study, tmp_path, *early)
    assert (one.verdict, one.recipe) == ("too_few_data", name)
    assert "in random order" in one.reason
    assert one.settled_by == [f"remeasure {name}, full in one call, which mixes their runs"]


def test_packing_keeps_no_other_recipe_from_a_ranking(tmp_path: Path) -> None:
    """A packed step holds more examples, of other data: it is told apart, by tokens that are not padding."""
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora", "packed"], "sequence_length": 128}
    study = repeats(3, recipes={"full": [], "lora": ["lora"], "packed": ["packing"]}, grid=[block])
    records = timed(study, lora=(1.0, 1.01, 1.02), full=(2.0, 2.01, 2.02), packed=(0.5, 0.5, 0.5))
    for record in records:
        if record.run.recipe == "packed":
            record.environment["data"] = {"sha256": "e" * 64}
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe, [versus.recipe for versus in one.versus]) == ("ranked", "lora", ["full"])
    assert "Not ranked by the step, since examples are packed: packed " in one.reason
    assert one.evidence_of("packed") is not None
    alone = [record for record in records if record.run.recipe == "packed"]
    assert recommend.recommend(handmade.compared(study, tmp_path / "b", *alone))[0].reason.endswith("not padding.")


def test_without_start_times_nothing_is_ranked(tmp_path: Path) -> None:
    study = repeats(3)
    records = timed(study, lora=(1.0, 1.01, 1.02), full=(2.0, 2.01, 2.02))
    undated = [r.model_copy(update={"started_at": None}) if r.run.recipe == "full" else r for r in records]
    one = the_only(study, tmp_path, *undated)
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert "When full started is not known; a ranking needs runs in random order." in one.reason
    assert one.settled_by == ["remeasure full: when they started is not known"]


def test_step_times_that_contradict_each_other_are_a_tie(tmp_path: Path) -> None:
    study = repeats(3)
    one = the_only(study, tmp_path, *timed(study, lora=(1.0, 3.0, 1.1), full=(1.2, 1.1, 2.9)))
    assert (one.verdict, one.tied_with) == ("tie", ["full"])


def test_what_would_settle_it_is_named_by_run(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    one = the_only(study, tmp_path, *timed(study, lora=(1.0, 1.0, 1.0), full=(2.0, 2.0)))
    assert (one.verdict, one.settled_by) == ("too_few_data", [runs["full", 3].run_id])


def test_a_rival_that_is_still_open_leaves_the_ranking_open(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora", "late"], "sequence_length": 128}
    study = repeats(3, recipes={"full": [], "lora": ["lora"], "late": ["eager"]}, grid=[block])
    runs = handmade.runs(study)
    one = the_only(study, tmp_path, *timed(study, lora=(1.0, 1.01, 1.02), full=(2.0, 2.01, 2.02)))
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert "No outcome yet: late (3 not run)." in one.reason
    assert one.settled_by == [runs["late", number].run_id for number in (1, 2, 3)]


def test_too_few_planned_repeats_are_named(tmp_path: Path) -> None:
    study = repeats(1)
    one = the_only(study, tmp_path, *timed(study, lora=(1.0,), full=(2.0,)))
    assert one.settled_by == ["repeats: 3, in the grid or the protocol, adds runs of full, lora"]


def test_eight_per_cent_on_one_repeat_is_too_few_data(tmp_path: Path) -> None:
    study = repeats(1)
    one = the_only(study, tmp_path, *timed(study, full=(1.08,), lora=(1.0,)))
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert one.reason.endswith("A ranking needs 3 runs of each.")


def test_one_recipe_with_two_repeats_is_too_few_data_for_all(tmp_path: Path) -> None:
    study = repeats(3)
    one = the_only(study, tmp_path, *timed(study, full=(9.0, 9.0), lora=(1.0, 1.0, 1.0)))
    assert one.verdict == "too_few_data"


def test_the_only_one_that_fits_has_completed_three_times(tmp_path: Path) -> None:
    """What ran out of memory once does not fit; its missing repeats change nothing, and are not asked for."""
    study = repeats(3)
    ran_out = handmade.out_of_memory(handmade.runs(study)["full", 1])
    one = the_only(study, tmp_path, ran_out, *timed(study, lora=(1.0, 1.01, 1.02)))
    assert (one.verdict, one.recipe, one.settled_by) == ("only_one_fits", "lora", [])
    assert "full (1 out of memory, 2 not run)" in one.reason


def test_one_run_against_one_out_of_memory_is_too_few_data(tmp_path: Path) -> None:
    once, thrice = repeats(1), repeats(3)
    for study, settled in (
        (once, ["repeats: 3, in the grid or the protocol, adds runs of lora"]),
        (thrice, [handmade.runs(thrice)["lora", number].run_id for number in (2, 3)]),
    ):
        ran_out = handmade.out_of_memory(handmade.runs(study)["full", 1])
        one = the_only(study, tmp_path / str(study.protocol.repeats), ran_out, *timed(study, lora=(1.0,)))
        assert (one.verdict, one.recipe) == ("too_few_data", "lora")
        assert "that no other one fits takes 3 runs of it. Not compared: full (" in one.reason
        assert one.settled_by == settled


def test_an_out_of_memory_leaves_a_ranking_of_the_others_settled(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora", "big"], "sequence_length": 128}
    study = repeats(3, recipes={"full": [], "lora": ["lora"], "big": ["eager"]}, grid=[block])
    ran_out = handmade.out_of_memory(handmade.runs(study)["big", 2])
    one = the_only(study, tmp_path, ran_out, *timed(study, lora=(1.0, 1.01, 1.02), full=(2.0, 2.01, 2.02)))
    assert (one.verdict, one.recipe, one.settled_by) == ("ranked", "lora", [])
    assert "Not compared: big (1 out of memory, 2 not run)." in one.reason


def test_one_out_of_memory_of_each_settles_that_nothing_fits(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    one = the_only(study, tmp_path, *(handmade.out_of_memory(runs[recipe, 2]) for recipe in ("full", "lora")))
    assert (one.verdict, one.settled_by) == ("nothing_fits", [])


@pytest.mark.parametrize("failed", [True, False])
def test_a_rival_without_an_outcome_leaves_it_open(tmp_path: Path, failed: bool) -> None:
    study = repeats(1)
    failure = [handmade.failure(handmade.runs(study)["full", 1])] if failed else []
    one = the_only(study, tmp_path, *failure, *timed(study, lora=(1.0,)))
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert ("full (failed)" if failed else "full (not run)") in one.reason


def test_repeats_that_contradict_each_other_leave_it_open_whether_another_is_the_only_one(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    lora = timed(study, lora=(1.0, 1.0, 1.0))[:2]
    records = [*lora, handmade.out_of_memory(runs["lora", 3]), *timed(study, full=(2.0, 2.0, 2.0))]
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe) == ("contradictory", "full")
    assert "repeats of lora contradict each other. Not compared: lora (2 completed, 1 out of memory)." in one.reason
    assert one.settled_by == [f"another repeat of lora: remeasure {runs['lora', 3].run_id}"]


def test_repeats_that_contradict_each_other_leave_it_open_whether_nothing_fits(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    records = [*timed(study, lora=(1.0, 1.0)), *(handmade.out_of_memory(runs[r, 3]) for r in ("lora", "full"))]
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe) == ("contradictory", None)
    assert one.reason.startswith("Nothing is known to fit; repeats of lora contradict each other: ")
    assert one.settled_by == [f"another repeat of lora: remeasure {runs['lora', 3].run_id}"]


def test_nothing_fits(tmp_path: Path) -> None:
    study = repeats(1)
    runs = handmade.runs(study)
    records = [handmade.out_of_memory(runs["full", 1]), handmade.unsupported(runs["lora", 1], "no such kernel")]
    one = the_only(study, tmp_path, *records)
    assert (one.verdict, one.recipe) == ("nothing_fits", None)
    assert one.reason == "Nothing fits: full (out of memory), lora (unsupported)."


def test_a_timeout_proves_nothing_about_memory(tmp_path: Path) -> None:
    """It is told before the many that are out of memory, and with more time it may fit."""
    recipes = {f"r{n}": ["lora"] for n in range(10)}
    block = {"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": 128}
    study = repeats(1, recipes=recipes, grid=[block])
    *ran_out, last = handmade.runs(study).values()
    one = the_only(study, tmp_path, *map(handmade.out_of_memory, ran_out), handmade.timed_out(last))
    assert (one.verdict, one.recipe) == ("no_data", None)
    assert one.reason.startswith(
        "Nothing is known to fit; of 1 of 10 recipes only the time ran out: r9 (timeout), r0 (out of memory), "
    )
    assert one.settled_by == [f"raise protocol.time_limit_minutes, then remeasure what ran out of time: {last.run_id}"]
    said = answer([one], recommend.defaults([one]))
    assert "(nothing is known to fit yet)" in said[0].text
    assert "nothing fits" not in " ".join(f"{text} {support}" for text, support in said).lower()


def test_a_timeout_beside_an_out_of_memory_of_one_recipe_changes_nothing(tmp_path: Path) -> None:
    study = repeats(2)
    runs = handmade.runs(study)
    ran_out = [handmade.out_of_memory(runs[recipe, 1]) for recipe in ("full", "lora")]
    one = the_only(study, tmp_path, *ran_out, handmade.timed_out(runs["full", 2]))
    assert (one.verdict, one.settled_by) == ("nothing_fits", [])


def test_a_recipe_is_not_the_only_one_that_fits_where_the_time_of_another_ran_out(tmp_path: Path) -> None:
    study = repeats(3)
    late = [handmade.timed_out(run) for (recipe, _), run in handmade.runs(study).items() if recipe == "full"]
    one = the_only(study, tmp_path, *timed(study, lora=(1.0, 1.01, 1.02)), *late)
    assert (one.verdict, one.recipe) == ("too_few_data", "lora")
    assert "; whether full would fit is not known, since only the time ran out." in one.reason
    (step,) = one.settled_by
    assert step.startswith("raise protocol.time_limit_minutes, then remeasure")
    assert late[0].run.run_id in step


def test_a_run_that_is_given_up_is_not_one_that_the_next_call_makes(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    records = timed(study, full=(2.0, 2.01, 2.02), lora=(1.0,))
    failures = [handmade.failure(runs["lora", 2], attempt=2), handmade.failure(runs["lora", 3], attempt=3)]
    cells = handmade.frame(study, tmp_path, *records, *failures)
    _, (one,) = recommend.of_cells(cells, study)
    assert one.settled_by == [
        runs["lora", 2].run_id,
        f"{runs['lora', 3].run_id}: given up after 3 tries; the next call tries it again once its failure.json is "
        "deleted, or remeasure it",
    ]


def test_no_data_yet(tmp_path: Path) -> None:
    study = repeats(1)
    one = the_only(study, tmp_path, handmade.out_of_memory(handmade.runs(study)["full", 1]))
    assert (one.verdict, one.recipe) == ("no_data", None)


def test_devices_that_differ_inside_a_hardware_entry_are_never_ranked(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    other = [handmade.completed(runs["lora", n], 1.0, device="Another CPU") for n in (1, 2, 3)]
    one = the_only(study, tmp_path, *timed(study, full=(2.0, 2.0, 2.0)), *other)
    assert (one.verdict, one.recipe) == ("not_comparable", None)
    assert "not all with the same software, device, weights" in one.reason
    assert one.settled_by == ["remeasure full, lora with one set of software, on one kind of device"]


def test_differing_software_is_never_ranked(tmp_path: Path) -> None:
    study = repeats(3)
    runs = handmade.runs(study)
    other = [handmade.completed(runs["lora", n], 1.0, software="b" * 64) for n in (1, 2, 3)]
    one = the_only(study, tmp_path, *timed(study, full=(2.0, 2.0, 2.0)), *other)
    assert (one.verdict, one.recipe) == ("not_comparable", None)


def two_sizes(root: Path, software: str) -> Config:
    """One recipe, faster at micro-batch 2, whose runs had this software, and another."""
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}
    study = repeats(3, grid=[{**block, "per_device_train_batch_size": [1, 2]}])
    records = []
    for number, planned in enumerate(handmade.planned(study)):
        large = planned.run.micro_batch == 2
        kind = software if large and planned.run.recipe == "full" else "a" * 64
        seconds = (1.0 if large else 2.0) * (1 if planned.run.recipe == "full" else 3) + 0.001 * number
        records.append(handmade.completed(planned.run, seconds, host=f"node-{planned.run.repeat}", software=kind))
    handmade.write(root, *records)
    return study


def test_micro_batches_with_differing_software_are_not_chosen_between(tmp_path: Path) -> None:
    one = the_only(two_sizes(tmp_path / "same", "a" * 64), tmp_path / "same")
    assert (one.verdict, one.recipe, one.per_device_train_batch_size) == ("ranked", "full", 2)
    one = the_only(two_sizes(tmp_path / "other", "b" * 64), tmp_path / "other")
    assert (one.verdict, one.recipe) == ("not_comparable", None)
    assert "full at micro-batch 1, full at micro-batch 2" in one.reason
    assert "not all with the same software" in one.reason
    assert {e.recipe: e.micro_batch for e in one.evidence}["full"] == "1"
    assert one.settled_by == ["remeasure full, lora with one set of software, on one kind of device"]


def test_each_recipe_counts_at_its_fastest_micro_batch_that_fits(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}
    study = repeats(1, grid=[{**block, "per_device_train_batch_size": [1, 2, 4]}])
    seconds = {("full", 1): 2.0, ("full", 2): 1.5, ("lora", 1): 1.8, ("lora", 2): 1.6, ("lora", 4): 1.9}
    records = []
    for planned in handmade.planned(study):
        time = seconds.get((planned.run.recipe, planned.run.micro_batch))
        records.append(handmade.completed(planned.run, time) if time else handmade.out_of_memory(planned.run))
    one = the_only(study, tmp_path, *records)
    assert (one.recipe, one.per_device_train_batch_size) == ("full", 2)
    assert {e.recipe: e.per_device_train_batch_size for e in one.evidence} == {"full": 2, "lora": 2}


@pytest.mark.parametrize(("ending", "told"), [(handmade.out_of_memory, [512]), (handmade.timed_out, [])])
def test_the_default_is_chosen_at_the_shortest_context_and_says_what_to_add_beyond(
    tmp_path: Path, ending: Callable[[Run], Record], told: list[int]
) -> None:
    """Where only its time ran out it may fit: nothing need be added."""
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": [512, 128]}
    study = repeats(1, recipes={"full": [], "lora": ["lora"]}, grid=[block])
    records = []
    for planned in handmade.planned(study):
        long = planned.run.sequence_length == 512
        full = planned.run.recipe == "full"
        records.append(ending(planned.run) if long and full else handmade.completed(planned.run, 1.0 if full else 2.0))
    (default,) = recommend.defaults(recommend.recommend(handmade.compared(study, tmp_path, *records)))
    assert (default.recommendation.sequence_length, default.recommendation.recipe) == (128, "full")
    assert (default.fits_in, default.fastest_in, default.of) == (1, 1, 2)
    assert [beyond.sequence_length for beyond in default.elsewhere] == told
    for beyond in default.elsewhere:
        assert (beyond.recipe, beyond.ended) == ("lora", ["device_oom"])
        assert (beyond.added, beyond.left_out) == (["lora"], [])
        assert beyond.step_time_seconds_median == 2.0


def test_one_recommendation_per_setting(tmp_path: Path) -> None:
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": [128, 512]}]
    study = repeats(1, grid=grid)
    found = recommend.recommend(handmade.compared(study, tmp_path))
    assert [one.sequence_length for one in found] == [128, 512]
    assert {one.verdict for one in found} == {"no_data"}


def test_aggregate_writes_both_files_from_the_outcomes(tmp_path: Path) -> None:
    study = repeats(3)
    results = handmade.write(tmp_path, *timed(study, full=(2.0, 2.1, 2.2), lora=(1.0, 1.1, 1.05)))
    planned = handmade.planned(study)
    outcome.collect(results, [one.run.run_id for one in planned], study.hardware).write_parquet(
        results.outcomes_parquet
    )
    recommend.aggregate(study, planned, results)
    assert pl.read_parquet(results.comparisons)["step_time_ratio"].to_list() == [1.0, pytest.approx(0.5)]
    document = json.loads(results.recommendations.read_text())
    assert document["format"] == recommend.FORMAT
    assert [one["target"] for one in document["defaults"]] == ["tiny"]
    (one,) = document["recommendations"]
    assert (one["target"], one["hardware"], one["num_gpus"], one["sequence_length"]) == ("tiny", "cpu", 1, 128)
    assert (one["verdict"], one["recipe"]) == ("ranked", "lora")
    assert [e["num_completed"] for e in one["evidence"]] == [3, 3]


def test_aggregate_of_a_study_without_outcomes(tmp_path: Path) -> None:
    study = repeats(1)
    results = handmade.write(tmp_path)
    outcome.collect(results, [], study.hardware).write_parquet(results.outcomes_parquet)
    recommend.aggregate(study, handmade.planned(study), results)
    assert json.loads(results.recommendations.read_text())["recommendations"][0]["verdict"] == "no_data"


def test_every_verdict_has_its_meaning() -> None:
    verdicts = Recommendation.model_fields["verdict"].annotation
    assert set(recommend.VERDICTS) == set(verdicts.__args__)  # type: ignore[union-attr]


def test_a_default_is_that_of_most_gpus_on_fewest_nodes(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128, "num_gpus": 2}
    study = handmade.study(grid=[block | {"nodes": [2, 1]}])
    documents = [
        handmade.out_of_memory(one.run)
        if (one.run.recipe, one.run.nodes) == ("lora", 2)
        else handmade.completed(one.run, {"full": 2.0, "lora": 1.0}[one.run.recipe])
        for one in handmade.planned(study)
    ]
    every = recommend.recommend(handmade.compared(study, tmp_path, *documents))
    assert {(one.nodes, one.recipe) for one in every} == {(1, "lora"), (2, "full")}
    (default,) = recommend.defaults(every)
    assert (default.recommendation.nodes, default.recommendation.recipe, default.of) == (1, "lora", 2)
    (other,) = default.elsewhere
    assert (other.num_gpus, other.nodes, other.recipe) == (2, 2, "full")
