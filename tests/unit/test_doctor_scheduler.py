"""What SLURM's commands print, as it was printed: by 22.05 on the test cluster unless a line says otherwise."""

import math
import subprocess
from pathlib import Path

import pytest

from finetune_study.doctor import scheduler
from finetune_study.doctor.scheduler import Cluster, SchedulerError

NODES = """\
a100-1|a100|gpu:a100:8|16|32000|(null)|idle
a100-2|a100|gpu:a100:8|16|32000|(null)|idle
v100-1|v100|gpu:v100:8|16|32000|(null)|mixed
v100-2|v100|gpu:v100:8|16|32000|(null)|down*
"""

PARTITIONS = """\
PartitionName=a100 AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A DefaultTime=NONE \
DisableRootJobs=NO ExclusiveUser=NO GraceTime=0 Hidden=NO MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO \
MaxCPUsPerNode=UNLIMITED Nodes=a100-[1-2] PriorityJobFactor=1 PriorityTier=1 RootOnly=NO ReqResv=NO OverSubscribe=NO \
OverTimeLimit=NONE PreemptMode=OFF State=UP TotalCPUs=32 TotalNodes=2 SelectTypeParameters=NONE JobDefaults=(null) \
DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED TRES=cpu=32,mem=62.50G,node=2,billing=32,gres/gpu=16
PartitionName=v100 AllowGroups=ALL AllowAccounts=lab,other AllowQos=ALL AllocNodes=ALL Default=NO QoS=N/A \
DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 State=UP TotalCPUs=32 TotalNodes=2 \
JobDefaults=(null) DefMemPerNode=UNLIMITED MaxMemPerNode=UNLIMITED
"""

CONFIG = """\
Configuration data as of 2026-11-22T08:30:15
AccountingStorageBackupHost = (null)
AccountingStorageEnforce = associations,limits,qos
AccountingStorageType   = accounting_storage/slurmdbd
ClusterName             = finetune-study-test
DefMemPerCPU            = 500
MaxArraySize            = 1001
SchedulerParameters     = batch_sched_delay=0,sched_interval=2
SLURM_VERSION           = 22.05.8

Cgroup Support Configuration:
ConstrainRAMSpace       = yes

Slurmctld(primary) at vm is UP
"""

ASSOCIATIONS = """\
lab||root||normal,long|||||||||
root||root||normal|||||||||
lab|root|||normal|||||||gres/gpu=4||
root||||normal|||||||||
"""


def cluster() -> Cluster:
    return Cluster(
        config=scheduler.settings(CONFIG),
        partitions=scheduler.parse_partitions(PARTITIONS),
        nodes=scheduler.parse_nodes(NODES),
        associations=scheduler.parse_rows(ASSOCIATIONS, scheduler.ASSOCIATION_FIELDS),
        default_account="lab",
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("30", 30), ("30:30", 30.5), ("1:30:00", 90), ("2-0", 2880), ("1-12:30", 2190), ("2-00:00:00", 2880),
        ("UNLIMITED", math.inf), ("", math.inf), ("NONE", math.inf), ("INFINITE", math.inf),
    ],
)  # fmt: skip
def test_time_limits_in_minutes(text: str, expected: float) -> None:
    assert scheduler.minutes(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cpu=32,mem=62.50G,node=2,gres/gpu=16", {"cpu": 32, "mem": 64000, "node": 2, "gres/gpu": 16}),
        ("mem=500M,gres/gpu:a100=2", {"mem": 500, "gres/gpu:a100": 2}),
        ("mem=1T", {"mem": 1024**2}),
        ("", {}),
    ],
)  # fmt: skip
def test_sizes_of_jobs(text: str, expected: dict[str, float]) -> None:
    assert scheduler.tres(text) == expected


@pytest.mark.parametrize(
    ("gres", "expected"),
    [
        ("gpu:a100:8", {"a100": 8}),
        ("gpu:8", {None: 8}),
        # As gres.conf with AutoDetect, sockets, several types, MIG and sharing make them (slurm.conf(5), gres.conf(5)).
        ("gpu:nvidia_a100-sxm4-80gb:4(S:0-1)", {"nvidia_a100-sxm4-80gb": 4}),
        ("gpu:a100:2(S:0),gpu:v100:4(S:1),shard:a100:16", {"a100": 2, "v100": 4}),
        ("gpu:2(S:0-1),nvme:1", {None: 2}),
        ("gpu:1g.10gb:7", {"1g.10gb": 7}),
        ("gpu:a100:no_consume:4", {"a100": 4}),
        ("(null)", {}),
        ("fpga:1", {}),
    ],
)
def test_gpus_of_a_node(gres: str, expected: dict[str | None, int]) -> None:
    assert scheduler.gpus(gres) == expected


