"""Records become rows: one per run, each number with its unit and scope in its name."""

import json
import shlex
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from finetune_study import accounting, micro_batch, ranks, techniques
from finetune_study.config import Hardware
from finetune_study.forecast import CATEGORIES
from finetune_study.measure.peaks import peak_tflops
from finetune_study.paths import RESULTS_FOLDER, Results
from finetune_study.record import Record, read_record
from finetune_study.run import Run
from finetune_study.sequences import steps_per_epoch
from finetune_study.slurm import srun

METRICS_VERSION = 6
"""Raise it when a column is added or its meaning changes: outcomes are derived anew, no run is repeated."""

GIB = 2**30
LOG_TAIL_LINES, LOG_TAIL_LETTERS = 10, 1000
"""Of a log in the report: there may be 100,000 of them in one page."""

PHASES = {
    "load": "while the model was loaded",
    "forward": "in forward passes",
    "backward": "in backward passes",
    "optimizer": "in the optimizer's steps",
}
"""Phases whose peak is kept; the peak memory of a run is the largest of them."""

COLUMNS: dict[str, tuple[type[pl.DataType] | pl.DataType, str]] = {
    "run_id": (pl.String, "Name of the run."),
    "target": (pl.String, "Model entry of the config."),
    "hardware": (pl.String, "Hardware entry of the config."),
    "num_gpus": (pl.Int64, "Devices, one process each, over all nodes."),
    "nodes": (pl.Int64, "Machines that the devices are on, equally many on each."),
    "sequence_length": (pl.Int64, "Positions of every sequence."),
    "micro_batch": (pl.String, "What the config asks for: a number of sequences, or `max`, the largest that fits."),
    "per_device_train_batch_size": (
        pl.Int64,
        "Micro-batch: sequences per device and forward pass; of `max` what was found, null where nothing fits.",
    ),
    "gradient_accumulation_steps": (pl.Int64, "Micro-batches per optimizer step."),
    "effective_batch_size": (pl.Int64, "Sequences per optimizer step over all devices."),
    "recipe": (pl.String, "Recipe of the config."),
    "techniques": (pl.String, "Its techniques with the defaults filled in, in order of application."),
    "repeat": (pl.Int64, "Number of the repeat, from 1."),
    "status": (pl.String, "How the run ended."),
    "reason": (pl.String, "Why, in a sentence, where it did not complete."),
    "oom_phase": (pl.String, "What the run was doing when memory ran out."),
    "oom_step": (pl.Int64, "Optimizer step in which memory ran out."),
    "oom_rank": (pl.Int64, "Rank that ran out first."),
    "oom_requested_gib": (pl.Float64, "Size of the allocation that failed, GiB."),
    "oom_held_gib": (pl.Float64, "Device memory that the rank held then, GiB."),
    "oom_fragmented": (pl.Boolean, "The allocator held more unused memory than was asked for."),
    "num_timed_steps": (pl.Int64, "Optimizer steps that were timed."),
    "num_skipped_steps": (pl.Int64, "Steps whose update fp16's loss scaling skipped; not timed."),
    "step_time_seconds_median": (pl.Float64, "Median time of an optimizer step, slowest rank, seconds."),
    "step_time_seconds_min": (pl.Float64, "Shortest timed step, seconds."),
    "step_time_seconds_max": (pl.Float64, "Longest timed step, seconds."),
    "step_time_seconds_samples": (pl.List(pl.Float64), "Every timed step, seconds."),
    "untimed_step_time_seconds_samples": (pl.List(pl.Float64), "Every untimed step before them, seconds."),
    "tokens_per_second": (pl.Float64, "Positions per second over all devices, at the median step time."),
    "tokens_per_second_per_gpu": (pl.Float64, "The same for one device."),
    "real_tokens_per_second": (pl.Float64, "Positions that are not padding, per second, over all devices."),
    "loss_tokens_per_second": (pl.Float64, "Positions that the loss counts, per second, over all devices."),
    "samples_per_second": (pl.Float64, "Sequences per second over all devices, at the median step time."),
    "peak_memory_allocated_gib": (pl.Float64, "GPU: most memory in tensors, largest rank, GiB."),
    "peak_memory_reserved_gib": (pl.Float64, "GPU: most memory held by the allocator, largest rank, GiB."),
    "peak_device_used_gib": (
        pl.Float64,
        "GPU: most memory in use on the device. CPU: most data memory of a rank above its baseline, which is what the "
        "budget limits. Largest rank, GiB.",
    ),
    **{
        f"peak_memory_{phase}_gib": (
            pl.Float64,
            f"Most memory {when}, in tensors, on a CPU in use; largest rank, GiB.",
        )
        for phase, when in PHASES.items()
    },
    "peak_host_rss_gib": (pl.Float64, "Most resident memory, summed over the ranks, GiB."),
    "memory_budget_gib": (pl.Float64, "CPU: the budget of each rank, GiB."),
    "predicted_peak_memory_allocated_gib": (
        pl.Float64,
        "What was forecast before the run was submitted, GiB; on a CPU of peak_device_used_gib.",
    ),
    "predicted_peak_memory_reserved_gib": (pl.Float64, "The same for the allocator: the interval's upper end, GiB."),
    **{
        f"predicted_memory_{name}_gib": (
            pl.Float64,
            f"Of the predicted peak: {name}, GiB"
            + ("; outside of what torch allocates on a GPU." if name == "context" else "."),
        )
        for name in CATEGORIES
    },
    "predicted_step_time_seconds": (pl.Float64, "What was forecast for an optimizer step, seconds."),
    "predicted_memory_error_percent": (pl.Float64, "Predicted over measured peak memory, less one, per cent."),
    "predicted_step_time_error_percent": (pl.Float64, "Predicted over measured median step time, less one, per cent."),
    "energy_joules_per_step": (pl.Float64, "Energy of all devices per optimizer step, by NVML, joules."),
    "model_flops_per_step": (
        pl.Float64,
        "Floating-point operations that the model needs for an optimizer step over all devices; recomputation and "
        "gradients of frozen weights are not counted.",
    ),
    "mfu_percent": (
        pl.Float64,
        "Model FLOPs per second over the devices' dense peak in the recipe's number format, per cent.",
    ),
    "trainable_parameters": (pl.Int64, "Weights that are trained."),
    "total_parameters": (pl.Int64, "All weights."),
    "train_loss_first": (pl.Float64, "Loss of the first optimizer step."),
    "train_loss_last": (pl.Float64, "Loss of the last optimizer step."),
    "eval_loss_before": (pl.Float64, "Held-out loss before training."),
    "eval_loss_after": (pl.Float64, "Held-out loss after training."),
    "rouge1": (pl.Float64, "Mean F measure of single words in summaries written after training, 0 to 1."),
    "rouge2": (pl.Float64, "The same of pairs of words."),
    "rougeL": (pl.Float64, "The same of the longest common subsequence."),
    "startup_seconds": (pl.Float64, "From the start of the processes until they can load the model, slowest rank."),
    "load_seconds": (pl.Float64, "Loading the model, slowest rank, seconds."),
    "duration_seconds": (pl.Float64, "The whole run, seconds."),
    "gpu_hours": (pl.Float64, "Duration times devices, hours."),
    "optimizer_steps_per_epoch": (pl.Int64, "Optimizer steps of one pass over the training data."),
    "epoch_hours": (pl.Float64, "So many steps at the median step time, hours."),
    "cost_usd_per_epoch": (pl.Float64, "The same in US dollars, at the config's price."),
    "optimizer_class": (pl.String, "Optimizer that really ran."),
    "attention_implementation": (pl.String, "Attention that the model really used."),
    "attention_kernel": (pl.String, "Kernel that torch chose for sdpa; null for others, and in a compiled program."),
    "compute_dtype": (pl.String, "Number format of a linear layer's output in the forward pass."),
    "gpu_name": (pl.String, "Device as found; on a CPU study the processor."),
    "host": (pl.String, "Where it ran; all of its nodes."),
    "model_source": (pl.String, "Where the weights came from."),
    "data_sha256": (pl.String, "Digest of the prepared data."),
    "torch_version": (pl.String, "Version of torch."),
    "transformers_version": (pl.String, "Version of transformers."),
    "deepspeed_version": (pl.String, "Version of DeepSpeed."),
    "software_sha256": (pl.String, "Digest of the versions of all installed packages."),
    "lock_sha256": (pl.String, "Digest of the lock file that the environment was installed from."),
    "commit": (pl.String, "Commit of this project."),
    "started_at": (pl.String, "Start, ISO 8601, UTC."),
    "slurm_job_id": (pl.String, "SLURM job, where there was one."),
    "billing_units": (
        pl.Int64,
        "SLURM's billing units of what the job was given, by its accounting; in an hour it costs so many unit-hours.",
    ),
    "attempt": (pl.Int64, "Which try it was."),
    "log_tail": (pl.String, "The last lines of the log of a run that was tried and did not complete."),
    "command": (pl.String, "Repeats the run."),
    "settings": (pl.String, "Everything that defines the run, as JSON: the contents of its run.yaml."),
}
"""Columns of outcomes.parquet: type and meaning."""

SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})


_OF_STUDY = Results(RESULTS_FOLDER)


def collect(results: Results, run_ids: Iterable[str], hardware: dict[str, Hardware]) -> pl.DataFrame:
    """The outcomes of those runs that have one.

    Args:
        results: the study's results.
        run_ids: runs of the plan; those without a record have no row.
        hardware: entries of the config, for their prices.

    Raises:
        RecordError: for a record that is damaged.
    """
    rows = (read_row(results, run_id, hardware) for run_id in run_ids)
    return pl.DataFrame([row for row in rows if row is not None], schema=SCHEMA)


def read_row(results: Results, run_id: str, hardware: dict[str, Hardware]) -> dict[str, Any] | None:
    """The row of one run; None when it has no record.

    Raises:
        RecordError: when the record is damaged.
    """
    paths = results.run(run_id)
    if not paths.record.exists():
        return None
    record = read_record(paths.record)
    entry = hardware.get(record.run.hardware.name)
    price = entry.price_usd_per_gpu_hour if entry else None
    values = row(record, price=price, prior=_prior(paths.prior), results=results)
    return values | {"log_tail": None if record.ending.status == "completed" else _log_tail(paths.log)}


def _log_tail(log: Path) -> str | None:
    """What a reader of the report sees of a log; None where there is none."""
    return "\n".join(ranks.tail(log, LOG_TAIL_LINES))[-LOG_TAIL_LETTERS:] or None


