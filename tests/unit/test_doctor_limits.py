"""A hardware entry against clusters that differ from the test cluster in one thing each."""

import dataclasses
from typing import Any

import pytest

from finetune_study.config import Hardware
from finetune_study.doctor import entries, limits, scheduler
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.findings import Findings
from finetune_study.doctor.scheduler import QOS_FIELDS, Cluster, Partition, SchedulerError
from tests.unit import handmade
from tests.unit.test_doctor_scheduler import cluster


@pytest.fixture(autouse=True)
def _sbatch_would_take_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """What sbatch says is tested on the real cluster."""
    monkeypatch.setattr(scheduler, "would_take", lambda words: None)


def entry(num_gpus: int = 2, max_gpus: int = 8, **slurm: Any) -> Entry:
    asked = {"partition": "a100", "gpu_model": "a100", "cpus_per_gpu": 2, "mem_gib_per_gpu": 3.0, **slurm}
    raw: dict[str, Any] = {"memory_gib": 80, "max_gpus": max_gpus, "slurm": asked}
    block = {"targets": "tiny", "hardware": "it", "recipes": "full", "sequence_length": 128, "num_gpus": num_gpus}
    training = {"effective_batch_size": 16}
    (found,) = entries.of_study(handmade.study(hardware={"it": raw}, grid=[block], training=training))
    return found


def changed(here: Cluster, partition: str = "a100", **says: str) -> Cluster:
    """The cluster with other words of a partition."""
    other = Partition(partition, {**here.partitions[partition].says, **says})
    return dataclasses.replace(here, partitions={**here.partitions, partition: other})


def with_qos(name: str, **row: str) -> Cluster:
    here = cluster()
    return dataclasses.replace(here, qos={name: {**dict.fromkeys(QOS_FIELDS, ""), "Name": name, **row}})


def verdicts(one: Entry, here: Cluster) -> dict[str, tuple[str, str]]:
    findings = Findings(one.name)
    limits.check(one, here, findings)
    assert all(found.mend for found in findings.all if found.verdict != "ok")
    return {found.check: (found.verdict, found.found) for found in findings.all}


def only_wrong(one: Entry, here: Cluster) -> tuple[str, str]:
    """Name and words of the only check that found something wrong."""
    ((check, words),) = [
        (check, found) for check, (verdict, found) in verdicts(one, here).items() if verdict == "wrong"
    ]
    return check, words


def test_all_is_well() -> None:
    said = verdicts(entry(), cluster())
    assert {verdict for verdict, _ in said.values()} == {"ok"}, said
    assert list(said) == ["partition", "account", "qos", "time", "gpus", "cpus", "memory", "limits", "sbatch"]


@pytest.mark.parametrize(
    ("says", "check", "words"),
    [
        ({"State": "DOWN"}, "partition", "`a100` is DOWN"),
        ({"AllowAccounts": "other"}, "account", "does not take account `lab` (AllowAccounts=other)"),
        ({"DenyQos": "normal"}, "qos", "does not take QOS `normal`"),
        ({"MaxTime": "00:40:00"}, "time", "a run asks for 45 min"),
        ({"MaxCPUsPerNode": "3"}, "cpus", "a run asks for 4 CPUs; a node has 3"),
        ({"MaxMemPerNode": "4096"}, "memory", "a run asks for 6 GiB; a node has 4 GiB"),
    ],
)
def test_partitions_that_do_not_take_a_run(says: dict[str, str], check: str, words: str) -> None:
    found, said = only_wrong(entry(), changed(cluster(), **says))
    assert found == check
    assert words in said


def test_runs_that_share_jobs_ask_for_the_time_of_all() -> None:
    too_short = entry(max_job_minutes=1)
    check, words = only_wrong(too_short, cluster())
    assert check == "time"
    assert "A job of 1 minutes can't hold a run" in words
    check, words = only_wrong(entry(max_job_minutes=100_000), changed(cluster(), MaxTime="2-00:00:00"))
    assert check == "time"
    assert "runs of 45 min share jobs (max_job_minutes), which ask for 99990 min" in words


def test_of_limits_of_one_kind_the_qos_counts_and_not_the_association() -> None:
    here = with_qos("long", MaxWall="2-00:00:00", MaxTRES="gres/gpu=8")
    rows = [{**row, "MaxWall": "00:01:00", "MaxTRES": "gres/gpu=1", "GrpTRES": ""} for row in here.associations or []]
    here = dataclasses.replace(here, associations=rows)  # type: ignore[arg-type]
    assert {verdict for verdict, _ in verdicts(entry(qos="long"), here).values()} == {"ok"}
    # What it says nothing of, the association says.
    without = dataclasses.replace(here, qos={"long": {**here.qos["long"], "MaxWall": ""}})
    check, words = only_wrong(entry(qos="long"), without)
    assert check == "time"
    assert "your association" in words