def test_a_cluster_is_read() -> None:
    here = cluster()
    assert (here.name, here.version, here.has_accounting) == ("finetune-study-test", "22.05.8", True)
    assert "AccountingStorageBackupHost" not in here.config
    assert [here.enforces(what) for what in ("associations", "limits", "qos")] == [True, True, True]
    default = here.partition(None)
    assert default is not None
    assert (default.name, default.max_minutes, default.qos) == ("a100", 2880, None)
    assert here.partition("h100") is None
    assert here.partition("v100,a100") == here.partitions["v100"]
    assert here.partition("v100,h100") is None
    assert [node.is_usable for node in here.nodes_of("v100")] == [True, False]
    assert here.nodes_of("a100", "v100") == []
    assert not default.refuses("Accounts", "nobody")
    assert here.partitions["v100"].refuses("Accounts", "nobody")
    assert not here.partitions["v100"].refuses("Accounts", "lab")


def test_accounts_and_what_is_above_them() -> None:
    here = cluster()
    assert here.accounts == ["lab", "root"]
    assert [row["QOS"] for row in here.of_account("lab", "a100")] == ["normal,long"]
    assert here.of_account("other", "a100") == []
    assert [row["Account"] for row in here.accounts_above("lab")] == ["lab", "root"]


@pytest.mark.parametrize(
    ("enforced", "expected"),
    [
        ("none", (False, False, False)),
        ("associations", (True, False, False)),
        ("associations,limits", (True, True, False)),
        ("associations,limits,qos,safe", (True, True, True)),
        ("all", (True, True, True)),
    ],
)
def test_what_a_cluster_enforces(enforced: str, expected: tuple[bool, bool, bool]) -> None:
    here = Cluster({"AccountingStorageEnforce": enforced}, {}, [])
    assert tuple(here.enforces(what) for what in ("associations", "limits", "qos")) == expected


@pytest.mark.parametrize(
    ("says", "expected"),
    [
        ({}, 2000.0),  # the cluster's DefMemPerCPU
        ({"DefMemPerCPU": "1000"}, 4000.0),
        ({"DefMemPerNode": "9000"}, 9000.0),
        ({"JobDefaults": "DefCpuPerGPU=4,DefMemPerGPU=3000"}, 6000.0),
    ],
)
def test_memory_of_a_job_that_asks_for_none(says: dict[str, str], expected: float) -> None:
    partition = scheduler.Partition("a100", says)
    assert partition.default_memory_mb(4, 2, {"DefMemPerCPU": "500"}) == expected
    assert scheduler.Partition("a100", {}).default_memory_mb(4, 2, {}) == math.inf


def test_options_of_sbatch() -> None:
    asked = {"job_name": "x", "slurm_partition": "a100", "slurm_account": None, "nodes": 1, "mem": 3072, "runtime": 15}
    assert scheduler.options(asked | {"slurm_extra": "--reservation='gpu week'"}) == [
        "--job-name=x", "--partition=a100", "--nodes=1", "--ntasks=1", "--mem=3072M", "--time=15",
        "--reservation=gpu week",
    ]  # fmt: skip


def test_extra_options_with_a_quote_too_few() -> None:
    with pytest.raises(SchedulerError, match="quotes come in pairs"):
        scheduler.options({"slurm_extra": "--reservation='gpu week"})


def test_errors_are_slurms_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal as sbatch 22.05 prints it, by a command that does nothing else."""
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\necho 'sbatch: error: invalid partition specified: nosuch' >&2\n"
        "echo 'sbatch: error: Batch job submission failed: Invalid partition name specified' >&2\nexit 1\n"
    )
    (tmp_path / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    with pytest.raises(SchedulerError) as refusal:
        scheduler.submit([], Path("job.sh"))
    assert str(refusal.value) == (
        "invalid partition specified: nosuch; Batch job submission failed: Invalid partition name specified"
    )
    with pytest.raises(SchedulerError, match=r"no-such-tool can't be started: No such file"):
        scheduler.ask("no-such-tool")


def test_variables_of_a_job_are_not_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SLURM_JOB_ID": "1", "SBATCH_PARTITION": "x", "SLURM_CONF": "/etc/slurm/slurm.conf"}.items():
        monkeypatch.setenv(name, value)
    said = scheduler.ask("env")
    assert "SLURM_CONF=/etc/slurm/slurm.conf" in said
    assert "SLURM_JOB_ID" not in said
    assert "SBATCH_PARTITION" not in said
    assert subprocess.run(["env"], capture_output=True, text=True).stdout.count("SLURM_JOB_ID") == 1