def write(results: Results, run_ids: Iterable[str], hardware: dict[str, Hardware]) -> None:
    """Writes outcomes.parquet and outcomes.csv; in the CSV lists are written as JSON.

    Args:
        results: the study's results.
        run_ids: runs of the plan.
        hardware: entries of the config, for their prices.
    """
    outcomes = with_billing(collect(results, run_ids, hardware), results)
    results.root.mkdir(parents=True, exist_ok=True)
    outcomes.write_parquet(results.outcomes_parquet)
    lists = [name for name, dtype in SCHEMA.items() if isinstance(dtype, pl.List)]
    as_text = [pl.col(n).map_elements(lambda v: json.dumps(list(v)), return_dtype=pl.String) for n in lists]
    outcomes.with_columns(as_text).write_csv(results.outcomes_csv)


def with_billing(outcomes: pl.DataFrame, results: Results) -> pl.DataFrame:
    """The outcomes with what SLURM's accounting says of their jobs, as far as it says anything."""
    units = accounting.billing_units(outcomes["slurm_job_id"].drop_nulls(), results.accounting)
    known = pl.col("slurm_job_id").replace_strict([*units], [*units.values()], default=None, return_dtype=pl.Int64)
    return outcomes.with_columns(billing_units=known)


def _prior(path: Path) -> dict[str, float | None]:
    """What was predicted of a run before it was submitted."""
    if not path.exists():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    return {name: None if found.get(name) is None else float(found[name]) for name in PREDICTED}


def run_columns(run: Run, results: Results = _OF_STUDY) -> dict[str, Any]:
    """A row with what is known before a run; everything else is null."""
    return dict.fromkeys(COLUMNS) | {
        "run_id": run.run_id,
        "target": run.target,
        "hardware": run.hardware.name,
        "num_gpus": run.num_gpus,
        "nodes": run.nodes,
        "sequence_length": run.sequence_length,
        "micro_batch": str(run.per_device_train_batch_size),
        "per_device_train_batch_size": None if micro_batch.is_searched(run) else run.per_device_train_batch_size,
        "gradient_accumulation_steps": run.gradient_accumulation_steps,
        "effective_batch_size": run.training.effective_batch_size,
        "recipe": run.recipe,
        "techniques": "+".join(run.parsed_techniques),
        "repeat": run.repeat,
        "memory_budget_gib": run.hardware.memory_budget_gib,
        "command": " ".join(
            [*srun(run), "python -m finetune_study.launch", shlex.quote(str(results.run(run.run_id).run_yaml))]
        ),
        "settings": json.dumps(run.model_dump(mode="json"), ensure_ascii=False),
    }


