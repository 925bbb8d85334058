"""What SLURM's commands say of a cluster, and how they are called.

Only formats that are the same in all releases are read: `sinfo --format`, `scontrol show`, `sacctmgr --parsable2`.
"""

import os
import pwd
import re
import shlex
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetune_study.errors import StudyError

COMMANDS = ("sbatch", "squeue", "sacct", "scontrol", "sinfo", "sacctmgr", "scancel")

COMMAND_SECONDS = 120
"""SLURM's commands give up by themselves after MessageTimeout (10 s by default) times some tries."""

GPU_GRES = re.compile(r"\bgpu(?::(?!no_consume)([^:,()]+?))?(?::no_consume)?:(\d+)(?![\w.])")
"""In a list as `gpu:a100:8(S:0-1),shard:16`: type, if there is one, and number."""

OPTIONS = {
    "job_name": "job-name", "slurm_partition": "partition", "slurm_account": "account", "qos": "qos",
    "constraint": "constraint", "nodes": "nodes", "tasks": "ntasks", "tasks_per_node": "ntasks-per-node",
    "gres": "gres", "cpus_per_task": "cpus-per-task", "mem": "mem", "runtime": "time",
}  # fmt: skip
"""Options of sbatch by the names of `slurm.resources`."""

UNLIMITED = float("inf")


class SchedulerError(StudyError):
    """A command of SLURM that failed; the message is SLURM's."""


