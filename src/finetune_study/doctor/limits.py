"""What a hardware entry asks of SLURM, against what partition, nodes, account and QOS allow."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from finetune_study import slurm
from finetune_study.doctor import scheduler
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.findings import Findings
from finetune_study.doctor.scheduler import UNLIMITED, Cluster, Node, Partition, Row, SchedulerError
from finetune_study.errors import ConfigError

SMALL_MEMORY_GIB = 4.0
"""For each device: the largest run of the demo, a model of 135M parameters, held 3.3 GiB of host memory (README)."""


def check(entry: Entry, cluster: Cluster, findings: Findings) -> None:
    """All of it for one entry; a job is worth its wait when partition, account and QOS are right."""
    partition = _partition(entry, cluster, findings)
    if partition is None:
        return
    account = _account(entry, cluster, partition, findings)
    qos = _qos(entry, cluster, partition, account, findings)
    sources = list(_sources(cluster, partition, account, qos)) if cluster.enforces("limits") else []
    _time(entry, cluster, partition, qos, sources, findings)
    _gpus(entry, cluster, partition, findings)
    _node_size(entry, cluster, partition, findings)
    if sources:
        _limits(entry, sources, findings)
    if not findings.wrong_checks():
        _slurms_word(entry, findings)


def _partition(entry: Entry, cluster: Cluster, findings: Findings) -> Partition | None:
    name = entry.hardware.slurm.partition
    partition = cluster.partition(name)
    there = ", ".join(sorted(cluster.partitions))
    key = f"hardware.{entry.name}.slurm.partition"
    if partition is None:
        found = f"there is no partition `{name}`" if name else "the cluster has no default partition"
        findings.wrong("partition", f"{found}; there are {there}", f"set {key} to one of them (`sinfo`)")
        return None
    if partition.state != "UP":
        findings.wrong("partition", f"`{partition.name}` is {partition.state}", f"wait, or set {key}: {there}")
    elif not any(node.is_usable for node in cluster.nodes_of(partition.name)):
        states = ", ".join(sorted({node.state for node in cluster.nodes_of(partition.name)})) or "it has none"
        findings.wrong("partition", f"no node of `{partition.name}` is usable: {states}", "`sinfo -R` says why")
    else:
        nodes = cluster.nodes_of(partition.name)
        usable = sum(node.is_usable for node in nodes)
        default = "" if name else ", the default one"
        findings.ok("partition", f"`{partition.name}`{default}: {usable} of {len(nodes)} nodes usable")
    return partition


def _account(entry: Entry, cluster: Cluster, partition: Partition, findings: Findings) -> str | None:
    """The account that pays; None where nobody asks for one."""
    asked = entry.hardware.slurm.account
    key = f"hardware.{entry.name}.slurm.account"
    account = asked or cluster.default_account
    if not cluster.associations:
        return account
    if account is None or not cluster.of_account(account, partition.name):
        said = findings.wrong if cluster.enforces("associations") else findings.warn
        what = f"`{account}` is no account of {scheduler.me()} here" if account else "you have no default account"
        there = ", ".join(cluster.accounts)
        mend = f"set {key} to one of {there}" if there else "ask the administrators for an account"
        said("account", what, f"{mend} (`sacctmgr show assoc user=$USER`)")
    elif partition.refuses("Accounts", account):
        allowed = partition.says.get("AllowAccounts", "ALL")
        findings.wrong(
            "account",
            f"partition `{partition.name}` does not take account `{account}` (AllowAccounts={allowed})",
            f"set {key}, or another partition",
        )
    else:
        findings.ok("account", f"`{account}`" + ("" if asked else ", your default"))
    return account


def _qos(entry: Entry, cluster: Cluster, partition: Partition, account: str | None, findings: Findings) -> str | None:
    """The QOS of the entry's jobs; None where there is none."""
    asked = entry.hardware.slurm.qos
    rows = cluster.of_account(account, partition.name) if account else []
    if not rows:
        return asked
    mine = {name for row in rows for name in row["QOS"].split(",") if name}
    default = next((row["DefaultQOS"] for row in rows if row["DefaultQOS"]), None)
    # Without a default a job gets the QOS `normal`, where the association has it.
    qos = asked or default or ("normal" if "normal" in mine else None)
    key, there = f"hardware.{entry.name}.slurm.qos", ", ".join(sorted(mine)) or "none"
    if asked and asked not in mine:
        unknown = "" if asked in cluster.qos else ": the cluster has none of that name"
        said = findings.wrong if cluster.enforces("qos") else findings.warn
        said("qos", f"`{asked}` is not yours with account `{account}`{unknown}", f"set {key} to one of {there}")
    elif qos and partition.refuses("Qos", qos):
        allowed = partition.says.get("AllowQos", "ALL")
        what = f"partition `{partition.name}` does not take QOS `{qos}` (AllowQos={allowed})"
        findings.wrong("qos", what, f"set {key}; yours are {there}")
    else:
        findings.ok("qos", (f"`{qos}`" if qos else "none") + ("" if asked else ", by default"))
    return qos


