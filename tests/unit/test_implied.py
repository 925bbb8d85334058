import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_study import implied, record, study
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
    return Record(run=run, ending=Ending(**({"status": "device_oom", "phase": "backward"} | ending)), ranks=[{}])


def witness(root: Path, harder: Run, *records: Record) -> str | None:
    results = handmade.write(root, *records)
    return Kin(results, implied.rungs(RUNS.values())).witness(harder.run_id)


def at(**changes: Any) -> Run:
    """The run at EASY's place but for these."""
    names = ("target", "hardware", "recipe", "num_gpus", "sequence_length", "micro_batch", "repeat")
    return RUNS[tuple((dict(zip(names, EASY, strict=True)) | changes).values())]  # type: ignore[index]


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
        {"fragmented": True},
    ],
    ids=str,
)
def test_only_training_that_ran_out_of_the_devices_memory_is_a_witness(tmp_path: Path, ending: dict[str, Any]) -> None:
    assert witness(tmp_path, at(sequence_length=256), ended(RUNS[EASY], **ending)) is None


@pytest.mark.parametrize("phase", ["load", "forward", "backward", "optimizer"])
def test_every_phase_of_training_is_one(tmp_path: Path, phase: str) -> None:
    assert witness(tmp_path, at(sequence_length=256), ended(RUNS[EASY], phase=phase, fragmented=False))


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


rung_strategy = st.builds(
    Rung,
    run_id=st.just("x"),
    kind=st.sampled_from("ab"),
    sequence_length=st.integers(1, 3),
    per_device_train_batch_size=st.sampled_from([1, 2, 3, "max"]),
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
        assert not b.needs_as_much_as(a)


def test_kinds_are_told_apart_by_all_that_defines_a_run() -> None:
    """Names stand for it within a study; between studies the settings decide."""
    rungs = {rung.run_id: rung for rung in implied.rungs(RUNS.values())}
    for one, other in itertools.combinations(list(RUNS)[::5], 2):
        same = rungs[RUNS[one].run_id].kind == rungs[RUNS[other].run_id].kind
        assert same == (one[:4] == other[:4])
    for run in RUNS.values():
        assert rungs[run.run_id] == Rung.of(run.model_dump(mode="json"))
    longer = runs_of(handmade.study(**CONFIG | {"protocol": {"num_timed_steps": 9}}))[EASY]
    assert Rung.of(longer.model_dump(mode="json")).kind != rungs[RUNS[EASY].run_id].kind


# --- in a study ------------------------------------------------------------------------------------------------------


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
    assert after.plan_digest == found.plan_digest == planned.plan_digest


def test_switched_off_they_are_trained_and_the_records_kept_aside(planned: Study) -> None:
    short, middle, long = planned.planned
    end(planned, short)
    study.write_plan(again(planned))
    off = again(planned, implied_oom=False)
    assert off.outdated == {middle, long}
    assert off.pending == (middle, long)
    assert off.plan_digest != planned.plan_digest
    assert list(off.planned) == list(planned.planned), "no part of a run's identity"
    assert off.lost_files == [off.results.run(min(middle, long)).superseded_record(1)]
    study.write_plan(off)
    for run_id in (middle, long):
        assert not off.results.run(run_id).record.exists()
        assert record.read_record(off.results.run(run_id).superseded_record(1)).ending.status == "implied_oom"
    assert again(planned, implied_oom=False).lost_files == []
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

    answer = launch(middle, "--if-needed", "--implied-oom")
    assert (answer.returncode, answer.stdout) == (0, f"{middle}: implied_oom by {short}\n")
    assert outcome_of(planned, middle).witness == short
    assert launch(long, "--if-needed").returncode == 1
    assert "is not prepared" in record.read_failure(planned.results.run(long).failure).cause
    study.write_plan(again(planned, implied_oom=False))
    assert launch(long, "--if-needed", "--implied-oom").returncode == 1
