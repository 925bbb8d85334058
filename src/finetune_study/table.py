"""Comparisons: the spread over repeats, and each recipe against the baseline recipe in the same setting."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from finetune_study.config import Config
from finetune_study.forecast import CATEGORIES
from finetune_study.outcome import PHASES
from finetune_study.ratio import NODE_EFFECT, Ratio, Repeat, ratio
from finetune_study.states import OPEN
from finetune_study.techniques.packing import Packing

Row = dict[str, Any]
"""A row of a table, by column."""

TIMES = "\N{MULTIPLICATION SIGN}"

SETTING = ["target", "hardware", "num_gpus", "nodes", "sequence_length"]
"""Recipes are compared within one setting."""
CONFIGURATION = [*SETTING, "micro_batch", "recipe"]
"""Runs that differ in nothing of this are repeats of each other."""

COLUMNS: dict[str, tuple[type[pl.DataType] | pl.DataType, str]] = {
    "target": (pl.String, "Model entry of the config."),
    "hardware": (pl.String, "Hardware entry of the config."),
    "num_gpus": (pl.Int64, "Devices, one process each, over all nodes."),
    "nodes": (pl.Int64, "Machines that the devices are on."),
    "sequence_length": (pl.Int64, "Positions of every sequence."),
    "micro_batch": (pl.String, "What the config asks for: a number of sequences, or `max`, the largest that fits."),
    "per_device_train_batch_size": (
        pl.Int64,
        "Micro-batch: sequences per device and forward pass; of `max` the smallest that a repeat found.",
    ),
    "recipe": (pl.String, "Recipe of the config."),
    "num_repeats": (pl.Int64, "Repeats that are planned."),
    "num_completed": (
        pl.Int64,
        "Repeats that completed; every number is over these alone, and empty where their software, device, "
        "weights, data or effective batch differ.",
    ),
    "states": (pl.List(pl.String), "How each repeat ended, or `failed` or `not_run`."),
    "step_time_seconds_median": (pl.Float64, "Median over the repeats of their median step time, seconds."),
    "step_time_seconds_min": (pl.Float64, "Smallest median step time of a repeat, seconds."),
    "step_time_seconds_max": (pl.Float64, "Largest median step time of a repeat, seconds."),
    "peak_memory_column": (pl.String, "Column of the outcomes that the peak memory is taken from."),
    "peak_memory_gib_median": (pl.Float64, "Median over the repeats of their peak memory, GiB."),
    "peak_memory_gib_min": (pl.Float64, "Smallest peak memory of a repeat, GiB."),
    "peak_memory_gib_max": (pl.Float64, "Largest peak memory of a repeat, GiB."),
    "provenance": (
        pl.List(pl.String),
        "Software, device, weights, data and effective batch of the completed repeats, one entry per kind.",
    ),
    "provenance_of_ended": (pl.List(pl.String), "The same of every repeat that ended, however it did."),
    "run_ids": (pl.List(pl.String), "Every repeat, in the order of `states`."),
    "nodes_of_repeats": (
        pl.List(pl.String),
        "Where each completed repeat ran, all of its nodes; `unknown` is a place of its own.",
    ),
    "starts_of_repeats": (pl.List(pl.String), "When each completed repeat started, ISO 8601."),
    "step_time_seconds_repeats": (pl.List(pl.Float64), "Median step time of each completed repeat, seconds."),
    "peak_memory_gib_repeats": (pl.List(pl.Float64), "Peak memory of each completed repeat, GiB."),
    "techniques": (pl.String, "Techniques of the recipe with the defaults filled in."),
    "technique_settings": (pl.String, "Each of them with its settings, JSON."),
    "trainable_parameters": (pl.Int64, "Weights that are trained."),
    "total_parameters": (pl.Int64, "All weights."),
    "tokens_per_second_per_gpu_median": (pl.Float64, "Median over the repeats, positions per second and device."),
    "real_tokens_per_second_median": (
        pl.Float64,
        "Median over the repeats, positions of all devices that are not padding: what packing is judged by.",
    ),
    "mfu_percent_median": (
        pl.Float64,
        "Median over the repeats, per cent of the dense peak in the recipe's number format.",
    ),
    "energy_joules_per_step_median": (pl.Float64, "Median over the repeats, joules of all devices per step."),
    "peak_memory_reserved_gib_median": (pl.Float64, "Median over the repeats, GiB."),
    "peak_device_used_gib_median": (pl.Float64, "Median over the repeats, GiB."),
    **{
        f"peak_memory_{phase}_gib_median": (pl.Float64, f"Peak memory {when}, median over the repeats, GiB.")
        for phase, when in PHASES.items()
    },
    "epoch_hours_median": (pl.Float64, "Hours of one pass over the training data, median over the repeats."),
    "cost_usd_per_epoch_median": (pl.Float64, "US dollars of one pass over the training data, at the config's price."),
    "billing_units_median": (pl.Float64, "SLURM's billing units of a run's job, median over the repeats."),
    "gpu_hours": (pl.Float64, "GPU-hours that all repeats took, whatever became of them."),
    "predicted_peak_memory_gib": (pl.Float64, "Forecast of the peak memory before the runs, GiB."),
    **{f"predicted_memory_{name}_gib": (pl.Float64, f"Of that peak: {name}, GiB.") for name in CATEGORIES},
    "predicted_step_time_seconds": (pl.Float64, "Forecast of the step time before the runs, seconds."),
    "oom_requested_gib": (pl.Float64, "Size of the allocation that failed, of the first repeat that says so, GiB."),
    "oom_held_gib": (pl.Float64, "Device memory that its rank held then, GiB."),
    "baseline": (pl.String, "Recipe that this one is compared with, at the same micro-batch or both at their largest."),
    "step_time_ratio": (pl.Float64, "Step time over the baseline's: below 1 is faster."),
    "peak_memory_ratio": (pl.Float64, "Peak memory over the baseline's: below 1 is less."),
    "not_compared": (pl.String, "Why there is no ratio although runs completed."),
}
"""Columns of comparisons.parquet: type and meaning."""

SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})

_MEASURES = [
    f"{measure}_{statistic}"
    for measure in ("step_time_seconds", "peak_memory_gib")
    for statistic in ("median", "min", "max")
]

_MEDIANS = (
    "tokens_per_second_per_gpu", "real_tokens_per_second", "mfu_percent", "energy_joules_per_step",
    "peak_memory_reserved_gib", "peak_device_used_gib", "epoch_hours", "cost_usd_per_epoch", "billing_units",
    *(f"peak_memory_{phase}_gib" for phase in PHASES),
)  # fmt: skip

_OF_REPEATS = ("nodes_of_repeats", "starts_of_repeats", "step_time_seconds_repeats", "peak_memory_gib_repeats")


def completed_everywhere(row: Row) -> bool:
    """Whether every repeat of a configuration that ended has completed, and one has."""
    return row["num_completed"] > 0 and {*row["states"]} <= {"completed", "failed", "not_run"}


def one_kind(rows: Iterable[Row]) -> bool:
    """Whether the completed runs of all these had the same software, device, weights, data and effective batch."""
    return len({kind for row in rows for kind in row["provenance"]}) <= 1


def padded(rows: Iterable[Row]) -> list[Row]:
    """Those that pad examples, or all where none does: a packed step holds more, and its time says nothing beside."""
    rows = list(rows)
    return [row for row in rows if "packing" not in (row["techniques"] or "").split("+")] or rows


def repeats(row: Row, column: str) -> list[Repeat]:
    """The completed repeats of a configuration, each with its node.

    Args:
        row: a configuration.
        column: `step_time_seconds` or `peak_memory_gib`.
    """
    values = zip(row["nodes_of_repeats"], row[f"{column}_repeats"], strict=True)
    return [Repeat(node, value) for node, value in values if value]


def ratio_of(above: Row, below: Row, column: str) -> Ratio | None:
    """The ratio of a configuration to another in a column with its interval; None where one is missing.

    Args:
        above: one.
        below: the other.
        column: `step_time_seconds` or `peak_memory_gib`; memory is the same on all nodes.
    """
    first, second = repeats(above, column), repeats(below, column)
    effect = NODE_EFFECT if column == "step_time_seconds" else 0.0
    return ratio(first, second, effect) if first and second else None


def baseline_of(config: Config) -> str:
    """The recipe that the others are compared with."""
    return config.report.baseline or config.grid[0].recipes[0]


def peak_memory() -> pl.Expr:
    """The peak memory of a row in GiB: allocated where there is such a number (GPU), else in use on the device."""
    return pl.coalesce("peak_memory_allocated_gib", "peak_device_used_gib")


PROVENANCE = ("software_sha256", "gpu_name", "model_source", "data_sha256", "effective_batch_size")
"""Columns of the outcomes that must be equal for numbers to be compared: one hardware entry may have several."""
BETWEEN = " | "
"""Parts of a provenance: the name of a device, and of a source, holds spaces."""


def provenance() -> pl.Expr:
    """What must be equal for numbers to be compared: software, device, source of the weights, data, batch."""
    parts = [pl.col(name).cast(pl.String).fill_null("unknown") for name in PROVENANCE]
    return pl.concat_str(parts, separator=BETWEEN)


def micro_batch_order(row: Row) -> int:
    """Sorts micro-batches as they are asked for; the largest that fits is the easiest to fit, and so comes first."""
    return 0 if row["micro_batch"] == "max" else int(row["micro_batch"])


def micro_batch(row: Row) -> str:
    """For a reader, to follow a setting or a recipe; empty where it is one sequence, as by default."""
    found = row["per_device_train_batch_size"]
    asked = "the largest micro-batch that fits" if row["micro_batch"] == "max" else f"micro-batch {row['micro_batch']}"
    known = f", {found}" if row["micro_batch"] == "max" and found else ""
    return "" if row["micro_batch"] == "1" else f", {asked}{known}"


def devices(hardware: str, num_gpus: int, nodes: int) -> str:
    """For a reader; the number of nodes where there are several."""
    return f"{hardware} {TIMES} {count(num_gpus, nodes)}"


def count(num_gpus: int, nodes: int) -> str:
    """How many devices, for a reader."""
    return str(num_gpus) + on_nodes(nodes)


def on_nodes(nodes: int) -> str:
    """What follows a number or a name where there are several nodes; else nothing."""
    return f" on {nodes} nodes" if nodes > 1 else ""


def show(value: float | None, unit: str = "") -> str:
    """A measured number for a reader: three significant digits, and all before the point; nothing where it is unknown.

    The page's script writes numbers in the same way (`measured` in report/page.js).
    """
    if value is None:
        return ""
    exponent = int(f"{value:.2e}".partition("e")[2])
    text = f"{value:,.{max(0, 2 - exponent)}f}"
    return f"{text} {unit}".rstrip()


def show_ratio(value: float, low: float | None, high: float | None) -> tuple[str, str, str]:
    """A ratio and its interval for a reader: as `show`, or with the digits that tell on which side of 1 each is.

    An interval that leaves out 1 by little, such as 1.0008 to 1.0012, would else read as 1.00 to 1.00.
    """
    known = [one for one in (value, low, high) if one is not None]
    if low is None or high is None or low <= 1 <= high or all(f"{one:.2f}" != "1.00" for one in known):
        return show(value), show(low), show(high)
    decimals = next((d for d in range(2, 6) if all(float(f"{one:.{d}f}") != 1 for one in known)), 6)
    return f"{value:.{decimals}f}", f"{low:.{decimals}f}", f"{high:.{decimals}f}"


def joined(parts: Iterable[str]) -> str:
    """For example `a, b and c`."""
    *first, last = [*parts] or [""]
    return f"{', '.join(first)} and {last}" if first else last


def runs(number: int) -> str:
    """For example `1 run`, `1,440 runs`."""
    return f"{number:,} {'run' if number == 1 else 'runs'}"


def tries(number: int) -> str:
    """For example `1 try`, `3 tries`."""
    return f"{number:,} {'try' if number == 1 else 'tries'}"


def compare(cells: pl.DataFrame, baseline: str) -> pl.DataFrame:
    """One row per configuration, in the order of the cells.

    Numbers of runs with different software, devices, weights or data are never brought together: repeats that differ in
    them have no statistics, and a recipe that differs in them from its baseline has no ratio; `not_compared` says so.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
        baseline: a recipe.
    """
    rows = _over_repeats(cells)
    keys = [*SETTING, "micro_batch"]
    reference = rows.filter(pl.col("recipe") == baseline).select(
        *keys,
        pl.col("num_completed", "provenance", "is_packed", "peak_memory_column", *_MEASURES).name.prefix("baseline_"),
    )
    rows = rows.with_columns(baseline=pl.lit(baseline, pl.String)).join(
        reference, on=keys, how="left", maintain_order="left"
    )
    rows = rows.with_columns(not_compared=_why_not_compared())
    same_memory = pl.col("peak_memory_column") == pl.col("baseline_peak_memory_column")
    rows = rows.with_columns(
        step_time_ratio=_ratio("step_time_seconds_median", pl.col("not_compared").is_null()),
        peak_memory_ratio=_ratio("peak_memory_gib_median", pl.col("not_compared").is_null() & same_memory),
    )
    return rows.select(pl.col(name).cast(dtype) for name, dtype in SCHEMA.items())


def _over_repeats(cells: pl.DataFrame) -> pl.DataFrame:
    completed = pl.col("state") == "completed"
    step_time = pl.col("step_time_seconds_median").filter(completed)
    memory = peak_memory().filter(completed)
    allocated = pl.col("peak_memory_allocated_gib").filter(completed).is_not_null().any()
    timed = completed & pl.col("step_time_seconds_median").is_not_null()
    medians = [pl.col(name).filter(completed).median().alias(f"{name}_median") for name in _MEDIANS]
    rows = cells.group_by(CONFIGURATION, maintain_order=True).agg(
        *medians,
        *(pl.col(f"predicted_memory_{name}_gib").drop_nulls().first() for name in CATEGORIES),
        per_device_train_batch_size=pl.col("per_device_train_batch_size").min(),
        run_ids=pl.col("run_id"),
        nodes_of_repeats=pl.col("host").fill_null("unknown").filter(timed),
        starts_of_repeats=pl.col("started_at").filter(timed),
        step_time_seconds_repeats=pl.col("step_time_seconds_median").filter(timed),
        peak_memory_gib_repeats=peak_memory().filter(timed),
        techniques=pl.col("techniques").first(),
        technique_settings=pl.col("settings").drop_nulls().first().str.json_path_match("$.techniques"),
        is_packed=pl.col("techniques").first().str.split("+").list.contains(Packing.name),
        trainable_parameters=pl.col("trainable_parameters").max(),
        total_parameters=pl.col("total_parameters").max(),
        gpu_hours=pl.col("gpu_hours").sum(),
        predicted_peak_memory_gib=pl.col("predicted_peak_memory_allocated_gib").drop_nulls().first(),
        predicted_step_time_seconds=pl.col("predicted_step_time_seconds").drop_nulls().first(),
        oom_requested_gib=pl.col("oom_requested_gib").drop_nulls().first(),
        oom_held_gib=pl.col("oom_held_gib").drop_nulls().first(),
        num_repeats=pl.len(),
        num_completed=completed.sum(),
        states=pl.col("state"),
        provenance=provenance().filter(completed).unique(maintain_order=True),
        provenance_of_ended=provenance().filter(~pl.col("state").is_in(OPEN)).unique(maintain_order=True),
        step_time_seconds_median=step_time.median(),
        step_time_seconds_min=step_time.min(),
        step_time_seconds_max=step_time.max(),
        peak_memory_gib_median=memory.median(),
        peak_memory_gib_min=memory.min(),
        peak_memory_gib_max=memory.max(),
        peak_memory_column=pl.when(allocated)
        .then(pl.lit("peak_memory_allocated_gib"))
        .when(memory.is_not_null().any())
        .then(pl.lit("peak_device_used_gib")),
    )
    one_kind = pl.col("provenance").list.len() <= 1
    numbers = [*_MEASURES, *(f"{name}_median" for name in _MEDIANS)]
    kept = pl.when(one_kind).then(pl.lit(None, pl.Int64)).otherwise(0)  # None: all of the list
    return rows.with_columns(
        *(pl.when(one_kind).then(pl.col(name)).alias(name) for name in numbers),
        *(pl.col(name).list.slice(0, kept) for name in _OF_REPEATS),
    )


def _why_not_compared() -> pl.Expr:
    own, theirs = pl.col("provenance"), pl.col("baseline_provenance")
    same_provenance = own.list.first().eq_missing(theirs.list.first()) & (theirs.list.len() == 1)
    return (
        pl.when(pl.col("num_completed") == 0)
        .then(None)
        .when(own.list.len() > 1)
        .then(pl.lit("software, device, weights, data or effective batch differ between its repeats"))
        .when(pl.col("baseline_num_completed").is_null())
        .then(pl.lit("the baseline is not planned here"))
        .when(pl.col("baseline_num_completed") == 0)
        .then(pl.lit("the baseline has no completed run here"))
        .when(pl.col("is_packed") != pl.col("baseline_is_packed"))
        .then(pl.lit("a step holds more examples where they are packed: compare real_tokens_per_second_median"))
        .when(~same_provenance)
        .then(pl.lit("software, device, weights, data or effective batch differ from the baseline's"))
        .otherwise(None)
    )


def _ratio(measure: str, allowed: pl.Expr) -> pl.Expr:
    return pl.when(allowed).then(pl.col(measure) / pl.col(f"baseline_{measure}"))