# --- limits of associations and QOS ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Limits:
    """What one association or QOS allows."""

    name: str
    max_minutes: float = UNLIMITED
    sizes: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What all a job asks for must fit in: by what it is counted over, then by TRES."""
    minimum: Mapping[str, float] = field(default_factory=dict)
    """What a job must ask for at least."""
    jobs: Mapping[str, float] = field(default_factory=dict)
    """Jobs that may be queued or running at a time, by how they are counted."""


SIZES = {
    "MaxTRES": "a job",
    "MaxTRESPerNode": "a node",
    "MaxTRESPU": "all jobs of a user",
    "MaxTRESPA": "all jobs of an account",
    "GrpTRES": "all jobs together",
}
JOBS = ("MaxJobs", "MaxSubmit", "MaxJobsPU", "MaxSubmitPU", "MaxJobsPA", "MaxSubmitPA", "GrpJobs", "GrpSubmit")


def _limits_of(name: str, row: Row, *, is_mine: bool = True) -> Limits:
    """Of a row; `Max...` of an account are passed on to its users, whose own rows show them."""
    numbers = {key: float(row[key]) for key in JOBS if row.get(key) and (is_mine or key.startswith("Grp"))}
    sizes = {SIZES[key]: scheduler.tres(row.get(key, "")) for key in SIZES if is_mine or key.startswith("Grp")}
    return Limits(
        name=name,
        max_minutes=scheduler.minutes(row.get("MaxWall", "")) if is_mine else UNLIMITED,
        sizes={over: size for over, size in sizes.items() if size},
        minimum=scheduler.tres(row.get("MinTRES", "")),
        # A QOS counts for a user (PU) or an account (PA) what an association counts for itself.
        jobs={
            kind: min(number for key, number in numbers.items() if key.startswith(kind))
            for kind in dict.fromkeys(key.removesuffix("PU").removesuffix("PA") for key in numbers)
        },
    )


def _sources(cluster: Cluster, partition: Partition, account: str | None, qos: str | None) -> Iterator[Limits]:
    """What counts of each: of limits of one kind the first (https://slurm.schedmd.com/resource_limits.html)."""
    taken: set[tuple[str, str]] = set()
    for limits in _by_precedence(cluster, partition, account, qos):
        yield _without(limits, taken)
        taken |= {("time", "")} if limits.max_minutes < UNLIMITED else set()
        taken |= {(over, name) for over, size in limits.sizes.items() for name in size}
        taken |= {("jobs", kind) for kind in limits.jobs} | {("minimum", name) for name in limits.minimum}


def _without(limits: Limits, taken: Collection[tuple[str, str]]) -> Limits:
    return Limits(
        name=limits.name,
        max_minutes=UNLIMITED if ("time", "") in taken else limits.max_minutes,
        sizes={
            over: {name: most for name, most in size.items() if (over, name) not in taken}
            for over, size in limits.sizes.items()
        },
        minimum={name: least for name, least in limits.minimum.items() if ("minimum", name) not in taken},
        jobs={kind: most for kind, most in limits.jobs.items() if ("jobs", kind) not in taken},
    )


def _by_precedence(cluster: Cluster, partition: Partition, account: str | None, qos: str | None) -> Iterator[Limits]:
    names = [partition.qos, qos]
    if "OverPartQOS" in cluster.qos.get(qos or "", {}).get("Flags", ""):
        names.reverse()
    for name in dict.fromkeys(filter(None, names)):
        if name in cluster.qos:
            yield _limits_of(f"QOS `{name}`", cluster.qos[name])
    if account is not None:
        for row in cluster.of_account(account, partition.name):
            yield _limits_of(f"your association with account `{account}`", row)
        for row in cluster.accounts_above(account):
            yield _limits_of(f"account `{row['Account']}`", row, is_mine=False)


def size_of(resources: Mapping[str, str | int | None]) -> dict[str, float]:
    """What a job takes, in SLURM's TRES; memory in MB."""
    nodes = int(resources["nodes"] or 1)
    size: dict[str, float] = {"node": nodes, "cpu": nodes * int(resources["cpus_per_task"] or 1)}
    if resources["mem"] is not None:
        size["mem"] = nodes * float(resources["mem"])
    for model, number in scheduler.gpus(str(resources["gres"] or "")).items():
        size["gres/gpu"] = size.get("gres/gpu", 0) + nodes * number
        if model is not None:
            size[f"gres/gpu:{model}"] = nodes * number
    return size


def _too_large(size: Mapping[str, float], limits: Limits, num_nodes: int) -> Iterator[str]:
    for over, allowed in limits.sizes.items():
        for name, most in allowed.items():
            asked = size.get(name, 0) / (num_nodes if over == "a node" else 1)
            if asked > most:
                yield f"{limits.name} allows {name}={most:g} for {over}, {asked:g} are asked for"
    for name, least in limits.minimum.items():
        if size.get(name, 0) < least:
            yield f"{limits.name} wants at least {name}={least:g}, {size.get(name, 0):g} are asked for"
    if min(limits.jobs.values(), default=UNLIMITED) < 1:
        yield f"{limits.name} allows no job at all"


def _limits(entry: Entry, sources: list[Limits], findings: Findings) -> None:
    size = size_of(entry.resources)
    problems = [words for limits in sources for words in _too_large(size, limits, int(size["node"]))]
    if problems:
        findings.wrong(
            "limits",
            f"{entry.largest.run_id}: {'; '.join(problems)}",
            f"take fewer GPUs in the grid, ask for less in hardware.{entry.name}.slurm (cpus_per_gpu, "
            "mem_gib_per_gpu), or name another account or qos there",
        )
        return
    at_a_time = min((most for limits in sources for most in limits.jobs.values()), default=UNLIMITED)
    jobs = "" if at_a_time == UNLIMITED else f"; {at_a_time:g} jobs at a time, the others wait for them"
    most = ", ".join(f"{name}={number:g}{'M' if name == 'mem' else ''}" for name, number in size.items())
    findings.ok("limits", f"account and QOS allow the largest run ({most}){jobs}")


# --- partition and nodes ---------------------------------------------------------------------------------------------


def _time(
    entry: Entry,
    cluster: Cluster,
    partition: Partition,
    qos: str | None,
    sources: list[Limits],
    findings: Findings,
) -> None:
    try:
        needed = slurm.job_minutes(entry.name, entry.hardware, entry.protocol)
    except ConfigError as error:
        findings.wrong("time", error.what, error.do)
        return
    run = int(entry.resources["runtime"] or 0)
    whose = "a run asks for" if needed == run else f"runs of {run} min share jobs (max_job_minutes), which ask for"
    allowed = {f"{one.name}, MaxWall": one.max_minutes for one in sources}
    # A QOS with that flag sets its own limit in place of the partition's.
    flags = cluster.qos.get(qos or "", {}).get("Flags", "")
    if "PartitionTimeLimit" not in flags:
        allowed[f"partition `{partition.name}`, MaxTime"] = partition.max_minutes
    name, least = min(allowed.items(), key=lambda item: item[1], default=("", UNLIMITED))
    if needed > least:
        findings.wrong(
            "time",
            f"{whose} {needed} min (time limit + startup_minutes + 5); {name} is {least:g} min",
            f"lower protocol.time_limit_minutes, or startup_minutes or max_job_minutes in hardware.{entry.name}.slurm, "
            "or name another partition or qos",
        )
    else:
        most = "no limit" if least == UNLIMITED else f"{least:g} min allowed by {name}"
        findings.ok("time", f"{whose} {needed} min; {most}")


def _gpus(entry: Entry, cluster: Cluster, partition: Partition, findings: Findings) -> None:
    if not entry.asks_for_gpus:
        return
    model = entry.hardware.slurm.gpu_model
    nodes = cluster.nodes_of(partition.name)
    types = {name or "without a type" for node in nodes for name in node.gpus}
    there = ", ".join(sorted(types)) or "none"
    fitting = cluster.nodes_of(partition.name, model)
    per_node = max((gpus_of(node, model) for node in fitting), default=0)
    key = f"hardware.{entry.name}"
    if per_node == 0:
        what = f"no node of `{partition.name}` has GPUs of type `{model}`" if model else "no node has a GPU"
        findings.wrong("gpus", f"{what}; types there: {there}", f"set {key}.slurm.gpu_model as `sinfo -o %G` prints it")
        return
    asked = max(scheduler.gpus(str(entry.resources["gres"])).values())
    if asked > per_node:
        findings.wrong(
            "gpus",
            f"{entry.largest.run_id} asks for {asked} GPUs of a node; those of `{partition.name}` have {per_node}",
            f"set {key}.max_gpus: {per_node}, and fewer num_gpus in the grid",
        )
    elif entry.hardware.max_gpus > per_node:
        findings.warn(
            "gpus",
            f"nodes of `{partition.name}` have {per_node} GPUs ({model or there}), and max_gpus is "
            f"{entry.hardware.max_gpus}",
            f"set {key}.max_gpus: {per_node}, so that the plan leaves out what could never start",
        )
    elif model is None and len(types) > 1:
        findings.warn(
            "gpus",
            f"`{partition.name}` has GPUs of several types: {there}",
            f"set {key}.slurm.gpu_model, or runs land on any of them",
        )
    else:
        number = sum(node.is_usable for node in fitting)
        findings.ok("gpus", f"{number} usable nodes with {per_node} GPUs ({model or there}); a run asks for {asked}")


def gpus_of(node: Node, model: str | None) -> int:
    """GPUs of a type that a node has, of any type where none is named."""
    return node.gpus.get(model, 0) if model else sum(node.gpus.values())


def _node_size(entry: Entry, cluster: Cluster, partition: Partition, findings: Findings) -> None:
    """CPUs and memory of a run have to fit a node; what is asked for each GPU should not leave GPUs idle."""
    asked = entry.resources
    model = entry.hardware.slurm.gpu_model if entry.asks_for_gpus else None
    nodes = cluster.nodes_of(partition.name, model)
    if not nodes:
        return
    cpus, key = int(asked["cpus_per_task"] or 1), f"hardware.{entry.name}.slurm"
    num_gpus = max(scheduler.gpus(str(asked["gres"] or "")).values(), default=0)
    share = max(gpus_of(node, model) for node in nodes) / num_gpus if num_gpus else 0.0
    most = min(max(node.cpus for node in nodes), _limit(partition, "MaxCPUsPerNode"))
    _fit(_Ask("cpus", cpus, most, " CPUs", f"{key}.cpus_per_gpu"), num_gpus, share, findings)
    most = min(max(node.memory_mb for node in nodes), _limit(partition, "MaxMemPerNode")) / 1024
    memory = _Ask("memory", float(asked["mem"] or 0) / 1024, most, " GiB", f"{key}.mem_gib_per_gpu")
    if memory.asked:
        _fit(memory, num_gpus, share, findings)
        return
    given = min(partition.default_memory_mb(cpus, num_gpus, cluster.config) / 1024, most)
    found = f"a run asks for none, and gets {given:.1f} GiB by default"
    if given < SMALL_MEMORY_GIB * max(1, num_gpus):
        fair = min(map(memory_of_gpu_gib, nodes))
        findings.warn("memory", f"{found}: little for training", f"set {memory.key}, for example {fair}")
    else:
        findings.ok("memory", found)


@dataclass(frozen=True)
class _Ask:
    """What the largest run asks of a node, of one kind."""

    check: str
    asked: float
    most: float
    unit: str
    key: str


def _fit(ask: _Ask, num_gpus: int, share: float, findings: Findings) -> None:
    """Whether it fits, also when such runs use all GPUs of a node: `share` of them."""
    found = f"a run asks for {ask.asked:.4g}{ask.unit}; a node has {ask.most:.4g}{ask.unit}"
    if ask.asked > ask.most:
        findings.wrong(ask.check, found, f"lower {ask.key}")
    elif ask.asked * share > ask.most:
        idle = int(share * num_gpus - num_gpus * (ask.most // ask.asked))
        fair = int(ask.most / (share * num_gpus))
        findings.warn(ask.check, f"{found}: {idle} of its GPUs have to stay idle", f"lower {ask.key} to {max(1, fair)}")
    else:
        findings.ok(ask.check, found)


def _limit(partition: Partition, key: str) -> float:
    value = partition.says.get(key, "UNLIMITED")
    return UNLIMITED if value in ("UNLIMITED", "0") else float(value)


def memory_of_gpu_gib(node: Node) -> int:
    """Memory of a node for each of its GPUs in whole GiB, less a tenth for the system."""
    return max(1, int(0.9 * node.memory_mb / 1024 / max(1, sum(node.gpus.values()))))


def _slurms_word(entry: Entry, findings: Findings) -> None:
    """What the checks before can't know: features, reservations, a site's own rules."""
    try:
        scheduler.would_take(scheduler.options(entry.resources))
    except SchedulerError as error:
        findings.wrong(
            "sbatch",
            f"SLURM would not take {entry.largest.run_id}: {error}",
            f"`sbatch --test-only` with what hardware.{entry.name}.slurm says gives the same answer",
        )
    else:
        findings.ok("sbatch", "SLURM would take the largest run")
