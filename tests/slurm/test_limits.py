"""Limits that pass and limits that never do, set on the real cluster for an ordinary user of his own account."""

import multiprocessing
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import pytest

from snakemake_executor_plugin_submitit import limits, slurm
from snakemake_executor_plugin_submitit.limits import Limits, Refusal
from tests.slurm.cluster import Cluster, ask, wait_for

pytestmark = pytest.mark.slurm

USER, UID, GID = "nobody", 65534, 65534
"""Has no jobs but those of these tests."""

ACCOUNT, PARENT, QOS, PARTITION = "limited", "limited-parent", "limited", "limited"
"""Of the QOS `limited` and `limited-partition` and the partition, nobody else knows."""

POLICY = "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"

Answer = TypeVar("Answer")


def _become_user() -> None:
    os.chdir("/")
    os.setgroups([])
    os.setgid(GID)
    os.setuid(UID)


class Lab:
    """An account below another one, a QOS, and a user of both."""

    def __init__(self) -> None:
        self._set: list[tuple[str, str]] = []
        # Forked: the user may not be allowed to read these files.
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("fork"), _become_user)
        self.call(os.getuid)

    def call(self, function: Callable[..., Answer], *arguments: Any) -> Answer:
        """Calls a function as the user."""
        return self._pool.submit(function, *arguments).result()

    def limit(self, entity: str, settings: str) -> None:
        """Sets limits of an entity (`qos limited`), as sacctmgr takes them; they are taken away after the test."""
        self._set.append((entity, settings))
        self._modify(entity, settings)

    @staticmethod
    def _modify(entity: str, settings: str) -> None:
        before = _values()
        sacctmgr("modify", *entity.split(), "set", *settings.split())
        # The database tells the controller a moment later; flags of a QOS are all that does not show.
        if "flags" not in settings:
            wait_for(lambda: _values() != before, f"the controller knows of {entity} {settings}")

    def lift(self) -> None:
        """Takes all limits away again."""
        for entity, settings in self._set:
            sacctmgr(
                "modify", *entity.split(), "set", *(re.sub(r"=[^=,]+(?=$|,)", "=-1", one) for one in settings.split())
            )
        self._set.clear()

    def sbatch(self, *words: str) -> str:
        """The id of a job, or what sbatch says; without --qos it has the account's."""
        done = subprocess.run(
            ["sbatch", "--parsable", "--output=/dev/null", "--mem=10", *words, "--wrap=sleep 300"],
            capture_output=True, text=True, cwd="/", user=UID, group=GID, extra_groups=[],
        )  # fmt: skip
        return (done.stdout or done.stderr).strip()

    def waits_for(self, slurm_id: str, pattern: str) -> str:
        """Why a job waits, when SLURM has found out: first it says `Priority`, `PartitionConfig` or nothing."""

        def said() -> str | None:
            words = ask("squeue", "--noheader", f"--jobs={slurm_id}", "--format=%r").strip()
            return words if re.fullmatch(pattern, words) else None

        return str(wait_for(said, f"{slurm_id} waits for {pattern}"))

    def cancel(self) -> None:
        subprocess.run(["scancel", f"--user={USER}"], check=True)
        wait_for(lambda: not ask("squeue", "--noheader", f"--user={USER}"), "the user's jobs are over")

    def close(self) -> None:
        self._pool.shutdown()


def _values() -> str:
    """All limits as the controller has them, without what is in use."""
    return re.sub(r"\([\d.]+\)|UsageRaw.*", "", ask("scontrol", "show", "assoc_mgr", "flags=assoc,qos"))