def row(
    record: Record,
    price: float | None = None,
    prior: Mapping[str, float | None] | None = None,
    results: Results = _OF_STUDY,
) -> dict[str, Any]:
    """One row of outcomes.

    Args:
        record: raw facts of a run.
        price: US dollars for one device for one hour.
        prior: what was predicted, by the names of its columns.
        results: where the run's folder is, for the command that repeats it.
    """
    run, ending, environment = record.run, record.ending, record.environment
    versions = environment.get("versions", {})
    first: dict[str, Any] = record.ranks[0] if record.ranks else {}
    values = run_columns(run, results) | {
        **_found_size(record),
        "status": ending.status,
        "reason": ending.reason,
        "oom_phase": ending.phase,
        "oom_step": ending.step,
        "oom_rank": ending.rank,
        "oom_requested_gib": _gib(ending.bytes_requested),
        "oom_held_gib": _gib(ending.bytes_held),
        "oom_fragmented": ending.fragmented,
        **{name: (prior or {}).get(name) for name in PREDICTED},
        "peak_memory_allocated_gib": _gib(_most(record, "peak_allocated_bytes")),
        "peak_memory_reserved_gib": _gib(_most(record, "peak_reserved_bytes")),
        "peak_device_used_gib": _gib(_most(record, "peak_device_used_bytes")),
        **{f"peak_memory_{phase}_gib": _gib(_most_in(record, phase)) for phase in PHASES},
        "peak_host_rss_gib": _gib(_total(record, "peak_rss_bytes")),
        "trainable_parameters": first.get("trainable_parameters"),
        "total_parameters": first.get("total_parameters"),
        "eval_loss_before": first.get("evaluations", {}).get("before"),
        "eval_loss_after": first.get("evaluations", {}).get("after"),
        **first.get("rouge", {}),
        "startup_seconds": _slowest(record, "startup_seconds"),
        "load_seconds": _slowest(record, "load_seconds"),
        "duration_seconds": record.duration_seconds,
        "gpu_hours": None if record.duration_seconds is None else record.duration_seconds * run.num_gpus / 3600,
        "optimizer_class": first.get("optimizer_class"),
        "attention_implementation": first.get("attention_implementation"),
        "attention_kernel": first.get("attention_kernel"),
        "compute_dtype": first.get("compute_dtype"),
        "gpu_name": environment.get("device_name"),
        "host": _hosts(environment),
        "model_source": environment.get("model", {}).get("source"),
        "data_sha256": environment.get("data", {}).get("sha256"),
        "torch_version": versions.get("torch"),
        "transformers_version": versions.get("transformers"),
        "deepspeed_version": versions.get("deepspeed"),
        "software_sha256": environment.get("software_sha256"),
        "lock_sha256": environment.get("lock_sha256"),
        "commit": environment.get("commit"),
        "started_at": record.started_at,
        "slurm_job_id": record.slurm_job_id,
        "attempt": record.attempt,
    }
    return _with_errors(values | _timing(record, price))


def _found_size(record: Record) -> dict[str, Any]:
    """Columns of the micro-batch of a run that looked for the largest."""
    size = micro_batch.chosen(record.environment)
    if size is None:
        return {}
    steps = micro_batch.at(record.run, size).gradient_accumulation_steps
    return {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}


PREDICTED = (
    "predicted_peak_memory_allocated_gib",
    "predicted_peak_memory_reserved_gib",
    "predicted_step_time_seconds",
    *(f"predicted_memory_{name}_gib" for name in CATEGORIES),
)


def _with_errors(values: dict[str, Any]) -> dict[str, Any]:
    """Adds how far the prior was from what was measured, where the run completed."""
    if values["status"] != "completed":
        return values
    memory = values["peak_memory_allocated_gib"] or values["peak_device_used_gib"]
    return values | {
        "predicted_memory_error_percent": error_percent(values["predicted_peak_memory_allocated_gib"], memory),
        "predicted_step_time_error_percent": error_percent(
            values["predicted_step_time_seconds"], values.get("step_time_seconds_median")
        ),
    }


