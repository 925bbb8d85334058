"""How a study stands, from its files alone: beside a live driver, after a dead one, with SLURM's words if it is there.

The ledger is the executor's (`ledger.schema.json` describes its lines); it is read, never written, and what this does
not know of it is left alone.
"""

import datetime
import json
import os
import re
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from finetune_study import cells, facts, record
from finetune_study.errors import RecordError
from finetune_study.run import Run
from finetune_study.states import STATES
from finetune_study.study import Study
from finetune_study.table import runs, show

LEDGER = Path(".snakemake/auxiliary/submitit/ledger.jsonl")
"""Of the executor, below the folder in which Snakemake works."""
SQUEUE_FORMAT = "%i|%T|%R|%M"
"""Job (of an array `<array>_<place>`), state, why it waits or where it runs, time used; see squeue(1)."""
SQUEUE_SECONDS = 20
"""A controller that does not answer by then is left out."""
LAST_FAILURES = 5
LISTED = 20
"""Works that are listed of those whose reason may clear, and runs that began; all are counted."""

NEVER_CLEARS = {
    "PartitionTimeLimit": "the job asks for more time than the partition allows: lower protocol.time_limit_minutes",
    "PartitionNodeLimit": "the partition has no such nodes: mend hardware.<name>.slurm",
    "PartitionConfig": "the partition can't give what is asked: mend hardware.<name>.slurm",
    "BadConstraints": "no node has what is asked: mend slurm.constraint, gpu_model or num_gpus",
    "AssocMaxJobsLimit": "the account's limit of jobs is 0 or used up: ask the administrators",
    "AssocMaxWallDurationPerJobLimit": "the job asks for more time than the account allows",
    "QOSMaxWallDurationPerJobLimit": "the job asks for more time than its QoS allows",
    "QOSMaxGRESPerUser": "clears only when the user's other jobs end, if one job is below the limit at all",
    "QOSNotAllowed": "the QoS is not allowed in this partition: mend slurm.qos or slurm.partition",
    "AccountNotAllowed": "the account may not use this partition: mend slurm.account or slurm.partition",
    "InvalidAccount": "SLURM does not know the account: mend slurm.account",
    "InvalidQOS": "SLURM does not know the QoS: mend slurm.qos",
    "QOSUsageThreshold": "the account's share is used up, for this QoS: wait for it to decay, or use another QoS",
    "MaxMemPerLimit": "the job asks for more memory than a node or CPU may give: lower slurm.mem_gib_per_gpu",
    "PartitionDown": "the partition takes no jobs: ask the administrators",
    "PartitionInactive": "the partition starts no jobs: ask the administrators",
    "JobHoldMaxRequeue": "it was put back too often and is held: look at its log, then `scontrol release`",
    "launch failed requeued held": "its node could not start it, and it is held: `scontrol release` tries again",
    "user env retrieval failed requeued held": "its node could not load your environment, and it is held: `scontrol "
    "release` tries again",
    "ReservationDeleted": "the reservation is gone: take it out of hardware.<name>.slurm",
    "DependencyNeverSatisfied": "what it waits for failed: cancel it",
    "JobHeldAdmin": "an administrator holds it: ask them",
    "JobHeldUser": "it is held: `scontrol release` lets it go",
    "ReqNodeNotAvail": "a node that was asked for is down or reserved",
    "JobArrayTaskLimit": "clears when other tasks of its array end",
}
"""SLURM's pending reasons that waiting alone does not clear, with what to do (squeue(1), JOB REASON CODES)."""
USED_UP = "what the account or QoS may use is used up: ask the administrators"
"""Of every budget of minutes, for example `AssocGrpGRESMinutes`; one of running minutes comes back as jobs end."""
TIME_USED_UP = frozenset({"QOSTimeLimit", "AssociationTimeLimit"})
"""The same for the time of the QoS or the account as a whole."""
TOO_LITTLE = "the job asks for less than its QoS takes: ask for more in hardware.<name>.slurm, or mend slurm.qos"
"""Of every least size of a QoS: `QOSMinGRES`, `QOSMinCpuNotSatisfied`, `QOSMinMemory`."""
OF_ONE_JOB = "the job asks for more than a job may: ask for less in hardware.<name>, or in num_gpus"
"""Of every other limit of one job: `QOSMaxGRESPerJob`, `AssocMaxCpuMinutesPerJobLimit`, `QOSMaxGRESPerNode`."""
WAITING = frozenset({"QOSMaxGRESPerUser", "JobArrayTaskLimit", "ReqNodeNotAvail", "AssocMaxJobsLimit"})
"""Of these, those that may clear after all, when something else ends: they are named, but not as hopeless."""
NO_SUCH_JOB = "Invalid job id specified"
"""What squeue answers about a single job that is no longer known, with status 1: it was asked, and it knows."""
NEVER_CLEARS_BY_WAITING = "NEVER CLEARS BY WAITING"


