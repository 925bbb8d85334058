from pathlib import Path
from typing import Any

import polars as pl
import pytest

from finetune_study import outcome
from finetune_study.errors import RecordError
from finetune_study.outcome import GIB
from finetune_study.paths import Results
from finetune_study.record import Ending, Record
from finetune_study.run import Run
from tests.unit import handmade

CPU = handmade.study()
FULL, LORA = handmade.runs(CPU)["full", 1], handmade.runs(CPU)["lora", 1]
TWO_GPUS = handmade.study(
    hardware={"a100": {"gpu": "NVIDIA A100-SXM4-80GB", "memory_gib": 80, "compute_capability": 8.0}},
    grid=[{"targets": "tiny", "hardware": "a100", "recipes": "full", "sequence_length": 256, "num_gpus": 2}],
)
ON_TWO = handmade.runs(TWO_GPUS)["full", 1]


def with_ranks(run: Run, *ranks: dict[str, Any], status: Any = "completed", device: str = "CPU") -> Record:
    return Record(
        run=run,
        ending=Ending(status=status),
        duration_seconds=1800.0,
        environment=handmade.environment(device=device),
        ranks=list(ranks),
    )


def test_a_row_has_exactly_the_columns() -> None:
    assert set(outcome.row(handmade.completed(FULL, 1.0))) == set(outcome.COLUMNS)
    assert set(outcome.row(handmade.unsupported(FULL, "no"))) == set(outcome.COLUMNS)
    assert all(meaning.endswith(".") for _, meaning in outcome.COLUMNS.values())


def test_identity_of_a_run() -> None:
    row = outcome.row(handmade.completed(LORA, 1.0))
    assert (row["run_id"], row["target"], row["hardware"], row["recipe"]) == (LORA.run_id, "tiny", "cpu", "lora")
    assert (row["num_gpus"], row["sequence_length"], row["repeat"]) == (1, 128, 1)
    assert (row["per_device_train_batch_size"], row["gradient_accumulation_steps"]) == (1, 8)
    assert row["effective_batch_size"] == 8
    assert row["techniques"] == "fp32+sdpa+lora+adamw_torch"
    assert row["command"] == f"python -m finetune_study.launch results/runs/{LORA.run_id}/run.yaml"


def test_step_times_and_rates_of_one_rank() -> None:
    row = outcome.row(handmade.completed(FULL, 2.0, 1.0, 4.0))
    assert row["step_time_seconds_samples"] == [2.0, 1.0, 4.0]
    assert row["untimed_step_time_seconds_samples"] == [9.0]
    assert (row["step_time_seconds_median"], row["step_time_seconds_min"], row["step_time_seconds_max"]) == (
        2.0,
        1.0,
        4.0,
    )
    # 8 sequences of 128 positions in 2 s.
    assert row["samples_per_second"] == 4.0
    assert row["tokens_per_second"] == row["tokens_per_second_per_gpu"] == 512.0
    # 1000 real tokens and 900 loss tokens a step; 3 steps in 7 s.
    assert row["real_tokens_per_second"] == pytest.approx(3000 / 7)
    assert row["loss_tokens_per_second"] == pytest.approx(2700 / 7)
    assert row["num_timed_steps"] == 3
    assert row["num_skipped_steps"] == 0


def test_losses_and_parameters() -> None:
    row = outcome.row(handmade.completed(FULL, 1.0, 1.0, 1.0))
    assert row["train_loss_first"] == 3.0
    assert row["train_loss_last"] == pytest.approx(2.7)
    assert (row["eval_loss_before"], row["eval_loss_after"]) == (3.5, 2.5)
    assert (row["trainable_parameters"], row["total_parameters"]) == (10, 100)


