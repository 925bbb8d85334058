"""Against an earlier study: what got better or worse beyond the noise, and what fits now that did not."""

import io
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from finetune_study import table
from finetune_study.cells import SCHEMA, table_column
from finetune_study.errors import StudyError
from finetune_study.ratio import Ratio
from finetune_study.record import write_atomically
from finetune_study.states import OPEN, in_words
from finetune_study.table import BETWEEN, CONFIGURATION, PROVENANCE, Row, completed_everywhere, ratio_of, show

ORDER = ("better", "worse", "differs", "same", "not known")
"""Of a change; the first two are what a reader looks for."""

LITTLE = 0.01
"""A difference below 1 % is none: peak memory hardly varies, and its interval would leave out 1 for a few bytes."""
COLUMNS = (*CONFIGURATION, "change", "why", "step_time_text", "peak_memory_text", "software")


@dataclass(frozen=True)
class Earlier:
    """The comparison with an earlier study."""

    path: str
    summary: str
    """In words: how many configurations are in both, and what became of them."""
    changed: list[Row]
    """One for each configuration of both, those that changed first."""


def read(path: Path, which: str = "The earlier study's outcomes") -> pl.DataFrame:
    """The outcomes of an earlier study; columns that it lacks are null.

    Args:
        path: of its outcomes.parquet.
        which: what to call them.

    Raises:
        StudyError: when the file can't be read, or is no table of outcomes.
    """
    try:
        with path.open("rb") as stream:  # of a folder polars would read all that it holds
            found = pl.read_parquet(stream)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise StudyError(
            f"{which} can't be read",
            where=str(path),
            given=getattr(error, "strerror", None) or str(error).splitlines()[0],
            allowed="an outcomes.parquet that finetune-study wrote",
            do="name it in report.earlier_outcomes, or give it to `compare`",
        ) from None
    if "nodes" not in found.columns:  # of a version whose runs were on one node
        found = found.with_columns(nodes=pl.lit(1))
    if "micro_batch" not in found.columns and "per_device_train_batch_size" in found.columns:
        found = found.with_columns(micro_batch=pl.col("per_device_train_batch_size").cast(pl.String))
    if missing := [name for name in (*CONFIGURATION, "run_id", "status") if name not in found.columns]:
        raise StudyError(
            "The file is no table of outcomes",
            where=str(path),
            given=f"no column {', '.join(missing)}",
            allowed="an outcomes.parquet that finetune-study wrote",
        )
    found = found.with_columns(state=pl.col("status"))
    return found.select(table_column(found, name, dtype) for name, dtype in SCHEMA.items())


def compare(now: list[Row], earlier: pl.DataFrame, path: str) -> Earlier:
    """Every configuration that is in both studies.

    Args:
        now: this study's configurations (`table.SCHEMA`).
        earlier: cells of the earlier study (`read`).
        path: what to call it.
    """
    then = {_key(row): row for row in table.compare(earlier, "").to_dicts()}
    changed = [_change(row, then[_key(row)]) for row in now if _key(row) in then]
    changed.sort(key=lambda one: ORDER.index(one["change"]))
    counts = Counter(one["change"] for one in changed)
    words = ", ".join(f"{counts[name]} {name}" for name in ORDER if counts[name])
    if unknown := Counter(one["why"] for one in changed if one["change"] == "not known"):
        words += f" ({'; '.join(f'{why}: {number}' for why, number in unknown.most_common())})"
    words = words or _why_none(now, [*then.values()])
    if others := sum(one["software"] == "differs" for one in changed):
        words += f"; the software differs in {others}"
    summary = f"{len(changed)} of {len(now)} configurations are in both" + (f": {words}" if words else "")
    return Earlier(path, summary, changed)


def _why_none(now: list[Row], then: list[Row]) -> str:
    """In what two studies that have no configuration in common have none: as with another study's file."""
    if not now or not then:
        return f"{'the earlier one' if now else 'this one'} has no runs"
    apart = [name for name in CONFIGURATION if not {row[name] for row in now} & {row[name] for row in then}]
    return f"they have no {table.joined(apart)} in common" if apart else ""


def of_files(now: Path, earlier: Path) -> Earlier:
    """The comparison of two files of outcomes.

    Raises:
        StudyError: when one of them is none.
    """
    return compare(table.compare(read(now, "The study's outcomes"), "").to_dicts(), read(earlier), str(earlier))