def sacctmgr(*words: str, check: bool = True) -> None:
    done = subprocess.run(["sacctmgr", "--immediate", "--quiet", *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr


def scontrol(*words: str, check: bool = True) -> None:
    subprocess.run(["scontrol", *words], check=check, capture_output=True)


@pytest.fixture(scope="module")
def made(cluster: Cluster) -> Iterator[Lab]:
    try:
        sacctmgr("add", "account", PARENT)
        sacctmgr("add", "account", ACCOUNT, f"parent={PARENT}")
        sacctmgr("add", "qos", f"{QOS},{QOS}-partition")
        sacctmgr("add", "user", USER, f"account={ACCOUNT}", f"defaultaccount={ACCOUNT}")
        sacctmgr("modify", "user", USER, "set", f"qos+={QOS}", f"defaultqos={QOS}")
        lab = Lab()
        wait_for(lambda: lab.sbatch("--hold").isdigit(), "the controller knows the user")
        lab.cancel()
        yield lab
        lab.close()
    finally:
        subprocess.run(["scancel", f"--user={USER}"])
        wait_for(lambda: not ask("squeue", "--noheader", f"--user={USER}"), "the user's jobs are over")
        sacctmgr("delete", "user", USER, check=False)
        sacctmgr("delete", "account", f"{ACCOUNT},{PARENT}", check=False)
        sacctmgr("delete", "qos", f"{QOS},{QOS}-partition", check=False)


@pytest.fixture
def lab(made: Lab) -> Iterator[Lab]:
    yield made
    made.cancel()
    made.lift()


@pytest.fixture
def partition(made: Lab) -> Iterator[Callable[..., None]]:
    """Makes the partition, with settings."""
    names = []

    def make(*settings: str) -> None:
        names.append(PARTITION)
        scontrol("create", f"PartitionName={PARTITION}", "Nodes=a100-[1-2]", *settings)

    yield make
    made.cancel()
    for name in names:
        scontrol("delete", f"PartitionName={name}")


def verdict(words: str, options: dict[str, Any], count: int = 1) -> Refusal:
    return Limits().verdict_of_refusal(words, options, count)


def never_starts(slurm_id: str, reason: str) -> str | None:
    return Limits().never_starts(slurm_id, reason)


def cost(jobs: list[tuple[str, str]]) -> tuple[set[str | None], int]:
    """What is said of all jobs and their reasons, and how many commands of SLURM that took."""
    commands = []

    def run(*words: str, **more: Any) -> str:
        commands.append(words)
        return slurm.run_command(*words, **more)

    limits.__dict__["run_command"] = run
    try:
        known = Limits()
        return {known.never_starts(*job) for job in jobs}, len(commands)
    finally:
        limits.__dict__["run_command"] = slurm.run_command


def submit_room(options: dict[str, Any]) -> int | None:
    """How many more such jobs the limits leave room for; what a refusal's verdict is made of."""
    known = Limits()
    try:
        values = known._known(0)
    except slurm.SlurmError:
        return None
    return limits._room(values, values.completed(limits.request_of(options)), known._usage(values.user))


def also(*row: str) -> Any:
    """A row of which the mechanism is tested by another one too."""
    return pytest.param(*row, marks=pytest.mark.exhaustive)


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entity", "limit", "word", "why"),
    [
        (f"user {USER}", "MaxSubmitJobs", "AssocMaxSubmitJobLimit",
         f"user {USER} in account {ACCOUNT} allows 2 jobs at a time (MaxSubmitJobs), 2 are there"),
        also(f"account {ACCOUNT}", "MaxSubmitJobs", "AssocMaxSubmitJobLimit",
         f"user {USER} in account {ACCOUNT} allows 2 jobs at a time (MaxSubmitJobs), 2 are there"),
        also(f"account {ACCOUNT}", "GrpSubmitJobs", "AssocGrpSubmitJobsLimit",
         f"account {ACCOUNT} allows 2 jobs at a time (GrpSubmitJobs), 2 are there"),
        (f"account {PARENT}", "GrpSubmitJobs", "AssocGrpSubmitJobsLimit",
         f"account {PARENT} allows 2 jobs at a time (GrpSubmitJobs), 2 are there"),
        (f"qos {QOS}", "MaxSubmitJobsPerUser", "QOSMaxSubmitJobPerUserLimit",
         f"QOS {QOS} allows 2 jobs at a time (MaxSubmitJobsPU), 2 are there"),
        also(f"qos {QOS}", "MaxSubmitJobsPerAccount", "MaxSubmitJobsPerAccount",
         f"QOS {QOS} allows 2 jobs at a time (MaxSubmitJobsPA), 2 are there"),
        also(f"qos {QOS}", "GrpSubmitJobs", "QOSGrpSubmitJobsLimit",
         f"QOS {QOS} allows 2 jobs at a time (GrpSubmitJobs), 2 are there"),
    ],
)  # fmt: skip
def test_number_of_jobs_passes(lab: Lab, entity: str, limit: str, word: str, why: str) -> None:
    lab.limit(entity, f"{limit}=2")
    assert lab.call(submit_room, {}) == 2
    array = lab.sbatch("--hold", "--array=1-3")
    assert word in array
    assert POLICY in array
    assert lab.call(verdict, array, {}, 3) == Refusal(True, why.replace("2 are there", "0 are there"), 2)
    lab.sbatch("--hold", "--array=1-2")
    full = lab.sbatch("--hold")
    assert full.splitlines()[0].endswith(word)
    assert lab.call(verdict, full, {}) == Refusal(True, why, 0)
    # Without the reason's word, the values say the same.
    assert lab.call(verdict, f"sbatch: error: Batch job submission failed: {POLICY}", {}) == Refusal(True, why, 0)
    assert lab.call(submit_room, {}) == 0
    lab.cancel()
    assert lab.call(verdict, full, {}) == Refusal(True, "", 2)


def test_no_job_at_all_never_passes(lab: Lab) -> None:
    lab.limit(f"user {USER}", "MaxSubmitJobs=0")
    found = lab.call(verdict, lab.sbatch(), {})
    assert found == Refusal(False, f"user {USER} in account {ACCOUNT} allows 0 jobs (MaxSubmitJobs)")


ASKS = ("--nodes=2", "--ntasks-per-node=1", "--gres=gpu:a100:2", "--time=60")
OPTIONS = {"nodes": 2, "ntasks-per-node": 1, "gres": "gpu:a100:2", "time": 60, "mem": "10M"}
TOO_MUCH = [
    (f"user {USER}", "MaxWall=10", "AssocMaxWallDurationPerJobLimit",
     f"user {USER} in account {ACCOUNT} allows 10 min per job (MaxWall), and the job asks for 60 min"),
    also(f"qos {QOS}", "MaxWall=10", "QOSMaxWallDurationPerJobLimit",
     f"QOS {QOS} allows 10 min per job (MaxWall), and the job asks for 60 min"),
    (f"qos {QOS}", "MaxTRESPerJob=gres/gpu=1", "QOSMaxGRESPerJob",
     f"QOS {QOS} allows 1 GPU(s) per job (MaxTRES), and the job asks for 4 GPU(s)"),
    also(f"user {USER}", "MaxTRESPerJob=gres/gpu=1", "AssocMaxGRESPerJob",
     f"user {USER} in account {ACCOUNT} allows 1 GPU(s) per job (MaxTRES), and the job asks for 4 GPU(s)"),
    (f"qos {QOS}", "MaxTRESPerUser=gres/gpu=1", "QOSMaxGRESPerUser",
     f"QOS {QOS} allows 1 GPU(s) per user (MaxTRESPU), and the job asks for 4 GPU(s)"),
    also(f"qos {QOS}", "MaxTRESPerAccount=gres/gpu=1", "MaxGRESPerAccount",
     f"QOS {QOS} allows 1 GPU(s) per account (MaxTRESPA), and the job asks for 4 GPU(s)"),
    also(f"qos {QOS}", "MaxTRESPerNode=gres/gpu=1", "QOSMaxGRESPerNode",
     f"QOS {QOS} allows 1 GPU(s) per node (MaxTRESPerNode), and the job asks for 2 GPU(s)"),
    also(f"qos {QOS}", "GrpTRES=gres/gpu=1", "QOSGrpGRES",
     f"QOS {QOS} allows 1 GPU(s) in all (GrpTRES), and the job asks for 4 GPU(s)"),
    (f"account {PARENT}", "GrpTRES=gres/gpu=1", "AssocGrpGRES",
     f"account {PARENT} allows 1 GPU(s) in all (GrpTRES), and the job asks for 4 GPU(s)"),
    also(f"qos {QOS}", "GrpTRES=node=1", "QOSGrpNodeLimit",
     f"QOS {QOS} allows 1 node(s) in all (GrpTRES), and the job asks for 2 node(s)"),
    also(f"qos {QOS}", "MaxTRESPerUser=cpu=1", "QOSMaxCpuPerUserLimit",
     f"QOS {QOS} allows 1 CPU(s) per user (MaxTRESPU), and the job asks for 2 CPU(s)"),
    also(f"qos {QOS}", "MaxTRESPerJob=mem=5", "QOSMaxMemoryPerJob",
     f"QOS {QOS} allows 5 MiB of memory per job (MaxTRES), and the job asks for 20 MiB of memory"),
    also(f"qos {QOS}", "MaxTRESMins=cpu=10", "QOSMaxCpuMinutesPerJobLimit",
     f"QOS {QOS} allows 10 CPU(s) × min per job (MaxTRESMins), and the job asks for 120 CPU(s) × min"),
    also(f"account {ACCOUNT}", "GrpTRESRunMins=cpu=10", "AssocGrpCPURunMinutesLimit",
     f"account {ACCOUNT} allows 10 CPU(s) × min in all (GrpTRESRunMins), and the job asks for 120 CPU(s) × min"),
]  # fmt: skip
"""Limits that a job alone is above: the reason, and what is said of it."""


@pytest.mark.parametrize(("entity", "limit", "word", "why"), TOO_MUCH)
def test_job_above_a_limit_never_starts(lab: Lab, entity: str, limit: str, word: str, why: str) -> None:
    """SLURM takes it, or refuses it where the QOS has a flag."""
    lab.limit(entity, limit)
    slurm_id = lab.sbatch(*ASKS)
    lab.waits_for(slurm_id, word)
    assert lab.call(never_starts, slurm_id, word) == why
    lab.cancel()
    lab.limit(f"qos {QOS}", "flags=DenyOnLimit")
    refused = wait_for(lambda: None if (said := lab.sbatch(*ASKS)).isdigit() else said, "the flag is known")
    assert refused.splitlines()[0].endswith(word)
    assert lab.call(verdict, refused, OPTIONS) == Refusal(False, why)
    assert lab.call(verdict, f"sbatch: error: Batch job submission failed: {POLICY}", OPTIONS) == Refusal(False, why)


# --- pending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entity", "limit", "word"),
    [
        (f"user {USER}", "MaxJobs=1", "AssocMaxJobsLimit"),
        also(f"account {ACCOUNT}", "GrpJobs=1", "AssocGrpJobsLimit"),
        also(f"qos {QOS}", "MaxJobsPerUser=1", "QOSMaxJobsPerUserLimit"),
        also(f"qos {QOS}", "MaxJobsPerAccount=1", "MaxJobsPerAccount"),
        (f"qos {QOS}", "MaxTRESPerUser=gres/gpu=3", "QOSMaxGRESPerUser"),
        also(f"qos {QOS}", "GrpTRES=gres/gpu=3", "QOSGrpGRES"),
        (f"account {PARENT}", "GrpTRES=gres/gpu=3", "AssocGrpGRES"),
    ],
)
def test_job_behind_others_may_start(lab: Lab, entity: str, limit: str, word: str) -> None:
    """The same words as for one that never will; with DenyOnLimit, too, it is taken."""
    lab.limit(entity, limit)
    lab.limit(f"qos {QOS}", "flags=DenyOnLimit")
    first, second = lab.sbatch("--gres=gpu:2", "--time=60"), lab.sbatch("--gres=gpu:2", "--time=60")
    lab.waits_for(second, word)
    assert lab.call(never_starts, second, word) is None
    subprocess.run(["scancel", first], check=True)
    wait_for(lambda: ask("squeue", "--noheader", f"--jobs={second}", "--format=%T").strip() == "RUNNING", "it starts")