def error_percent(predicted: float | None, measured: float | None) -> float | None:
    """Predicted over measured, less one, per cent; None where either is not known."""
    return None if predicted is None or not measured else 100 * (predicted / measured - 1)


def _timing(record: Record, price: float | None) -> dict[str, Any]:
    """Everything that follows from the steps; empty where no step was finished by all ranks."""
    run = record.run
    per_rank = [rank.get("steps", []) for rank in record.ranks]
    # A step is as slow as its slowest rank; ranks that were cut off have fewer.
    steps = [
        {**group[0], "seconds": max(s["seconds"] for s in group), "ranks": group}
        for group in zip(*per_rank, strict=False)
    ]
    if not steps:
        return {}
    timed = [step for step in steps if step["timed"]]
    values: dict[str, Any] = {
        "num_timed_steps": len(timed),
        "num_skipped_steps": sum(not step["stepped"] for step in steps),
        "untimed_step_time_seconds_samples": [s["seconds"] for s in steps if not s["timed"] and s["stepped"]],
        "train_loss_first": steps[0]["loss"],
        "train_loss_last": steps[-1]["loss"],
    }
    if not timed:
        return values
    samples = [step["seconds"] for step in timed]
    median, total = statistics.median(samples), sum(samples)
    sequences = run.training.effective_batch_size
    positions = sequences * run.sequence_length
    flops = _total(record, "model_flops_per_step")
    energy = _total(record, "energy_joules")
    peak = peak_tflops(record.environment.get("device_name"), techniques.number_format(run.parsed_techniques))
    train_sequences = record.environment.get("data", {}).get("num_train_available")
    epoch_steps = None if train_sequences is None else steps_per_epoch(train_sequences, sequences)
    epoch_hours = None if epoch_steps is None else epoch_steps * median / 3600
    return values | {
        "optimizer_steps_per_epoch": epoch_steps,
        "step_time_seconds_median": median,
        "step_time_seconds_min": min(samples),
        "step_time_seconds_max": max(samples),
        "step_time_seconds_samples": samples,
        "tokens_per_second": positions / median,
        "tokens_per_second_per_gpu": positions / median / run.num_gpus,
        "real_tokens_per_second": sum(r["real_tokens"] for s in timed for r in s["ranks"]) / total,
        "loss_tokens_per_second": sum(r["loss_tokens"] for s in timed for r in s["ranks"]) / total,
        "samples_per_second": sequences / median,
        "energy_joules_per_step": None if energy is None else energy / len(timed),
        "model_flops_per_step": flops,
        "mfu_percent": None if flops is None or peak is None else 100 * flops / median / (peak * 1e12 * run.num_gpus),
        "epoch_hours": epoch_hours,
        "cost_usd_per_epoch": None if price is None or epoch_hours is None else price * run.num_gpus * epoch_hours,
    }


def _hosts(environment: dict[str, Any]) -> str | None:
    hosts = [environment.get("host"), *(other["node"] for other in environment.get("other_nodes", ()))]
    return ", ".join(sorted(host for host in hosts if host)) or None  # the same nodes in any order


def _values(record: Record, key: str) -> list[Any]:
    values = [rank.get(key, rank.get("memory", {}).get(key)) for rank in record.ranks]
    return [value for value in values if value is not None]


def _most(record: Record, key: str) -> Any:
    return max(_values(record, key), default=None)


_slowest = _most


def _most_in(record: Record, phase: str) -> int | None:
    """Peak memory of a phase, largest rank, bytes: in tensors where torch counts them, else in use on the device."""
    ways = [_values(record, f"peak_{what}_bytes_by_phase") for what in ("allocated", "device_used")]
    return max((peaks[phase] for peaks in ways[0] or ways[1] if phase in peaks), default=None)


def _total(record: Record, key: str) -> Any:
    """Sum over the ranks; null where one of them does not know."""
    values = _values(record, key)
    return sum(values) if values and len(values) == len(record.ranks) else None


def _gib(value: int | None) -> float | None:
    return None if value is None else value / GIB