@dataclass(frozen=True)
class Submitted:
    """A work of the ledger that is not closed; several may share a job of SLURM."""

    name: str
    slurm_id: str | None
    """`<job>`, or `<array>_<place>`."""
    submitted_at: float | None
    """Seconds since 1970."""
    batch: str = ""
    """The sbatch that it is part of."""
    place: int | None = None
    """Its job's index in an array."""


@dataclass(frozen=True)
class InQueue:
    """A job as SLURM sees it."""

    state: str
    reason: str
    """Why it waits, or the nodes that it runs on."""
    elapsed: str


@dataclass(frozen=True)
class Begun:
    """A run whose supervisor left notes of a try and no end of it: it goes on, or was killed with all its processes."""

    run_id: str
    about: record.About
    num_steps: int
    """That its first rank has told."""
    last_written: float
    """When anything of it was, seconds since 1970."""


UNANSWERED = InQueue("in a state that is not known", "", "")
"""Of every job where there is no squeue, or no controller behind it."""
Work = tuple[Submitted, InQueue | None]
"""A work, and what SLURM says of its job; None where it knows none."""


@dataclass
class Status:
    """All that is shown."""

    counts: list[tuple[str, int]]
    open: list[Work]
    begun: list[Begun]
    """Of the works above, and of runs that no executor submitted."""
    failures: list[record.Failure]
    """The last of them, the newest first."""
    num_failures: int
    used_gpu_hours: float
    """By the last try of each run: of earlier ones no time is kept."""
    expected_gpu_hours: float | None
    """Of the runs without an outcome; None where nothing is known that they could be compared with."""
    num_left: int
    """Runs that are still to be trained: not those that are given up, can't run here, or that others decide."""
    num_given_up: int
    driver: str
    """Of the executor; empty where none has been at work."""
    problems: list[str] = field(default_factory=list)


def look(
    study: Study, ledger: Path = LEDGER, queue: Callable[[Iterable[str]], Mapping[str, InQueue] | None] | None = None
) -> Status:
    """The status of a study now.

    Args:
        study: its configuration and results.
        ledger: of the executor.
        queue: asks SLURM about jobs, None where it does not answer; default: squeue.
    """
    jobs, problems = read_ledger(ledger)
    ids = [job.slurm_id for job in jobs if job.slurm_id]
    seen = (queue or squeue)(ids)
    if seen is None:
        seen = dict.fromkeys(ids, UNANSWERED)
        if ids:
            problems = [*problems, "SLURM did not answer (squeue): where its jobs stand is not known"]
    runs = {run_id: _read(study, run_id, problems) for run_id in study.planned}
    states = [_state(document) for document in runs.values()]
    left = [i for i in study.pending if not isinstance(runs[i], record.Record)]
    used, expected = _gpu_hours(study, runs, left)
    failures = sorted((d for d in runs.values() if isinstance(d, record.Failure)), key=lambda one: one.started_at or "")
    return Status(
        counts=[(state, Counter(states)[state]) for state in STATES if state in states],
        open=[(job, seen.get(job.slurm_id or "")) for job in jobs],
        begun=list(_begun(study, runs)),
        failures=failures[-LAST_FAILURES:][::-1],
        num_failures=len(failures),
        used_gpu_hours=used,
        expected_gpu_hours=expected,
        num_left=len(left),
        num_given_up=len(study.given_up),
        driver=_driver(ledger.parent / "lock"),
        problems=problems,
    )


