"""Limits of partition, account and QOS: does one pass by itself, or will a job never get past it?

SLURM says nearly the same in both cases, so the limits' values and what is in use are asked for. What SLURM 22.05.8
says (measured; tests/slurm/test_limits.py does it again):

sbatch refuses, always with the second line `Job violates accounting/QOS policy (job submit limit, user's size and/or
time limits)`; the first line is the reason's word (a SLURM that gives no reason has the second line alone):

    MaxSubmitJobs of user or account             AssocMaxSubmitJobLimit         passes, if the limit is not 0
    GrpSubmitJobs of account or parent           AssocGrpSubmitJobsLimit        passes
    MaxSubmitJobsPerUser, -PerAccount of QOS     QOSMaxSubmitJobPerUserLimit, MaxSubmitJobsPerAccount    passes
    GrpSubmitJobs of QOS                         QOSGrpSubmitJobsLimit          passes
    any other, if the QOS of job or partition    the pending job's word         never passes
    has the flag DenyOnLimit and the job alone
    is above the limit

An array counts with all its tasks, and is refused as a whole. A QOS that is merely busy refuses nothing, with
DenyOnLimit either. Without the flag, sbatch takes the job. It is pending then, above the limit or only behind others:

    MaxWall           AssocMaxWallDurationPerJobLimit, QOSMaxWallDurationPerJobLimit
    MaxTRES           AssocMaxGRESPerJob, QOSMaxGRESPerJob, QOSMaxCpuPerJobLimit, QOSMaxMemoryPerJob,
                      QOSMaxNodePerJobLimit
    MaxTRESPerNode    AssocMaxGRESPerNode, QOSMaxGRESPerNode
    MaxTRESMins       AssocMaxCpuMinutesPerJobLimit, QOSMaxCpuMinutesPerJobLimit
    MaxTRESPU, -PA    QOSMaxGRESPerUser, QOSMaxCpuPerUserLimit, QOSMaxNodePerUserLimit, MaxGRESPerAccount
    GrpTRES           AssocGrpGRES (parents' limits too), QOSGrpGRES, QOSGrpCpuLimit, QOSGrpNodeLimit
    GrpTRESRunMins    AssocGrpCPURunMinutesLimit, QOSGrpCPURunMinutesLimit
    MaxJobs, GrpJobs  AssocMaxJobsLimit, AssocGrpJobsLimit, QOSMaxJobsPerUserLimit, QOSGrpJobsLimit, MaxJobsPerAccount
    GrpTRESMins, GrpWall: a job that alone is above them starts (AccountingStorageEnforce without `safe`)

Partitions (EnforcePartLimits=NO: the job is pending for; ALL and ANY: sbatch refuses with):

    MaxTime                        PartitionTimeLimit   Requested time limit is invalid (missing or exceeds some limit)
    MinNodes, MaxNodes, all nodes  PartitionNodeLimit   Node count specification invalid
    MaxCPUsPerNode, a node's CPUs  PartitionConfig      More processors requested than permitted
    MaxMemPerNode                  MaxMemPerLimit       Memory required by task is not available
    AllowQos       Job's QOS not permitted to use this partition (...)          Invalid qos specification
    AllowAccounts, DenyAccounts
                   Job's account not permitted to use this partition (...)      Invalid account or account/partition ...
    AllowGroups    always refused: User's group not permitted to use this partition
    State=DOWN     always taken: PartitionDown
    State=DRAIN, INACTIVE
                   always refused: Required partition not available (inactive or drain)

Of limits of the same kind, the partition's QOS counts before the job's (after it, if that has the flag OverPartQOS),
and both before the associations (https://slurm.schedmd.com/resource_limits.html, Hierarchy; measured). Users may ask
sacctmgr for their associations, all accounts and all QOS, and `scontrol show assoc_mgr` for what is in use; PrivateData
may hide parts of it, and then the words alone decide.
"""

import math
import os
import pwd
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from snakemake_executor_plugin_submitit.slurm import TRANSIENT, SlurmError, run_command

