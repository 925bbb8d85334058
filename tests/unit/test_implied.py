import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_study import implied, record, study
from finetune_study import run as run_module
from finetune_study.config import Config
from finetune_study.implied import Kin, Rung
from finetune_study.paths import Results
from finetune_study.record import Ending, Record
from finetune_study.run import Run
from finetune_study.study import Study
from tests.unit import handmade

GRID: dict[str, Any] = {
    "targets": ["tiny", "other"],
    "hardware": ["cpu", "cpu2"],
    "recipes": ["full", "lora"],
    "sequence_length": [64, 128, 256],
    "per_device_train_batch_size": [1, 2, 4],
    "num_gpus": [1, 2],
}
CONFIG: dict[str, Any] = {
    "models": {"tiny": handmade.LLAMA, "other": handmade.LLAMA},
    "hardware": {name: {"device": "cpu", "memory_gib": 1.0, "max_gpus": 2} for name in ("cpu", "cpu2")},
    "grid": [GRID],
    "training": {"effective_batch_size": 8},
    "protocol": {"repeats": 2},
}

Place = tuple[str, str, str, int, int, int, int]
"""Target, hardware, recipe, GPUs, context, micro-batch, repeat."""
EASY: Place = ("tiny", "cpu", "full", 1, 128, 2, 1)


def runs_of(config: Config) -> dict[Place, Run]:
    return {
        (r.target, r.hardware.name, r.recipe, r.num_gpus, r.sequence_length, r.micro_batch, r.repeat): r
        for r in (one.run for one in handmade.planned(config))
    }


RUNS = runs_of(handmade.study(**CONFIG))


def ended(run: Run, **ending: Any) -> Record:
    """Out of memory, that of a GPU in one piece; on a CPU nobody says so."""
    whole = {} if run.hardware.device == "cpu" else {"fragmented": False}
    return Record(
        run=run, ending=Ending(**({"status": "device_oom", "phase": "backward"} | whole | ending)), ranks=[{}]
    )


def witness(root: Path, harder: Run, *records: Record, runs: dict[Place, Run] = RUNS) -> str | None:
    results = handmade.write(root, *records)
    return Kin(results, implied.rungs(runs.values())).witness(harder.run_id)


def at(runs: dict[Place, Run] = RUNS, **changes: Any) -> Run:
    """The run at EASY's place but for these."""
    names = ("target", "hardware", "recipe", "num_gpus", "sequence_length", "micro_batch", "repeat")
    return runs[tuple((dict(zip(names, EASY, strict=True)) | changes).values())]  # type: ignore[index]


# --- what is implied -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "is_implied"),
    [
        ({"sequence_length": 256}, True),
        ({"sequence_length": 256, "repeat": 2}, True),
        ({"micro_batch": 4}, True),
        ({"sequence_length": 256, "micro_batch": 4}, True),
        ({}, False),
        ({"repeat": 2}, False),
        ({"sequence_length": 64}, False),
        ({"micro_batch": 1}, False),
        ({"sequence_length": 256, "micro_batch": 1}, False),
        ({"sequence_length": 64, "micro_batch": 4}, False),
        ({"sequence_length": 256, "num_gpus": 2}, False),
        ({"sequence_length": 256, "recipe": "lora"}, False),
        ({"sequence_length": 256, "target": "other"}, False),
        ({"sequence_length": 256, "hardware": "cpu2"}, False),
    ],
    ids=str,
)
def test_only_a_harder_run_of_the_same_kind_is_implied(tmp_path: Path, changes: Any, is_implied: bool) -> None:
    found = witness(tmp_path, at(**changes), ended(RUNS[EASY]))
    assert found == (RUNS[EASY].run_id if is_implied else None)


@pytest.mark.parametrize(
    "ending",
    [
        {"phase": "evaluate"},
        {"phase": None},
        {"status": "host_oom"},
        {"status": "timeout", "phase": None},
        {"status": "completed", "phase": None},
        {"status": "unsupported", "phase": None},
        {"status": "implied_oom", "phase": None, "witness": "another"},
    ],
    ids=str,
)
def test_only_training_that_ran_out_of_the_devices_memory_is_a_witness(tmp_path: Path, ending: dict[str, Any]) -> None:
    assert witness(tmp_path, at(sequence_length=256), ended(RUNS[EASY], **ending)) is None


@pytest.mark.parametrize("phase", ["load", "forward", "backward", "optimizer"])
def test_every_phase_of_training_is_one(tmp_path: Path, phase: str) -> None:
    assert witness(tmp_path, at(sequence_length=256), ended(RUNS[EASY], phase=phase, fragmented=False))