def ask(*words: str) -> str:
    """What a command of SLURM prints.

    Raises:
        SchedulerError: when it is not there, fails, or does not answer.
    """
    # A doctor that runs inside a job must not hand its own allocation on.
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_")) or name in ("SLURM_CONF", "SBATCH_EXPORT")
    }
    try:
        done = subprocess.run(
            words,
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
            stdin=subprocess.DEVNULL,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise SchedulerError(f"{words[0]} did not answer within {COMMAND_SECONDS} s") from None
    except OSError as error:
        raise SchedulerError(f"{words[0]} can't be started: {error.strerror}") from None
    if done.returncode:
        # All of it: a site's own rules (job_submit plugins) say in the first lines what they do not like.
        lines = [re.sub(rf"^{words[0]}: (error: )?", "", line).strip() for line in done.stderr.splitlines()]
        said = "; ".join(dict.fromkeys(filter(None, lines)))
        raise SchedulerError(said or f"{words[0]} ended with status {done.returncode}")
    return done.stdout


def options(resources: Mapping[str, str | int | None]) -> list[str]:
    """The words of sbatch for what a run asks for.

    Args:
        resources: as `slurm.resources` gives them: `mem` in MB, `runtime` in minutes.

    Raises:
        SchedulerError: when `slurm_extra` can't be taken apart.
    """
    given = {"tasks": 1, **{name: value for name, value in resources.items() if value is not None}}
    if "tasks_per_node" in given:
        del given["tasks"]
    words = [
        f"--{option}={given[name]}{'M' if name == 'mem' else ''}" for name, option in OPTIONS.items() if name in given
    ]
    try:
        return [*words, *shlex.split(str(given.get("slurm_extra") or ""))]
    except ValueError as error:
        raise SchedulerError(f"slurm.extra is {given['slurm_extra']!r}: {error} (quotes come in pairs)") from None


# --- parsing ---------------------------------------------------------------------------------------------------------


def minutes(text: str) -> float:
    """A time limit of SLURM in minutes: `30`, `30:00`, `1:30:00`, `2-0`, `2-00:00:00`; without a limit infinite."""
    if text.strip().upper() in ("", "UNLIMITED", "INFINITE", "NONE", "N/A", "(NULL)", "-1"):
        return UNLIMITED
    days, dash, rest = text.strip().rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash:  # hours come first
        hours, mins, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, mins, seconds = parts
    else:  # minutes come first
        hours, (mins, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 1440 + hours * 60 + mins + seconds / 60


def tres(text: str) -> dict[str, float]:
    """`cpu=4,mem=10G,gres/gpu:a100=2` as numbers; memory in MB."""
    found = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        number = re.fullmatch(r"([\d.]+)([KMGTP]?)", value)
        if number is None:
            continue
        factor = {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2, "P": 1024**3}[number[2]]
        found[name] = float(number[1]) * (factor if name == "mem" else 1)
    return found


def gpus(gres: str) -> dict[str | None, int]:
    """GPUs of a node by type, from its list of generic resources; None is the type of GPUs that have no name."""
    found: dict[str | None, int] = {}
    for model, number in GPU_GRES.findall(gres):
        found[model or None] = found.get(model or None, 0) + int(number)
    return found


def pairs(line: str) -> dict[str, str]:
    """`Key=value` words of `scontrol --oneliner show`."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def settings(text: str) -> dict[str, str]:
    """What `scontrol show config` says, by name; what is not set is left out."""
    found = dict(re.findall(r"^(\S+)\s*= (.*?)\s*$", text, re.MULTILINE))
    return {name: value for name, value in found.items() if value != "(null)"}


def _names(text: str) -> frozenset[str] | None:
    """Names of a list of a partition; None stands for all."""
    return None if text in ("", "ALL", "N/A", "(null)") else frozenset(text.split(","))


# --- what there is ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A node, once for each partition that it is in."""

    name: str
    partition: str
    gpus: Mapping[str | None, int]
    """Numbers by type."""
    cpus: int
    memory_mb: int
    features: str
    state: str
    """One word of sinfo(1)'s NODE STATE CODES, with its mark."""

    @property
    def is_usable(self) -> bool:
        return not re.match(r"down|drain|fail|unk|error|inval|maint|.*[*$]$", self.state)


NODE_FORMAT = "%N|%R|%G|%c|%m|%f|%T"


def parse_nodes(text: str) -> list[Node]:
    """Nodes from `sinfo --Node --format` with NODE_FORMAT."""
    rows = [line.split("|") for line in text.splitlines() if line.count("|") >= 6]
    return [
        Node(name, partition, gpus(gres), int(cpus.rstrip("+")), int(memory.rstrip("+")), features, state)
        for name, partition, gres, cpus, memory, features, state in (row[:7] for row in rows)
    ]


@dataclass(frozen=True)
class Partition:
    """A partition with the limits that bind everyone."""

    name: str
    says: Mapping[str, str]
    """All of `scontrol show partition`."""

    @property
    def is_default(self) -> bool:
        return self.says.get("Default") == "YES"

    @property
    def state(self) -> str:
        return self.says.get("State", "UP")

    @property
    def max_minutes(self) -> float:
        return minutes(self.says.get("MaxTime", "UNLIMITED"))

    @property
    def qos(self) -> str | None:
        """The QOS whose limits hold for every job there."""
        name = self.says.get("QoS", "N/A")
        return None if name in ("N/A", "(null)") else name

    def refuses(self, kind: str, name: str) -> bool:
        """Whether it is closed to an account or QOS (`kind`: `Accounts`, `Qos`)."""
        allowed, denied = _names(self.says.get(f"Allow{kind}", "ALL")), _names(self.says.get(f"Deny{kind}", ""))
        return (allowed is not None and name not in allowed) or (denied is not None and name in denied)

    def default_memory_mb(self, cpus: int, num_gpus: int, config: Mapping[str, str]) -> float:
        """Memory of a job on one node that asks for none, in MB; infinite where it may use all of the node."""
        for says in (self.says, config):
            for key, times in (("DefMemPerCPU", cpus), ("DefMemPerNode", 1)):
                if (value := says.get(key, "UNLIMITED")) not in ("UNLIMITED", "0"):
                    return float(value) * times
            per_gpu = re.search(r"DefMemPerGPU=(\d+)", says.get("JobDefaults", ""))
            if per_gpu and num_gpus:
                return float(per_gpu[1]) * num_gpus
        return UNLIMITED


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions by name from `scontrol --oneliner show partition`."""
    found = {}
    for line in text.splitlines():
        says = pairs(line)
        if name := says.get("PartitionName"):
            found[name] = Partition(name, says)
    return found


ASSOCIATION_FIELDS = (
    "Account", "ParentName", "User", "Partition", "QOS", "DefaultQOS", "MaxJobs", "MaxSubmit", "MaxWall", "MaxTRES",
    "MaxTRESPerNode", "GrpTRES", "GrpJobs", "GrpSubmit",
)  # fmt: skip
QOS_FIELDS = (
    "Name", "Flags", "MaxWall", "MaxTRES", "MaxTRESPerNode", "MaxTRESPU", "MaxTRESPA", "GrpTRES", "MinTRES",
    "MaxJobsPU", "MaxSubmitPU", "MaxJobsPA", "MaxSubmitPA", "GrpJobs", "GrpSubmit",
)  # fmt: skip

Row = Mapping[str, str]


def parse_rows(text: str, fields: Iterable[str]) -> list[Row]:
    """Rows of `sacctmgr --noheader --parsable2`."""
    names = tuple(fields)
    rows = [line.split("|") for line in text.splitlines()]
    return [dict(zip(names, row, strict=True)) for row in rows if len(row) == len(names)]


@dataclass(frozen=True)
class Cluster:
    """What SLURM says of itself; accounting is empty where it keeps none, or does not answer."""

    config: Mapping[str, str]
    partitions: Mapping[str, Partition]
    nodes: list[Node]
    associations: list[Row] = field(default_factory=list)
    """Of this user; `User` is empty in rows of accounts."""
    qos: Mapping[str, Row] = field(default_factory=dict)
    default_account: str | None = None

    @property
    def name(self) -> str:
        return self.config.get("ClusterName", "cluster")

    @property
    def version(self) -> str:
        return self.config.get("SLURM_VERSION", "unknown")

    @property
    def has_accounting(self) -> bool:
        return self.config.get("AccountingStorageType", "accounting_storage/none") != "accounting_storage/none"

    def enforces(self, what: str) -> bool:
        """Whether SLURM holds jobs to `associations`, `limits` or `qos`; each includes the ones before it."""
        words = set(self.config.get("AccountingStorageEnforce", "none").split(","))
        implied = {"limits": {"safe", "limits"}, "qos": {"qos", "safe"}}.get(what)
        if "all" in words:
            return True
        return bool(words & implied) if implied else bool(words - {"none", "nojobs", "nosteps"})

    def partition(self, name: str | None) -> Partition | None:
        """The partition of a name, or the default one; the first of several, which SLURM takes in a list."""
        if name is not None:
            found = [self.partitions.get(one) for one in name.split(",")]
            return found[0] if all(found) else None
        return next((one for one in self.partitions.values() if one.is_default), None)

    def nodes_of(self, partition: str, gpu_model: str | None = None) -> list[Node]:
        """Nodes of a partition, those that have GPUs of a type if one is given."""
        nodes = [node for node in self.nodes if node.partition == partition]
        return [node for node in nodes if gpu_model in node.gpus] if gpu_model else nodes

    def of_account(self, account: str, partition: str) -> list[Row]:
        """This user's rows for an account; those made for another partition do not count."""
        mine = [row for row in self.associations if row["User"] and row["Account"] == account]
        return [row for row in mine if row["Partition"] in ("", partition)]

    def accounts_above(self, account: str) -> list[Row]:
        """Rows of an account and its parents, as far as they can be seen."""
        by_name = {row["Account"]: row for row in self.associations if not row["User"]}
        chain: list[Row] = []
        while account in by_name and by_name[account] not in chain:
            chain.append(by_name[account])
            account = by_name[account]["ParentName"]
        return chain

    @property
    def accounts(self) -> list[str]:
        """Accounts that this user may charge."""
        return sorted({row["Account"] for row in self.associations if row["User"]})


def me() -> str:
    """This user's name, whatever the environment says."""
    return pwd.getpwuid(os.getuid()).pw_name


def look() -> Cluster:
    """Partitions and nodes of the cluster; accounting is asked by `look_up_accounting`.

    Raises:
        SchedulerError: when SLURM's controller does not answer.
    """
    return Cluster(
        config=settings(ask("scontrol", "show", "config")),
        partitions=parse_partitions(ask("scontrol", "--oneliner", "show", "partition")),
        nodes=parse_nodes(ask("sinfo", "--noheader", "--Node", f"--format={NODE_FORMAT}")),
    )


def look_up_accounting(cluster: Cluster) -> Cluster:
    """The same with what accounting knows of this user: associations, QOS, their limits.

    Raises:
        SchedulerError: when accounting does not answer.
    """
    ask("sacct", "--noheader", "--allocations", "--starttime=now-1hour")

    def rows(fields: tuple[str, ...], *words: str) -> list[Row]:
        shown = ask("sacctmgr", "--noheader", "--parsable2", "show", *words, f"format={','.join(fields)}")
        return parse_rows(shown, fields)

    here = f"cluster={cluster.name}"
    associations = rows(ASSOCIATION_FIELDS, "assoc", "where", here, f"user={me()}")
    associations += rows(ASSOCIATION_FIELDS, "assoc", "where", here, "user=")
    default = ask("sacctmgr", "--noheader", "--parsable2", "show", "user", me(), "format=DefaultAccount").strip()
    return Cluster(
        config=cluster.config,
        partitions=cluster.partitions,
        nodes=cluster.nodes,
        associations=associations,
        qos={row["Name"]: row for row in rows(QOS_FIELDS, "qos")},
        default_account=default.splitlines()[0] if default else None,
    )


# --- jobs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Queued:
    """A job that is not over."""

    state: str
    reason: str
    node: str


def submit(words: list[str], script: Path) -> str:
    """Hands a batch script to sbatch, and gives the job's id.

    Raises:
        SchedulerError: SLURM refuses it, in its words.
    """
    return ask("sbatch", "--parsable", *words, str(script)).strip().split(";")[0]


def would_take(words: list[str]) -> None:
    """Asks SLURM whether it would take a job of these options, without submitting one.

    Raises:
        SchedulerError: SLURM refuses it, in its words.
    """
    ask("sbatch", "--test-only", *words, "--wrap=true")


def queue(ids: Iterable[str]) -> dict[str, Queued]:
    """Those of some jobs that are not over.

    Raises:
        SchedulerError: when the controller does not answer.
    """
    wanted, found = set(ids), {}
    for line in ask("squeue", "--noheader", f"--user={me()}", "--format=%A|%T|%r|%N").splitlines():
        slurm_id, state, reason, node = line.split("|", 3)
        if slurm_id in wanted:
            found[slurm_id] = Queued(state, reason, node)
    return found


def end_of(slurm_id: str) -> str:
    """How a job ended, in SLURM's words; for some minutes after its end the controller knows."""
    try:
        says = pairs(ask("scontrol", "--oneliner", "show", "job", slurm_id))
    except SchedulerError as error:
        return f"unknown to SLURM ({error})"
    return f"{says.get('JobState', '?')}, reason {says.get('Reason', '?')}, exit code {says.get('ExitCode', '?')}"


def cancel(slurm_id: str) -> None:
    """Cancels a job; one that is over stays as it is.

    Raises:
        SchedulerError: when SLURM does not answer.
    """
    ask("scancel", slurm_id)
