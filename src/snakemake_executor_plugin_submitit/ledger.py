"""What was asked of SLURM, on disk before and after each sbatch, so that another driver can go on.

<folder>/lock           held by the driver that is at work; the kernel lets go of it when that process ends
<folder>/ledger.jsonl   one event a line: intent, submitted, closed
<folder>/ended/<token>  exit status, SLURM id and node of a job that ended by itself
<folder>/jobs/<token>/  job.sh, command.sh, claim, what sbatch was given, and the job's log
"""

import fcntl
import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WITHDRAWN = "withdrawn"
"""In a claim: the driver took the work back before any job began it."""
CLOSED = "closed"
"""In a claim: the work is concluded; a job that SLURM starts once more leaves at once."""


class LedgerInUseError(Exception):
    """Another driver is at work in the same folder."""


@dataclass
class Submission:
    """One request to SLURM."""

    key: str
    """The work: equal for the same outputs in every call of Snakemake."""
    token: str
    """This request; names its folder."""
    digest: str
    """Of what is to be run; a changed command is other work."""
    asked: str = ""
    """Digest of what was asked of SLURM."""
    name: str = ""
    slurm_id: str | None = None
    resubmissions: int = 0


@dataclass(frozen=True)
class Ended:
    """What a job said of its end."""

    status: int
    slurm_id: str
    node: str


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
        for inner in (folder, folder / "jobs", folder / "ended"):
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
            if event["event"] == "intent":
                fields = {name: event[name] for name in Submission.__dataclass_fields__ if name in event}
                self.open[event["key"]] = Submission(**fields)
            elif (submission := self.open.get(event["key"])) and submission.token == event["token"]:
                if event["event"] == "submitted":
                    submission.slurm_id = event["slurm_id"]
                else:
                    del self.open[event["key"]]

    def _compact(self) -> None:
        temporary = self._path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as stream:
            for submission in self.open.values():
                for event in self._events_of(submission):
                    stream.write(json.dumps(event) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(self._path)

    @staticmethod
    def _events_of(submission: Submission) -> Iterator[dict[str, Any]]:
        yield {"event": "intent", **submission.__dict__, "slurm_id": None}
        if submission.slurm_id:
            yield {"event": "submitted", **{k: submission.__dict__[k] for k in ("key", "token", "slurm_id")}}

    def _write(self, **event: Any) -> None:
        self._events.write(json.dumps({**event, "at": round(time.time(), 3)}) + "\n")
        self._events.flush()
        os.fsync(self._events.fileno())

    def intend(self, key: str, digest: str, asked: str, name: str, resubmissions: int = 0) -> Submission:
        """Notes that a job is about to be submitted, and makes its folder."""
        submission = Submission(key, uuid.uuid4().hex[:16], digest, asked, name, resubmissions=resubmissions)
        self.folder_of(submission).mkdir()
        self._write(event="intent", **submission.__dict__)
        self.open[key] = submission
        return submission

    def submitted(self, submission: Submission, slurm_id: str) -> None:
        """Notes the id that SLURM gave."""
        submission.slurm_id = slurm_id
        self._write(event="submitted", key=submission.key, token=submission.token, slurm_id=slurm_id)

    def close(self, submission: Submission, how: str, *, keep_files: bool) -> None:
        """Notes that nobody has to look after this submission any more."""
        self._write(event="closed", key=submission.key, token=submission.token, how=how)
        if self.open.get(submission.key) is submission:
            del self.open[submission.key]
        self.forget_end(submission)
        folder = self.folder_of(submission)
        if not keep_files:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder.is_dir():
            (folder / "claim").write_text(CLOSED, encoding="utf-8")

    def forget_end(self, submission: Submission) -> None:
        """Of a job that runs again, or whose end is noted."""
        self._ended_path(submission).unlink(missing_ok=True)

    def folder_of(self, submission: Submission) -> Path:
        return self.folder / "jobs" / submission.token

    def log_of(self, submission: Submission) -> Path:
        """Output of the job itself; the name is submitit's."""
        return self.folder_of(submission) / f"{submission.slurm_id}_0_log.out"

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
            status, slurm_id, node = self._ended_path(submission).read_text(encoding="utf-8").split()
        except (FileNotFoundError, ValueError):
            return None
        return Ended(int(status), slurm_id, node)

    def claimed_by(self, submission: Submission) -> str | None:
        """The SLURM id of the job that began the work, or `WITHDRAWN`."""
        try:
            return (self.folder_of(submission) / "claim").read_text(encoding="utf-8").strip() or None
        except FileNotFoundError:
            return None

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
