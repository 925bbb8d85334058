import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from finetune_study import implied, micro_batch, outcome, plan, record, study, table
from finetune_study import run as run_module
from finetune_study.after_kill import after_kill
from finetune_study.errors import ConfigError
from finetune_study.forecast import predict
from finetune_study.forecast import study as forecast_study
from finetune_study.implied import Kin, Rung
from finetune_study.micro_batch import Search, Try
from finetune_study.paths import Results
from finetune_study.recommend import recommend
from finetune_study.record import About, Ending, Record
from finetune_study.run import Run
from tests.unit import handmade

GRID = {"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}


def runs(effective: int = 8, **axes: Any) -> list[Run]:
    block = GRID | {"per_device_train_batch_size": "max"} | axes
    config = handmade.study(grid=[block], training={"effective_batch_size": effective})
    return [one.run for one in handmade.planned(config)]


RUN = runs()[0]


# --- what is asked ---------------------------------------------------------------------------------------------------


def test_sizes_make_up_the_effective_batch_exactly() -> None:
    config = handmade.study(
        hardware={"cpu": {"device": "cpu", "memory_gib": 1.0, "max_gpus": 8}},
        grid=[GRID | {"per_device_train_batch_size": "max", "num_gpus": [1, 2, 4, 8, 3], "recipes": "full"}],
        training={"effective_batch_size": 8},
    )
    planned = handmade.planned(config)
    assert [micro_batch.sizes(one.run) for one in planned] == [[1, 2, 4, 8], [1, 2, 4], [1, 2], [1], []]
    assert [one.unsupported is None for one in planned] == [True, True, True, True, False]
    assert "can't be made of steps of 3" in str(planned[-1].unsupported)


def test_identity_is_what_is_asked_not_what_is_found(tmp_path: Path) -> None:
    assert "_bmax_full_r1-" in RUN.run_id
    assert RUN.gradient_accumulation_steps is None
    path = tmp_path / "run.yaml"
    path.write_text(run_module.dump(RUN))
    assert run_module.load(path) == RUN
    (fixed,) = runs(recipes="full", per_device_train_batch_size=4)
    assert micro_batch.at(RUN, 4) == fixed, "the run at its size is the run that asks for that size"
    assert fixed.run_id != RUN.run_id


def test_a_short_run_accumulates_if_the_run_does() -> None:
    for size, steps in ((1, 2), (4, 2), (8, 1)):
        short = micro_batch.short(RUN, size)
        assert (short.micro_batch, short.gradient_accumulation_steps, short.num_steps) == (size, steps, 2)
        assert not short.protocol.evaluates
        assert (short.data_key, short.model_key) == (RUN.data_key, RUN.model_key)
        assert short.num_train_samples <= RUN.num_train_samples


def test_anything_but_max_and_numbers_is_refused() -> None:
    for wrong in ("auto", 0, -1, 1.5, True, None):
        with pytest.raises(
            ConfigError, match="is no micro-batch: give a number of sequences from 1, or `max`"
        ) as caught:
            runs(per_device_train_batch_size=[1, wrong])
        assert "has 1 problem" in str(caught.value)


# --- the search ------------------------------------------------------------------------------------------------------


def tried(size: int, status: str, steps: str = "short") -> Try:
    return Try(size, steps, status, None, None, None, 1.0)


def search(sizes: list[int], fits: set[int], forecast: dict[int, str]) -> Search:
    """The search on a device on which these sizes fit."""
    found = Search(sizes, forecast)
    for _ in sizes:
        if (size := found.next_size) is None:
            break
        found.tried.append(tried(size, "completed" if size in fits else "device_oom"))
    assert found.next_size is None
    return found


def words(sizes: list[int], largest: int) -> dict[int, str]:
    return {size: "fits" if size <= largest else "does not fit" for size in sizes}


ladders = st.sampled_from([1, 2, 6, 8, 12, 64, 120, 512]).map(
    lambda each: [size for size in range(1, each + 1) if each % size == 0]
)


@given(st.data(), ladders)
def test_the_largest_that_fits_is_found_whatever_the_forecast_says(data: st.DataObject, sizes: list[int]) -> None:
    *accumulating, single = sizes
    largest = data.draw(st.sampled_from([0, *accumulating]))
    single_fits = data.draw(st.booleans())
    said = data.draw(st.sampled_from(["fits", "tight", "does not fit"]))
    forecast = words(sizes, data.draw(st.sampled_from([0, *sizes]))) | {single: said}
    fits = {size for size in accumulating if size <= largest} | ({single} if single_fits else set())
    found = search(sizes, fits, forecast if data.draw(st.booleans()) else {})
    assert len({one.per_device_train_batch_size for one in found.tried}) == len(found.tried)
    failed_below = bool(accumulating) and 0 < largest < accumulating[-1]
    if single_fits and not (failed_below and found.forecast.get(single) == "does not fit"):
        assert found.chosen == single
    else:
        assert found.chosen == (largest or None)
    if found.chosen is None:
        assert {sizes[0], single} <= {one.per_device_train_batch_size for one in found.tried}


@given(st.data(), ladders)
def test_a_right_forecast_needs_two_tries(data: st.DataObject, sizes: list[int]) -> None:
    largest = data.draw(st.sampled_from(sizes))
    found = search(sizes, {size for size in sizes if size <= largest}, words(sizes, largest))
    assert len(found.tried) <= 2
    assert found.chosen == largest


@given(st.data(), ladders)
def test_a_wrong_one_costs_the_logarithm(data: st.DataObject, sizes: list[int]) -> None:
    largest, said = data.draw(st.sampled_from([0, *sizes])), data.draw(st.sampled_from([0, *sizes]))
    found = search(sizes, {size for size in sizes if size <= largest}, words(sizes, said))
    assert len(found.tried) <= 4 + len(sizes).bit_length()


def test_a_run_that_runs_out_after_all_takes_a_smaller_size() -> None:
    found = search([1, 2, 4, 8], {1, 2, 4, 8}, {})
    assert found.chosen == 8
    found.tried.append(tried(8, "device_oom", "all"))
    assert found.next_size is None
    assert found.chosen == 4
    found.tried += [tried(size, "host_oom", "all") for size in (4, 2, 1)]
    assert found.next_size is None
    assert found.chosen is None


# --- what is concluded -----------------------------------------------------------------------------------------------


def test_max_decides_about_every_size_and_no_size_about_max(tmp_path: Path) -> None:
    every = runs(recipes="full", sequence_length=[128, 256], per_device_train_batch_size=[1, 4, 8, "max"])
    rungs = {rung.run_id: rung for rung in implied.rungs(every)}
    assert all(rung == Rung.of(run) for rung, run in zip(rungs.values(), every, strict=True))
    implied_by = {
        (a.sequence_length, a.per_device_train_batch_size, b.sequence_length)
        for a, b in itertools.permutations(every, 2)
        if b.per_device_train_batch_size == "max" and rungs[a.run_id].is_harder_than(rungs[b.run_id])
    }
    assert implied_by == {
        *((s, size, 128) for s, size in itertools.product((128, 256), (1, 4, 8))),
        *((256, size, 256) for size in (1, 4, 8)),
        (256, "max", 128),
    }
    assert not any(
        rungs[a.run_id].is_harder_than(rungs[b.run_id])
        for a, b in itertools.permutations(every, 2)
        if a.per_device_train_batch_size == "max" and b.per_device_train_batch_size != "max"
    )


def test_max_that_fits_says_nothing_of_a_size(tmp_path: Path) -> None:
    """It may have fitted with less; but a size that fits shows that max does."""
    small, large, largest = runs(recipes="full", per_device_train_batch_size=[1, 8, "max"])
    ran_out = Record(run=small, ending=Ending(status="device_oom", phase="forward"), ranks=[{}])
    results = handmade.write(tmp_path / "a", ran_out, found(largest, 8))
    kin = Kin(results, implied.rungs([small, large, largest]))
    assert not kin.fits(small.run_id)
    results = handmade.write(tmp_path / "b", handmade.completed(large, 1.0))
    assert Kin(results, implied.rungs([small, large, largest])).fits(largest.run_id)


def found(run: Run, size: int, seconds: float = 1.0) -> Record:
    done = handmade.completed(run, seconds)
    fact = {"sizes": [1, 2, 4, 8], "forecast": {}, "tried": [], "chosen": size}
    return done.model_copy(update={"environment": done.environment | {micro_batch.FACT: fact}})


def test_outcome_says_what_was_asked_and_what_was_found() -> None:
    row = outcome.row(found(RUN, 4))
    names = ("micro_batch", "per_device_train_batch_size", "gradient_accumulation_steps", "effective_batch_size")
    assert [row[name] for name in names] == ["max", 4, 2, 8]
    nothing = outcome.row(handmade.out_of_memory(RUN))
    assert [nothing[name] for name in names] == ["max", None, None, 8]


def test_recipes_are_compared_at_their_own_largest_micro_batch(tmp_path: Path) -> None:
    config = handmade.study(
        grid=[GRID | {"per_device_train_batch_size": ["max", 1]}], training={"effective_batch_size": 8}
    )
    at = {(one.run.recipe, str(one.run.per_device_train_batch_size)): one.run for one in handmade.planned(config)}
    compared = handmade.compared(
        config,
        tmp_path,
        found(at["full", "max"], 2, 4.0),
        found(at["lora", "max"], 8, 1.0),
        handmade.completed(at["full", "1"], 5.0),
        handmade.completed(at["lora", "1"], 4.5),
    )
    ratios = {(r["recipe"], r["micro_batch"]): r["step_time_ratio"] for r in compared.to_dicts()}
    assert ratios == {("full", "max"): 1.0, ("lora", "max"): 0.25, ("full", "1"): 1.0, ("lora", "1"): 0.9}
    (one,) = recommend(compared)
    assert (one.recipe, one.per_device_train_batch_size) == ("lora", 8)
    assert {e.recipe: (e.micro_batch, e.per_device_train_batch_size) for e in one.evidence} == {
        "full": ("max", 2),
        "lora": ("max", 8),
    }
    assert [*map(table.micro_batch_order, compared.to_dicts())] == [0, 0, 1, 1]


def test_a_job_killed_in_its_search_has_measured_nothing(tmp_path: Path) -> None:
    results = handmade.write(tmp_path)
    paths = results.run(RUN.run_id)
    record.write_atomically(paths.run_yaml, run_module.dump(RUN))
    kill = {"rule": "finetune", "wildcards": {"run_id": RUN.run_id}, "state": "TIMEOUT", "slurm_job_id": "1"}
    for chosen, ranks in ((None, 0), (4, 1)):
        paths.record.unlink(missing_ok=True)
        about = About(attempt=1, slurm_job_id="1", environment={micro_batch.FACT: {"chosen": chosen}})
        record.write_about(paths, about)
        record.write_atomically(paths.rank_facts(0), json.dumps({"device_ready": True}) + "\n")
        after_kill(json.dumps(kill), results)
        assert len(record.read_record(paths.record).ranks) == ranks


# --- what the forecast says ------------------------------------------------------------------------------------------


def test_the_forecast_speaks_of_each_size(tmp_path: Path) -> None:
    raw = handmade.study(
        models={"tiny": {"weights": "random", "architecture": SHAPE}},
        hardware={"cpu": {"device": "cpu", "memory_gib": 0.35}},
        grid=[GRID | {"sequence_length": 512, "recipes": "eager", "per_device_train_batch_size": "max"}],
        recipes={"eager": {"eager": {}}},
        training={"effective_batch_size": 16},
    )
    (run,) = (one.run for one in plan.plan(raw))
    said = micro_batch.predict_words(run, Results(tmp_path), None)
    assert list(said) == [1, 2, 4, 8, 16]
    assert [*said.values()] == sorted(said.values(), key=["fits", "tight", "does not fit"].index)
    assert {said[1], said[16]} == {"fits", "does not fit"}


SHAPE = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 384, "tie_word_embeddings": True,
}  # fmt: skip


def test_what_is_predicted_of_a_run_is_that_of_the_size_it_is_expected_to_find(tmp_path: Path) -> None:
    raw = {
        "models": {"tiny": {"weights": "random", "architecture": SHAPE}},
        "hardware": {"cpu": {"device": "cpu", "memory_gib": 0.35}},
        "recipes": {"eager": {"eager": {}}},
        "grid": [GRID | {"sequence_length": 512, "recipes": "eager", "per_device_train_batch_size": ["max", 1, 4, 16]}],
        "training": {"effective_batch_size": 16},
    }
    found = study.open_study(raw, Results(tmp_path))
    searched, *fixed = forecast_study.forecast(found, predict.Traces())
    by_size = {row["per_device_train_batch_size"]: row for row in fixed}
    size = searched["per_device_train_batch_size"]
    assert size * searched["gradient_accumulation_steps"] == 16
    assert (searched["fits"], by_size[16]["fits"]) == ("fits", "does not fit")
    peak = "predicted_peak_memory_allocated_gib"
    assert by_size[1][peak] <= searched[peak] < by_size[16][peak]
    assert size not in by_size or searched[peak] == by_size[size][peak]