def test_whether_a_gpus_memory_was_in_pieces_must_be_known(tmp_path: Path) -> None:
    """CUDA's errors outside of torch's allocator do not say; a CPU's never do."""
    gpu = runs_of(handmade.study(**CONFIG | {"hardware": {n: {"memory_gib": 16.0} for n in ("cpu", "cpu2")}}))
    found = {
        (device, fragmented): witness(
            tmp_path / f"{device}{fragmented}",
            at(runs, sequence_length=256),
            ended(runs[EASY], fragmented=fragmented),
            runs=runs,
        )
        is not None
        for device, runs in (("cpu", RUNS), ("cuda", gpu))
        for fragmented in (None, False, True)
    }
    assert found == {
        ("cpu", None): True, ("cpu", False): True, ("cpu", True): True,
        ("cuda", None): False, ("cuda", False): True, ("cuda", True): False,
    }  # fmt: skip


def test_a_last_micro_batch_does_not_lie_beside_gradients(tmp_path: Path) -> None:
    """8 sequences: micro-batches of 1 and 2 on two GPUs accumulate 4 and 2 times, one of 4 does not."""
    easy = at(num_gpus=2, micro_batch=1)
    assert [at(num_gpus=2, micro_batch=n).gradient_accumulation_steps for n in (1, 2, 4)] == [4, 2, 1]
    assert witness(tmp_path, at(num_gpus=2, micro_batch=2), ended(easy)) == easy.run_id
    assert witness(tmp_path, at(num_gpus=2, micro_batch=4), ended(easy)) is None
    whole = at(num_gpus=2, micro_batch=4)
    longer = at(num_gpus=2, micro_batch=4, sequence_length=256)
    assert witness(tmp_path, longer, ended(whole)) == whole.run_id


@pytest.mark.parametrize(
    "other", [{"repeat": 2}, {"sequence_length": 256, "micro_batch": 4}, {"micro_batch": 4}], ids=str
)
def test_a_witness_is_not_believed_when_a_run_that_needs_as_much_completed(tmp_path: Path, other: Any) -> None:
    harder = at(sequence_length=256)
    assert witness(tmp_path, harder, ended(RUNS[EASY]), handmade.completed(at(**other), 1.0)) is None
    # Another witness is not touched by that: its own kin did not complete.
    beside = at(sequence_length=128, micro_batch=1)
    assert witness(tmp_path / "2", harder, ended(RUNS[EASY]), handmade.completed(beside, 1.0)) == RUNS[EASY].run_id


def test_the_easiest_witness_is_named(tmp_path: Path) -> None:
    records = [ended(at(sequence_length=s, micro_batch=b)) for s, b in ((128, 2), (64, 2), (128, 1))]
    assert witness(tmp_path, at(sequence_length=256, micro_batch=4), *records) == at(sequence_length=64).run_id


def test_a_damaged_record_proves_nothing(tmp_path: Path) -> None:
    results = handmade.write(tmp_path, ended(RUNS[EASY]))
    for text in ("", "{", "[]", "null", '{"ending": 3}', '{"ending": {"status": "device_oom", "phase": []}}'):
        results.run(RUNS[EASY].run_id).record.write_text(text)
        assert Kin(results, implied.rungs(RUNS.values())).witness(at(sequence_length=256).run_id) is None


# --- fewer GPUs ------------------------------------------------------------------------------------------------------

SHARDING: dict[str, list[str]] = {
    "zero1": ["zero1"],
    "zero2": ["zero2"],
    "zero3": ["zero3"],
    "fsdp": ["fsdp"],
    "lora-zero3": ["lora", "zero3"],
    "lora-fsdp": ["lora", "fsdp"],
    "zero3-states-away": ["zero3", "offload_optimizer"],
    "zero3-weights-away": ["zero3", "offload_param"],
}
"""Recipes of which each rank has less on its device the more ranks there are."""
NOT_SHARDING: dict[str, list[str]] = {
    "full": [],
    "lora": ["lora"],
    "lora-zero1": ["lora", "zero1"],
    "lora-zero2": ["lora", "zero2"],
    "zero1-away": ["zero1", "offload_optimizer"],
    "zero2-away": ["zero2", "offload_optimizer"],
    "zero3-away": ["zero3", "offload_optimizer", "offload_param"],
    "lora-zero3-away": ["lora", "zero3", "offload_param"],
    "fsdp-away": ["fsdp", "offload_param"],
}
SHARED = runs_of(
    handmade.study(
        models={"tiny": handmade.LLAMA},
        hardware={"cpu": {"memory_gib": 16.0}},
        recipes=SHARDING | NOT_SHARDING,
        grid=[
            {
                "targets": "tiny",
                "hardware": "cpu",
                "recipes": [*SHARDING, *NOT_SHARDING],
                "num_gpus": [1, 2, 4, 8],
                "sequence_length": [64, 128, 256],
                "per_device_train_batch_size": [1, 2, 4],
            }
        ],
        training={"effective_batch_size": 16},
    )
)