@pytest.mark.parametrize(
    ("row", "check", "words"),
    [
        ({"MaxTRES": "gres/gpu=1"}, "limits", "QOS `long` allows gres/gpu=1 for a job, 2 are asked for"),
        ({"MaxTRESPU": "cpu=3"}, "limits", "allows cpu=3 for all jobs of a user, 4 are asked for"),
        ({"MaxTRESPerNode": "mem=5G"}, "limits", "allows mem=5120 for a node, 6144 are asked for"),
        ({"GrpTRES": "gres/gpu:a100=1"}, "limits", "for all jobs together"),
        ({"MinTRES": "gres/gpu=4"}, "limits", "wants at least gres/gpu=4, 2 are asked for"),
        ({"MaxSubmitPU": "0"}, "limits", "allows no job at all"),
        ({"MaxWall": "00:30:00"}, "time", "QOS `long`, MaxWall is 30 min"),
    ],
)
def test_qos_that_is_too_small(row: dict[str, str], check: str, words: str) -> None:
    found, said = only_wrong(entry(qos="long"), with_qos("long", **row))
    assert found == check
    assert words in said


def test_limits_of_the_account_bind_its_users() -> None:
    check, words = only_wrong(entry(num_gpus=8), cluster())  # lab has GrpTRES=gres/gpu=4
    assert check == "limits"
    assert "account `lab` allows gres/gpu=4 for all jobs together, 8 are asked for" in words


def test_limits_that_nobody_enforces_bind_nobody() -> None:
    here = dataclasses.replace(cluster(), config={**cluster().config, "AccountingStorageEnforce": "associations"})
    assert "limits" not in verdicts(entry(num_gpus=8), here)


def test_limit_of_the_partitions_own_qos_and_number_of_jobs() -> None:
    here = changed(with_qos("part", MaxTRES="gres/gpu=1"), QoS="part")
    assert "QOS `part` allows gres/gpu=1" in only_wrong(entry(), here)[1]
    here = changed(with_qos("part", MaxSubmitPU="3"), QoS="part")
    assert "3 jobs at a time, the others wait for them" in verdicts(entry(), here)["limits"][1]


def test_qos_that_sets_the_partitions_time_limit_aside() -> None:
    here = changed(with_qos("long", Flags="PartitionTimeLimit"), MaxTime="00:10:00")
    assert verdicts(entry(qos="long"), here)["time"][0] == "ok"
    assert verdicts(entry(), here)["time"][0] == "wrong"


@pytest.mark.parametrize(
    ("one", "check", "words"),
    [
        (entry(partition="h100"), "partition", "there is no partition `h100`; there are a100, v100"),
        (entry(account="nobody"), "account", "`nobody` is no account of"),
        (entry(qos="short"), "qos", "`short` is not yours with account `lab`: the cluster has none of that name"),
        (entry(gpu_model="h100"), "gpus", "no node of `a100` has GPUs of type `h100`; types there: a100"),
        (entry(num_gpus=16, max_gpus=16, cpus_per_gpu=1, mem_gib_per_gpu=1), "gpus", "those of `a100` have 8"),
    ],
)
def test_entries_that_ask_for_what_is_not_there(one: Entry, check: str, words: str) -> None:
    here = cluster()
    here = dataclasses.replace(here, associations=[row | {"GrpTRES": ""} for row in here.associations])  # type: ignore[operator]
    found, said = only_wrong(one, here)
    assert found == check
    assert words in said


def test_partition_whose_nodes_are_all_down() -> None:
    nodes = [dataclasses.replace(node, state="drained") for node in cluster().nodes]
    assert only_wrong(entry(), dataclasses.replace(cluster(), nodes=nodes)) == (
        "partition",
        "no node of `a100` is usable: drained",
    )


def test_default_memory_that_is_small_and_gpus_that_a_node_does_not_have_are_warnings() -> None:
    said = verdicts(entry(mem_gib_per_gpu=None), cluster())  # DefMemPerCPU=500
    assert said["memory"][0] == "warning"
    assert "gets 2.0 GiB by default" in said["memory"][1]
    assert verdicts(entry(max_gpus=16), cluster())["gpus"][0] == "warning"


def test_runs_that_would_leave_gpus_of_a_node_idle_are_warned_of() -> None:
    said = verdicts(entry(num_gpus=1, cpus_per_gpu=5, mem_gib_per_gpu=8), cluster())
    assert said["cpus"] == ("warning", "a run asks for 5 CPUs; a node has 16 CPUs: 5 of its GPUs have to stay idle")
    assert said["memory"] == ("warning", "a run asks for 8 GiB; a node has 31.25 GiB: 5 of its GPUs have to stay idle")


def test_sbatch_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(words: list[str]) -> None:
        raise SchedulerError("Invalid feature specification")

    monkeypatch.setattr(scheduler, "would_take", refuse)
    assert "Invalid feature specification" in only_wrong(entry(constraint="x"), cluster())[1]


def test_entry_without_gpus_needs_none() -> None:
    one = Entry("cpu", Hardware(device="cpu", memory_gib=3, max_gpus=2))
    said = verdicts(one, cluster())
    assert "gpus" not in said
    assert said["cpus"] == ("ok", "a run asks for 8 CPUs; a node has 16 CPUs")


def test_cluster_without_accounting_has_no_accounts_to_check() -> None:
    here = dataclasses.replace(cluster(), associations=[], default_account=None, config={})
    assert not {"account", "qos", "limits"} & verdicts(entry(account="x"), here).keys()