def test_time_and_money() -> None:
    row = outcome.row(handmade.completed(FULL, 2.0, 2.0, 2.0), price=3.6)
    assert row["gpu_hours"] == pytest.approx(0.01)  # 36 s on one device
    assert row["optimizer_steps_per_epoch"] == 50  # 400 sequences
    assert row["epoch_hours"] == pytest.approx(100 / 3600)
    assert row["cost_usd_per_epoch"] == pytest.approx(0.1)
    assert outcome.row(handmade.completed(FULL, 2.0))["cost_usd_per_epoch"] is None


def test_a_step_is_as_slow_as_its_slowest_rank() -> None:
    fast = {"steps": handmade.steps(1.0, 3.0, 2.0), "startup_seconds": 5.0, "load_seconds": 2.0}
    slow = {"steps": handmade.steps(2.0, 2.0, 5.0), "startup_seconds": 7.0, "load_seconds": 1.0}
    row = outcome.row(with_ranks(ON_TWO, fast, slow), price=2.0)
    assert row["step_time_seconds_samples"] == [2.0, 3.0, 5.0]
    assert row["step_time_seconds_median"] == 3.0
    assert row["tokens_per_second"] == pytest.approx(8 * 256 / 3)
    assert row["tokens_per_second_per_gpu"] == pytest.approx(8 * 256 / 6)
    assert row["real_tokens_per_second"] == pytest.approx(2 * 3000 / 10)  # tokens of both ranks
    assert (row["startup_seconds"], row["load_seconds"]) == (7.0, 2.0)
    assert row["gpu_hours"] == pytest.approx(1.0)  # half an hour of two devices
    assert row["cost_usd_per_epoch"] == pytest.approx(2.0 * 2 * row["epoch_hours"])


def test_memory_is_of_the_largest_rank_and_host_memory_of_all() -> None:
    memory = [
        {"peak_allocated_bytes": 3 * GIB, "peak_reserved_bytes": 5 * GIB, "peak_device_used_bytes": 6 * GIB},
        {"peak_allocated_bytes": 4 * GIB, "peak_reserved_bytes": 4 * GIB, "peak_device_used_bytes": 7 * GIB},
    ]
    ranks = [{"memory": {**one, "peak_rss_bytes": 2 * GIB}} for one in memory]
    row = outcome.row(with_ranks(ON_TWO, *ranks))
    assert row["peak_memory_allocated_gib"] == 4.0
    assert row["peak_memory_reserved_gib"] == 5.0
    assert row["peak_device_used_gib"] == 7.0
    assert row["peak_host_rss_gib"] == 4.0


def test_a_sum_that_lacks_a_rank_is_not_known() -> None:
    row = outcome.row(with_ranks(ON_TWO, {"memory": {"peak_rss_bytes": GIB}}, {"memory": {}}))
    assert row["peak_host_rss_gib"] is None


def on_two_gpus(recipe: dict[str, Any]) -> Run:
    """A run on two GPUs of any kind."""
    gpu = {"memory_gib": 80, "max_gpus": 2}
    grid = [{"targets": "tiny", "hardware": "gpu", "num_gpus": 2, "recipes": "one", "sequence_length": 128}]
    return handmade.runs(handmade.study(hardware={"gpu": gpu}, recipes={"one": recipe}, grid=grid))["one", 1]


@pytest.mark.parametrize(
    ("recipe", "peak"),
    [
        ({"bf16": {}}, 312),
        ({"bf16_pure": {}}, 312),
        ({"fp16": {}}, 312),
        ({"tf32": {}}, 156),
        ({"fp32": {}}, 19.5),
        ({"bf16": {}, "lora": {}}, 312),
        ({"bf16": {}, "qlora": {}}, 312),  # its first linear layer gives float32
        ({"tf32": {}, "qlora": {}}, 156),
        ({"bf16": {}, "qlora": {"load_in_8bit": True}}, None),
        ({"fp8": {}}, None),  # an A100 has no units for it
        ({"fp8": {"emulate": True}}, 19.5),
    ],
)
def test_model_flops_utilization_by_hand(recipe: dict[str, Any], peak: float | None) -> None:
    """124.8 TFLOP in a step of 2 s on two A100; with a bf16 peak of 312 TFLOP/s each that is 10 %."""
    rank = {"steps": handmade.steps(2.0, 2.0), "compute_dtype": "float32", "model_flops_per_step": 62.4e12}
    row = outcome.row(with_ranks(on_two_gpus(recipe), rank, rank, device="NVIDIA A100-SXM4-80GB"))
    assert row["model_flops_per_step"] == pytest.approx(124.8e12)
    assert row["mfu_percent"] == (peak and pytest.approx(10.0 * 312 / peak))