Document = record.Record | record.Failure | None


def _read(study: Study, run_id: str, problems: list[str]) -> Document:
    """What lies there of a run; a file that is being replaced or is damaged is a problem to name, not an end."""
    paths = study.results.run(run_id)
    try:
        if paths.record.exists():
            return record.read_record(paths.record)
        if paths.failure.exists():
            return record.read_failure(paths.failure)
    except RecordError as error:
        problems.append(str(error).replace("\n", " "))
    return None


def _begun(study: Study, runs: Mapping[str, Document]) -> Iterator[Begun]:
    for run_id, document in runs.items():
        paths = study.results.run(run_id)
        about = None if isinstance(document, record.Record) else record.read_about(paths)
        if about is None or (document is not None and (document.started_at or "") >= (about.started_at or "")):
            continue
        steps = facts.read(paths.rank_facts(0)).get("steps", [])
        yield Begun(run_id, about, len(steps), max(map(_written, (paths.log, *paths.scratch.glob("*")))))


def _written(path: Path) -> float:
    """When, seconds since 1970; 0 for what is not there, or no longer."""
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _state(document: Document) -> str:
    if isinstance(document, record.Record):
        return document.ending.status
    return "not_run" if document is None else "failed"


def _gpu_hours(study: Study, runs: Mapping[str, Document], left: Iterable[str]) -> tuple[float, float | None]:
    """GPU-hours that the last tries took, and what the runs that are left may take.

    The latter is the mean of its repeats, else what the forecast says of the run, else the mean of all.
    """
    used = 0.0
    of_repeats: dict[tuple[Any, ...], list[float]] = {}
    for run_id, document in runs.items():
        if document is None or document.duration_seconds is None:
            continue
        run = study.run(run_id)
        hours = document.duration_seconds * run.num_gpus / 3600
        used += hours
        if isinstance(document, record.Record):
            of_repeats.setdefault(_configuration(run), []).append(hours)
    every = [hours for values in of_repeats.values() for hours in values]
    expected = []
    for run in map(study.run, left):
        predicted = study.predicted_cost(run.run_id)[0]
        like = of_repeats.get(_configuration(run)) or ([predicted] if predicted is not None else every)
        expected.append(sum(like) / len(like) if like else None)
    return used, None if None in expected else sum(filter(None, expected))


def _configuration(run: Run) -> tuple[Any, ...]:
    """What repeats have in common; runs of other contexts or recipes may take many times as long."""
    size = run.per_device_train_batch_size
    return run.target, run.hardware.name, run.num_gpus, run.nodes, run.sequence_length, size, run.recipe


def read_ledger(path: Path) -> tuple[list[Submitted], list[str]]:
    """Works of the ledger that are not closed, in the order of their submission, and what could not be read.

    Unknown events and fields are left alone; a last line that is cut off is one that is being written.
    """
    jobs: dict[str, Submitted] = {}
    strange: list[int] = []
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return [], []
    except OSError as error:
        return [], [f"{path}: {error.strerror}"]
    for number, line in enumerate(lines, start=1):
        event = _event(line)
        if event is None:
            if number < len(lines):
                strange.append(number)
            continue
        match event:
            case {"event": "closed", "token": str(token)}:
                jobs.pop(token, None)
            case {"event": "intent", "token": str(token)}:
                jobs[token] = _intended(event)
            case {"event": "submitted", "token": str(token), "slurm_id": slurm_id} if token in jobs:
                jobs[token] = _with_id(jobs[token], slurm_id, event)
            case {"event": "submitted", "batch": str(batch), "slurm_id": slurm_id}:
                for token, job in jobs.items():
                    if job.batch == batch:
                        of_array = slurm_id if job.place is None else f"{slurm_id}_{job.place}"
                        jobs[token] = _with_id(job, of_array, event)
    first = f"{path}: no event in {len(strange)} of {len(lines)} lines, first in line {strange[0]}" if strange else None
    return list(jobs.values()), [first] if first else []


def _intended(event: Mapping[str, Any]) -> Submitted:
    name, place = event.get("name") or event.get("key") or event["token"], event.get("place")
    return Submitted(
        name=str(name),
        slurm_id=None,
        submitted_at=_number(event.get("at")),
        batch=str(event.get("batch") or ""),
        place=place if isinstance(place, int) else None,
    )


