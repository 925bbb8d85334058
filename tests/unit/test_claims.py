from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from finetune_study import claims, recommend
from finetune_study.claims import Claim
from finetune_study.config import Config
from finetune_study.record import Ending, Record
from tests.unit import handmade

GPU = {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}


def study(recipes: dict[str, Any], lengths: list[int], num_gpus: int = 2) -> Config:
    block = {
        "targets": "tiny",
        "hardware": "a100",
        "num_gpus": num_gpus,
        "recipes": list(recipes),
        "sequence_length": lengths,
    }
    protocol = {"num_untimed_steps": 1, "num_timed_steps": 3, "repeats": 3}
    return handmade.study(hardware={"a100": GPU}, recipes=recipes, grid=[block], protocol=protocol)


def checked(
    config: Config, root: Path, numbers: Mapping[tuple[str, int], tuple[float, float] | None], **parameters: int
) -> dict[str, Claim]:
    """The claims where each recipe at each context took (seconds, GiB), ran out of memory (None), or has no outcome."""
    records: list[Record] = []
    for one in handmade.planned(config):
        run = one.run
        if (run.recipe, run.sequence_length) not in numbers:
            continue
        found = numbers[run.recipe, run.sequence_length]
        if found is None:
            records.append(handmade.out_of_memory(run))
            continue
        # Nodes differ by 8 %, tries by 0.5 %: every recipe on the same three nodes.
        seconds = found[0] * (1 + 0.08 * (run.repeat - 1)) * (1 + 0.005 * (len(run.recipe) % 2 - 0.5) * run.repeat)
        done = handmade.completed(run, seconds, host=f"node-{run.repeat}")
        memory = int(found[1] * 2**30) + run.repeat * 2**16
        done.ranks[0].update(memory={"peak_allocated_bytes": memory}, **parameters)
        records.append(done)
    rows = handmade.compared(config, root, *records).to_dicts()
    return {claim.name: claim for claim in claims.check(rows)}


def test_flash_attention_long_and_short(tmp_path: Path) -> None:
    config = study({"plain": {"eager": {}}, "flash": {"flash_attention_2": {}}}, [256, 4096])
    found = checked(
        config,
        tmp_path,
        {
            ("plain", 256): (1.0, 10.0),
            ("flash", 256): (1.02, 10.0),
            ("plain", 4096): (9.0, 60.0),
            ("flash", 4096): (5.0, 20.0),
        },
    )
    assert (found["flash-long"].answer, found["flash-short"].answer) == ("holds", "holds")
    (long,) = found["flash-long"].comparisons
    assert long.where == "tiny, a100 × 2, context 4096"
    assert "memory × 0.333" in long.what


def test_a_claim_that_the_numbers_contradict_does_not_hold(tmp_path: Path) -> None:
    config = study({"plain": {"eager": {}}, "flash": {"flash_attention_2": {}}}, [4096])
    found = checked(config, tmp_path, {("plain", 4096): (5.0, 20.0), ("flash", 4096): (9.0, 20.5)})
    assert found["flash-long"].answer == "does not hold"


def test_without_a_pair_there_is_not_enough_data(tmp_path: Path) -> None:
    config = study({"plain": {"eager": {}}}, [4096])
    found = checked(config, tmp_path, {("plain", 4096): (5.0, 20.0)})
    assert {claim.answer for claim in found.values()} == {"not enough data"}


def test_zero_saves_memory_and_three_costs_time(tmp_path: Path) -> None:
    config = study({"ddp": {}, "zero2": {"zero2": {}}, "zero3": {"zero3": {}}}, [256])
    found = checked(
        config, tmp_path, {("ddp", 256): (1.0, 40.0), ("zero2", 256): (1.1, 15.0), ("zero3", 256): (2.0, 10.0)}
    )
    assert found["zero-memory"].answer == "holds"
    assert len(found["zero-memory"].comparisons) == 2
    assert found["zero3-costs"].answer == "holds"


