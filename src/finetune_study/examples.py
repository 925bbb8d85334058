"""Examples to train on: read from where they lie, and checked."""

import csv
import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_study.config import Data
from finetune_study.errors import DataError
from finetune_study.prepared import first_line, say

COLUMNS = ("dialogue", "summary")
HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


@dataclass(frozen=True)
class Examples:
    """Distinct dialogues with their summaries, in the order of their source."""

    rows: list[tuple[str, str]]
    """Dialogue and summary."""
    places: list[str]
    """Where each stands in its source, for messages."""
    facts: dict[str, Any]
    """Where they come from: `source`, and `revision`, `licence` where known; how many."""


def load_examples(data: Data) -> Examples:
    """The examples of a data set.

    Raises:
        DataError: when the source is missing, empty, damaged, or has not the right columns with text in them.
    """
    if data.dataset == "generated":
        from finetune_study import dialogues

        rows: Iterable[tuple[str, Any]] = (
            (f"dialogue {number}", row)
            for number, row in enumerate(dialogues.generate(data.num_dialogues, data.seed), start=1)
        )
        return _checked(rows, data.dataset, {"source": "generated"})
    path = Path(data.dataset).expanduser()
    if path.suffix in READERS:
        return _checked(_read_file(path), str(path), {"source": "file", "sha256_file": _sha256_of_file(path)})
    if path.exists() or not HUB_ID.fullmatch(data.dataset):
        raise DataError(
            "The data set is none that can be read",
            where="data.dataset",
            given=data.dataset,
            allowed=f"`generated`, a hub id such as `knkarthick/samsum`, or a file ending in {', '.join(READERS)}",
        )
    return _from_hub(data)


def _read_file(path: Path) -> Iterator[tuple[str, Any]]:
    if not path.is_file():
        raise DataError("The data file is missing", where="data.dataset", given=path)
    try:
        yield from READERS[path.suffix](path)
    except UnicodeDecodeError as error:
        raise DataError("The data file is not UTF-8 text", where=str(path), given=error) from None
    except OSError as error:
        raise DataError("The data file can't be read", where=str(path), given=error.strerror or error) from None


def _read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            try:
                yield f"line {number}", json.loads(line)
            except ValueError as error:
                raise DataError(f"Line {number} of the data file is not JSON", where=str(path), given=error) from None


def _read_json(path: Path) -> Iterator[tuple[str, Any]]:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise DataError("The data file is not JSON", where=str(path), given=error) from None
    if not isinstance(rows, list):
        raise DataError(
            "The data file is not a list of dialogues",
            where=str(path),
            given=f"a JSON {'object' if isinstance(rows, dict) else type(rows).__name__}",
            allowed='[{"dialogue": "...", "summary": "..."}, ...]',
        )
    yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))


def _read_csv(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream, strict=True)
        try:
            for row in reader:
                yield f"line {reader.line_num}", row
        except csv.Error as error:
            raise DataError(
                f"Line {reader.line_num} of the data file is not CSV", where=str(path), given=error
            ) from None


def _read_parquet(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow.parquet as parquet
    from pyarrow import ArrowException

    try:
        table = parquet.ParquetFile(path)
        # The columns that are there, whichever they are, so that a message can name them.
        wanted = [name for name in table.schema_arrow.names if name in COLUMNS] or None
        rows = (row for batch in table.iter_batches(columns=wanted) for row in batch.to_pylist())
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
    except ArrowException as error:
        raise DataError("The data file is not Parquet", where=str(path), given=first_line(error)) from None


READERS = {".jsonl": _read_json_lines, ".json": _read_json, ".csv": _read_csv, ".parquet": _read_parquet}


def _from_hub(data: Data) -> Examples:
    from huggingface_hub import HfApi, is_offline_mode

    facts: dict[str, Any] = {"source": "hub", "dataset": data.dataset, "revision": data.revision, "licence": None}
    try:
        if not is_offline_mode():  # offline, `datasets` looks into its cache
            info = HfApi().dataset_info(data.dataset, revision=data.revision, timeout=30)
            facts |= {"revision": info.sha, "licence": getattr(info.card_data, "license", None)}
        say(f"data: loading {data.dataset} at {facts['revision'] or 'the cached revision'}")
        table = _load_split(data.dataset, facts)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises dozens of classes, its HTTP library's among them
        raise DataError(
            "The data set can't be loaded from the hub",
            where="data.dataset",
            given=f"{data.dataset}, revision {data.revision or 'newest'}: {first_line(error)}",
            do="check name, revision and network (HF_HUB_OFFLINE=1 uses the cache); or use a file, or `generated`",
        ) from None
    whole = [(f"row {number}", row) for number, row in enumerate(table, start=1) if not _lacks_text(row)]
    facts["num_empty_left_out"] = len(table) - len(whole)
    if facts["num_empty_left_out"]:
        say(f"data: {facts['num_empty_left_out']} of {len(table)} rows have no dialogue or no summary and are left out")
    return _checked(whole, data.dataset, facts)


def _lacks_text(row: dict[str, Any]) -> bool:
    """Public data sets have such rows, and a user can't mend them; in a user's own file they are errors."""
    return any(name in row and not str(row[name] or "").strip() for name in COLUMNS)


def _load_split(name: str, facts: dict[str, Any]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    splits = datasets.load_dataset(name, revision=facts["revision"])
    if "train" not in splits and len(splits) != 1:
        raise DataError(
            "The data set has no split `train`", where=f"data.dataset: {name}", given=f"splits {', '.join(splits)}"
        )
    return splits["train"] if "train" in splits else next(iter(splits.values()))


def _checked(rows: Iterable[tuple[str, Any]], where: str, facts: dict[str, Any]) -> Examples:
    """Distinct examples with text in both columns; a repeated one could stand in training and evaluation alike."""
    found: dict[tuple[str, str], str] = {}
    count = 0
    for place, row in rows:
        found.setdefault(_texts(place, row, where), place)
        count += 1
    if not found:
        raise DataError("The data set is empty", where=where, allowed="rows with `dialogue` and `summary`")
    facts |= {"num_examples": len(found), "num_duplicates_left_out": count - len(found)}
    return Examples(rows=list(found), places=list(found.values()), facts=facts)


def _texts(place: str, row: Any, where: str) -> tuple[str, str]:
    columns = list(row) if isinstance(row, dict) else None
    if columns is None or not all(name in columns for name in COLUMNS):
        missing = [name for name in COLUMNS if name not in (columns or [])]
        raise DataError(
            f"{place.capitalize()} has no {' and no '.join(f'`{name}`' for name in missing)}",
            where=where,
            given=f"columns {', '.join(map(str, columns))}" if columns is not None else f"{row!r:.60}",
            allowed="columns `dialogue` and `summary` (others are ignored)",
        )
    dialogue, summary = (_text(place, name, row[name], where) for name in COLUMNS)
    return dialogue, summary


def _text(place: str, name: str, value: object, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(
            f"{place.capitalize()} has a `{name}` that is not text",
            where=where,
            given=f"{value!r:.60} ({type(value).__name__})",
            allowed="text",
        )
    if not value.strip():
        raise DataError(f"{place.capitalize()} has an empty `{name}`", where=where, allowed="text")
    return value.replace("\r\n", "\n").strip()


def _sha256_of_file(path: Path) -> str | None:
    if not path.is_file():
        return None
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
