"""Raw facts of a run and how it ended: record.json for an outcome, failure.json for anything else, never both."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar, get_args

from pydantic import Field, ValidationError

from finetune_study.errors import RecordError
from finetune_study.paths import RunPaths
from finetune_study.run import Run
from finetune_study.section import LATER, Section

FORMAT = 1
"""Version of record.json; readers take all versions up to this one."""

Status = Literal["completed", "device_oom", "host_oom", "timeout", "unsupported", "implied_oom", "predicted_oom"]
STATUSES: tuple[str, ...] = get_args(Status)
"""The closed list of ways in which a run can end as a result."""

Phase = Literal["load", "forward", "backward", "optimizer", "evaluate"]
"""Where in a run something happened."""


class Ending(Section):
    """How a run ended. Memory is in bytes; what is not known is null."""

    status: Status
    reason: str | None = None
    """In a sentence: the allocator's message, the limit, why it is unsupported."""
    phase: Phase | None = None
    """What the run was doing when memory ran out."""
    step: int | None = None
    """Optimizer step (from 1) in which memory ran out; 0 before the first."""
    rank: int | None = None
    """The rank that ran out first."""
    bytes_requested: int | None = None
    """Size of the allocation that failed."""
    bytes_held: int | None = None
    """Device memory the rank held then: allocated on a GPU, growth of data memory on a CPU."""
    bytes_reserved: int | None = None
    """Memory that the CUDA allocator held, given out or not."""
    fragmented: bool | None = None
    """The allocator held more unused memory than was asked for."""
    allocator_summary: str | None = None
    """torch.cuda.memory_summary() at that moment."""
    witness: str | None = None
    """run_id of the easier run that an implied_oom is concluded from."""


class Record(Section):
    """Everything that was seen of a run; metrics are derived from it elsewhere."""

    format: int = FORMAT
    run: Run
    ending: Ending
    attempt: int = 1
    started_at: str | None = None
    """ISO 8601, UTC."""
    duration_seconds: float | None = None
    """From the supervisor's start to its conclusion."""
    slurm_job_id: str | None = None
    environment: dict[str, Any] = {}
    """Versions, commit, lock, host, variables, hardware as found."""
    ranks: list[dict[str, Any]] = []
    """What each rank reported, in the order of ranks."""


class Failure(Section):
    """A try that left no outcome."""

    format: int = FORMAT
    run_id: str
    attempt: int
    """Failures so far, this one included; what was not the run's fault is not counted."""
    interrupted: bool = False
    """A signal from outside ended it: a Ctrl-C, a scheduler; not the run's fault."""
    unfit_node: bool = Field(default=False, json_schema_extra=LATER)
    """The node was not what the run asks for; not the run's fault either."""
    cause: str
    """In a sentence."""
    traceback: str | None = None
    log: str
    """Path of the log."""
    log_tail: str = ""
    started_at: str | None = None
    """ISO 8601, UTC."""
    duration_seconds: float | None = None
    slurm_job_id: str | None = None


@dataclass
class About:
    """What is known of a try apart from its ranks."""

    attempt: int
    started_at: str | None = None
    slurm_job_id: str | None = None
    environment: dict[str, Any] = field(default_factory=dict)


Document = TypeVar("Document", Record, Failure)


def assemble(
    run: Run, ending: Ending, about: About, facts_of_ranks: Mapping[int, dict[str, Any]], duration: float | None
) -> Record:
    """The record of a run.

    Args:
        run: what was done.
        ending: how it ended.
        about: what is known of the try.
        facts_of_ranks: what the ranks told, by their numbers.
        duration: seconds from the start of the try to its end.
    """
    environment, ranks = {**about.environment}, []
    for number, facts in sorted(facts_of_ranks.items()):
        environment |= facts.get("environment", {})
        ranks.append({"rank": number} | {k: v for k, v in facts.items() if k not in ("environment", "ended")})
    return Record(
        run=run,
        ending=ending,
        attempt=about.attempt,
        started_at=about.started_at,
        duration_seconds=duration,
        slurm_job_id=about.slurm_job_id,
        environment=environment,
        ranks=ranks,
    )


def write_atomically(path: Path, text: str, mode: int = 0o644) -> None:
    """Writes a file so that a reader sees the old bytes or the new ones, after a crash as well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, mode)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _to_json(document: Section) -> str:
    return json.dumps(document.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def write_record(paths: RunPaths, record: Record) -> None:
    """Writes an outcome and removes the failure of an earlier try."""
    write_atomically(paths.record, _to_json(record))
    paths.failure.unlink(missing_ok=True)


def write_failure(paths: RunPaths, failure: Failure) -> None:
    """Writes a failure, unless there is an outcome."""
    if not paths.record.exists():
        write_atomically(paths.failure, _to_json(failure))


def read_record(path: Path) -> Record:
    """The record of a run.

    Raises:
        RecordError: when the file is not a whole record of a known format.
    """
    return _read(path, Record)


def read_failure(path: Path) -> Failure:
    """The failure of a run's last try.

    Raises:
        RecordError: when the file is not a whole failure of a known format.
    """
    return _read(path, Failure)


def previous_attempts(paths: RunPaths) -> int:
    """Failures that the run has had so far."""
    try:
        return read_failure(paths.failure).attempt
    except RecordError:
        return 0


def write_about(paths: RunPaths, about: About) -> None:
    """Keeps what is known of a try beside the facts of its ranks."""
    write_atomically(paths.about, json.dumps(asdict(about)))


def read_about(paths: RunPaths) -> About | None:
    """What a supervisor that is gone knew of its try; None where there is no such note."""
    try:
        return About(**json.loads(paths.about.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _read(path: Path, kind: type[Document]) -> Document:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(document, dict) and document.get("format", 0) > FORMAT:
            raise RecordError(
                f"{path.name} was written by a newer version",
                where=str(path),
                given=f"format {document['format']}",
                allowed=f"up to {FORMAT}",
                do="use the version of finetune-study that wrote it",
            )
        return kind.model_validate(document)
    except OSError as error:
        raise RecordError(f"{path.name} can't be read", where=str(path), given=error.strerror) from None
    except (ValueError, ValidationError) as error:
        raise RecordError(
            f"{path.name} is damaged",
            where=str(path),
            given=_first_problem(error),
            do="restore it from a backup, or delete it to measure this run again",
        ) from None


def _first_problem(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        problem = error.errors()[0]
        return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"
    return str(error).splitlines()[0]


class Glance(NamedTuple):
    """What the last bytes of a record tell."""

    is_whole: bool
    is_trained: bool
    """Some rank told something: the record was not given without training."""


NO_RANKS = b'"ranks": []\n}\n'


def glance(path: Path) -> Glance:
    """A look at a record that is cheap enough for 10,000 of them before anything starts."""
    with path.open("rb") as stream:
        stream.seek(0, os.SEEK_END)
        stream.seek(max(0, stream.tell() - len(NO_RANKS)))
        end = stream.read()
    return Glance(end.endswith(b"}\n"), end != NO_RANKS)