def test_checkpointing_saves_and_rescues(tmp_path: Path) -> None:
    config = study({"full": {}, "full-gc": {"gradient_checkpointing": {}}}, [256, 4096])
    found = checked(
        config,
        tmp_path,
        {
            ("full", 256): (1.0, 40.0),
            ("full-gc", 256): (1.3, 10.0),
            ("full", 4096): None,
            ("full-gc", 4096): (9.0, 60.0),
        },
    )
    assert found["checkpointing"].answer == "holds"
    assert found["checkpointing-fits"].answer == "holds"
    assert "completes in 1 of 1" in found["checkpointing-fits"].comparisons[0].what


def test_very_large_models_need_all_three(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {
        "zero3-lora": {"zero3": {}, "lora": {}},
        "zero3-lora-gc": {"zero3": {}, "lora": {}, "gradient_checkpointing": {}},
    }
    config = study(recipes, [256])
    needed = checked(
        config,
        tmp_path / "a",
        {("zero3-lora", 256): None, ("zero3-lora-gc", 256): (1.0, 70.0)},
        total_parameters=70_000_000_000,
    )
    assert needed["very-large"].answer == "holds"
    fits = checked(
        config,
        tmp_path / "b",
        {("zero3-lora", 256): (1.0, 75.0), ("zero3-lora-gc", 256): (1.0, 70.0)},
        total_parameters=70_000_000_000,
    )
    assert fits["very-large"].answer == "does not hold"


def test_the_best_balance_by_the_product_of_time_and_memory(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "zero2-lora": {"zero2": {}, "lora": {}}}
    config = study(recipes, [256])
    found = checked(
        config, tmp_path, {("full", 256): (1.0, 40.0), ("lora", 256): (0.9, 20.0), ("zero2-lora", 256): (0.9, 10.0)}
    )
    assert found["balance"].answer == "holds"
    assert found["balance"].comparisons[0].what.startswith("zero2-lora against lora: time and memory × 0.5")
    assert " to 0.5" in found["balance"].comparisons[0].what
    assert found["lora-memory"].comparisons[0].what.endswith("memory × 0.500 (0.500 to 0.500), a saving of 50.0 %")
    assert found["lora-memory"].answer == "does not hold"


def test_a_packed_recipe_is_not_compared_with_padded_ones_and_hides_none(tmp_path: Path) -> None:
    """Its step holds more examples: its time is no match for theirs, and theirs are still one of a kind."""
    recipes: dict[str, Any] = {
        "full": {},
        "lora": {"lora": {}},
        "zero2-lora": {"zero2": {}, "lora": {}},
        "packed": {"lora": {}, "packing": {}},
    }
    config = study(recipes, [256])
    numbers = {"full": (1.0, 40.0), "lora": (0.9, 20.0), "zero2-lora": (0.9, 10.0), "packed": (0.1, 9.0)}
    found = checked(config, tmp_path / "claims", {(name, 256): value for name, value in numbers.items()})
    (balance,) = found["balance"].comparisons
    assert balance.what.startswith("zero2-lora against lora: ")
    records = [
        handmade.completed(one.run, numbers[one.run.recipe][0], host=f"node-{one.run.repeat}")
        for one in handmade.planned(config)
    ]
    walk = claims.walk(handmade.compared(config, tmp_path / "walk", *records).to_dicts(), 2, 1, 80.0)
    assert [step.row["recipe"] for step in walk.first if step.row and step.taken] == ["lora"]


def test_balance_and_saving_are_undecided_without_an_interval(tmp_path: Path) -> None:
    """One run of each: the numbers are shown, and decide nothing."""
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "zero2-lora": {"zero2": {}, "lora": {}}}
    config = study(recipes, [256])
    records = [
        handmade.completed(one.run, 1.0, used={"full": 40.0, "lora": 10.0, "zero2-lora": 10.0}[one.run.recipe])
        for one in handmade.planned(config)
        if one.run.repeat == 1
    ]
    found = {claim.name: claim for claim in claims.check(handmade.compared(config, tmp_path, *records).to_dicts())}
    for name in ("balance", "lora-memory"):
        assert [one.speaks_for for one in found[name].comparisons] == [None], name
        assert "(no interval)" in found[name].comparisons[0].what


