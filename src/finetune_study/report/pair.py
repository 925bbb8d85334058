"""What is drawn together: a target on some hardware."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from finetune_study.config import Config
from finetune_study.recommend import Recommendation
from finetune_study.table import Row, completed_everywhere, micro_batch_order, one_kind

MAX_PAIRS = 12
"""Pairs of target and hardware that are drawn, those with most runs first; `finetune-study figures` draws any other."""

Devices = tuple[int, int]
"""How many devices, and the nodes that they are on."""


@dataclass(frozen=True)
class Pair:
    """All that is known of a target on some hardware."""

    target: str
    hardware: str
    device: str
    limit: float
    """Memory of a device, GiB."""
    rows: list[Row]
    """Configurations (`table.SCHEMA`)."""
    recommendations: list[Recommendation]
    recipes: list[str] = field(default_factory=list)
    """Of the whole study, in the order of the config."""

    @property
    def where(self) -> str:
        return f"{self.target} on {self.hardware}"

    @property
    def planned_devices(self) -> Devices:
        """The largest number of devices that a run asks for, on as few nodes as one does."""
        return _most(map(_devices, self.rows))

    @property
    def most_devices(self) -> Devices:
        """The largest number of devices with a completed run; else the largest that was planned."""
        done = [_devices(row) for row in self.rows if row["num_completed"]]
        return _most(done) if done else self.planned_devices

    @property
    def shortest(self) -> int:
        """The shortest context with a completed run on these devices; else the shortest that was planned."""
        most = self.most_devices
        at = [row for row in self.rows if _devices(row) == most]
        done = [int(row["sequence_length"]) for row in at if row["num_completed"]]
        return min(done or [int(row["sequence_length"]) for row in at])

    def best_rows(self, *, devices: Devices | None = None, sequence_length: int | None = None) -> list[Row]:
        """Each recipe of each setting at its fastest micro-batch that fits, else at its smallest.

        Where software, weights or data differ among those that fit, their times are not compared: the smallest, too.
        """
        options: dict[tuple[Any, ...], list[Row]] = {}
        for row in self.rows:
            if devices in (None, _devices(row)) and sequence_length in (None, row["sequence_length"]):
                options.setdefault((*_devices(row), row["sequence_length"], row["recipe"]), []).append(row)
        return [_best(found) for found in options.values()]


def _devices(row: Row) -> Devices:
    return int(row["num_gpus"]), int(row["nodes"])


def _most(counts: Iterable[Devices]) -> Devices:
    return max(counts, key=lambda one: (one[0], -one[1]))


def _best(rows: list[Row]) -> Row:
    fitting = [row for row in rows if completed_everywhere(row) and row["step_time_seconds_median"] is not None]
    if fitting and one_kind(fitting):
        return min(fitting, key=lambda row: float(row["step_time_seconds_median"]))
    return min(fitting or rows, key=micro_batch_order)


def pairs(config: Config, rows: Iterable[Row], recommendations: Iterable[Recommendation]) -> list[Pair]:
    """Targets on hardware, in the order of the comparisons."""
    found: dict[tuple[str, str], Pair] = {}
    rows = list(rows)
    used = {row["recipe"] for row in rows}
    recipes = [name for name in config.recipes if name in used]
    for row in rows:
        key = row["target"], row["hardware"]
        if key not in found:
            entry = config.hardware[row["hardware"]]
            found[key] = Pair(*key, entry.device, entry.memory_gib, [], [], recipes)
        found[key].rows.append(row)
    for one in recommendations:
        found[one.target, one.hardware].recommendations.append(one)
    return list(found.values())


def drawn(all_pairs: list[Pair]) -> list[Pair]:
    """Those that are drawn, in their order."""
    kept = sorted(all_pairs, key=lambda pair: -sum(row["num_repeats"] for row in pair.rows))[:MAX_PAIRS]
    return [pair for pair in all_pairs if any(pair is one for one in kept)]
