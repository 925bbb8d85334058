"""The runs inside the page: every column of every run, small enough for 100,000 of them."""

import base64
import gzip
import json
from dataclasses import dataclass
from typing import Any

import polars as pl

from finetune_study import cells as cells_module
from finetune_study.states import STATES
from finetune_study.table import CONFIGURATION, SETTING

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
_LEFT_OUT = {"settings", "status", "attempt"}
"""Parts of the first are stored, the others are in `state` and `attempts`."""
RUN_ID = "RUN_ID"
"""Stands for it in the commands, which are then few."""


@dataclass(frozen=True)
class Shown:
    """A column of the table of runs."""

    name: str
    title: str
    hint: str = ""
    numeric: bool = True
    on_paper: bool = True
    """Whether a sheet has room for it."""


TABLE = (
    Shown("state", "Status", numeric=False),
    Shown("target", "Target", numeric=False),
    Shown("hardware", "Hardware", numeric=False),
    Shown("num_gpus", "GPUs"),
    Shown("nodes", "Nodes"),
    Shown("sequence_length", "Context", "tokens"),
    Shown("recipe", "Recipe", numeric=False),
    Shown("per_device_train_batch_size", "Micro-batch"),
    Shown("repeat", "Repeat"),
    Shown("step_time_seconds_median", "Step time", "s, median"),
    Shown("predicted_step_time_seconds", "Predicted", "s, before the run", on_paper=False),
    Shown("predicted_step_time_error_percent", "Error of prediction", "% of step time", on_paper=False),
    Shown("tokens_per_second", "Tokens/s", "all devices"),
    Shown("peak_memory_allocated_gib", "Peak allocated", "GiB per GPU"),
    Shown("peak_memory_reserved_gib", "Peak reserved", "GiB per GPU", on_paper=False),
    Shown("peak_device_used_gib", "Peak device memory", "GiB", on_paper=False),
    Shown("predicted_peak_memory_allocated_gib", "Predicted", "GiB, before the run", on_paper=False),
    Shown("predicted_memory_error_percent", "Error of prediction", "% of peak memory", on_paper=False),
    Shown("mfu_percent", "MFU", "% of the dense peak"),
    Shown("eval_loss_after", "Held-out loss", "after training", on_paper=False),
    Shown("peak_host_rss_gib", "Host memory", "GiB, all ranks", on_paper=False),
    Shown("run_id", "Run", numeric=False),
)
"""Columns of the table, in their order; one in which no run has a value is left out, and nodes where all are 1."""
FILTERS = ("state", "target", "hardware", "recipe", "num_gpus", "nodes", "sequence_length")
"""Columns with a choice of their values above the table."""


def embed(cells: pl.DataFrame) -> str:
    """The runs as base64 of gzipped JSON, which holds no character that HTML could take for its own.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
    """
    commands = [command.replace(run_id, RUN_ID) for command, run_id in cells.select("command", "run_id").iter_rows()]
    cells = cells.with_columns(command=pl.Series(commands, dtype=pl.String))
    columns = {
        name: _column(cells[name]) for name in cells.columns if name not in _LEFT_OUT and _has_values(cells[name])
    }
    shown = [one for one in TABLE if one.name in columns and (one.name != "nodes" or (cells["nodes"] > 1).any())]
    parts = _parts(cells)
    document = {
        "count": cells.height,
        "columns": columns,
        "settings": {name: _column(series) for name, series in parts.items() if _has_values(series)},
        "table": [
            {"name": one.name, "title": one.title, "hint": one.hint, "numeric": one.numeric, "on_paper": one.on_paper}
            for one in shown
        ],
        "filters": [one.name for one in shown if one.name in FILTERS],
        "states": {name: {"words": s.words, "symbol": s.symbol, "tone": s.tone} for name, s in STATES.items()},
        "meanings": {name: meaning for name, (_, meaning) in cells_module.COLUMNS.items() if name in columns},
    }
    text = json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), compresslevel=5, mtime=0)).decode()


def _parts(cells: pl.DataFrame) -> dict[str, pl.Series]:
    """Each part of the settings; taken apart once for all repeats, which have them in common."""
    texts = cells.group_by(CONFIGURATION).agg(pl.col("settings").first())
    texts = texts.with_columns(
        pl.col("settings").str.json_path_match(f"$.{name}").alias(f"_{name}") for name in SETTINGS
    )
    joined = cells.select(CONFIGURATION).join(
        texts, on=CONFIGURATION, how="left", nulls_equal=True, maintain_order="left"
    )
    return {name: joined[f"_{name}"] for name in SETTINGS}


def _has_values(series: pl.Series) -> bool:
    return series.null_count() < len(series)


def _column(series: pl.Series) -> dict[str, Any]:
    """Plain values, with how a number is written unless as it is; or for texts that repeat themselves, each once."""
    if series.dtype.is_float():
        return {"kind": "measured", "values": series.round_sig_figs(DIGITS).to_list()}
    if isinstance(series.dtype, pl.List):
        return {"kind": "measured", "values": series.list.eval(pl.element().round_sig_figs(DIGITS)).to_list()}
    if series.dtype == pl.String:
        words = series.unique(maintain_order=True).drop_nulls()
        if len(words) * 2 <= len(series):
            codes = series.replace_strict(words, range(len(words)), default=None, return_dtype=pl.Int64)
            return {"words": words.to_list(), "codes": codes.to_list()}
    counted = series.dtype.is_integer() and series.name not in SETTING
    return {"values": series.to_list()} | ({"kind": "counted"} if counted else {})