REFRESH_SECONDS = 180.0
"""What is known of limits and pending jobs is asked for again after so long: administrators change it now and then."""

FRESH_SECONDS = 20.0
"""No job fails for a limit that was asked for longer ago, and so often a new job's request is; status_interval's
default."""

POLICY = re.compile(r"violates accounting/QOS policy", re.IGNORECASE)
"""ESLURM_ACCOUNTING_POLICY: any limit of association or QOS."""

CLOSED = re.compile(r"partition not available|breached requested QOS usage threshold", re.IGNORECASE)
"""Refusals that an administrator or time may mend: ESLURM_PARTITION_NOT_AVAIL, ESLURM_QOS_THRES."""

PERMANENT = re.compile(
    r"BadConstraints|Invalid(Account|QOS)|(Account|QOS)NotAllowed|DependencyNeverSatisfied|PartitionTimeLimit|"
    r"MaxMemPerLimit|(Assoc|QOS)Max\w+Per(Job|Node)(Limit)?|Job's (QOS|account) not permitted to use this partition.*"
)
"""Reasons that are about the job alone, whatever the limit's value (squeue(1), JOB REASON CODES)."""

_OF_LIMITS = re.compile(r"(Assoc|QOS)(Grp|Max|Min)\w+|Max\w+PerAccount|Partition(NodeLimit|Config)")
"""Reasons that pass or do not pass, depending on the limit's value."""

_SENTENCES = {
    "time limit is invalid": "PartitionTimeLimit",
    "node count specification invalid": "PartitionNodeLimit",
    "more processors requested": "PartitionConfig",
    "memory required by task": "MaxMemPerLimit",
}
"""What sbatch says (slurm_strerror) of that for which a job would be pending where limits are not enforced."""

_TRES, _TRES_MINUTES, _PER_NODE, _MINUTES = "TRES", "TRES minutes", "TRES per node", "minutes"
_RUNNING, _SUBMITTED = "running jobs", "jobs"

_GROUP = {
    "GrpTRES": ("Grp{}", _TRES),
    "GrpTRESMins": ("Grp{}Minutes", _TRES_MINUTES),
    "GrpTRESRunMins": ("Grp{}RunMinutes", _TRES_MINUTES),
    "GrpJobs": ("GrpJobs", _RUNNING),
    "GrpSubmitJobs": ("GrpSubmitJobs", _SUBMITTED),
    "GrpWall": ("GrpWall", _MINUTES),
}
_OWN = {
    "MaxTRES": ("Max{}PerJob", _TRES),
    "MaxTRESPerNode": ("Max{}PerNode", _PER_NODE),
    "MaxTRESMins": ("Max{}MinutesPerJob", _TRES_MINUTES),
    "MaxWall": ("MaxWallPerJob", _MINUTES),
}
_USER = _GROUP | _OWN | {"MaxJobs": ("MaxJobs", _RUNNING), "MaxSubmitJobs": ("MaxSubmitJobs", _SUBMITTED)}
_QOS = (
    _GROUP
    | _OWN
    | {
        "MaxTRESPU": ("Max{}PerUser", _TRES),
        "MaxJobsPU": ("MaxJobsPerUser", _RUNNING),
        "MaxSubmitJobsPU": ("MaxSubmitJobsPerUser", _SUBMITTED),
        "MaxTRESPA": ("Max{}PerAccount", _TRES),
        "MaxJobsPA": ("MaxJobsPerAccount", _RUNNING),
        "MaxSubmitJobsPA": ("MaxSubmitJobsPerAccount", _SUBMITTED),
        "MinTRESPerJob": ("Min{}", _TRES),
    }
)
"""Limits of users, accounts (`_GROUP`) and QOS as sacctmgr(1) names them: the reason's word without its scope, `{}` for
the resource, and what is compared."""

_PARTITION = {
    "MaxTime": ("PartitionTimeLimit", _MINUTES, ""),
    "MaxNodes": ("PartitionNodeLimit", _TRES, "node"),
    "TotalNodes": ("PartitionNodeLimit", _TRES, "node"),
    "MinNodes": ("PartitionNodeLimit", _TRES, "node"),
    "MaxCPUsPerNode": ("PartitionConfig", _TRES, "cpu of one node"),
    "MaxMemPerNode": ("MaxMemPerLimit", _PER_NODE, "mem"),
}
"""Limits of partitions as `scontrol show partition` names them: the reason, what is compared, the resource."""

