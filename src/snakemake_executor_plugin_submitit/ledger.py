"""What was asked of SLURM, on disk before and after each sbatch, so that another driver can go on.

<folder>/lock              held by the driver that is at work; the kernel lets go of it when that process ends
<folder>/ledger.jsonl      one event a line, see `EVENTS`
<folder>/ended/<token>     exit status, SLURM id and node of a work that ended by itself, and who ended it
<folder>/jobs/<token>/     of a work: job.sh, command.sh, claim, and its log
<folder>/batches/<batch>/  of an sbatch: what it was given, batch.sh, and what SLURM itself had to say to each job

A job of SLURM runs one work, or several one after another; an sbatch asks for one job, or for an array of them.
"""

import fcntl
import json
import os
import shutil
import socket
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EVENTS = {
    "intent": "a work is about to be submitted; the fields of `Submission`",
    "submitted": "SLURM's id of a `batch`; of an array each work has `<slurm_id>_<place>`. With `token`, of one work",
    "closed": "nobody looks after `token` any more; `how` it ended, and whether it `began`, or its job (`job_began`)",
    "asked": "`gpu_hours` that closed works had asked for",
    "proved": "a work of this `kind` was a success",
    "failed": "the work `key` of a `kind` failed; `said` is a digest of what it said",
    "mended": "what failed of a `kind`, or of all where none is named, does not count any more",
    "unfit": "`nodes` that are not what works with this `asked` ask for; holds for a day",
}
"""Of the ledger, by the field `event`; most have `at`, the time in seconds since 1970."""

UNFIT_SECONDS = 24 * 3600.0
"""How long a node is left out: its cards may be changed, or whoever used them may leave."""

WITHDRAWN = "withdrawn"
"""In a claim: the driver took the work back before any job began it."""
CLOSED = "closed"
"""In a claim: the work is concluded; a job that SLURM starts once more leaves at once."""


class LedgerInUseError(Exception):
    """Another driver is at work in the same folder."""


@dataclass
class Submission:
    """One work's part of a request to SLURM."""

    key: str
    """The work: equal for the same outputs in every call of Snakemake."""
    token: str
    """Names its folder."""
    digest: str
    """Of what is to be run; a changed command is other work."""
    asked: str = ""
    """Digest of what was asked of SLURM."""
    name: str = ""
    batch: str = ""
    """The sbatch that it is part of."""
    place: int | None = None
    """Its job's index in an array."""
    shared: bool = False
    """Its job runs other works, too."""
    job_began: bool = False
    """A job that it shares began: SLURM was asked for all of it, whatever becomes of this work."""
    gpu_hours: float = 0.0
    """Asked for."""
    slurm_id: str | None = None
    """`<job>`, or `<array>_<place>`."""
    resubmissions: int = 0


@dataclass(frozen=True)
class Ended:
    """What a job said of its end."""

    status: int
    slurm_id: str
    node: str
    by: str = "itself"
    """What ended it: `itself`, `signal` (the job was told to end), `OUT_OF_MEMORY`, `TIMEOUT`."""


