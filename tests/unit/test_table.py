from pathlib import Path

import pytest

from finetune_study import recommend, table
from tests.unit import handmade

THRICE = handmade.study(protocol={"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 3})
ONCE = handmade.study()


def test_spread_and_ratio_over_repeats(tmp_path: Path) -> None:
    runs = handmade.runs(THRICE)
    seconds = {"full": (2.0, 2.2, 2.1), "lora": (1.0, 1.3, 1.05)}
    records = [
        handmade.completed(run, time := seconds[recipe][repeat - 1], time, time, used=0.25 if recipe == "lora" else 0.5)
        for (recipe, repeat), run in runs.items()
    ]
    full, lora = handmade.compared(THRICE, tmp_path, *records).to_dicts()
    assert (full["recipe"], lora["recipe"]) == ("full", "lora")
    assert (full["num_repeats"], full["num_completed"], full["states"]) == (3, 3, ["completed"] * 3)
    assert [full[f"step_time_seconds_{s}"] for s in ("median", "min", "max")] == [2.1, 2.0, 2.2]
    assert [lora[f"step_time_seconds_{s}"] for s in ("median", "min", "max")] == [1.05, 1.0, 1.3]
    assert lora["peak_memory_gib_median"] == 0.25
    assert lora["peak_memory_column"] == "peak_device_used_gib"
    assert lora["baseline"] == "full"
    assert lora["step_time_ratio"] == pytest.approx(0.5)
    assert lora["peak_memory_ratio"] == pytest.approx(0.5)
    assert full["step_time_ratio"] == 1.0


def test_numbers_are_over_completed_repeats_alone(tmp_path: Path) -> None:
    runs = handmade.runs(THRICE)
    records = [handmade.completed(runs["full", 1], 2.0, 2.0), handmade.out_of_memory(runs["full", 2])]
    full, lora = handmade.compared(THRICE, tmp_path, *records).to_dicts()
    assert full["states"] == ["completed", "device_oom", "not_run"]
    assert (full["num_repeats"], full["num_completed"], full["step_time_seconds_median"]) == (3, 1, 2.0)
    assert lora["num_completed"] == 0
    assert lora["step_time_seconds_median"] is None
    assert lora["not_compared"] is None


@pytest.mark.parametrize("recipes", [{"full": {}, "packed": {"packing": {}}}, {"packed": {"packing": {}}, "full": {}}])
def test_packed_steps_hold_more_examples_and_have_no_ratio(tmp_path: Path, recipes: dict[str, object]) -> None:
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": 128}]
    config = handmade.study(recipes=recipes, grid=grid)
    runs = handmade.runs(config)
    records = [handmade.completed(runs["full", 1], 2.0), handmade.completed(runs["packed", 1], 2.5)]
    for step in records[1].ranks[0]["steps"]:
        step["real_tokens"] = 5000
    baseline, other = handmade.compared(config, tmp_path, *records).to_dicts()
    assert (baseline["step_time_ratio"], baseline["not_compared"]) == (1.0, None)
    assert (other["step_time_ratio"], other["peak_memory_ratio"]) == (None, None)
    assert "compare real_tokens_per_second_median" in other["not_compared"]
    found = {row["recipe"]: row["real_tokens_per_second_median"] for row in (baseline, other)}
    assert found == {"full": 500.0, "packed": 2000.0}


def test_recipes_that_are_all_packed_have_ratios(tmp_path: Path) -> None:
    recipes: dict[str, dict[str, object]] = {"packed": {"packing": {}}, "lora": {"packing": {}, "lora": {}}}
    grid = [{"targets": "tiny", "hardware": "cpu", "recipes": [*recipes], "sequence_length": 128}]
    config = handmade.study(recipes=recipes, grid=grid)
    records = [handmade.completed(run, 2.0) for run in handmade.runs(config).values()]
    assert [row["step_time_ratio"] for row in handmade.compared(config, tmp_path, *records).to_dicts()] == [1.0, 1.0]


def test_partial_steps_of_a_timeout_are_no_measurement_to_compare(tmp_path: Path) -> None:
    run = handmade.runs(ONCE)["full", 1]
    record = handmade.completed(run, 2.0)
    late = record.model_copy(update={"ending": record.ending.model_copy(update={"status": "timeout"})})
    full = handmade.compared(ONCE, tmp_path, late).row(0, named=True)
    assert full["states"] == ["timeout"]
    assert full["step_time_seconds_median"] is None


def test_recipes_with_differing_software_are_never_compared(tmp_path: Path) -> None:
    runs = handmade.runs(ONCE)
    records = [
        handmade.completed(runs["full", 1], 2.0, software="a" * 64),
        handmade.completed(runs["lora", 1], 1.0, software="b" * 64),
    ]
    full, lora = handmade.compared(ONCE, tmp_path, *records).to_dicts()
    assert full["step_time_ratio"] == 1.0
    assert lora["step_time_seconds_median"] == 1.0
    assert (lora["step_time_ratio"], lora["peak_memory_ratio"]) == (None, None)
    assert lora["not_compared"] == "software, device, weights, data or effective batch differ from the baseline's"


def test_unknown_software_is_not_taken_for_the_same(tmp_path: Path) -> None:
    runs = handmade.runs(ONCE)
    known = handmade.completed(runs["lora", 1], 1.0)
    environment = {**known.environment}
    del environment["software_sha256"]
    records = [handmade.completed(runs["full", 1], 2.0), known.model_copy(update={"environment": environment})]
    lora = handmade.compared(ONCE, tmp_path, *records).row(1, named=True)
    assert lora["step_time_ratio"] is None
    assert lora["provenance"][0].startswith("unknown ")


def test_repeats_with_differing_software_are_not_pooled(tmp_path: Path) -> None:
    runs = handmade.runs(THRICE)
    records = [handmade.completed(runs["full", 1], 2.0), handmade.completed(runs["full", 2], 1.0, software="b" * 64)]
    full = handmade.compared(THRICE, tmp_path, *records).row(0, named=True)
    assert [one.split(table.BETWEEN)[0] for one in full["provenance"]] == ["a" * 64, "b" * 64]
    assert full["not_compared"] == "software, device, weights, data or effective batch differ between its repeats"
    assert full["num_completed"] == 2
    for column in full:
        if column.endswith(("_median", "_min", "_max", "_ratio")):
            assert full[column] is None, column
        if column.endswith("_repeats") and column != "num_repeats":
            assert full[column] == [], column


def test_a_baseline_without_a_completed_run_gives_no_ratio(tmp_path: Path) -> None:
    runs = handmade.runs(ONCE)
    records = [handmade.out_of_memory(runs["full", 1]), handmade.completed(runs["lora", 1], 1.0)]
    lora = handmade.compared(ONCE, tmp_path, *records).row(1, named=True)
    assert (lora["step_time_ratio"], lora["not_compared"]) == (None, "the baseline has no completed run here")


def test_settings_and_micro_batches_are_kept_apart(tmp_path: Path) -> None:
    block = {
        "targets": "tiny",
        "hardware": "cpu",
        "recipes": ["full"],
        "sequence_length": [128, 512],
        "per_device_train_batch_size": [1, 2],
    }
    study = handmade.study(grid=[block, {**block, "recipes": ["lora"], "per_device_train_batch_size": 4}])
    comparisons = handmade.compared(study, tmp_path, *(handmade.completed(p.run, 1.0) for p in handmade.planned(study)))
    assert comparisons.height == 6
    lora = [row for row in comparisons.to_dicts() if row["recipe"] == "lora"]
    assert {row["not_compared"] for row in lora} == {"the baseline is not planned here"}


def test_runs_on_several_nodes_are_not_mixed_with_those_on_one(tmp_path: Path) -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": "full", "sequence_length": 128}
    study = handmade.study(grid=[block | {"num_gpus": 2, "nodes": [1, 2]}])
    one, two = (planned.run for planned in handmade.planned(study))
    documents = handmade.completed(one, 1.0), handmade.completed(two, 5.0)
    rows = handmade.compared(study, tmp_path, *documents).to_dicts()
    assert [(row["nodes"], row["num_repeats"], row["step_time_seconds_median"]) for row in rows] == [
        (1, 1, 1.0),
        (2, 1, 5.0),
    ]
    assert [table.devices("cpu", 2, row["nodes"]) for row in rows] == ["cpu × 2", "cpu × 2 on 2 nodes"]
    assert [one.nodes for one in recommend.recommend(handmade.compared(study, tmp_path))] == [1, 2]


def test_gpu_memory_is_what_tensors_hold(tmp_path: Path) -> None:
    gpu = handmade.study(
        hardware={"a100": {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}},
        grid=[{"targets": "tiny", "hardware": "a100", "recipes": ["full"], "sequence_length": 128}],
    )
    run = handmade.runs(gpu)["full", 1]
    record = handmade.completed(run, 1.0, used=9.0)
    record.ranks[0]["memory"] |= {"peak_allocated_bytes": 3 * 2**30, "peak_reserved_bytes": 5 * 2**30}
    row = handmade.compared(gpu, tmp_path, record).row(0, named=True)
    assert (row["peak_memory_column"], row["peak_memory_gib_median"]) == ("peak_memory_allocated_gib", 3.0)


def test_the_baseline_is_the_configs_or_the_first_recipe() -> None:
    assert table.baseline_of(ONCE) == "full"
    assert table.baseline_of(handmade.study(report={"baseline": "lora"})) == "lora"


def test_an_empty_study_has_an_empty_table_of_the_same_columns(tmp_path: Path) -> None:
    empty = table.compare(handmade.frame(ONCE, tmp_path).clear(), "full")
    assert empty.height == 0
    assert empty.schema == table.SCHEMA


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, ""),
        (0.0, "0.00"),
        (1.0, "1.00"),
        (0.12345, "0.123"),
        (45.67, "45.7"),
        (999.0, "999"),
        (999.7, "1,000"),
        (2472.4, "2,472"),
        (12345.6, "12,346"),
        (0.0000123, "0.0000123"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_are_shown_with_three_digits(value: float | None, text: str) -> None:
    assert table.show(value) == text


def test_a_unit_follows_a_number_and_never_stands_alone() -> None:
    assert table.show(1.5, "s") == "1.50 s"
    assert table.show(None, "s") == ""


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        ((2.0, 1.781, 2.25), ("2.00", "1.78", "2.25")),
        ((1.001, 0.999, 1.003), ("1.00", "0.999", "1.00")),
        ((1.001, 1.001, 1.001), ("1.001", "1.001", "1.001")),
        ((1.2, 1.0004, 1.44), ("1.2000", "1.0004", "1.4400")),
        ((0.9996, 0.9994, 0.9998), ("0.9996", "0.9994", "0.9998")),
        ((1.001, None, None), ("1.00", "", "")),
    ],
)
def test_a_ratio_that_leaves_out_1_is_not_shown_as_1(
    ratio: tuple[float, float | None, float | None], text: tuple[str, str, str]
) -> None:
    assert table.show_ratio(*ratio) == text