_LIFTED_BY = {"MaxTime": "PartitionTimeLimit", "MaxNodes": "PartitionMaxNodes", "MinNodes": "PartitionMinNodes"}
"""Flags of a QOS that lift a partition's limit (sacctmgr(1))."""

_BUDGETS = ("GrpTRESMins", "GrpWall")
"""What is used up over months; a job above it waits for ever only where AccountingStorageEnforce has `safe`."""


@dataclass(frozen=True)
class Limit:
    """One limit of one partition, account, user or QOS."""

    scope: str
    """Whose, in words: `QOS gpu`."""
    name: str
    """SLURM's: `MaxWall`."""
    reason: str
    """Of jobs that wait for it, as `_plain` has it."""
    measure: str
    """What is compared."""
    resource: str
    """The TRES, `gres/gpu`; empty for times and numbers of jobs."""
    value: float
    """In minutes, MiB, pieces."""

    @property
    def slot(self) -> tuple[str, str]:
        """Limits of the same slot take each other's place."""
        same = {"MaxJobsPU": "MaxJobs", "MaxSubmitJobsPU": "MaxSubmitJobs"}
        return same.get(self.name, self.name), self.resource

    def asked(self, request: "Request") -> float | None:
        """What a job asks for of what is limited; None if that is not known."""
        if self.measure in (_RUNNING, _SUBMITTED):
            return 1
        if self.measure == _MINUTES:
            return request.minutes
        amount = dict(request.tres).get(self.resource, 0.0 if self.name.startswith("Min") else None)
        if amount is None or self.measure == _TRES:
            return amount
        if self.measure == _PER_NODE:
            return amount / (dict(request.tres).get("node") or 1)
        return None if request.minutes is None else amount * request.minutes

    def excludes(self, request: "Request") -> bool:
        """Whether a job alone asks for more than that, so that nobody's end helps."""
        asked = self.asked(request)
        if asked is None:
            return False
        return asked < self.value if self.name.startswith("Min") else asked > self.value

    def amount(self, number: float) -> str:
        """A number of what is limited, in words."""
        unit = "min" if self.measure == _MINUTES else _UNITS.get(self.resource, self.resource) or self.measure
        unit += " × min" * (self.measure == _TRES_MINUTES)
        return f"{'unlimited' if math.isinf(number) else f'{number:.10g}'} {unit}"

    def against(self, request: "Request") -> str:
        """Why a job never gets past it."""
        verb = "wants at least" if self.name.startswith("Min") else "allows"
        share = next((words for sign, words in _SHARES.items() if sign in self.name), "")
        asked = "" if self.measure in (_RUNNING, _SUBMITTED) else f", and the job asks for {self._asked(request)}"
        return f"{self.scope} {verb} {self.amount(self.value)}{share} ({self.name}){asked}"

    def _asked(self, request: "Request") -> str:
        return self.amount(self.asked(request) or 0.0)


_UNITS = {"mem": "MiB of memory", "node": "node(s)", "cpu": "CPU(s)", "gres/gpu": "GPU(s)"}
_UNITS["cpu of one node"] = "CPU(s)"

_SHARES = {
    "PerNode": " per node", "CPUs of": " per node", "PU": " per user", "PA": " per account",
    "GrpTRES": " in all", "GrpWall": " in all", "MaxTRES": " per job", "MaxWall": " per job", "MaxTime": " per job",
}  # fmt: skip
"""What of a limit's name says whose share it is; the first that fits."""


@dataclass(frozen=True)
class Request:
    """What one job asks for."""

    partitions: tuple[str, ...]
    """The first that is free; none: the cluster's default one."""
    account: str | None
    qos: str | None
    minutes: float | None
    tres: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Refusal:
    """What a refusal of sbatch means."""

    passes: bool | None
    """Whether it will be another answer when other jobs have ended; None: that can't be told."""
    why: str = ""
    """Which limit it is, its value, and what is in use or asked for; empty if that is not known."""
    room: int | None = None
    """How many jobs fit now, as far as known. An array that asks for more has to be cut."""