@pytest.mark.parametrize(
    ("setting", "asks", "reason", "why"),
    [
        ("MaxTime=10", "--time=60", "PartitionTimeLimit",
         "allows 10 min per job (MaxTime), and the job asks for 60 min"),
        also("MaxNodes=1", "--nodes=2", "PartitionNodeLimit",
         "allows 1 node(s) (MaxNodes), and the job asks for 2 node(s)"),
        ("MaxNodes=9", "--nodes=3", "PartitionNodeLimit",
         "allows 2 node(s) (TotalNodes), and the job asks for 3 node(s)"),
        also("MinNodes=2", "--nodes=1", "PartitionNodeLimit",
         "wants at least 2 node(s) (MinNodes), and the job asks for 1 node(s)"),
        also("MaxCPUsPerNode=1", "--cpus-per-task=4", "PartitionConfig",
         "allows 1 CPU(s) per node (MaxCPUsPerNode), and the job asks for 4 CPU(s)"),
        also("MaxNodes=9", "--cpus-per-task=100", "PartitionConfig",
         "allows 16 CPU(s) per node (CPUs of its nodes), and the job asks for 100 CPU(s)"),
        ("MaxMemPerNode=5", "--nodes=1", "MaxMemPerLimit",
         "allows 5 MiB of memory per node (MaxMemPerNode), and the job asks for 10 MiB of memory"),
    ],
)  # fmt: skip
def test_job_above_its_partition_never_starts(
    lab: Lab, partition: Callable[..., None], setting: str, asks: str, reason: str, why: str
) -> None:
    partition(setting)
    slurm_id = lab.sbatch(f"--partition={PARTITION}", asks)
    lab.waits_for(slurm_id, reason)
    found = lab.call(never_starts, slurm_id, reason)
    assert found is not None
    assert f"partition {PARTITION} {why}" in found


