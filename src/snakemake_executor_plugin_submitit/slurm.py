"""SLURM's commands: sbatch through submitit, one sacct for all jobs, and what their words mean."""

import os
import pwd
import re
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit.core.utils import FailedSubmissionError
from submitit.slurm.slurm import SlurmExecutor

COMMAND_SECONDS = 120
"""No command of SLURM is waited for longer; its own give up after MessageTimeout (10 s by default) times some tries."""

IDS_PER_COMMAND = 8000
"""Ids in one command line: Linux allows 128 KiB for an argument (MAX_ARG_STRLEN), an id and its comma take up to 12."""

TRANSIENT = re.compile(
    r"socket timed out|unable to contact|connection (refused|reset|timed out)|temporarily|try again|"
    r"unexpected message received|zero bytes were transmitted|communications? (connection|shutdown) failure|"
    r"backup controller|in standby mode|slurm_persist|unable to connect to database|slurmdbd|"
    r"protocol authentication error|munge|controller .*(busy|not responding)|could not be reached|transport endpoint|"
    r"no route to host|network is unreachable|timed out after|temporary failure|unable to establish control machine",
    re.IGNORECASE,
)
"""Words of a SLURM that is busy, restarting or out of reach (slurm_strerror and its callers); it may be asked again."""

NO_ACCOUNTING = re.compile(r"accounting storage is disabled|accounting_storage/none", re.IGNORECASE)

ACTIVE = {
    "PENDING", "RUNNING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "COMPLETING", "CONFIGURING",
    "RESIZING", "RESV_DEL_HOLD", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "REVOKED", "POWER_UP_NODE",
}  # fmt: skip
WAITING = {"PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD", "CONFIGURING"}
"""Of the active ones, those that do not run yet."""
NODE_LOST = {"NODE_FAIL", "PREEMPTED", "BOOT_FAIL"}
"""Nothing the job did: it is submitted again."""
KILLED = {"OUT_OF_MEMORY", "TIMEOUT", "DEADLINE"}
"""Limits that the scheduler enforced; `after_kill` may make a result of them."""
# The rest of squeue(1)'s JOB STATE CODES: COMPLETED, CANCELLED, FAILED.

_BADNESS = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "DEADLINE",
    "TIMEOUT",
    "BOOT_FAIL",
    "PREEMPTED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
)
"""Which row of a job, its batch script and its steps explains its end: the last of these."""


class SlurmError(Exception):
    """A command of SLURM that failed; the message is SLURM's."""

    transient = False


class SlurmBusyError(SlurmError):
    """SLURM may answer another time."""

    transient = True


@dataclass(frozen=True)
class JobStatus:
    """What SLURM says of a job; unknown is None."""

    slurm_id: str
    state: str
    """One word of squeue(1)'s JOB STATE CODES: of job, batch script and steps the one that explains most."""
    by: str | None = None
    """Who cancelled it."""
    exit_code: str | None = None
    """`status:signal`, as sacct gives it."""
    reason: str | None = None
    node: str | None = None
    elapsed_seconds: int | None = None
    requested_memory_mib: float | None = None
    max_rss_mib: float | None = None
    time_limit_minutes: int | None = None
    is_whole: bool = True
    """Accounting notes a job piece by piece; until all is there, states and sizes may be wrong."""
    number: str | None = None
    """What the job itself sees as its id; of an array each task has one, once it has begun."""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE

    def explanation(self, command_status: int | None = None) -> str:
        """The end in words: state, reason, exit code, node.

        Args:
            command_status: what the command itself ended with, where that is known; SLURM folds it.
        """
        state = f"{self.state} by {self.by}" if self.by else self.state
        reason = self.reason or _REASONS.get(self.state)
        if self.state == "OUT_OF_MEMORY" and self.requested_memory_mib:
            reason = f"the job's memory limit of {self.requested_memory_mib:.0f} MiB was reached"
            if self.max_rss_mib:
                reason += f" (largest resident size seen: {self.max_rss_mib:.0f} MiB)"
        if self.state == "TIMEOUT" and self.time_limit_minutes:
            reason = f"the job's time limit of {self.time_limit_minutes} min was reached"
        code, _, signal = (self.exit_code or "").partition(":")
        if self.state == "FAILED" and (code or command_status is not None):
            reason = f"the command ended with status {code if command_status is None else command_status}"
            if command_status is None and signal not in ("", "0"):
                reason = f"killed by signal {signal}"
            elif command_status is not None and command_status > 128:
                reason += f", killed by signal {command_status - 128}"
            if self.reason not in (None, "NonZeroExitCode"):
                reason += f" ({self.reason})"
        parts = [
            f"SLURM state {state}",
            f"reason: {reason or 'SLURM gives none'}",
            f"exit code {self.exit_code or 'unknown'}",
            f"node {self.node or 'none'}",
        ]
        return ", ".join(parts)