@dataclass(frozen=True)
class _Partition:
    qos: str | None
    limits: tuple[Limit, ...]


@dataclass(frozen=True)
class _Values:
    """The cluster's limits as they were at a time."""

    user: str
    default_account: str | None
    default_qos: Mapping[str, str | None]
    """By account."""
    default_partition: str | None
    parents: Mapping[str, str]
    associations: Mapping[str, Sequence[Limit]]
    """By scope; an association for one partition alone has it in its scope."""
    qos: Mapping[str, Sequence[Limit]]
    qos_flags: Mapping[str, str]
    partitions: Mapping[str, _Partition]

    def completed(self, request: Request) -> Request:
        """With the defaults for what it does not name."""
        account = request.account or self.default_account
        return replace(
            request,
            partitions=request.partitions or ((self.default_partition,) if self.default_partition else ()),
            account=account,
            qos=request.qos or self.default_qos.get(account or ""),
        )

    def in_force(self, request: Request, partition: str) -> list[Limit]:
        """All limits that a job has to keep in a partition; lower ones hide behind higher ones of the same slot."""
        there = self.partitions.get(partition, _Partition(None, ()))
        flags = self.qos_flags.get(request.qos or "", "").split(",")
        order = [there.qos, request.qos]
        if "OverPartQOS" in flags:
            order.reverse()
        found: dict[tuple[str, str], Limit] = {}
        for qos in order:
            for limit in self.qos.get(qos or "", ()):
                found.setdefault(limit.slot, limit)
        of_partition = [limit for limit in there.limits if _LIFTED_BY.get(limit.name) not in flags]
        of_accounts = [limit for limit in self._of_account(request.account or "", partition) if limit.slot not in found]
        return [*found.values(), *of_accounts, *of_partition]

    def _of_account(self, account: str, partition: str) -> Iterable[Limit]:
        special = _scope(account, self.user, partition)
        yield from self.associations.get(special, self.associations.get(_scope(account, self.user), ()))
        seen: set[str] = set()
        while account and account not in seen:
            yield from self.associations.get(_scope(account), ())
            seen.add(account)
            account = self.parents.get(account, "")


Usage = Mapping[tuple[str, str, str], float]
"""What is in use, by scope, name of the limit and account (of limits per account; else empty)."""