def on_fewer(root: Path, of: dict[str, Any], harder: dict[str, Any], *records: Record) -> bool:
    one, other = (at(SHARED, micro_batch=1, **settings) for settings in (of, harder))
    found = witness(root, other, ended(one), *records, runs=SHARED)
    assert found in (None, one.run_id)
    return found is not None


@pytest.mark.parametrize("recipe", [*SHARDING, *NOT_SHARDING])
def test_fewer_gpus_are_harder_where_shards_grow_on_their_devices(tmp_path: Path, recipe: str) -> None:
    on_eight: Any = {"recipe": recipe, "num_gpus": 8}
    for num_gpus in (2, 4):
        assert on_fewer(tmp_path, on_eight, {"recipe": recipe, "num_gpus": num_gpus}) == (recipe in SHARDING)
    assert not on_fewer(tmp_path, on_eight, {"recipe": recipe, "num_gpus": 1}), "it gathers nothing"


@pytest.mark.parametrize(
    ("settings", "is_implied"),
    [
        ({"num_gpus": 2, "sequence_length": 256}, True),
        ({"num_gpus": 2, "sequence_length": 64}, False),
        ({"num_gpus": 8, "sequence_length": 256}, False),
        ({"num_gpus": 2, "recipe": "zero3"}, False),
    ],
    ids=str,
)
def test_fewer_gpus_and_the_other_axes(tmp_path: Path, settings: dict[str, Any], is_implied: bool) -> None:
    assert on_fewer(tmp_path, {"recipe": "zero2", "num_gpus": 4}, {"recipe": "zero2"} | settings) == is_implied


@pytest.mark.parametrize(
    "ending", [{"fragmented": True}, {"fragmented": None}, {"phase": "evaluate"}, {"status": "host_oom"}], ids=str
)
def test_fewer_gpus_need_a_witness_as_good(tmp_path: Path, ending: dict[str, Any]) -> None:
    one, other = (at(SHARED, recipe="zero3", num_gpus=number) for number in (8, 4))
    assert witness(tmp_path, other, ended(one, **ending), runs=SHARED) is None
    assert witness(tmp_path, other, ended(one), handmade.completed(at(SHARED, recipe="zero3", num_gpus=2), 1.0),
                   runs=SHARED) is None  # fmt: skip