def test_no_utilization_without_a_known_peak() -> None:
    rank = {"steps": handmade.steps(2.0), "model_flops_per_step": 1e12}
    row = outcome.row(with_ranks(ON_TWO, rank, rank, device="Unknown GPU"))
    assert row["mfu_percent"] is None
    assert row["model_flops_per_step"] == 2e12


def test_energy_per_timed_step_is_of_all_devices() -> None:
    rank = {"steps": handmade.steps(2.0, 2.0), "energy_joules": 300.0}
    assert outcome.row(with_ranks(ON_TWO, rank, rank))["energy_joules_per_step"] == 300.0
    assert outcome.row(handmade.completed(FULL, 1.0))["energy_joules_per_step"] is None


def test_skipped_steps_are_counted_and_never_timed() -> None:
    steps = handmade.steps(2.0, 2.0)
    skipped = {**steps[0], "stepped": False, "seconds": 100.0}
    row = outcome.row(with_ranks(FULL, {"steps": [skipped, skipped, *steps]}))
    assert row["num_skipped_steps"] == 2
    assert row["num_timed_steps"] == 2
    assert row["untimed_step_time_seconds_samples"] == [9.0]
    assert row["step_time_seconds_median"] == 2.0


def test_a_timeout_keeps_the_steps_that_all_ranks_finished() -> None:
    cut_off = {"steps": handmade.steps(2.0)}
    row = outcome.row(with_ranks(ON_TWO, {"steps": handmade.steps(1.0, 1.0)}, cut_off, status="timeout"))
    assert row["status"] == "timeout"
    assert row["step_time_seconds_samples"] == [2.0]
    assert row["num_timed_steps"] == 1


def test_untimed_steps_alone_give_no_step_time() -> None:
    row = outcome.row(with_ranks(FULL, {"steps": handmade.steps()}, status="timeout"))
    assert row["num_timed_steps"] == 0
    assert row["untimed_step_time_seconds_samples"] == [9.0]
    assert row["step_time_seconds_median"] is None
    assert row["train_loss_first"] == 3.0