def _with_id(job: Submitted, slurm_id: object, event: Mapping[str, Any]) -> Submitted:
    return replace(job, slurm_id=str(slurm_id), submitted_at=_number(event.get("at")) or job.submitted_at)


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) and isinstance(event.get("event"), str) else None


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _driver(lock: Path) -> str:
    """Who submits jobs: the executor writes it into its lock, which outlives it; a process of this host is looked for.

    Empty where none ever did, as in a study that runs without SLURM.
    """
    try:
        said = lock.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
    words = said.split()
    if len(words) != 4 or words[3] != os.uname().nodename:
        return f"last driver: {said}" if said else "no driver is at work"
    return f"driver: {said}" if Path(f"/proc/{words[1]}").exists() else f"the last driver is gone ({said})"


def squeue(ids: Iterable[str]) -> dict[str, InQueue] | None:
    """SLURM's own word on these jobs, without those that it does not know; None where it does not answer."""
    jobs = (one.partition("_")[0] for one in ids)  # an array has thousands of tasks: it is asked for as a whole
    asked = [*dict.fromkeys(one for one in jobs if one.isdigit())]
    if not asked:
        return {}
    try:
        found = subprocess.run(
            [
                "squeue",
                "--noheader",
                "--states=all",
                "--array",
                "--jobs",
                ",".join(asked),
                f"--format={SQUEUE_FORMAT}",
            ],
            capture_output=True,
            text=True,
            timeout=SQUEUE_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    if found.returncode != 0 and NO_SUCH_JOB not in found.stderr:
        return None
    return parse_squeue(found.stdout)


def parse_squeue(text: str) -> dict[str, InQueue]:
    """Lines of `squeue --array` in `SQUEUE_FORMAT`."""
    jobs: dict[str, InQueue] = {}
    for line in text.splitlines():
        parts = [part.strip() for part in line.split("|")]
        if len(parts) >= 4:
            jobs[parts[0]] = InQueue(parts[1], parts[2].strip("()"), parts[3])
    return jobs


def advice(reason: str) -> str | None:
    """What to do about a pending reason that waiting does not clear; None for one that clears, or is not known."""
    word = _word(reason)
    if word in NEVER_CLEARS:
        return NEVER_CLEARS[word]
    of_all = word.startswith(("AssocGrp", "QOSGrp")) and "Minutes" in word and "Run" not in word
    if of_all or word in TIME_USED_UP:
        return USED_UP
    if word.startswith("QOSMin"):
        return TOO_LITTLE
    return OF_ONE_JOB if any(limit in word for limit in ("PerJob", "PerNode")) else None


def _word(reason: str) -> str:
    return reason.partition(",")[0].strip()


def render(status: Status, now: float | None = None) -> Group:
    """The status for a terminal.

    Args:
        status: what was seen.
        now: seconds since 1970; default: now.
    """
    now = time.time() if now is None else now
    total = sum(number for _, number in status.counts)
    parts: list[Any] = [
        Text(f"{runs(total)}: " + ", ".join(f"{n} {STATES[state].words}" for state, n in status.counts))
    ]
    expected = "not known yet" if status.expected_gpu_hours is None else f"about {show(status.expected_gpu_hours)}"
    given_up = f"; {status.num_given_up:,} given up" if status.num_given_up else ""
    parts.append(
        Text(
            f"GPU-hours: {show(status.used_gpu_hours)} used by the last try of each run; "
            f"of {runs(status.num_left)} still to come: {expected}{given_up}"
        )
    )
    if status.driver:
        parts.append(Text(status.driver))
    begun = {one.run_id: one for one in status.begun}
    submitted = {job.name for job, _ in status.open}
    if alone := [one for one in status.begun if one.run_id not in submitted]:
        parts += _tries(alone, now)
    if status.open:
        parts += _works(status.open, begun, now)
    if status.num_failures > len(status.failures):
        parts.append(Text(f"The last {len(status.failures)} of {status.num_failures} failures:"))
    for failure in status.failures:
        parts.append(Text(f"{failure.run_id} failed (try {failure.attempt}): {failure.cause}\n  log: {failure.log}"))
        tail = re.sub(cells.CONTROL, "\N{REPLACEMENT CHARACTER}", failure.log_tail.strip()).splitlines()[-3:]
        parts += [Text(f"    {line}", style="dim") for line in tail]
    parts += [Text(problem, style="yellow") for problem in status.problems]
    return Group(*parts)


def _tries(begun: list[Begun], now: float) -> Iterator[Text]:
    yield Text(f"{runs(len(begun))} begun and not ended; what has written nothing for long was killed:")
    for one in sorted(begun, key=lambda one: -one.last_written)[:LISTED]:
        parts = [f"try {one.about.attempt}", f"on {one.about.environment.get('host', 'an unknown host')}"]
        if one.about.started_at is not None:
            parts.append(f"for {_ago(datetime.datetime.fromisoformat(one.about.started_at).timestamp(), now)}")
        yield Text(f"  {one.run_id}\n    {', '.join([*parts, *_progress(one, now)])}")
    if len(begun) > LISTED:
        yield Text(f"  and {len(begun) - LISTED:,} more")


def _progress(one: Begun, now: float) -> list[str]:
    steps = "1 step" if one.num_steps == 1 else f"{one.num_steps} steps"
    return [steps, f"wrote {_ago(one.last_written, now)} ago"]


def _ago(at: float, now: float) -> datetime.timedelta:
    return datetime.timedelta(seconds=max(0, int(now - at)))


def _works(works: list[Work], begun: Mapping[str, Begun], now: float) -> Iterator[Any]:
    """Counts by state and reason, every work that waits in vain, then the first of the others."""
    counts = Counter((_state_in_words(job, seen), _pending_reason(seen)) for job, seen in works)
    yield Text(f"{len(works):,} submitted and not done:")
    for (state, reason), number in counts.most_common():
        todo = advice(reason)
        said = [f"  {number:,} {state}" + (f" ({reason})" if reason else "")]
        said += [NEVER_CLEARS_BY_WAITING] if _hopeless(reason) else []
        said += [todo] if todo else []
        yield Text(": ".join(said), style="bold red" if _hopeless(reason) else "")
    in_vain = [work for work in works if _hopeless(_pending_reason(work[1]))]
    others = [work for work in works if not _hopeless(_pending_reason(work[1]))]
    if in_vain:
        yield Text(f"{NEVER_CLEARS_BY_WAITING}:", style="bold red")
        yield from (_told(*work, begun, now) for work in in_vain)
    if others:
        yield Text("Others:" if in_vain else "In the order of their submission:")
        yield from (_told(*work, begun, now) for work in others[:LISTED])
    if len(others) > LISTED:
        yield Text(f"  and {len(others) - LISTED:,} more")


def _told(job: Submitted, seen: InQueue | None, begun: Mapping[str, Begun], now: float) -> Text:
    """A name has a line of its own: in a column of a table it is cut, or folded beyond reading."""
    parts = [job.slurm_id or "", _state_in_words(job, seen)]
    if seen:
        parts += [f"({seen.reason})"] if _pending_reason(seen) else [seen.reason, seen.elapsed]
    if job.submitted_at is not None:
        parts.append(f"submitted {_ago(job.submitted_at, now)} ago")
    if job.name in begun:
        parts += _progress(begun[job.name], now)
    return Text(f"  {job.name}\n    {', '.join(filter(None, parts))}")


def _state_in_words(job: Submitted, seen: InQueue | None) -> str:
    if seen:
        return seen.state
    return "not submitted yet" if job.slurm_id is None else "not in SLURM's queue"


def _pending_reason(seen: InQueue | None) -> str:
    """Why it waits, without the nodes that SLURM may name behind it; empty for one that does not."""
    return _word(seen.reason) if seen and seen.state == "PENDING" else ""


def _hopeless(reason: str) -> bool:
    return advice(reason) is not None and reason not in WAITING


def schema() -> dict[str, Any]:
    """The JSON schema of a line of the ledger."""
    text = Path(__file__).with_name("ledger.schema.json").read_text(encoding="utf-8")
    document: dict[str, Any] = json.loads(text)
    return document