def text(found: Earlier) -> str:
    """For a terminal: what changed, then a line on the rest."""
    rows = [one for one in found.changed if one["change"] in ("better", "worse", "differs")]
    shown = Table("setting", "recipe", "change", "why", "software", box=box.SIMPLE_HEAD, pad_edge=False)
    for one in rows:
        there = table.devices(one["hardware"], one["num_gpus"], one["nodes"])
        place = f"{one['target']} on {there}, context {one['sequence_length']}"
        shown.add_row(*map(Text, (place, one["recipe"], one["change"], one["why"], one["software"])))
    stream = io.StringIO()
    console = Console(file=stream, width=140, highlight=False)
    if rows:
        console.print(shown)
    console.print(Text(f"{found.summary} (against {found.path})"))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def write(found: Earlier, path: Path) -> None:
    """The comparison as CSV."""
    schema = dict.fromkeys(COLUMNS, pl.String) if not found.changed else None
    write_atomically(path, pl.DataFrame(found.changed, schema, infer_schema_length=None).write_csv())


def _key(row: Row) -> tuple[Any, ...]:
    return tuple(row[name] for name in CONFIGURATION)


def _change(now: Row, then: Row) -> Row:
    time, memory = ratio_of(now, then, "step_time_seconds"), ratio_of(now, then, "peak_memory_gib")
    fits, fitted = completed_everywhere(now), completed_everywhere(then)
    if other := _not_comparable(now, then):
        change, why = "not known", other
    elif _contradictory(now) or _contradictory(then):
        change, why = "not known", f"repeats contradict each other: {_states(then)} then, {_states(now)} now"
    elif fits != fitted:
        change = "better" if fits and _answered(then) else "worse" if fitted and _answered(now) else "not known"
        why = f"{_states(then)} then, {_states(now)} now"
    elif not fits:
        same = {*now["states"]} == {*then["states"]}
        change, why = ("same" if same else "differs"), f"{_states(then)} then, {_states(now)} now"
    else:
        change, why = _by_numbers(time, memory)
    return {
        **{name: now[name] for name in CONFIGURATION},
        "change": change,
        "why": why,
        "step_time_text": _text(time),
        "peak_memory_text": _text(memory),
        "software": _software(now, then),
    }


def _kinds(row: Row) -> list[set[str]]:
    """What is known of each of `table.PROVENANCE` of the repeats that ended, software first."""
    kinds = [kind.split(BETWEEN) for kind in row["provenance_of_ended"]]
    return [{*column} - {"unknown"} for column in zip(*kinds, strict=True)] or [set() for _ in PROVENANCE]


def _software(now: Row, then: Row) -> str:
    """By the digests of the installed packages."""
    here, there = _kinds(now)[0], _kinds(then)[0]
    return "not known" if not here or not there else "the same" if here == there else "differs"


def _not_comparable(now: Row, then: Row) -> str:
    """What else differs than the software, which is what may have changed between two studies; empty: nothing.

    What is not known of a run, as of one that ran out of memory before it read its data, is no difference."""
    if _settings(now) != _settings(then) and None not in (_settings(now), _settings(then)):
        return f"the recipe's techniques or their settings differ ({_settings_apart(now, then)}): not compared"
    if any(len(here | there) > 1 for here, there in zip(_kinds(now)[1:], _kinds(then)[1:], strict=True)):
        return "device, weights, data or effective batch differ: not compared"
    return ""


def _settings(row: Row) -> dict[str, dict[str, Any]] | None:
    """Of each technique; None in a table of a version that did not keep them."""
    found = row["technique_settings"]
    return None if found is None else json.loads(found)


def _settings_apart(now: Row, then: Row) -> str:
    here, there = _settings(now) or {}, _settings(then) or {}
    return ", ".join(name for name in {**there, **here} if here.get(name) != there.get(name))


def _by_numbers(time: Ratio | None, memory: Ratio | None) -> tuple[str, str]:
    """Better or worse by what differs beyond the noise; `differs` where time and memory say opposite things."""
    words: list[str] = []
    directions: set[str] = set()
    for name, found in (("step time", time), ("peak memory", memory)):
        if found is not None and found.leaves_out_one and abs(found.value - 1) >= LITTLE:
            directions.add("better" if found.value < 1 else "worse")
            words.append(f"{name} × {show(found.value)}")
    if words:
        return (directions.pop() if len(directions) == 1 else "differs"), ", ".join(words)
    if time is None or not time.bounded:
        return "not known", "too few repeats or nodes to tell"
    return "same", "no difference beyond the noise"


def _answered(row: Row) -> bool:
    """Whether something else than a forecast has said that it does not fit, and no repeat that it does."""
    return row["num_completed"] == 0 and bool({*row["states"]} - {*OPEN, "predicted_oom"})


def _contradictory(row: Row) -> bool:
    """Some repeats completed, some did not."""
    return row["num_completed"] > 0 and not completed_everywhere(row)


def _states(row: Row) -> str:
    return in_words(row["states"])


def _text(found: Ratio | None) -> str:
    if found is None:
        return ""
    return show(found.value) + (f" ({show(found.low)} to {show(found.high)})" if found.bounded else "")