@pytest.mark.parametrize(
    ("setting", "pattern", "never"),
    [
        ("AllowQos=normal", r"Job's QOS not permitted to use this partition \(.*", True),
        ("AllowAccounts=lab", r"Job's account not permitted to use this partition \(.*", True),
        ("State=DOWN", "PartitionDown", False),
    ],
)
def test_who_may_use_a_partition(
    lab: Lab, partition: Callable[..., None], setting: str, pattern: str, never: bool
) -> None:
    partition(setting)
    slurm_id = lab.sbatch(f"--partition={PARTITION}")
    reason = lab.waits_for(slurm_id, pattern)
    assert (lab.call(never_starts, slurm_id, reason) is not None) is never


def test_limit_of_one_of_several_partitions_is_none(lab: Lab, partition: Callable[..., None]) -> None:
    partition("MaxTime=10")
    both = lab.sbatch(f"--partition={PARTITION},v100", "--time=60", "--begin=now+1hour")
    assert lab.call(never_starts, both, "PartitionTimeLimit") is None
    one = lab.sbatch(f"--partition={PARTITION}", "--time=60", "--begin=now+1hour")
    assert lab.call(never_starts, one, "PartitionTimeLimit") is not None


def test_higher_limit_takes_the_place_of_a_lower_one(lab: Lab, partition: Callable[..., None]) -> None:
    """The QOS of the partition before the job's, both before the association's."""
    partition(f"QoS={QOS}-partition")
    there = {"partition": PARTITION}
    lab.limit(f"user {USER}", "MaxSubmitJobs=5")
    assert lab.call(submit_room, there) == 5
    lab.limit(f"qos {QOS}", "MaxSubmitJobsPerUser=9")
    assert lab.call(submit_room, there) == 9
    lab.sbatch("--hold", "--array=1-7", f"--partition={PARTITION}")
    assert lab.call(submit_room, there) == 2


