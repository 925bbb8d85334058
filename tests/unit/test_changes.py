from pathlib import Path

import polars as pl
import pytest

from finetune_study import changes, outcome
from finetune_study.config import Config
from finetune_study.errors import StudyError
from finetune_study.record import Ending, Record
from tests.unit import handmade

STUDY = handmade.study(protocol={"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 3})
RUNS = handmade.runs(STUDY)
OTHER_DATA = ("not known", "device, weights, data or effective batch differ: not compared")


def timed(recipe: str, *seconds: float, used: float = 0.5, software: str = "a" * 64) -> list[Record]:
    return [
        handmade.completed(RUNS[recipe, number], value, host=f"node-{number}", used=used, software=software)
        for number, value in enumerate(seconds, start=1)
    ]


def outcomes(root: Path, *records: Record, config: Config = STUDY) -> Path:
    results = handmade.write(root, *records)
    path = root / "outcomes.parquet"
    ids = [one.run.run_id for one in handmade.planned(config)]
    outcome.collect(results, ids, config.hardware).write_parquet(path)
    return path


def compared(tmp_path: Path, now: list[Record], then: list[Record]) -> dict[str, tuple[str, str]]:
    found = changes.of_files(outcomes(tmp_path / "now", *now), outcomes(tmp_path / "then", *then))
    return {one["recipe"]: (one["change"], one["why"]) for one in found.changed}


def test_better_and_worse_beyond_the_noise_and_the_same_within_it(tmp_path: Path) -> None:
    now = [*timed("full", 1.0, 1.01, 1.02), *timed("lora", 1.0, 1.02, 1.01)]
    then = [*timed("full", 2.0, 2.02, 2.04), *timed("lora", 1.01, 1.0, 1.02)]
    found = compared(tmp_path, now, then)
    assert found["full"] == ("better", "step time × 0.500")
    assert found["lora"] == ("same", "no difference beyond the noise")
    assert compared(tmp_path / "b", then, now)["full"][0] == "worse"


def test_what_fits_now_and_did_not_is_better(tmp_path: Path) -> None:
    ran_out = [handmade.out_of_memory(RUNS["full", number]) for number in (1, 2, 3)]
    fits = timed("full", 1.0, 1.0, 1.0)
    assert compared(tmp_path, fits, ran_out)["full"] == ("better", "3 out of memory then, 3 completed now")
    assert compared(tmp_path / "b", ran_out, fits)["full"][0] == "worse"


def test_faster_with_more_memory_is_neither(tmp_path: Path) -> None:
    now = timed("full", 1.0, 1.01, 1.02, used=0.75)
    assert compared(tmp_path, now, timed("full", 2.0, 2.02, 2.04))["full"] == (
        "differs",
        "step time × 0.500, peak memory × 1.50",
    )


def test_repeats_that_contradict_each_other_are_neither_better_nor_worse(tmp_path: Path) -> None:
    then = [*timed("full", 1.0, 1.01), handmade.out_of_memory(RUNS["full", 3])]
    now = timed("full", 1.0, 1.01, 1.02)
    for number, (new, old) in enumerate([(now, then), (then, now), (then, then)]):
        change, why = compared(tmp_path / str(number), new, old)["full"]
        assert change == "not known"
        assert why.startswith("repeats contradict each other: ")


def test_a_recipe_that_was_defined_otherwise_is_not_compared(tmp_path: Path) -> None:
    """Its name is the same; what differs is said. Where the earlier table does not tell, it is not held against it."""
    recipes = {"full": [], "lora": {"lora": {"r": 4}}}
    other = handmade.study(protocol=STUDY.protocol.model_dump(), recipes=recipes)
    runs = handmade.runs(other)
    now = outcomes(tmp_path / "now", *timed("lora", 1.0, 1.01, 1.02))
    earlier = [
        handmade.completed(runs["lora", number], 2.0 + number / 100, host=f"node-{number}") for number in (1, 2, 3)
    ]
    then = outcomes(tmp_path / "then", *earlier, config=other)
    (one,) = changes.of_files(now, then).changed
    assert (one["change"], one["why"]) == (
        "not known",
        "the recipe's techniques or their settings differ (lora): not compared",
    )
    pl.read_parquet(then).drop("settings").write_parquet(then)
    assert changes.of_files(now, then).changed[0]["change"] == "better"


def test_a_few_bytes_more_are_no_change(tmp_path: Path) -> None:
    """Memory hardly varies from run to run, so that the interval of its ratio has no width."""
    now, then = timed("full", 1.0, 1.01, 1.02, used=0.5001), timed("full", 2.0, 2.02, 2.04, used=0.5)
    assert compared(tmp_path, now, then)["full"] == ("better", "step time × 0.500")
    same = timed("full", 2.0, 2.02, 2.04, used=0.5001)
    assert compared(tmp_path / "b", same, then)["full"][0] == "same"


def test_other_data_are_not_compared_and_other_software_is(tmp_path: Path) -> None:
    then = timed("full", 2.0, 2.02, 2.04)
    other_data = timed("full", 1.0, 1.01, 1.02)
    for record in other_data:
        record.environment["data"] = {"sha256": "e" * 64}
    assert compared(tmp_path, other_data, then)["full"] == OTHER_DATA
    elsewhere = timed("full", 1.0, 1.01, 1.02)
    for record in elsewhere:
        record.environment["device_name"] = "Another CPU"
    assert compared(tmp_path / "device", elsewhere, then)["full"][1].startswith("device, weights, data or effective")
    newer = timed("full", 1.0, 1.01, 1.02, software="b" * 64)
    assert compared(tmp_path / "b", newer, then)["full"] == ("better", "step time × 0.500")


def test_one_repeat_tells_nothing_and_other_software_is_named(tmp_path: Path) -> None:
    now, then = timed("full", 1.0), timed("full", 2.0, software="b" * 64)
    found = changes.of_files(outcomes(tmp_path / "now", *now), outcomes(tmp_path / "then", *then))
    (one,) = found.changed
    assert (one["change"], one["software"]) == ("not known", "differs")
    assert "in both: 1 not known (too few repeats or nodes to tell: 1)" in changes.text(found)


def test_a_table_without_rows_has_its_head(tmp_path: Path) -> None:
    now = outcomes(tmp_path / "now", *timed("full", 1.0))
    for recipe, rows in (("full", 1), ("lora", 0)):
        then = outcomes(tmp_path / recipe, *timed(recipe, 1.0))
        changes.write(changes.of_files(now, then), tmp_path / "changes.csv")
        written = pl.read_csv(tmp_path / "changes.csv")
        assert (written.columns, written.height) == (list(changes.COLUMNS), rows)


def test_columns_that_an_earlier_version_lacked_are_null(tmp_path: Path) -> None:
    path = outcomes(tmp_path, *timed("full", 1.0, 1.0, 1.0))
    pl.read_parquet(path).drop("mfu_percent", "energy_joules_per_step").write_parquet(path)
    assert changes.read(path)["mfu_percent"].null_count() == 3


def test_a_file_that_holds_no_outcomes_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    pl.DataFrame({"a": [1]}).write_parquet(path)
    with pytest.raises(StudyError, match="no table of outcomes"):
        changes.read(path)
    with pytest.raises(StudyError, match="can't be read"):
        changes.read(tmp_path / "none.parquet")


def test_nodes_are_compared_with_as_many_nodes(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": "full", "sequence_length": 128, "num_gpus": 2}
    one, two = (handmade.study(grid=[block | {"nodes": nodes}]) for nodes in (1, [1, 2]))
    then = outcomes(tmp_path / "then", *(handmade.completed(p.run, 1.0) for p in handmade.planned(one)), config=one)
    now = outcomes(
        tmp_path / "now",
        *(handmade.completed(p.run, 1.0) if p.run.nodes == 1 else handmade.out_of_memory(p.run)
          for p in handmade.planned(two)),
        config=two,
    )  # fmt: skip
    found = changes.of_files(now, then)
    assert [(row["nodes"], row["change"]) for row in found.changed] == [(1, "not known")]
    both = changes.of_files(now, now)
    assert [row["nodes"] for row in both.changed] == [2, 1]
    reverse = outcomes(tmp_path / "r", *(handmade.completed(p.run, 1.0) for p in handmade.planned(two)), config=two)
    assert "tiny on cpu × 2 on 2 nodes, context 128" in changes.text(changes.of_files(reverse, now))


def test_outcomes_from_before_there_were_nodes_are_of_one(tmp_path: Path) -> None:
    path = outcomes(tmp_path, *timed("full", 1.0, 1.0, 1.0))
    pl.read_parquet(path).drop("nodes").write_parquet(path)
    assert changes.read(path)["nodes"].to_list() == [1, 1, 1]


def test_a_forecast_is_not_an_earlier_answer(tmp_path: Path) -> None:
    skipped = [Record(run=RUNS["full", n], ending=Ending(status="predicted_oom")) for n in (1, 2, 3)]
    assert compared(tmp_path, timed("full", 1.0, 1.0, 1.0), skipped)["full"][0] == "not known"


def test_a_file_of_another_study_is_told_by_what_they_do_not_share(tmp_path: Path) -> None:
    now = outcomes(tmp_path / "now", *timed("full", 1.0))
    assert changes.of_files(now, outcomes(tmp_path / "then", *timed("lora", 1.0))).summary == (
        "0 of 1 configurations are in both: they have no recipe in common"
    )
    (tmp_path / "empty").mkdir()
    empty = outcomes(tmp_path / "empty")
    assert changes.of_files(now, empty).summary.endswith("in both: the earlier one has no runs")
    assert changes.of_files(empty, now).summary.endswith("in both: this one has no runs")


def test_a_folder_is_no_file_of_outcomes(tmp_path: Path) -> None:
    outcomes(tmp_path / "now", *timed("full", 1.0))
    with pytest.raises(StudyError, match="Is a directory"):
        changes.read(tmp_path / "now")


def test_other_data_are_not_compared_where_something_fits_now(tmp_path: Path) -> None:
    ran_out = [handmade.out_of_memory(RUNS["full", number]) for number in (1, 2, 3)]
    fits = timed("full", 1.0, 1.0, 1.0)
    for record in fits:
        record.environment["data"] = {"sha256": "e" * 64}
    for record in ran_out:
        record.environment["data"] = {}
    assert compared(tmp_path / "b", fits, ran_out)["full"][0] == "better", "what the others read is not known"
    for record in ran_out:
        record.environment["data"] = {"sha256": "d" * 64}
    assert compared(tmp_path, fits, ran_out)["full"] == OTHER_DATA
    both = [record.model_copy(update={"environment": {"data": {"sha256": "f" * 64}}}) for record in ran_out]
    assert compared(tmp_path / "c", both, ran_out)["full"] == OTHER_DATA


@pytest.mark.parametrize(("digest", "said"), [("a" * 64, "the same"), ("b" * 64, "differs"), (None, "not known")])
def test_software_is_compared_of_runs_that_did_not_complete_too(tmp_path: Path, digest: str | None, said: str) -> None:
    ran_out = [handmade.out_of_memory(RUNS["full", number]) for number in (1, 2, 3)]
    for record in ran_out:
        record.environment["software_sha256"] = digest
    then, now = outcomes(tmp_path / "then", *ran_out), outcomes(tmp_path / "now", *timed("full", 1.0, 1.0, 1.0))
    found = changes.of_files(now, then)
    assert [one["software"] for one in found.changed] == [said]
    assert ("the software differs in 1" in found.summary) == (said == "differs")


def test_the_file_that_can_not_be_read_is_called_what_it_is(tmp_path: Path) -> None:
    there = outcomes(tmp_path, *timed("full", 1.0))
    with pytest.raises(StudyError, match="The study's outcomes can't be read"):
        changes.of_files(tmp_path / "none.parquet", there)
    with pytest.raises(StudyError, match="The earlier study's outcomes can't be read"):
        changes.of_files(there, tmp_path / "none.parquet")
