"""What a recipe costs: GPU-hours always, dollars, billing units and energy where they are known."""

from collections.abc import Iterable
from typing import Any

import polars as pl

from finetune_study import table
from finetune_study.config import Config
from finetune_study.recommend import Default, Recommendation
from finetune_study.table import Row, show

JOULES_PER_KWH = 3.6e6
SECONDS_PER_HOUR = 3600


def costs(
    config: Config, defaults: Iterable[Default], recommendations: Iterable[Recommendation], rows: Iterable[Row]
) -> list[Row]:
    """For each target on each hardware: its default, and of what is recommended the one with fewest GPU-hours an epoch.

    The latter among runs with the default's software, weights and data; without a default, where all have the same.

    Args:
        config: the study, for its prices.
        defaults: one for each target and hardware.
        recommendations: one for each setting: what it names is what it costs there.
        rows: configurations (`table.SCHEMA`).
    """
    named = {tuple(best.run_ids): one.pair for one in recommendations if (best := one.best) is not None}
    by_pair: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if (pair := named.get(tuple(row["run_ids"]))) and row["epoch_hours_median"] is not None:
            by_pair.setdefault(pair, []).append(row)
    found: list[Row] = []
    for default in defaults:
        group = by_pair.get(default.pair, [])
        at = default.recommendation
        chosen = [r for r in group if at.best and r["run_ids"] == at.best.run_ids]
        found += [_cost(config, "the default", row) for row in chosen]
        # A shorter context is a cheaper epoch, of fewer tokens: only settings of the default's context are compared.
        same = [r for r in group if r["sequence_length"] == at.sequence_length]
        same = [r for r in same if r["provenance"] == chosen[0]["provenance"]] if chosen else same
        cheapest = min(same, key=_gpu_hours, default=None)
        if cheapest is not None and cheapest not in chosen and table.one_kind(same):
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