_REASONS = {
    "CANCELLED": "somebody cancelled it",
    "NODE_FAIL": "its node failed",
    "PREEMPTED": "a job of higher priority took its place",
    "BOOT_FAIL": "its node did not boot",
    "DEADLINE": "its deadline passed",
    "OUT_OF_MEMORY": "the job's memory limit was reached",
    "TIMEOUT": "the job's time limit was reached",
}


class _Submitter(SlurmExecutor):
    """submitit's executor with a command of ours as the job, and without what a job did not ask for."""

    def __init__(
        self, folder: Path, options: Mapping[str, Any], extra: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        super().__init__(folder)
        self._extra, self._environment = list(extra), environment
        # submitit gives every job five minutes and one node; here a job has what it asks for, or SLURM's default.
        self.parameters = {
            "time": None, "nodes": None, "wckey": None, "use_srun": False, "stderr_to_stdout": True,
            "additional_parameters": {
                "output": f"{str(folder).replace('%', '%%')}/{'%a' if 'array' in options else '0'}.log",
                **{name.replace("-", "_"): value for name, value in options.items()},
            },
        }  # fmt: skip

    def _num_tasks(self) -> int:
        return 1  # SLURM starts the batch script once, whatever it may start itself

    def _make_submission_file_text(self, command: str, uid: str) -> str:
        text = super()._make_submission_file_text(command, uid)
        # Its early warning by SIGUSR2 would end any step that does not know of it.
        return "\n".join(line for line in text.split("\n") if not line.startswith("#SBATCH --signal="))

    def submit(self, command: str) -> str:
        """Writes the batch script and hands it to sbatch, once and with a limit; submitit's own way has none."""
        script = Path(self.folder) / "submission.sh"
        script.write_text(self._make_submission_file_text(command, ""), encoding="utf-8")
        # A driver that is a job itself must not hand its own allocation on; where SLURM's configuration lies must stay.
        environment = {
            name: value
            for name, value in self._environment.items()
            if not name.startswith(("SLURM_", "SBATCH_")) or name in ("SLURM_CONF", "SBATCH_EXPORT")
        }
        answer = run_command("sbatch", *self._extra, str(script), environment=environment)
        return str(self._get_job_id_from_submission_command(answer))


def submission_text(folder: Path, options: Mapping[str, Any], command: str) -> str:
    """The file that sbatch gets; for readers and tests."""
    return _Submitter(folder, options, [], {})._make_submission_file_text(command, "")


def submit(folder: Path, options: Mapping[str, Any], extra: Sequence[str], command: str) -> str:
    """Submits a job.

    Args:
        folder: for the batch script and the log.
        options: of sbatch, by long names.
        extra: more words for its command line.
        command: what the job runs, for a shell.

    Returns:
        Its SLURM id.

    Raises:
        SlurmBusyError: it may work another time; whether the job was accepted is not known.
        SlurmError: SLURM refuses the job, in its words.
    """
    try:
        return _Submitter(folder, options, extra, os.environ).submit(command)
    except FailedSubmissionError as error:
        raise SlurmError(str(error)) from None


def _error(words: str) -> SlurmError:
    words = words.strip() or "no message"
    return (SlurmBusyError if TRANSIENT.search(words) else SlurmError)(words)


def run_command(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command of SLURM prints.

    Raises:
        SlurmBusyError: it may answer another time.
        SlurmError: what it says instead.
    """
    try:
        # No input: sbatch would wait at a terminal for its script when an option has taken the file for its value.
        # A session of its own: a Ctrl-C at the terminal is the driver's to answer.
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=COMMAND_SECONDS, stdin=subprocess.DEVNULL, env=environment,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise SlurmBusyError(f"{words[0]} timed out after {COMMAND_SECONDS} s") from None
    except OSError as error:
        raise SlurmError(f"{words[0]} can't be started: {error}") from None
    if done.returncode:
        raise _error(done.stderr or done.stdout)
    return done.stdout


def _batches(ids: Sequence[str]) -> Iterable[Sequence[str]]:
    return (ids[start : start + IDS_PER_COMMAND] for start in range(0, len(ids), IDS_PER_COMMAND))


STEP = re.compile(r"\.\w+$")
"""What `12_3.batch` has more than its job."""


def _array(slurm_id: str) -> str:
    """Of `12_3`, the array `12`; of another job, its own id."""
    return slurm_id.partition("_")[0]


_FIELDS = (
    "JobID", "JobIDRaw", "State", "ExitCode", "Reason", "NodeList", "ElapsedRaw", "ReqMem", "MaxRSS", "TimelimitRaw",
)  # fmt: skip


class Slurm:
    """One cluster, or several by name (`clusters`), as seen by its commands."""

    def __init__(self) -> None:
        self.clusters: set[str] = set()
        self.has_accounting = True

    def _cluster(self) -> list[str]:
        return ["--clusters", ",".join(sorted(self.clusters))] if self.clusters else []

    def status(self, ids: Sequence[str]) -> dict[str, JobStatus]:
        """What accounting says of all jobs, in one question.

        Raises:
            SlurmError: when it does not answer.
        """
        if not self.has_accounting:
            return self.queue(ids)
        # Of the tasks of an array that wait, accounting has one row for all, under the array's id.
        asked = list(dict.fromkeys(map(_array, ids)))
        rows: list[dict[str, str]] = []
        try:
            for some in _batches(asked):
                answer = run_command(
                    *("sacct", "--noheader", "--parsable2", *self._cluster()),
                    *("--format", ",".join(_FIELDS), "--jobs", ",".join(some)),
                )
                rows += [dict(zip(_FIELDS, line.split("|"), strict=False)) for line in answer.splitlines() if line]
        except SlurmError as error:
            if NO_ACCOUNTING.search(str(error)):
                self.has_accounting = False
                return self.queue(ids)
            raise
        found = parse_accounting(rows, ids)
        vanished = [slurm_id for slurm_id in ids if "_" in slurm_id and slurm_id not in found]
        if not vanished or not rows:
            return found
        known = self.queue(vanished)
        begun = {_array(row["JobID"]) for row in rows}
        gone = [one for one in vanished if one not in known and _array(one) in begun]
        # A task of an array that is cancelled while it waits leaves no trace.
        why = "it was cancelled in the queue"
        active = {one: status for one, status in known.items() if status.is_active}  # accounting tells of the others
        return found | active | {one: JobStatus(one, "CANCELLED", reason=why) for one in gone}

    def queue(self, ids: Iterable[str]) -> dict[str, JobStatus]:
        """What the controller says of those jobs that it still knows; a finished one for MinJobAge (300 s by default).

        Raises:
            SlurmError: when it does not answer.
        """
        wanted = set(ids)
        answer = run_command(
            *("squeue", "--noheader", "--me", "--array", "--states=all", *self._cluster()),
            "--format=%i|%T|%r|%N|%l|%A",
        )
        found = {}
        for line in answer.splitlines():
            if line.count("|") >= 5 and (words := line.split("|"))[0] in wanted:
                reason = None if words[2] == "None" else words[2]
                found[words[0]] = JobStatus(words[0], words[1], reason=reason, node=words[3] or None, number=words[5])
        return found

    def find(self, folder: Path) -> str | None:
        """Id of the job or array whose batch script lies in a folder, if the controller knows one.

        Raises:
            SlurmError: when it does not answer.
        """
        answer = run_command("squeue", "--noheader", "--me", "--states=all", *self._cluster(), "--format=%F|%o")
        for line in answer.splitlines():
            slurm_id, _, command = line.partition("|")
            if command.startswith(f"{folder}/"):
                return slurm_id.strip()
        return None

    def nodes(self, names: Sequence[str]) -> list[str]:
        """Those of the names that are nodes: sbatch refuses a request that names another.

        Raises:
            SlurmError: when SLURM does not answer.
        """
        where = ("--nodes", ",".join(names), "--format", "%N")
        known = run_command("sinfo", "--noheader", "--Node", *self._cluster(), *where).split()
        return [name for name in names if name in known]

    def details(self, slurm_id: str) -> str | None:
        """The controller's reason for a job's end, which accounting does not keep; None where it knows none."""
        try:
            answer = run_command("scontrol", "--oneliner", "show", "job", slurm_id)
        except SlurmError:
            return None
        reason = re.search(r"\bReason=(\S+)", answer)
        return reason[1] if reason and reason[1] != "None" else None

    def cancel(self, ids: Sequence[str]) -> None:
        """Cancels jobs; those that are over stay as they are.

        Raises:
            SlurmError: when SLURM does not answer.
        """
        for start in range(0, len(ids), 500):
            run_command("scancel", *self._cluster(), *ids[start : start + 500])

    def signal(self, slurm_id: str, name: str) -> None:
        """Sends a signal to the batch script of a job, and to nothing else of it.

        Raises:
            SlurmError: when SLURM does not answer.
        """
        run_command("scancel", "--batch", f"--signal={name}", *self._cluster(), slurm_id)

    def hurry(self, slurm_id: str) -> None:
        """Lets a requeued job start at once: SLURM makes it wait for two minutes and more.

        Raises:
            SlurmError: when SLURM refuses.
        """
        run_command("scontrol", "update", f"JobId={slurm_id}", "StartTime=now")


def parse_accounting(rows: Iterable[Mapping[str, str]], ids: Iterable[str]) -> dict[str, JobStatus]:
    """Rows of jobs, their batch scripts and steps become one status a job.

    While the job itself is active, it is that; when it is over, the row that explains most gives the state: a step that
    ran out of memory inside a job that merely `FAILED`.

    Args:
        rows: of sacct, by its field names.
        ids: jobs, and tasks of arrays as `<array>_<index>`; of others nothing is said.
    """
    of_job: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        of_job.setdefault(STEP.sub("", row["JobID"]), []).append(row)
    in_line = [(job, rows_of_it) for job, rows_of_it in of_job.items() if job.endswith("]")]
    found = {}
    for slurm_id in ids:
        those = of_job.get(slurm_id) or next((its for job, its in in_line if _is_in(slurm_id, job)), None)
        if those:
            found[slurm_id] = _status(slurm_id, those)
    return found


def _is_in(slurm_id: str, job: str) -> bool:
    """Whether a task is among those that wait together, as `12_3` in `12_[0,2-5%4]`."""
    array, _, index = slurm_id.partition("_")
    if not index.isdigit() or not job.startswith(f"{array}_["):
        return False
    if "..." in job:  # SLURM cuts long lists short
        return True
    for part in job[job.index("[") + 1 : -1].partition("%")[0].split(","):
        first, _, last = part.partition(":")[0].partition("-")
        if int(first) <= int(index) <= int(last or first):
            return True
    return False


def _status(slurm_id: str, rows: Sequence[Mapping[str, str]]) -> JobStatus:
    main = next((row for row in rows if not STEP.search(row["JobID"])), rows[0])
    state, by = _state(main["State"])
    exit_code = main["ExitCode"] or None
    if state not in ACTIVE and state != "COMPLETED" and by is None:
        for row in rows:
            if _badness(_state(row["State"])[0]) > _badness(state):
                state, exit_code = _state(row["State"])[0], row["ExitCode"] or exit_code
    return JobStatus(
        slurm_id=slurm_id,
        state=state,
        by=by,
        exit_code=exit_code,
        # Of a job that is over, accounting's reason is why it once had to wait.
        reason=None if state not in ACTIVE or main["Reason"] in ("", "None") else main["Reason"],
        node=None if main["NodeList"] in ("", "None assigned") else main["NodeList"],
        elapsed_seconds=int(main["ElapsedRaw"]) if main["ElapsedRaw"].isdigit() else None,
        requested_memory_mib=mib(main["ReqMem"]),
        max_rss_mib=max(filter(None, (mib(row["MaxRSS"]) for row in rows)), default=None),
        time_limit_minutes=int(main["TimelimitRaw"]) if main["TimelimitRaw"].isdigit() else None,
        is_whole=not STEP.search(main["JobID"]) and main["TimelimitRaw"] != "",
        number=main["JobIDRaw"].split(".")[0] if not main["JobID"].endswith("]") else None,
    )


def _badness(state: str) -> int:
    return _BADNESS.index(state) if state in _BADNESS else -1


def _state(words: str) -> tuple[str, str | None]:
    """`CANCELLED by 1000` and `CANCELLED+` become a state, and who did it."""
    match = re.match(r"([A-Z_]+)\+?(?: by (\d+))?", words)
    if match is None:
        return words or "UNKNOWN", None
    return match[1], _user(int(match[2])) if match[2] else None


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def mib(words: str) -> float | None:
    """`100M`, `4Gn`, `97636K` in MiB; per-CPU sizes (`4Gc`) are not the job's."""
    match = re.fullmatch(r"([\d.]+)([KMGT]?)n?", words)
    if match is None:
        return None
    return float(match[1]) * {"": 2**-20, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20}[match[2]] or None