class Limits:
    """The limits of one cluster, as its commands tell them; asked for when they are needed, and seldom."""

    def __init__(self, cluster: str | None = None) -> None:
        """
        Args:
            cluster: its name, where commands go to another cluster than this machine's (`--clusters`).
        """
        self._cluster = cluster
        self._config: dict[str, str] | None = None
        self._values: _Values | None = None
        self._values_since = 0.0
        self._error: SlurmError | None = None
        self._error_since = 0.0
        self._pending: dict[str, Request] = {}
        self._pending_since = -math.inf

    def verdict_of_refusal(self, words: str, options: Mapping[str, Any], count: int = 1) -> Refusal:
        """What it means that sbatch refused.

        Args:
            words: sbatch's.
            options: of sbatch, by long names.
            count: how many jobs it was for; an array counts with all its tasks.
        """
        if TRANSIENT.search(words) or CLOSED.search(words):
            return Refusal(None)
        named = {_plain(word) for word in re.findall(r"\b(?:Assoc|QOS|Max)[A-Z]\w+", words)}
        named |= {_plain(reason) for said, reason in _SENTENCES.items() if said in words.lower()}
        is_policy = POLICY.search(words) is not None
        if not named and not is_policy:
            return Refusal(False)
        # DenyOnLimit refuses only what alone is above a limit; only limits on submitted jobs refuse while others run.
        by_words = Refusal(any("submitjob" in reason for reason in named) if named else None)
        request = request_of(options)
        try:
            values = self._known(FRESH_SECONDS)
        except SlurmError as error:
            return Refusal(by_words.passes, f"its limits could not be asked for: {error}")
        usage = self._usage(values.user) if is_policy else {}
        request = values.completed(request)
        if excluded := _exclusion(values, request, lambda limit: not named or limit.reason in named):
            return Refusal(False, excluded)
        full, room = [], _room(values, request, usage)
        for limit in _submit_limits(values, request):
            used = _used(limit, request, usage)
            if used is not None and used + count > limit.value and (not named or limit.reason in named):
                full.append(f"{limit.scope} allows {limit.amount(limit.value)} at a time ({limit.name}), {used:g} "
                            f"{'is' if used == 1 else 'are'} there")  # fmt: skip
        if full:
            return Refusal(True, "; ".join(full), room)
        return Refusal(by_words.passes, by_words.why, room if by_words.passes else None)

    def never_starts(self, slurm_id: str, reason: str) -> str | None:
        """Why a pending job will never start, however many others end.

        Asks SLURM once for all pending jobs, and for the limits; the answers hold for minutes.

        Args:
            slurm_id: of a job of this user; of an array, with or without the task.
            reason: for which SLURM lets it wait.

        Returns:
            The limit, its value and what the job asks for; None: it may start, or that is not known.
        """
        is_permanent = PERMANENT.fullmatch(reason) is not None
        if not is_permanent and not _OF_LIMITS.fullmatch(reason):
            return None
        by_words = f"{reason} does not pass by itself" if is_permanent else None
        try:
            request = self._request(slurm_id)
            if self._judged(self._known(REFRESH_SECONDS), reason, request, by_words) is None:
                return None
            return self._judged(self._known(FRESH_SECONDS), reason, request, by_words)
        except SlurmError:
            return by_words

    def _judged(self, values: _Values, reason: str, request: Request | None, by_words: str | None) -> str | None:
        if request is None:
            return by_words
        is_safe = "safe" in self._configuration().get("AccountingStorageEnforce", "")
        excluded = _exclusion(
            values,
            values.completed(request),
            lambda limit: limit.reason == _plain(reason) and (is_safe or limit.name not in _BUDGETS),
        )
        # Of several partitions, SLURM tells the reason of one.
        return excluded or (None if len(request.partitions) > 1 and "artition" in reason else by_words)

    def max_array_size(self) -> int:
        """How many tasks an array may have whose first one has the index 0; 1: there are no arrays.

        Raises:
            SlurmError: when SLURM does not answer.
        """
        config = self._configuration()
        sizes = [int(config.get(name) or 0) for name in ("MaxArraySize", "MaxJobCount")]
        if most := re.search(r"\bmax_array_tasks=(\d+)", config.get("SchedulerParameters", "")):
            sizes.append(int(most[1]))
        return max(1, min(sizes))

    # What SLURM is asked for

    def _there(self) -> list[str]:
        return ["--clusters", self._cluster] if self._cluster else []

    def _configuration(self) -> dict[str, str]:
        if self._config is None:
            lines = run_command("scontrol", *self._there(), "show", "config").splitlines()
            self._config = {name.strip(): value.strip() for name, _, value in (line.partition("=") for line in lines)}
        return self._config

    def _known(self, most_seconds: float) -> _Values:
        if self._values is None or time.monotonic() - self._values_since >= most_seconds:
            if self._error is not None and time.monotonic() - self._error_since < FRESH_SECONDS:
                raise self._error
            try:
                self._values, self._values_since = self._asked(), time.monotonic()
            except SlurmError as error:
                self._error, self._error_since = error, time.monotonic()
                raise
        return self._values

    def _asked(self) -> _Values:
        try:
            user = pwd.getpwuid(os.getuid()).pw_name
        except KeyError:
            raise SlurmError(f"the user {os.getuid()} has no name on this machine") from None
        config = self._configuration()
        cluster = f"cluster={config.get('ClusterName', '')}"
        table = _ask_table if "slurmdbd" in config.get("AccountingStorageType", "") else _no_table
        own = table("assoc", ("Account", "Partition", "DefaultQOS", "QOS", *_USER), cluster, f"user={user}")
        accounts = table("assoc", ("Account", "ParentName", *_GROUP), cluster, "user=")
        qos = table("qos", ("Name", "Flags", *_QOS))
        default = table("user", ("DefaultAccount",), f"name={user}")
        partitions = parse_partitions(
            run_command("scontrol", *self._there(), "--oneliner", "show", "partition"),
            run_command("sinfo", *self._there(), "--noheader", "--exact", "--format=%R|%c"),
        )
        return _Values(
            user=user,
            default_account=default[0]["DefaultAccount"] or None if default else None,
            default_qos={row["Account"]: row["DefaultQOS"] or _only(row["QOS"]) for row in own},
            default_partition=next((name for name, (is_default, _) in partitions.items() if is_default), None),
            parents={row["Account"]: row["ParentName"] for row in accounts},
            associations={
                scope: limits_of(scope, "Assoc", row, kinds)
                for rows, kinds, name in ((own, _USER, user), (accounts, _GROUP, None))
                for row in rows
                for scope in [_scope(row["Account"], name, row.get("Partition", ""))]
            },
            qos={row["Name"]: limits_of(f"QOS {row['Name']}", "QOS", row, _QOS) for row in qos},
            qos_flags={row["Name"]: row["Flags"] for row in qos},
            partitions={name: partition for name, (_, partition) in partitions.items()},
        )

    def _usage(self, user: str) -> Usage:
        try:
            answer = run_command("scontrol", *self._there(), "show", "assoc_mgr", "flags=assoc,qos", f"users={user}")
        except SlurmError:
            return {}
        return parse_usage(answer, user, os.getuid())

    def _request(self, slurm_id: str) -> Request | None:
        slurm_id = slurm_id.split("_")[0]
        age = time.monotonic() - self._pending_since
        if age >= (REFRESH_SECONDS if slurm_id in self._pending else FRESH_SECONDS):
            names = ("JobID", "ArrayJobID", "Partition", "Account", "QOS", "TimeLimit", "tres-alloc", "MinCpus")
            columns = ",".join(f"{name}:|" for name in names)
            with suppress(SlurmError):
                answer = run_command(
                    *("squeue", "--noheader", "--me", "--states=PENDING", *self._there(), f"--Format={columns}")
                )
                self._pending = parse_pending(answer)
            self._pending_since = time.monotonic()
        return self._pending.get(slurm_id)