def test_on_fewer_gpus_a_run_may_accumulate_where_its_witness_does_not(tmp_path: Path) -> None:
    """16 sequences: 4 on each of four GPUs is a single pass, on two it is two of them. The other way round nothing
    follows: 2 on each of four GPUs is two passes, and a single one of 8 may need less."""
    easy, hard = (at(SHARED, recipe="zero2", num_gpus=number, micro_batch=4) for number in (4, 2))
    assert (easy.gradient_accumulation_steps, hard.gradient_accumulation_steps) == (1, 2)
    assert witness(tmp_path, hard, ended(easy), runs=SHARED) == easy.run_id
    whole = Rung.of(hard.model_copy(update={"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}))
    passes = Rung.of(at(SHARED, recipe="zero2", num_gpus=4, micro_batch=2))
    assert passes.gradient_accumulation_steps == 2
    assert not whole.needs_as_much_as(passes)
    assert whole.needs_as_much_as(Rung.of(easy))


def test_the_largest_that_fits_decides_about_every_size_on_fewer_gpus() -> None:
    """Whatever is planned for them, as `micro_batch` would try it."""
    searched = {"per_device_train_batch_size": "max", "gradient_accumulation_steps": None}
    on_eight, on_four = (
        Rung.of(at(SHARED, recipe="zero3", num_gpus=number).model_copy(update=searched)) for number in (8, 4)
    )
    assert on_four.is_harder_than(on_eight)
    for size in (1, 2, 4):
        sized = Rung.of(at(SHARED, recipe="zero3", num_gpus=4, micro_batch=size))
        assert sized.is_harder_than(on_eight)
        assert not on_four.needs_as_much_as(Rung.of(at(SHARED, recipe="zero3", num_gpus=8, micro_batch=size)))


def test_other_nodes_are_another_kind() -> None:
    """Communication between nodes has buffers of its own."""
    runs = [
        at(SHARED, recipe="zero3", num_gpus=number).model_copy(update={"nodes": nodes})
        for number, nodes in ((8, 2), (8, 1), (4, 1))
    ]
    two, one, four = implied.rungs(runs)
    assert [two, one, four] == [Rung.of(run) for run in runs]
    assert two.kind != one.kind == four.kind


rung_strategy = st.builds(
    Rung,
    run_id=st.just("x"),
    kind=st.sampled_from("ab"),
    sequence_length=st.integers(1, 3),
    per_device_train_batch_size=st.sampled_from([1, 2, 3, "max"]),
    num_gpus=st.integers(1, 3),
    gradient_accumulation_steps=st.integers(1, 3),
)


@given(rung_strategy, rung_strategy, rung_strategy)
def test_being_harder_is_a_strict_order(a: Rung, b: Rung, c: Rung) -> None:
    """So that a run is never its own witness, not even by a detour."""
    assert a.needs_as_much_as(a)
    assert not a.is_harder_than(a)
    assert not (a.is_harder_than(b) and b.is_harder_than(a))
    if a.is_harder_than(b) and b.is_harder_than(c):
        assert a.is_harder_than(c)
    if a.is_harder_than(b):
        assert a.kind == b.kind
        assert a.sequence_length >= b.sequence_length
        assert a.num_gpus <= b.num_gpus
        assert not b.needs_as_much_as(a)


def test_kinds_are_told_apart_by_all_that_defines_a_run() -> None:
    """Names stand for it within a study; between studies the settings decide."""
    rungs = {rung.run_id: rung for rung in implied.rungs(RUNS.values())}
    for one, other in itertools.combinations(list(RUNS)[::5], 2):
        same = rungs[RUNS[one].run_id].kind == rungs[RUNS[other].run_id].kind
        assert same == (one[:4] == other[:4])
    for run in RUNS.values():
        assert rungs[run.run_id] == Rung.of(run)
    longer = runs_of(handmade.study(**CONFIG | {"protocol": {"num_timed_steps": 9}}))[EASY]
    assert Rung.of(longer).kind != rungs[RUNS[EASY].run_id].kind


# --- in a study ------------------------------------------------------------------------------------------------------


def test_more_gpus_that_shard_go_first_in_the_study(tmp_path: Path) -> None:
    """What priorities are made of, and what `before_submit` waits for."""
    config = handmade.study(
        hardware={"cpu": {"memory_gib": 16.0}},
        recipes={"zero3": ["zero3"], "ddp": ["ddp"]},
        grid=[
            {
                "targets": "tiny",
                "hardware": "cpu",
                "recipes": ["zero3", "ddp"],
                "num_gpus": [1, 2, 4, 8],
                "sequence_length": 128,
            }
        ],
    )
    opened = study.open_study(config.model_dump(mode="json"), Results(tmp_path))
    by_place = {(run.recipe, run.num_gpus): run.run_id for run in map(opened.run, opened.planned)}
    assert {place: opened.number_of_easier(run_id) for place, run_id in by_place.items()} == {
        **dict.fromkeys((("ddp", number) for number in (1, 2, 4, 8)), 0),
        ("zero3", 8): 0,
        ("zero3", 4): 1,
        ("zero3", 2): 2,
        ("zero3", 1): 0,
    }
    study.write_plan(opened)
    end(opened, by_place["zero3", 4])
    again = study.open_study(config.model_dump(mode="json"), Results(tmp_path))
    assert again.implied == {by_place["zero3", 2]: by_place["zero3", 4]}


def test_a_plan_of_an_older_form_decides_nothing_and_is_written_anew(planned: Study) -> None:
    """Jobs see the plan alone; the digest is of all that it says, and another one makes Snakemake write it."""
    written = json.loads(planned.results.plan.read_text())
    assert planned.plan_digest == run_module.digest([written, None], 16)
    (*_, last) = planned.planned
    assert implied.kin(planned.results).easier(last)
    for one in written["runs"]:
        del one["num_gpus"]
    planned.results.plan.write_text(json.dumps(written))
    assert implied.kin(planned.results).easier(last) == []


@pytest.fixture
def planned(raw: dict[str, Any], tmp_path: Path) -> Study:
    """Contexts 64, 96 and 128 of one recipe; the plan is written."""
    raw["grid"][0] |= {"recipes": "full", "sequence_length": [64, 96, 128]}
    opened = study.open_study(raw, Results(tmp_path))
    study.write_plan(opened)
    return opened


def again(planned: Study, **protocol: Any) -> Study:
    """The study as the next call finds it."""
    changed = planned.config.protocol.model_copy(update=protocol)
    raw = planned.config.model_copy(update={"protocol": changed}).model_dump(mode="json")
    return study.open_study(raw, planned.results)


def end(planned: Study, run_id: str, **ending: Any) -> None:
    record.write_record(planned.results.run(run_id), ended(planned.run(run_id), **ending))


def outcome_of(planned: Study, run_id: str) -> Ending:
    return record.read_record(planned.results.run(run_id).record).ending


def test_the_plan_gives_implied_runs_their_record_and_names_the_witness(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, middle)
    found = again(planned)
    assert (found.implied, found.pending) == ({long: middle}, (short,))
    assert found.lost_files == [found.results.run(long).record]
    assert "1 implied out of memory" in found.summary()
    study.write_plan(found)
    assert outcome_of(planned, long).status == "implied_oom"
    assert outcome_of(planned, long).witness == middle
    assert middle in str(outcome_of(planned, long).reason)
    after = again(planned)
    assert (after.implied, after.pending, after.lost_files, after.outdated) == ({}, (short,), [], frozenset())
    assert after.summary().startswith("3 runs, 1 measured, 1 to train, 1 implied out of memory")
    assert after.plan_digest == found.plan_digest == planned.plan_digest


def test_switched_off_they_are_trained_and_the_records_kept_aside(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    off = again(planned, infer_oom=False)
    assert off.outdated == {middle, long}
    assert off.pending == (middle, long)
    assert off.plan_digest != planned.plan_digest
    assert list(off.planned) == list(planned.planned), "no part of a run's identity"
    assert off.lost_files == [off.results.run(min(middle, long)).superseded_record(1)]
    study.write_plan(off)
    for run_id in (middle, long):
        assert not off.results.run(run_id).record.exists()
        assert record.read_record(off.results.run(run_id).superseded_record(1)).ending.status == "implied_oom"
    assert again(planned, infer_oom=False).lost_files == []
    assert again(planned).implied == {middle: short, long: short}


def test_a_record_stands_as_long_as_its_witness(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    planned.results.run(short).record.unlink()
    assert again(planned).outdated == {middle, long}
    assert again(planned).pending == (short, middle, long)
    end(planned, short, status="completed", phase=None)
    assert again(planned).outdated == {middle, long}
    # Another witness will do.
    end(planned, middle)
    assert again(planned).outdated == frozenset()


def test_a_harder_run_that_completed_takes_back_what_was_concluded(planned: Study) -> None:
    """As when somebody asked to measure it."""
    short, middle, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    end(planned, long, status="completed", phase=None)
    assert (again(planned).outdated, again(planned).implied) == (frozenset({middle}), {})
    assert again(planned).pending == (middle,)


def test_a_witness_that_left_the_study_is_one_all_the_same(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    raw = planned.config.model_dump(mode="json")
    raw["grid"][0]["sequence_length"] = [96, 128]
    assert study.open_study(raw, planned.results).outdated == frozenset()
    planned.results.run(short).record.unlink()
    assert study.open_study(raw, planned.results).outdated == {middle, long}


def test_a_run_that_is_asked_for_is_measured(planned: Study) -> None:
    short, _, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    raw = planned.config.model_dump(mode="json") | {study.REMEASURE: long}
    asked = study.open_study(raw, planned.results)
    assert (asked.pending, asked.implied, asked.outdated) == ((long,), {}, frozenset())


def test_a_run_that_failed_too_often_may_yet_be_implied(planned: Study) -> None:
    short, middle, _ = planned.planned
    record.write_failure(planned.results.run(middle), handmade.failure(planned.run(middle), attempt=3))
    assert again(planned).given_up == {middle}
    end(planned, short)
    found = again(planned)
    assert (found.given_up, list(found.implied)[:1]) == (frozenset(), [middle])
    study.write_plan(found)
    assert not planned.results.run(middle).failure.exists()


def test_launch_asks_first_where_it_is_told_to(planned: Study) -> None:
    """As the rule calls it; nothing is prepared, so that training would fail."""
    short, middle, long = planned.planned
    end(planned, short)

    def launch(run_id: str, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "finetune_study.launch", str(planned.results.run(run_id).run_yaml)]
        return subprocess.run([*command, *arguments], capture_output=True, text=True)

    answer = launch(middle, "--if-needed", "--infer-oom")
    assert (answer.returncode, answer.stdout) == (0, f"{middle}: implied_oom by {short}\n")
    assert outcome_of(planned, middle).witness == short
    assert launch(long, "--if-needed").returncode == 1
    assert "is not prepared" in record.read_failure(planned.results.run(long).failure).cause
    study.write_plan(again(planned, infer_oom=False))
    assert launch(long, "--if-needed", "--infer-oom").returncode == 1