def test_out_of_memory_before_the_first_step() -> None:
    row = outcome.row(handmade.out_of_memory(FULL, asked=GIB // 2, held=2 * GIB))
    assert (row["status"], row["oom_phase"], row["oom_step"], row["oom_rank"]) == ("device_oom", "backward", 1, 0)
    assert (row["oom_requested_gib"], row["oom_held_gib"]) == (0.5, 2.0)
    assert row["num_timed_steps"] is None
    assert row["train_loss_first"] is None
    assert row["memory_budget_gib"] == 1.0


def test_unsupported_has_its_reason_and_no_number() -> None:
    row = outcome.row(handmade.unsupported(FULL, "no bf16 here"))
    assert (row["status"], row["reason"]) == ("unsupported", "no bf16 here")
    for name in ("step_time_seconds_median", "peak_device_used_gib", "gpu_hours", "host", "software_sha256"):
        assert row[name] is None


def test_environment_of_a_row() -> None:
    row = outcome.row(handmade.completed(FULL, 1.0))
    assert (row["torch_version"], row["transformers_version"], row["deepspeed_version"]) == (
        "2.13.0",
        "5.23.0",
        "0.19.8",
    )
    assert (row["gpu_name"], row["host"], row["model_source"]) == ("Some CPU @ 2.5GHz", "node-1", "random weights")
    assert row["software_sha256"] == "a" * 64
    assert row["data_sha256"] == "d" * 64


def test_what_really_ran() -> None:
    facts = {"attention_implementation": "sdpa", "attention_kernel": "flash_attention", "compute_dtype": "bfloat16"}
    row = outcome.row(with_ranks(FULL, facts))
    assert {name: row[name] for name in facts} == facts
    assert outcome.row(with_ranks(FULL, {"attention_implementation": "eager"}))["attention_kernel"] is None


def test_collect_takes_the_runs_that_have_a_record(tmp_path: Path) -> None:
    results = handmade.write(tmp_path, handmade.completed(LORA, 1.0), handmade.failure(FULL))
    results.run(LORA.run_id).prior.write_text('{"predicted_peak_memory_allocated_gib": 0.75}')
    frame = outcome.collect(results, [FULL.run_id, LORA.run_id], CPU.hardware)
    assert frame.schema == outcome.SCHEMA
    assert frame["run_id"].to_list() == [LORA.run_id]
    assert frame["predicted_peak_memory_allocated_gib"].to_list() == [0.75]
    assert frame["step_time_seconds_samples"].dtype == pl.List(pl.Float64)


def test_collect_of_nothing_has_the_columns(tmp_path: Path) -> None:
    assert outcome.collect(Results(tmp_path), [FULL.run_id], CPU.hardware).schema == outcome.SCHEMA


def test_collect_stops_at_a_damaged_record(tmp_path: Path) -> None:
    results = handmade.write(tmp_path, handmade.completed(LORA, 1.0))
    path = results.run(LORA.run_id).record
    path.write_text(path.read_text()[:-100])
    with pytest.raises(RecordError, match=r"record\.json is damaged"):
        outcome.collect(results, [LORA.run_id], CPU.hardware)


def test_run_over_several_nodes() -> None:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": "full", "sequence_length": 128, "num_gpus": 2, "nodes": 2}
    run = handmade.planned(handmade.study(grid=[block]))[0].run
    record = handmade.completed(run, 1.0)
    record.environment["other_nodes"] = [{"node": "node-2", "allocation": {}}]
    row = outcome.row(record)
    assert (row["num_gpus"], row["nodes"], row["host"]) == (2, 2, "node-1, node-2")
    assert row["command"].startswith("srun --nodes=2 --ntasks=2 --ntasks-per-node=1 python -m finetune_study.launch ")


def test_prior_stands_beside_what_was_measured() -> None:
    record = handmade.completed(FULL, 2.0, 1.0, 4.0)
    prior = {"predicted_peak_memory_allocated_gib": 0.5, "predicted_step_time_seconds": 3.0}
    row = outcome.row(record, prior=prior)
    measured = row["peak_memory_allocated_gib"] or row["peak_device_used_gib"]
    assert row["predicted_memory_error_percent"] == pytest.approx(100 * (0.5 / measured - 1))
    assert row["predicted_step_time_error_percent"] == pytest.approx(100 * (3.0 / row["step_time_seconds_median"] - 1))
    assert outcome.row(record)["predicted_memory_error_percent"] is None


def test_the_last_lines_of_a_log_are_kept_where_a_run_did_not_complete(tmp_path: Path) -> None:
    config = handmade.study()
    runs = handmade.runs(config)
    full, lora = runs["full", 1], runs["lora", 1]
    results = handmade.write(tmp_path, handmade.out_of_memory(full), handmade.completed(lora, 1.0))
    for run in (full, lora):
        results.run(run.run_id).log.write_bytes(
            b"x" * 5000 + b"\n\xff line\n" + b"".join(b"%d\n" % n for n in range(9))
        )
    rows = {
        row["run_id"]: row["log_tail"] for row in outcome.collect(results, [full.run_id, lora.run_id], {}).to_dicts()
    }
    assert rows[lora.run_id] is None
    assert rows[full.run_id].splitlines() == ["\N{REPLACEMENT CHARACTER} line", *map(str, range(9))]