# Comparing


def _exclusion(values: _Values, request: Request, counts: Callable[[Limit], bool]) -> str | None:
    """Which limit excludes a job in every partition that it may go to; one partition's is told."""
    told = None
    for partition in request.partitions or ("",):
        in_force = filter(counts, values.in_force(request, partition))
        excluding = [limit for limit in in_force if limit.excludes(request)]
        if not excluding:
            return None
        told = told or "; ".join(limit.against(request) for limit in excluding)
    return told


def _submit_limits(values: _Values, request: Request) -> list[Limit]:
    found = [limit for partition in request.partitions or ("",) for limit in values.in_force(request, partition)]
    return [limit for limit in dict.fromkeys(found) if limit.measure == _SUBMITTED]


def _used(limit: Limit, request: Request, usage: Usage) -> float | None:
    if not usage:
        return None
    # Who has no entry has no jobs.
    return usage.get((limit.scope, limit.name, (request.account or "") if limit.name.endswith("PA") else ""), 0.0)


def _room(values: _Values, request: Request, usage: Usage) -> int | None:
    left = [
        max(0, int(limit.value - used))
        for limit in _submit_limits(values, request)
        if (used := _used(limit, request, usage)) is not None
    ]
    return min(left, default=None)


# Reading what SLURM prints


def _plain(reason: str) -> str:
    """A reason without what is spelled differently from limit to limit (`QOSMaxMemoryPerJob`, `AssocMaxMemPerJob`)."""
    word = re.sub(r"limit$|notsatisfied$|duration", "", reason.lower())
    return word.replace("memory", "mem").replace("submitjobs", "submitjob")


