"""The runs inside the page: every column of every run, small enough for 100,000 of them."""

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any

import polars as pl

from finetune_study import cells as cells_module
from finetune_study.report.tables import STATES

SETTINGS = (
    "model",
    "tokenizer",
    "hardware",
    "techniques",
    "data",
    "training",
    "protocol",
)
"""Parts of a run's settings: each takes few values over a study, so that each is stored once."""
DIGITS = 6
"""Significant digits of a number in the page; the files have them all."""
_LEFT_OUT = {"settings", "command", "status"}
"""Parts of it are stored, it follows from the run_id, it is in `state`."""


@dataclass(frozen=True)
class Shown:
    """A column of the table of runs."""

    name: str
    title: str
    hint: str = ""
    numeric: bool = True


TABLE = (
    Shown("state", "Status", numeric=False),
    Shown("target", "Target", numeric=False),
    Shown("hardware", "Hardware", numeric=False),
    Shown("num_gpus", "GPUs"),
    Shown("sequence_length", "Context", "tokens"),
    Shown("recipe", "Recipe", numeric=False),
    Shown("per_device_train_batch_size", "Micro-batch"),
    Shown("repeat", "Repeat"),
    Shown("step_time_seconds_median", "Step time", "s, median"),
    Shown("tokens_per_second", "Tokens/s", "all devices"),
    Shown("peak_memory_allocated_gib", "Peak allocated", "GiB per GPU"),
    Shown("peak_memory_reserved_gib", "Peak reserved", "GiB per GPU"),
    Shown("peak_device_used_gib", "Peak device memory", "GiB"),
    Shown("prediction_error_percent", "Error of prediction", "% of peak memory"),
    Shown("mfu_percent", "MFU", "% of the dense peak"),
    Shown("eval_loss_after", "Held-out loss", "after training"),
    Shown("peak_host_rss_gib", "Host memory", "GiB, all ranks"),
    Shown("run_id", "Run", numeric=False),
)
"""Columns of the table, in their order; one in which no run has a value is left out."""
FILTERS = ("state", "target", "hardware", "recipe", "num_gpus", "sequence_length")
"""Columns with a choice of their values above the table."""


def embed(cells: pl.DataFrame) -> str:
    """The runs as base64 of gzipped JSON, which holds no character that HTML could take for its own.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
    """
    frame = with_error_of_prediction(cells)
    columns = {
        name: _column(frame[name]) for name in frame.columns if name not in _LEFT_OUT and _has_values(frame[name])
    }
    parts = {name: frame["settings"].str.json_path_match(f"$.{name}") for name in SETTINGS}
    document = {
        "count": frame.height,
        "columns": columns,
        "settings": {name: _column(series) for name, series in parts.items() if _has_values(series)},
        "table": [
            {"name": one.name, "title": one.title, "hint": one.hint, "numeric": one.numeric}
            for one in TABLE
            if one.name in columns
        ],
        "filters": [name for name in FILTERS if name in columns],
        "states": {name: {"words": s.words, "symbol": s.symbol, "tone": s.tone} for name, s in STATES.items()},
        "meanings": {name: meaning for name, (_, meaning) in cells_module.COLUMNS.items() if name in columns},
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=5, mtime=0)).decode()


def with_error_of_prediction(cells: pl.DataFrame) -> pl.DataFrame:
    """The cells with how far the forecast of the peak memory was off, in per cent of what was measured."""
    predicted = pl.col("predicted_peak_memory_allocated_gib")
    real = pl.coalesce("peak_memory_allocated_gib", "peak_device_used_gib")
    error = pl.when(pl.col("state") == "completed").then(100 * (predicted / real - 1))
    return cells.with_columns(prediction_error_percent=error)


def _has_values(series: pl.Series) -> bool:
    return series.null_count() < len(series)


def _column(series: pl.Series) -> dict[str, Any]:
    """Plain values; or for texts that repeat themselves, each once, and where it stands."""
    if series.dtype.is_float():
        return {"values": series.round_sig_figs(DIGITS).to_list()}
    if isinstance(series.dtype, pl.List):
        return {"values": series.list.eval(pl.element().round_sig_figs(DIGITS)).to_list()}
    if series.dtype == pl.String:
        words = series.unique(maintain_order=True).drop_nulls()
        if len(words) * 2 <= len(series):
            codes = series.replace_strict(words, range(len(words)), default=None, return_dtype=pl.Int64)
            return {"words": words.to_list(), "codes": codes.to_list()}
    return {"values": series.to_list()}
