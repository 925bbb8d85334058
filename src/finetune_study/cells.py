"""Cells of the study: one row per planned run, whether it has an outcome or not."""

from typing import Any

import polars as pl

from finetune_study import outcome
from finetune_study.config import Hardware
from finetune_study.errors import RecordError, StudyError
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun
from finetune_study.record import read_failure, read_record

FAILED = "failed"
"""The last try left no outcome; the next call tries again."""
NOT_RUN = "not_run"
"""There was no try yet."""

CONTROL = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # Bidi_Control, Unicode Standard Annex 9
)
"""What a text of a program could do something with to its reader: characters of control, and of the direction of text,
which show it in another order than it has."""
_OF_PROGRAMS = ("reason", "failure_cause", "failure_log_tail", "log_tail")
"""Columns of what programs wrote, whatever it is."""

COLUMNS: dict[str, tuple[type[pl.DataType] | pl.DataType, str]] = {
    **outcome.COLUMNS,
    "state": (pl.String, "The status of the outcome; `failed` or `not_run` where there is none."),
    "attempts": (pl.Int64, "How often the run was tried; null where a damaged file hides it."),
    "failure_cause": (pl.String, "Why the last try left no outcome."),
    "failure_log_tail": (pl.String, "The last lines of its log."),
    "failure_log": (pl.String, "Path of that log."),
}
"""Columns of a cell: type and meaning."""

SCHEMA = pl.Schema({name: dtype for name, (dtype, _) in COLUMNS.items()})


def cells(config_plan: list[PlannedRun], results: Results, hardware: dict[str, Hardware]) -> pl.DataFrame:
    """One row per planned run, from the records and failures as they lie there.

    A damaged file makes its own cell `failed`, with the damage as the cause; the others are not touched by it.

    Args:
        config_plan: every run of the study, in the order of the rows.
        results: the study's results.
        hardware: entries of the config, for their prices.
    """
    return _readable(_frame([_read(planned, results, hardware) for planned in config_plan]))


def of_outcomes(config_plan: list[PlannedRun], results: Results) -> pl.DataFrame:
    """One row per planned run, from outcomes.parquet as it lies there."""
    return complete(pl.read_parquet(results.outcomes_parquet), config_plan, results)


def complete(outcomes: pl.DataFrame, config_plan: list[PlannedRun], results: Results) -> pl.DataFrame:
    """One row per planned run, from a table of outcomes; runs that have none are `failed` or `not_run`."""
    ended = outcomes.with_columns(state=pl.col("status"), attempts=pl.col("attempt"))
    ended = ended.select(table_column(ended, name, dtype) for name, dtype in SCHEMA.items())
    known = frozenset(outcomes["run_id"])
    missing = _frame([_without_outcome(one, results) for one in config_plan if one.run.run_id not in known])
    order = pl.DataFrame({"run_id": [one.run.run_id for one in config_plan]}, schema={"run_id": pl.String})
    every = order.join(pl.concat([ended, missing]), on="run_id", how="left", maintain_order="left")
    return _readable(every.select(SCHEMA.names()))


def _readable(frame: pl.DataFrame) -> pl.DataFrame:
    """With a replacement character for each one of control in what programs wrote."""
    return frame.with_columns(pl.col(_OF_PROGRAMS).str.replace_all(CONTROL, "\N{REPLACEMENT CHARACTER}"))


def table_column(frame: pl.DataFrame, name: str, dtype: pl.DataType | type[pl.DataType]) -> pl.Expr:
    """A column, null where the frame has none: a table of another version may lack it."""
    return (pl.col(name) if name in frame.columns else pl.lit(None)).cast(dtype).alias(name)


def _frame(rows: list[dict[str, Any]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema=SCHEMA)


def _read(planned: PlannedRun, results: Results, hardware: dict[str, Hardware]) -> dict[str, Any]:
    try:
        row = outcome.read_row(results, planned.run.run_id, hardware)
    except (StudyError, ValueError) as error:  # ValueError: a prior.json that is not JSON
        return _damaged(planned, results, error)
    return _without_outcome(planned, results) if row is None else _ended(row)


def _ended(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"state": row["status"], "attempts": row["attempt"]}


def _without_outcome(planned: PlannedRun, results: Results) -> dict[str, Any]:
    row = outcome.run_columns(planned.run, results)
    paths = results.run(planned.run.run_id)
    if paths.record.exists():
        try:
            read_record(paths.record)
        except RecordError as error:
            return _damaged(planned, results, error)
    path = paths.failure
    if not path.exists():
        return row | {"state": NOT_RUN, "attempts": 0, "reason": planned.unsupported}
    try:
        failure = read_failure(path)
    except RecordError as error:
        return _damaged(planned, results, error)
    return row | {
        "state": FAILED,
        "attempts": failure.attempt,
        "failure_cause": failure.cause,
        "failure_log_tail": failure.log_tail or failure.traceback,
        "failure_log": failure.log,
        "duration_seconds": failure.duration_seconds,
        "started_at": failure.started_at,
        "slurm_job_id": failure.slurm_job_id,
    }


def _damaged(planned: PlannedRun, results: Results, error: Exception) -> dict[str, Any]:
    log = results.run(planned.run.run_id).log
    return outcome.run_columns(planned.run, results) | {
        "state": FAILED,
        "failure_cause": error.what if isinstance(error, StudyError) else f"a file of this run is damaged: {error}",
        "failure_log_tail": str(error),
        "failure_log": str(log) if log.exists() else None,
    }
