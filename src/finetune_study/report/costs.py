"""What a recipe costs: GPU-hours always, dollars, billing units and energy where they are known."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from finetune_study import table
from finetune_study.config import Config
from finetune_study.recommend import Default
from finetune_study.table import Row, completed_everywhere, show

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600


def costs(config: Config, defaults: Iterable[Default], rows: Iterable[Row]) -> list[Row]:
    """For each target on each hardware: its default, and the recipe and setting with fewest GPU-hours an epoch.

    The latter among runs with the default's software, weights and data; without a default, where all have the same. It
    is left out where it is tied with the default in the same setting.

    Args:
        config: the study, for its prices.
        defaults: one for each target and hardware.
        rows: configurations (`table.SCHEMA`).
    """
    by_pair: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if completed_everywhere(row) and row["epoch_hours_median"] is not None:
            by_pair.setdefault((row["target"], row["hardware"]), []).append(row)
    found: list[Row] = []
    for default in defaults:
        group = by_pair.get((default.target, default.hardware), [])
        at = default.recommendation
        chosen = [
            r
            for r in group
            if (r["num_gpus"], r["nodes"], r["sequence_length"], r["recipe"], r["micro_batch"])
            == (at.num_gpus, at.nodes, at.sequence_length, at.recipe, at.best.micro_batch if at.best else None)
        ]
        found += [_cost(config, "the default", row) for row in chosen[:1]]
        # A shorter context is a cheaper epoch, of fewer tokens: only settings of the default's context are compared.
        same = [r for r in group if r["sequence_length"] == at.sequence_length]
        same = [r for r in same if r["provenance"] == chosen[0]["provenance"]] if chosen else same
        cheapest = min(same, key=_gpu_hours, default=None)
        if cheapest is None or not table.one_kind(same):
            continue
        there = (cheapest["num_gpus"], cheapest["nodes"]) == (at.num_gpus, at.nodes)
        # What is tied with the default in its own setting is no other choice: the noise made it cheaper.
        if cheapest not in chosen and not (there and cheapest["recipe"] in at.tied_with):
            found.append(_cost(config, "fewest GPU-hours", cheapest))
    return found


def spent(cells: pl.DataFrame) -> str:
    """What the last try of each run took, failed ones too, in words; of earlier ones no time is kept.

    Args:
        cells: one row per planned run (`cells.SCHEMA`).
    """
    gpu_hours = (cells["num_gpus"] * cells["duration_seconds"] / SECONDS_PER_HOUR).sum()
    parts = [f"{show(float(gpu_hours))} GPU-hours"]
    billed = (cells["billing_units"] * cells["duration_seconds"] / SECONDS_PER_HOUR).sum()
    parts += [f"{show(float(billed))} billing unit-hours"] if billed else []
    return " and ".join(parts)


def _gpu_hours(row: Row) -> float:
    return float(row["epoch_hours_median"] * row["num_gpus"])


def _cost(config: Config, choice: str, row: Row) -> dict[str, Any]:
    price = config.hardware[row["hardware"]].price_usd_per_gpu_hour
    units = row["billing_units_median"]
    seconds, energy = row["step_time_seconds_median"], row["energy_joules_per_step_median"]
    tokens_per_hour = row["tokens_per_second_per_gpu_median"] * SECONDS_PER_HOUR
    steps = row["epoch_hours_median"] * SECONDS_PER_HOUR / seconds
    return {
        **{name: row[name] for name in ("target", "hardware", "recipe", "num_gpus", "nodes", "sequence_length")},
        "choice": choice,
        "run_id": row["run_ids"][0],
        "hours": row["epoch_hours_median"],
        "gpu_hours": _gpu_hours(row),
        "billing_unit_hours": None if units is None else units * row["epoch_hours_median"],
        "usd": None if price is None else price * _gpu_hours(row),
        "usd_per_million_tokens": None if price is None else price / tokens_per_hour * 1e6,
        "kwh": None if energy is None else energy * steps / JOULES_PER_KWH,
    }
