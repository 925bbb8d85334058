"""What SLURM prints of limits becomes numbers; the lines are real ones of SLURM 22.05, without what is not read."""

import math
from typing import Any

import pytest

from snakemake_executor_plugin_submitit.limits import (
    Limits,
    Refusal,
    parse_minutes,
    parse_partitions,
    parse_pending,
    parse_tres,
    parse_usage,
    request_of,
)
from snakemake_executor_plugin_submitit.slurm import SlurmBusyError

USAGE = """\
Current Association Manager state

Association Records

ClusterName=lab Account=root UserName= Partition= Priority=0 ID=1
    GrpSubmitJobs=N(4) GrpWall=N(0.00)
    MaxJobs= MaxJobsAccrue= MaxSubmitJobs= MaxWallPJ=
ClusterName=lab Account=physics UserName= Partition= Priority=0 ID=8
    GrpSubmitJobs=9(4) GrpWall=N(0.00)
    GrpTRES=cpu=N(2),mem=4096(20),energy=N(0),node=N(1),billing=N(2),gres/gpu=6(2)
ClusterName=lab Account=physics UserName=anna(1001) Partition= Priority=0 ID=9
    GrpSubmitJobs=N(4) GrpWall=N(0.00)
    MaxJobs= MaxJobsAccrue= MaxSubmitJobs=5(4) MaxWallPJ=30

QOS Records

QOS=normal(1)
    GrpJobs=N(0) GrpJobsAccrue=N(0) GrpSubmitJobs=7(4) GrpWall=N(0.00)
    Account Limits
      physics
        MaxJobsPA=N(0) MaxJobsAccruePA=N(0) MaxSubmitJobsPA=8(3)
      chemistry
        MaxJobsPA=N(0) MaxJobsAccruePA=N(0) MaxSubmitJobsPA=8(1)
    User Limits
      1002
        MaxJobsPU=N(0) MaxJobsAccruePU=N(0) MaxSubmitJobsPU=6(9)
      1001
        MaxJobsPU=N(0) MaxJobsAccruePU=N(0) MaxSubmitJobsPU=6(2)
QOS=gpu(2)
    GrpJobs=N(0) GrpJobsAccrue=N(0) GrpSubmitJobs=N(0) GrpWall=N(0.00)
    Account Limits
        No Accounts
    User Limits
        No Users
"""

PARTITIONS = (
    "PartitionName=a100 AllowGroups=ALL AllowAccounts=ALL AllowQos=ALL AllocNodes=ALL Default=YES QoS=N/A "
    "DefaultTime=NONE MaxNodes=UNLIMITED MaxTime=2-00:00:00 MinNodes=0 LLN=NO MaxCPUsPerNode=UNLIMITED "
    "Nodes=a100-[1-2] State=UP TotalCPUs=32 TotalNodes=2 MaxMemPerNode=UNLIMITED "
    "TRES=cpu=32,mem=62.50G,node=2,billing=32,gres/gpu=16\n"
    "PartitionName=v100 Default=NO QoS=slow MaxNodes=1 MaxTime=UNLIMITED MinNodes=1 MaxCPUsPerNode=8 "
    "TotalNodes=2 MaxMemPerNode=4000\n"
)


def test_usage_is_that_of_the_user_the_accounts_and_the_qos() -> None:
    used = parse_usage(USAGE, "anna", 1001)
    assert used["user anna in account physics", "MaxSubmitJobs", ""] == 4
    assert used["account physics", "GrpSubmitJobs", ""] == 4
    assert used["account root", "GrpSubmitJobs", ""] == 4
    assert used["QOS normal", "GrpSubmitJobs", ""] == 4
    assert used["QOS normal", "MaxSubmitJobsPA", "physics"] == 3
    assert used["QOS normal", "MaxSubmitJobsPA", "chemistry"] == 1
    assert used["QOS normal", "MaxSubmitJobsPU", ""] == 2
    assert ("QOS gpu", "MaxSubmitJobsPU", "") not in used


def test_partitions_have_limits_a_qos_and_a_default() -> None:
    found = parse_partitions(PARTITIONS, "CLUSTER: lab\na100|16\na100|32\nv100|16\n")
    assert {name: is_default for name, (is_default, _) in found.items()} == {"a100": True, "v100": False}
    a100, v100 = found["a100"][1], found["v100"][1]
    assert (a100.qos, v100.qos) == (None, "slow")
    assert {limit.name: limit.value for limit in a100.limits} == {
        "MaxTime": 2880, "TotalNodes": 2, "CPUs of its nodes": 32,
    }  # fmt: skip
    assert {limit.name: limit.value for limit in v100.limits} == {
        "MaxNodes": 1, "TotalNodes": 2, "MinNodes": 1, "MaxCPUsPerNode": 8, "MaxMemPerNode": 4000,
        "CPUs of its nodes": 16,
    }  # fmt: skip