def _scope(account: str, user: str | None = None, partition: str = "") -> str:
    whose = f"user {user} in account {account}" if user else f"account {account}"
    return f"{whose} and partition {partition}" if partition else whose


def _only(qos: str) -> str | None:
    """The QOS of jobs that name none, where no default is set."""
    return qos if qos and "," not in qos else "normal"


def _ask_table(what: str, columns: Sequence[str], *conditions: str) -> list[dict[str, str]]:
    answer = run_command(
        "sacctmgr", "--noheader", "--parsable2", "show", what, *conditions, f"format={','.join(columns)}"
    )
    return [dict(zip(columns, line.split("|"), strict=False)) for line in answer.splitlines() if line]


def _no_table(*_: object) -> list[dict[str, str]]:
    """Of a cluster without accounting: partitions alone have limits there."""
    return []


def limits_of(scope: str, prefix: str, row: Mapping[str, str], kinds: Mapping[str, tuple[str, str]]) -> list[Limit]:
    """The limits in a row of sacctmgr."""
    found = []
    for name, (reason, measure) in kinds.items():
        start = "" if name.endswith("PA") else prefix
        words = row.get(name, "")
        if "{}" in reason:
            for resource, value in parse_tres(words).items():
                about = reason.format(resource.split("/")[0])
                found.append(Limit(scope, name, _plain(start + about), measure, resource, value))
        elif words:
            value = parse_minutes(words) if measure == _MINUTES else float(words)
            found.append(Limit(scope, name, _plain(start + reason), measure, "", value))
    return found


def parse_partitions(shown: str, nodes: str) -> dict[str, tuple[bool, _Partition]]:
    """Partitions by name, and which is the default one.

    Args:
        shown: by `scontrol --oneliner show partition`.
        nodes: a line `partition|CPUs of a node` for each kind of node.
    """
    largest: dict[str, int] = {}
    for of, cpus in re.findall(r"^(.+)\|(\d+)", nodes, re.MULTILINE):
        largest[of] = max(largest.get(of, 0), int(cpus))
    found = {}
    for line in shown.splitlines():
        fields = dict(word.partition("=")[::2] for word in line.split() if "=" in word)
        name = fields.get("PartitionName", "")
        scope, limits = f"partition {name}", []
        for key, (reason, measure, resource) in _PARTITION.items():
            words = fields.get(key, "")
            if not words or words in ("UNLIMITED", "NONE", "(null)", "0"):
                continue
            value = parse_minutes(words) if measure == _MINUTES else _number(words)
            limits.append(Limit(scope, key, _plain(reason), measure, resource, value))
        if largest.get(name):
            limits.append(Limit(scope, "CPUs of its nodes", "partitionconfig", _TRES, "cpu of one node", largest[name]))
        qos = fields.get("QoS")
        is_default = fields.get("Default") == "YES"
        if name:
            found[name] = is_default, _Partition(None if qos in (None, "N/A") else qos, tuple(limits))
    return found


def parse_usage(shown: str, user: str, uid: int) -> Usage:
    """Submitted jobs by limit, from `scontrol show assoc_mgr flags=assoc,qos`: `MaxSubmitJobs=3(1)`, `N` is none."""
    found: dict[tuple[str, str, str], float] = {}
    scope, group, holder = "", "", ""
    for line in shown.splitlines():
        if association := re.match(r"ClusterName=\S+ Account=(\S*) UserName=(\S*?)(?:\(\d+\))? Partition=(\S*)", line):
            account, name, partition = association.groups()
            scope, group, holder = _scope(account, name or None, partition), "", ""
        elif qos := re.match(r"QOS=(\S+?)(?:\(\d+\))?$", line):
            scope, group, holder = f"QOS {qos[1]}", "", ""
        elif line.strip() in ("Account Limits", "User Limits"):
            group = line.split()[0]
        elif group and "=" not in line:
            holder = line.strip()
        mine = group != "User" or re.fullmatch(rf"{uid}|{re.escape(user)}(\({uid}\))?", holder)
        for name, used in re.findall(r"\b(\w*SubmitJobs\w*)=\w+\((\d+)\)", line):
            if mine:
                found[scope, name, holder if group == "Account" else ""] = float(used)
    return found