def test_very_large_counts_what_its_criterion_says(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {
        "lora": {"lora": {}},
        "zero3-lora": {"zero3": {}, "lora": {}},
        "zero3-lora-gc": {"zero3": {}, "lora": {}, "gradient_checkpointing": {}},
    }
    config = study(recipes, [128, 256])
    mix, lesser, least = ((name, 256) for name in ("zero3-lora-gc", "zero3-lora", "lora"))
    large = {"total_parameters": 70_000_000_000}
    known_to_be_large = {("lora", 128): (1.0, 60.0)}
    cases: dict[str, tuple[dict[tuple[str, int], tuple[float, float] | None], bool | None]] = {
        "none of two fits": ({mix: (1.0, 70.0), lesser: None, least: None}, True),
        "one of two fits": ({mix: (1.0, 70.0), lesser: (1.0, 75.0), least: None}, False),
        "a lesser one fits, the mix does not": ({mix: None, lesser: (1.0, 75.0), least: None}, False),
        "one of two is not run": ({mix: (1.0, 70.0), lesser: None}, None),
        "nothing fits": ({mix: None, lesser: None, least: None}, False),
        "the mix is not run": ({lesser: None, least: None}, None),
    }
    for name, (numbers, speaks) in cases.items():
        found = checked(config, tmp_path / name, numbers | known_to_be_large, **large)["very-large"]
        (one,) = (one for one in found.comparisons if one.where.endswith("context 256"))
        assert one.speaks_for is speaks, name


def test_very_large_counts_where_zero3_can_shard_and_says_what_speaks_against(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {
        "zero3-lora": {"zero3": {}, "lora": {}},
        "zero3-lora-gc": {"zero3": {}, "lora": {}, "gradient_checkpointing": {}},
    }
    large = {"total_parameters": 70_000_000_000}
    numbers: dict[tuple[str, int], tuple[float, float] | None] = {
        ("zero3-lora", 128): (1.0, 60.0),
        ("zero3-lora-gc", 128): (1.0, 50.0),
        ("zero3-lora", 256): None,
        ("zero3-lora-gc", 256): (1.0, 70.0),
        ("zero3-lora", 512): None,
        ("zero3-lora-gc", 512): None,
    }
    config = study(recipes, [128, 256, 512])
    found = checked(config, tmp_path / "two", numbers, **large)["very-large"]
    assert (
        found.tally
        == "1 of 3 for it; against it: 1 where a lesser mix fits and 1 where the mix ran out of memory itself"
    )
    alone = checked(study(recipes, [128, 256, 512], num_gpus=1), tmp_path / "one", numbers, **large)["very-large"]
    assert alone.comparisons == []


def test_very_large_mixes_are_compared_with_those_that_use_the_host_alike(tmp_path: Path) -> None:
    """The paper keeps optimizer states on the host throughout."""
    recipes: dict[str, Any] = {
        "lesser": {"zero2": {}, "lora": {}, "gradient_checkpointing": {}},
        "mix": {"zero3": {}, "lora": {}, "gradient_checkpointing": {}},
    }
    recipes |= {f"{name}-offload": {**recipe, "offload_optimizer": {}} for name, recipe in recipes.items()}
    numbers = {
        ("lesser", 256): None,
        ("mix", 256): None,
        ("lesser-offload", 256): None,
        ("mix-offload", 256): (9.0, 60.0),
    }
    found = checked(study(recipes, [256]), tmp_path, numbers, total_parameters=70_000_000_000)["very-large"]
    assert [(one.what.split()[0], one.speaks_for) for one in found.comparisons] == [
        ("mix", False),
        ("mix-offload", True),
    ]


def test_memory_with_flash_attention_grows_as_a_line_or_does_not(tmp_path: Path) -> None:
    config = study({"flash": {"flash_attention_2": {}}}, [1024, 2048, 4096])
    for name, peaks, speaks in (
        ("line", (10.0, 14.0, 22.0), True),
        ("square", (10.0, 13.0, 25.0), False),
        ("a step that holds the peak", (10.0, 10.0, 12.0), None),
    ):
        numbers = {("flash", length): (1.0, gib) for length, gib in zip((1024, 2048, 4096), peaks, strict=True)}
        (one,) = checked(config, tmp_path / name, numbers)["flash-linear"].comparisons
        assert one.speaks_for is speaks, (name, one.what)
    assert not checked(config, tmp_path / "two", {("flash", n): (1.0, 9.0) for n in (1024, 2048)})[
        "flash-linear"
    ].deciding


def test_the_tree_stops_at_the_first_rung_that_fits(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "lora-gc": {"lora": {}, "gradient_checkpointing": {}}}
    config = study(recipes, [256, 4096])
    records: list[Record] = []
    for one in handmade.planned(config):
        short = one.run.sequence_length == 256
        fits = one.run.recipe == "lora-gc" or (one.run.recipe == "lora" and short)
        records.append(handmade.completed(one.run, 1.0, used=10.0) if fits else handmade.out_of_memory(one.run))
    walk = claims.walk(handmade.compared(config, tmp_path, *records).to_dicts(), 2, 1, 80.0)
    assert [(step.row["recipe"], step.taken) for step in walk.first if step.row] == [("full", False), ("lora", True)]
    assert walk.first[1].room == 70.0
    last = walk.second[-1]
    assert (last.question, last.row and last.row["recipe"], last.taken) == (
        "Context 4096: gradient checkpointing",
        "lora-gc",
        True,
    )


def test_of_a_tie_the_tree_ends_in_what_is_named(tmp_path: Path) -> None:
    """Of a tie not always the fastest by median is named."""
    recipes: dict[str, Any] = {"full": {}, "lora": {"lora": {}}, "zero2-lora": {"zero2": {}, "lora": {}}}
    config = study(recipes, [256])
    seconds = {"full": 2.0, "lora": 1.0, "zero2-lora": 1.01}
    records = [handmade.completed(one.run, seconds[one.run.recipe]) for one in handmade.planned(config)]
    rows = handmade.compared(config, tmp_path, *records).to_dicts()
    fastest, named = (claims.walk(rows, 2, 1, 80.0, named=by) for by in (None, {256: ("zero2-lora", "1")}))
    ends = [next(step.row for step in walk.first if step.taken) for walk in (fastest, named)]
    assert [row and row["recipe"] for row in ends] == ["lora", "zero2-lora"]


def test_the_tree_ends_in_what_fits_though_the_ladder_does_not_name_it(tmp_path: Path) -> None:
    recipes: dict[str, Any] = {"full": {}, "odd": {"zero1": {}, "lora": {}}}
    config = study(recipes, [256])
    records = [
        handmade.completed(one.run, 1.0) if one.run.recipe == "odd" else handmade.out_of_memory(one.run)
        for one in handmade.planned(config)
    ]
    walk = claims.walk(handmade.compared(config, tmp_path, *records).to_dicts(), 2, 1, 80.0)
    last = walk.first[-1]
    assert (last.question, last.row and last.row["recipe"], last.taken) == (claims._NAMED, "odd", True)


def test_the_tree_ends_in_what_is_recommended(tmp_path: Path) -> None:
    """LoRA is the first rung that fits, by a recipe that saves activations, too; another recipe is faster."""
    recipes: dict[str, Any] = {
        "full": {},
        "lora": {"lora": {}},
        "lora-gc": {"lora": {}, "gradient_checkpointing": {}},
        "zero2-lora": {"zero2": {}, "lora": {}},
        "zero1": {"zero1": {}, "gradient_checkpointing": {}},
    }
    config = study(recipes, [256, 4096])
    seconds = {("lora-gc", 256): 2.0, ("zero2-lora", 256): 1.0, ("zero1", 4096): 5.0}
    records: list[Record] = []
    for one in handmade.planned(config):
        time = seconds.get((one.run.recipe, one.run.sequence_length))
        if time is None:
            records.append(handmade.out_of_memory(one.run))
            continue
        done = handmade.completed(one.run, time, used=30.0, host=f"node-{one.run.repeat}")
        for rank in done.ranks:
            rank["memory"]["peak_allocated_bytes"] = 20 * 2**30
        records.append(done)
    compared = handmade.compared(config, tmp_path, *records)
    walk = claims.walk(compared.to_dicts(), 2, 1, 80.0)
    assert [(step.row["recipe"], step.fits, step.taken) for step in walk.first if step.row] == [
        ("full", False, False),
        ("lora-gc", True, False),
        ("zero2-lora", True, True),
    ]
    assert walk.first[-1].room == 50.0  # of the device's peak, not of what tensors held
    short, long = recommend.recommend(compared)
    assert [walk.first[-1].row["recipe"], walk.second[-1].row["recipe"]] == [short.recipe, long.recipe]  # type: ignore[index]
    assert [step.taken for step in walk.second].count(True) == 1


@pytest.mark.parametrize("times", [(2.0, 1.0, 1.5), (1.0, 2.0, 3.0)])
def test_of_larger_micro_batches_the_tree_takes_the_fastest_alone(
    tmp_path: Path, times: tuple[float, float, float]
) -> None:
    block = study({"full": {}}, [256]).grid[0].model_dump() | {"per_device_train_batch_size": [1, 2, 4]}
    config = handmade.study(
        hardware={"a100": GPU}, recipes={"full": {}}, grid=[block], training={"effective_batch_size": 8}
    )
    records = [
        handmade.completed(one.run, times[int(one.run.micro_batch).bit_length() - 1])
        for one in handmade.planned(config)
    ]
    rows = handmade.compared(config, tmp_path, *records).to_dicts()
    walk = claims.walk(rows, 2, 1, 80.0)
    larger = [step for step in walk.second if step.question == "More sequences at once, at context 256"]
    assert [(step.row["micro_batch"], step.fits, step.taken) for step in larger if step.row] == [
        ("2", True, times[1] == 1.0),
        ("4", True, False),
    ]
    assert claims.where(rows[-1]) == "tiny, a100 × 2, context 256, micro-batch 4"


def test_the_tree_names_no_fastest_across_software(tmp_path: Path) -> None:
    config = study({"full": {}, "lora": {"lora": {}}}, [256])
    records = [
        handmade.completed(one.run, 1.0, software=("a" if one.run.recipe == "full" else "b") * 64)
        for one in handmade.planned(config)
    ]
    walk = claims.walk(handmade.compared(config, tmp_path, *records).to_dicts(), 2, 1, 80.0)
    assert [step.question for step in walk.first if step.taken] == ["All weights trained, nothing sharded"]


def test_nodes_are_never_mixed(tmp_path: Path) -> None:
    """On one node alone ZeRO-2 is measured, on two alone ZeRO-3: that is no comparison."""
    recipes: dict[str, Any] = {"two": {"zero2": {}}, "three": {"zero3": {}}}
    block = {"targets": "tiny", "hardware": "a100", "num_gpus": 2, "sequence_length": 256}
    parts = [block | {"recipes": ["two"], "nodes": 1}, block | {"recipes": ["three"], "nodes": [1, 2]}]
    config = handmade.study(hardware={"a100": GPU}, recipes=recipes, grid=parts)
    done = [handmade.completed(one.run, float(one.run.nodes)) for one in handmade.planned(config)]
    rows = handmade.compared(config, tmp_path, *done).to_dicts()
    (found,) = (claim for claim in claims.check(rows) if claim.name == "zero3-costs")
    (pair,) = found.comparisons
    assert pair.where == "tiny, a100 × 2, context 256"
    assert "time × 1.00" in pair.what
    assert claims.where(rows[-1]) == "tiny, a100 × 2 on 2 nodes, context 256"
    walk = claims.walk(rows, 2, 2, 80.0)
    assert {step.row["nodes"] for step in walk.first if step.row} <= {2}


def test_what_an_easier_run_implies_speaks_as_what_ran_out_itself(tmp_path: Path) -> None:
    config = study({"plain": {}, "gc": {"gradient_checkpointing": {}}}, [256])
    documents = [
        handmade.completed(one.run, 1.0)
        if one.run.recipe == "gc"
        else Record(run=one.run, ending=Ending(status="implied_oom", reason="an easier run ran out"))
        for one in handmade.planned(config)
    ]
    rows = handmade.compared(config, tmp_path, *documents).to_dicts()
    (found,) = (claim for claim in claims.check(rows) if claim.name == "checkpointing-fits")
    assert found.answer == "holds"