class Ledger:
    """All submissions that are not closed, by key."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: where it lies; made if need be, readable for its owner alone.

        Raises:
            LedgerInUseError: with who uses it.
        """
        self.folder = folder
        for inner in (folder, folder / "jobs", folder / "ended", folder / "batches"):
            inner.mkdir(parents=True, exist_ok=True)
        os.chmod(folder, 0o700)  # what lies here is run
        self._lock = (folder / "lock").open("a+")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.seek(0)
            raise LedgerInUseError(self._lock.read().strip() or "an unknown process") from None
        except OSError as error:
            raise OSError(
                f"{folder}: this file system can't lock files ({error.strerror}); Lustre needs the mount option `flock`"
            ) from None
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self.open: dict[str, Submission] = {}
        """Submissions that are not closed, by key."""
        self._tokens: dict[str, Submission] = {}
        self._batches: dict[str, list[Submission]] = {}
        """The same by token, and those of a batch."""
        self.proved: set[str] = set()
        """Kinds of which a work was a success."""
        self.failures: dict[str, dict[str, Counter[str]]] = {}
        """How often which works failed, by kind and by what they said; until one of the kind is a success."""
        self.excluded: dict[str, set[str]] = {}
        """Nodes that were not what was asked for, by that."""
        self._unfit: list[dict[str, Any]] = []
        self._gpu_hours_of_closed = 0.0
        self._read()
        self._compact()
        self._events = self._path.open("a", encoding="utf-8")

    @property
    def _path(self) -> Path:
        return self.folder / "ledger.jsonl"

    def _read(self) -> None:
        if not self._path.exists():
            return
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                event = json.loads(line)
            except ValueError:
                continue  # the last line of a driver that was cut off while it wrote
            self._replay(event)

    def _replay(self, event: dict[str, Any]) -> None:
        what = event["event"]
        if what == "intent":
            fields = {name: event[name] for name in Submission.__dataclass_fields__ if name in event}
            self._open(Submission(**fields))
        elif what == "proved":
            self.proved.add(event["kind"])
        elif what == "failed":
            self.failures.setdefault(event["kind"], {}).setdefault(event["said"], Counter())[event["key"]] += 1
        elif what == "mended":
            for kind in [event["kind"]] if "kind" in event else list(self.failures):
                self.failures.pop(kind, None)
        elif what == "unfit":
            if time.time() - event["at"] < UNFIT_SECONDS:
                self._unfit.append(event)
                self.excluded.setdefault(event["asked"], set()).update(event["nodes"])
        elif what == "asked":
            self._gpu_hours_of_closed += event["gpu_hours"]
        else:
            for submission in self._of(event):
                if what == "closed":
                    self._forget(submission, event.get("job_began", event["began"]))
                else:
                    submission.slurm_id = _id_in(submission, event)

    def _open(self, submission: Submission) -> None:
        if before := self.open.get(submission.key):
            self._drop(before)
        self.open[submission.key] = self._tokens[submission.token] = submission
        self._batches.setdefault(submission.batch, []).append(submission)

    def _drop(self, submission: Submission) -> None:
        del self.open[submission.key], self._tokens[submission.token]
        self._batches[submission.batch].remove(submission)
        if not self._batches[submission.batch]:
            del self._batches[submission.batch]

    def _of(self, event: dict[str, Any]) -> list[Submission]:
        """What an event speaks of: one work, or all of a batch."""
        if "token" not in event:
            return self.batch_mates(event["batch"])
        return [self._tokens[event["token"]]] if event["token"] in self._tokens else []

    def _compact(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            for event in self._events_to_keep():
                stream.write(json.dumps(event) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._path)
        for token in self.ended_tokens() - {one.token for one in self.open.values()}:
            (self.ended_folder / token).unlink(missing_ok=True)  # of a job that was given up before it ended

    def _events_to_keep(self) -> Iterator[dict[str, Any]]:
        yield {"event": "asked", "gpu_hours": self._gpu_hours_of_closed}
        for kind in sorted(self.proved):
            yield {"event": "proved", "kind": kind}
        for kind, alike in self.failures.items():
            for said, keys in alike.items():
                yield from ({"event": "failed", "kind": kind, "said": said, "key": key} for key in keys.elements())
        yield from self._unfit
        for submission in self.open.values():
            yield {"event": "intent", **submission.__dict__, "slurm_id": None}
            if submission.slurm_id:
                yield {"event": "submitted", "token": submission.token, "slurm_id": submission.slurm_id}

    def _write(self, *events: dict[str, Any]) -> None:
        at = round(time.time(), 3)
        self._events.write("".join(json.dumps({"at": at} | event) + "\n" for event in events))
        self._events.flush()
        os.fsync(self._events.fileno())

    def _note(self, event: dict[str, Any]) -> None:
        self._write(event)
        self._replay(event)

    def intend(self, submissions: Iterable[Submission]) -> None:
        """Notes that a batch is about to be submitted, and makes its folders."""
        intended = list(submissions)
        for submission in intended:
            self.folder_of(submission).mkdir()
            self.batch_folder_of(submission).mkdir(exist_ok=True)
        self._write(*({"event": "intent", **submission.__dict__} for submission in intended))
        for submission in intended:
            self._open(submission)

    def submitted(self, batch: str, slurm_id: str) -> None:
        """Notes the id that SLURM gave to a batch."""
        self._note({"event": "submitted", "batch": batch, "slurm_id": slurm_id})

    def moved(self, submission: Submission, slurm_id: str) -> None:
        """Notes that another job than the one that was known does this work."""
        self._note({"event": "submitted", "token": submission.token, "slurm_id": slurm_id})

    def prove(self, kind: str) -> None:
        """Notes that works of this kind can be a success."""
        if kind not in self.proved:
            self._note({"event": "proved", "kind": kind})

    def fail(self, kind: str, said: str, key: str) -> None:
        """Notes what a work said that failed."""
        self._note({"event": "failed", "kind": kind, "said": said, "key": key})

    def forgive(self, kind: str | None = None) -> None:
        """Notes that earlier failures of a kind, or of all, do not count any more."""
        if self.failures if kind is None else kind in self.failures:
            self._note({"event": "mended"} | ({} if kind is None else {"kind": kind}))

    def exclude(self, asked: str, nodes: Iterable[str]) -> set[str]:
        """Notes nodes that are not what works ask for; all such nodes."""
        self._note({"event": "unfit", "asked": asked, "nodes": sorted(nodes), "at": round(time.time(), 3)})
        return self.excluded[asked]

    @property
    def gpu_hours_asked(self) -> float:
        """GPU-hours asked of SLURM so far, in all calls; what never began is not counted."""
        return self._gpu_hours_of_closed + sum(one.gpu_hours for one in self.open.values())

    def batch_mates(self, batch: str) -> list[Submission]:
        """The open works of an sbatch."""
        return list(self._batches.get(batch, []))

    def job_mates(self, submission: Submission) -> list[Submission]:
        """The open works of the same job, itself among them."""
        return [one for one in self.batch_mates(submission.batch) if one.place == submission.place]

    def close(self, submission: Submission, how: str, *, keep_files: bool) -> None:
        """Notes that nobody has to look after this submission any more."""
        event = {
            "event": "closed", "token": submission.token, "how": how, "began": self.has_begun(submission),
            "job_began": submission.job_began or any(map(self.has_begun, self.job_mates(submission))),
        }  # fmt: skip
        self._note(event)
        self.forget_end(submission)
        folder = self.folder_of(submission)
        if not keep_files:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            (folder / "claim").write_text(CLOSED, encoding="utf-8")
            (self.batch_folder_of(submission) / "keep").touch()
        self._tidy(submission)

    def _forget(self, submission: Submission, job_began: bool) -> None:
        if self.open.get(submission.key) is submission:
            for mate in self.job_mates(submission):
                mate.job_began = job_began
            self._drop(submission)
            self._gpu_hours_of_closed += submission.gpu_hours * job_began

    def _tidy(self, submission: Submission) -> None:
        """Removes what an sbatch was given when the last of its works is closed, unless a log of it is referred to."""
        folder = self.batch_folder_of(submission)
        if self.batch_mates(submission.batch) or (folder / "keep").exists():
            return
        shutil.rmtree(folder, ignore_errors=True)

    def forget_end(self, submission: Submission) -> None:
        """Of a job that runs again, or whose end is noted."""
        self._ended_path(submission).unlink(missing_ok=True)

    def folder_of(self, submission: Submission) -> Path:
        return self.folder / "jobs" / submission.token

    def batch_folder_of(self, submission: Submission) -> Path:
        return self.folder / "batches" / submission.batch

    def logs_of(self, submission: Submission) -> list[Path]:
        """What the work said, and what SLURM said of its job; those that hold anything."""
        logs = (self.folder_of(submission) / "log", self.batch_folder_of(submission) / f"{submission.place or 0}.log")
        return [log for log in logs if log.exists() and log.stat().st_size]

    def _ended_path(self, submission: Submission) -> Path:
        return self.folder / "ended" / submission.token

    @property
    def ended_folder(self) -> Path:
        return self.folder / "ended"

    def ended_tokens(self) -> set[str]:
        """Tokens of all jobs that said how they ended; one look at one folder."""
        return {name for name in os.listdir(self.ended_folder) if "." not in name}

    def ended(self, submission: Submission) -> Ended | None:
        """What a job said of its end, if it did."""
        try:
            status, *rest = self._ended_path(submission).read_text(encoding="utf-8").split()
            return Ended(int(status), *rest)
        except (FileNotFoundError, ValueError, TypeError):
            return None

    def claimed_by(self, submission: Submission) -> str | None:
        """The SLURM id of the job that began the work, or `WITHDRAWN`."""
        try:
            return (self.folder_of(submission) / "claim").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

    def has_begun(self, submission: Submission) -> bool:
        """Whether a job has begun the work."""
        return self.claimed_by(submission) not in (None, WITHDRAWN)

    def unfit_nodes(self, submission: Submission) -> list[str]:
        """Nodes that the work itself calls not what was asked for."""
        try:
            return (self.folder_of(submission) / "unfit").read_text(encoding="utf-8").split()
        except FileNotFoundError:
            return []

    def withdraw(self, submission: Submission) -> bool:
        """Takes the work back, so that a job of this submission that starts later leaves at once.

        Returns:
            False when a job has begun it already.
        """
        try:
            with (self.folder_of(submission) / "claim").open("x") as stream:
                stream.write(WITHDRAWN)
        except FileExistsError:
            return self.claimed_by(submission) == WITHDRAWN
        except FileNotFoundError:
            return True  # somebody deleted the folder: its job can't start either
        return True

    def release(self) -> None:
        """Lets another driver in."""
        self._events.close()
        self._lock.close()


def _id_in(submission: Submission, event: dict[str, Any]) -> str:
    slurm_id = str(event["slurm_id"])
    return slurm_id if "token" in event or submission.place is None else f"{slurm_id}_{submission.place}"