def parse_pending(answer: str) -> dict[str, Request]:
    """Requests by id of job and of array, from rows `id|array|partition|account|QOS|time|TRES|CPUs of a node|`."""
    found = {}
    for line in answer.splitlines():
        if line.count("|") < 8:
            continue
        slurm_id, array, partitions, account, qos, limit, tres, cpus, *_ = line.split("|")
        amounts = parse_tres(f"{tres},cpu of one node={cpus}")
        request = Request(tuple(partitions.split(",")), account, qos, parse_minutes(limit), tuple(amounts.items()))
        found[slurm_id] = found[array] = request
    return found


def parse_tres(words: str) -> dict[str, float]:
    """`cpu=4,mem=4G,gres/gpu=2`; memory in MiB."""
    pairs = (word.rpartition("=") for word in words.split(",") if "=" in word)
    return {name: _number(value) for name, _, value in pairs}


def _number(words: str) -> float:
    """`4`, `20M`, `62.50G`; a size in MiB, as SLURM counts."""
    match = re.fullmatch(r"([\d.]+)([KMGTP]?)[nc]?", words)
    if match is None:
        return math.inf
    return float(match[1]) * {"": 1.0, "K": 2**-10, "M": 1.0, "G": 2.0**10, "T": 2.0**20, "P": 2.0**30}[match[2]]


def parse_minutes(words: str) -> float:
    """A time in minutes, as sbatch(1) takes it and SLURM prints it: `30`, `20:00`, `01:00:00`, `1-00`, `UNLIMITED`."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", words)
    if match is None:
        return math.inf
    days, *parts = (int(part or 0) for part in match.groups())
    if match[1] is None and match[4] is None:
        parts = [0, *parts[:2]]  # minutes and seconds
    hours, minutes, seconds = parts
    return days * 1440 + hours * 60 + minutes + seconds / 60


def request_of(options: Mapping[str, Any]) -> Request:
    """What a job with these options of sbatch asks for, as far as they say it."""

    def whole(name: str, default: int = 0) -> int:
        number = re.match(r"\d+", str(options.get(name, "")))  # of a range (`2-4`) the least
        return int(number[0]) if number else default

    nodes = whole("nodes", 1)
    tasks = whole("ntasks") or whole("ntasks-per-node") * nodes or 1
    tres: dict[str, float] = {"node": nodes}
    for option, times in (("gpus", 1), ("gpus-per-node", nodes), ("gpus-per-task", tasks), ("gres", nodes)):
        for name, count in _devices(str(options.get(option) or ""), is_gres=option == "gres"):
            tres[name] = tres.get(name, 0.0) + count * times
    tres["cpu of one node"] = whole("cpus-per-task", 1)
    per_gpu = whole("cpus-per-gpu")
    tres["cpu"] = max(tasks * whole("cpus-per-task", 1), per_gpu * int(tres.get("gres/gpu", 0)))
    if memory := options.get("mem"):
        tres["mem"] = _number(str(memory)) * nodes
    elif memory := options.get("mem-per-cpu"):
        tres["mem"] = _number(str(memory)) * tres["cpu"]
    limit = options.get("time")
    return Request(
        tuple(str(options.get("partition") or "").split(",")) if options.get("partition") else (),
        options.get("account"),
        options.get("qos"),
        None if limit is None else parse_minutes(str(limit)),
        tuple(tres.items()),
    )


def _devices(words: str, is_gres: bool) -> Iterable[tuple[str, float]]:
    """`gpu:a100:2` of --gres, `a100:2` of --gpus: with the type, and without."""
    for word in filter(None, words.split(",")):
        parts = word.split(":") if is_gres else ["gpu", *word.split(":")]
        count = _number(parts.pop()) if parts[-1][:1].isdigit() and len(parts) > 1 else 1.0
        yield f"gres/{parts[0]}", count
        if len(parts) > 1:
            yield f"gres/{':'.join(parts)}", count