def test_pending_jobs_are_known_by_job_and_array() -> None:
    rows = "157|154|a100,v100|lab|normal|20:00|cpu=4,mem=20M,node=2,billing=4,gres/gpu=4|2|\nnonsense\n"
    found = parse_pending(rows)
    assert found["157"] is found["154"]
    assert (found["157"].partitions, found["157"].minutes) == (("a100", "v100"), 20)
    assert dict(found["157"].tres) == {
        "cpu": 4, "mem": 20, "node": 2, "billing": 4, "gres/gpu": 4, "cpu of one node": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "minutes"),
    [("30", 30), ("20:00", 20), ("0:30", 0.5), ("01:00:00", 60), ("1-00", 1440), ("1-02:30", 1590),
     ("2-00:00:00", 2880), ("UNLIMITED", math.inf), ("NOT_SET", math.inf)],
)  # fmt: skip
def test_times_are_minutes(words: str, minutes: float) -> None:
    assert parse_minutes(words) == minutes


def test_amounts_of_memory_are_mib() -> None:
    assert parse_tres("cpu=4,mem=4G,gres/gpu:a100=2") == {"cpu": 4, "mem": 4096, "gres/gpu:a100": 2}
    assert parse_tres("mem=62.50G") == {"mem": 64000}
    assert parse_tres("") == {}


@pytest.mark.parametrize(
    ("options", "tres"),
    [
        ({}, {"node": 1, "cpu": 1}),
        ({"ntasks": 3, "cpus-per-task": 4}, {"node": 1, "cpu": 12, "cpu of one node": 4}),
        ({"nodes": 2, "ntasks-per-node": 3, "mem": "10M"}, {"node": 2, "cpu": 6, "mem": 20}),
        ({"mem-per-cpu": "1G", "cpus-per-task": 4}, {"cpu": 4, "mem": 4096}),
        ({"gres": "gpu"}, {"gres/gpu": 1}),
        ({"gres": "gpu:2", "nodes": 2}, {"gres/gpu": 4}),
        ({"gres": "gpu:a100:2,nvme:1"}, {"gres/gpu": 2, "gres/gpu:a100": 2, "gres/nvme": 1}),
        ({"gres": "gpu:a100"}, {"gres/gpu": 1, "gres/gpu:a100": 1}),
        ({"gpus": "3", "nodes": 2}, {"gres/gpu": 3}),
        ({"gpus": "a100:3"}, {"gres/gpu": 3, "gres/gpu:a100": 3}),
        ({"gpus": "4", "cpus-per-gpu": 8}, {"cpu": 32}),
    ],
)
def test_options_ask_for_resources(options: dict[str, Any], tres: dict[str, float]) -> None:
    assert tres.items() <= dict(request_of(options).tres).items()


def test_options_name_partition_account_and_time() -> None:
    request = request_of({"partition": "a100,v100", "account": "lab", "qos": "gpu", "time": 90})
    assert (request.partitions, request.account, request.qos, request.minutes) == (("a100", "v100"), "lab", "gpu", 90)
    assert (request_of({}).partitions, request_of({}).minutes) == ((), None)


@pytest.mark.parametrize(
    "reason",
    ["Resources", "Priority", "None", "BeginTime", "Dependency", "JobHeldUser", "JobHeldAdmin", "JobArrayTaskLimit",
     "PartitionDown", "PartitionInactive", "NodeDown", "Licenses", "Reservation", "ReqNodeNotAvail",
     "ReqNodeNotAvail, UnavailableNodes:a100-1",
     "Nodes required for job are DOWN, DRAINED or reserved for jobs in higher "
     "priority partitions"],
)  # fmt: skip
def test_reasons_that_pass_are_not_asked_about(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Limits().never_starts("1", reason) is None


@pytest.mark.parametrize(
    "reason",
    ["BadConstraints", "InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "PartitionTimeLimit",
     "DependencyNeverSatisfied", "MaxMemPerLimit", "QOSMaxWallDurationPerJobLimit", "AssocMaxGRESPerNode",
     "Job's QOS not permitted to use this partition (a100 allows normal not gpu)"],
)  # fmt: skip
def test_reasons_that_never_pass_need_no_answer(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert Limits().never_starts("1", reason) == f"{reason} does not pass by itself"


def test_busy_slurm_has_no_verdict() -> None:
    words = "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)"
    assert Limits().verdict_of_refusal(words, {}) == Refusal(None)


def test_array_size_is_an_error_without_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Exception, match="scontrol can't be started") as error:
        Limits().max_array_size()
    assert not isinstance(error.value, SlurmBusyError)


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"MaxArraySize": "1001", "MaxJobCount": "10000"}, 1001),
        ({"MaxArraySize": "1001", "MaxJobCount": "50"}, 50),
        ({"MaxArraySize": "1001", "MaxJobCount": "9", "SchedulerParameters": "x,max_array_tasks=7"}, 7),
        ({"MaxArraySize": "0", "MaxJobCount": "10000"}, 1),
        ({}, 1),
    ],
)
def test_array_size_is_the_least_of_all_limits(config: dict[str, str], size: int) -> None:
    limits = Limits()
    limits._config = config
    assert limits.max_array_size() == size