def test_many_pending_jobs_cost_a_constant_number_of_commands(lab: Lab) -> None:
    lab.limit(f"qos {QOS}", "MaxTRESPerUser=gres/gpu=3")
    array = lab.sbatch("--gres=gpu:2", "--array=1-300", "--begin=now+1hour")
    jobs = [(f"{array}_{task}", "QOSMaxGRESPerUser") for task in range(1, 301)]
    one, of_one = lab.call(cost, jobs[:1])
    all_of_them, of_all = lab.call(cost, jobs)
    assert one == all_of_them == {None}
    assert of_one == of_all < 10
    large = [lab.sbatch("--gres=gpu:4", "--begin=now+1hour") for _ in range(3)]
    found, of_large = lab.call(cost, [(slurm_id, "QOSMaxGRESPerUser") for slurm_id in large])
    assert found == {f"QOS {QOS} allows 3 GPU(s) per user (MaxTRESPU), and the job asks for 4 GPU(s)"}
    assert of_large == of_all


def test_array_may_have_as_many_tasks_as_the_cluster_allows(lab: Lab) -> None:
    size = lab.call(Limits().max_array_size)
    assert lab.sbatch("--hold", f"--array=0-{size - 1}").isdigit()
    assert "Invalid job array specification" in lab.sbatch("--hold", f"--array=0-{size}")


def test_refusal_that_no_limit_explains_is_final(lab: Lab) -> None:
    for words in ("--account=nobodys", "--qos=nosuch", "--partition=nosuch", "--gres=gpu:12", "--mem=1000000"):
        refused = lab.sbatch(words)
        assert "sbatch: error: " in refused
        assert lab.call(verdict, refused, {}) == Refusal(False)


@pytest.mark.parametrize("state", ["DRAIN", "INACTIVE"])
def test_closed_partition_may_open(lab: Lab, partition: Callable[..., None], state: str) -> None:
    partition(f"State={state}")
    refused = lab.sbatch(f"--partition={PARTITION}")
    assert lab.call(verdict, refused, {"partition": PARTITION}).passes is None


def test_accounting_that_does_not_answer_leaves_the_words(lab: Lab, cluster: Cluster) -> None:
    job = lab.sbatch("--begin=now+1hour")
    cluster.stop_daemon("slurmdbd")
    try:
        passing = lab.call(verdict, f"sbatch: error: AssocMaxSubmitJobLimit\nsbatch: error: {POLICY}", {})
        never = lab.call(verdict, f"sbatch: error: QOSMaxGRESPerUser\nsbatch: error: {POLICY}", {})
        unknown = lab.call(verdict, f"sbatch: error: {POLICY}", {})
        room = lab.call(submit_room, {})
        pending = [lab.call(never_starts, job, reason) for reason in ("QOSMaxGRESPerUser", "QOSMaxGRESPerJob")]
    finally:
        cluster.start_daemon("slurmdbd")
    assert (passing.passes, never.passes, unknown.passes) == (True, False, None)
    assert "its limits could not be asked for" in unknown.why
    assert room is None
    assert pending == [None, "QOSMaxGRESPerJob does not pass by itself"]
