"""The study itself on the cluster: `snakemake --profile slurm`, as a lab member calls it."""

import copy
import signal
import subprocess
import sys
from typing import Any

import pytest

from finetune_study import record
from tests.slurm.cluster import Attempt, Cluster, ask, queue, wait_for
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import REPOSITORY, Workplace

pytestmark = [pytest.mark.slurm, pytest.mark.long]

PROFILE = str(REPOSITORY / "slurm")
JOBS = "2"
"""The nodes share this machine: more runs at once would only wait for each other."""


def stand_in(partition: str, **more: Any) -> dict[str, Any]:
    """A hardware entry of the test cluster, whose GPUs do not exist."""
    slurm = {"partition": partition, "gpu_model": partition, "stand_in": True, "cpus_per_gpu": 1, "startup_minutes": 0}
    return {
        "device": "cpu",
        "memory_gib": more.pop("memory_gib", 2),
        "max_gpus": 2,
        "threads_per_gpu": 1,
        "slurm": {**slurm, "mem_gib_per_gpu": 3, **more},
    }


def small_study() -> dict[str, Any]:
    """Runs on both partitions that end in every way in which a run itself knows how it ends."""
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {
        "a100": stand_in("a100"),
        "v100": stand_in("v100"),
        "no-memory": stand_in("v100", memory_gib=0.003),
        "no-host-memory": stand_in("a100", mem_gib_per_gpu=0.2),
    }
    raw["recipes"]["flash"] = {"bf16": {}, "flash_attention_2": {}}
    common = {"targets": "tiny", "sequence_length": 64}
    raw["grid"] = [
        common | {"hardware": "a100", "recipes": ["full", "lora"]},
        common | {"hardware": "v100", "recipes": ["full", "flash"]},
        common | {"hardware": ["no-memory", "no-host-memory"], "recipes": "full"},
    ]
    return raw


def submit(place: Workplace, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return place.snakemake("--profile", PROFILE, "--jobs", JOBS, *arguments, cores=None)


def statuses(place: Workplace) -> dict[str, str]:
    """How the runs ended, by the run_id without its digest."""
    found: dict[str, str] = {}
    for folder in place.run_folders():
        if (folder / "record.json").exists():
            found[folder.name.rsplit("-", 1)[0]] = record.read_record(folder / "record.json").ending.status
    return found


def jobs_of(place: Workplace, run_id: str) -> list[Attempt]:
    """SLURM's jobs of a run, all that there ever were; other tests have runs of the same name in other folders."""
    answer = ask(
        *("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates", "--starttime", "now-2hours"),
        *("--name", run_id, "--format", "JobIDRaw,State,NodeList,Partition,AllocTRES,WorkDir"),
    )
    rows = (line.rsplit("|", 1) for line in answer.splitlines())
    return [Attempt(*row.split("|")) for row, folder in rows if folder == str(place.folder)]


def submissions(place: Workplace) -> dict[str, int]:
    """How many there were of each run."""
    return {folder.name: len(jobs_of(place, folder.name)) for folder in place.run_folders()}


@pytest.fixture
def place(workplace: Workplace) -> Workplace:
    """Where a study runs."""
    return workplace


@pytest.fixture(scope="module")
def measured(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """The small study, measured once; tests work on what it left, one after the other."""
    place = Workplace(tmp_path_factory.mktemp("study"))
    place.write(small_study())
    answer = submit(place)
    assert answer.returncode == 0, answer.stdout
    return place


def test_runs_end_on_slurm_as_they_end_here(measured: Workplace) -> None:
    assert statuses(measured) == {
        "tiny_a100x1_s64_b1_full_r1": "completed",
        "tiny_a100x1_s64_b1_lora_r1": "completed",
        "tiny_v100x1_s64_b1_full_r1": "completed",
        "tiny_v100x1_s64_b1_flash_r1": "unsupported",
        "tiny_no-memoryx1_s64_b1_full_r1": "device_oom",
        "tiny_no-host-memoryx1_s64_b1_full_r1": "host_oom",
    }
    assert (measured.results / "report" / "index.html").exists()


def test_each_run_was_one_job_named_by_its_run_id_on_its_partition(measured: Workplace) -> None:
    for folder in measured.run_folders():
        jobs = jobs_of(measured, folder.name)
        written = record.read_record(folder / "record.json")
        if written.ending.status == "unsupported":
            assert jobs == []
            continue
        (job,) = jobs
        assert job.slurm_id == written.slurm_job_id
        assert job.partition == ("a100" if "_a100" in folder.name or "host" in folder.name else "v100")
        assert "gres/gpu=1" in job.tres


def test_record_says_what_was_allotted_and_that_it_is_a_stand_in(measured: Workplace) -> None:
    allocation = record.read_record(measured.record("a100x1_s64_b1_full")).environment["allocation"]
    assert allocation["by"] == "slurm (stand-in)"
    assert allocation["asked"]["gpu_model"] == "a100"
    assert allocation["found"]["gpus"] == ["a100"]
    assert allocation["found"]["nodes"] == 1


def test_second_call_submits_nothing_and_a_new_model_only_its_own_runs(measured: Workplace) -> None:
    before = submissions(measured)
    again = submit(measured)
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout, again.stdout
    raw = measured.read()
    raw["models"]["wider"] = copy.deepcopy(raw["models"]["tiny"])
    raw["models"]["wider"]["architecture"]["hidden_size"] = 96
    raw["grid"].append({"targets": "wider", "hardware": "v100", "sequence_length": 64, "recipes": "full"})
    measured.write(raw)
    answer = submit(measured)
    assert answer.returncode == 0, answer.stdout
    after = submissions(measured)
    assert {run_id: after[run_id] for run_id in before} == before
    (new,) = set(after) - set(before)
    assert after[new] == 1
    assert statuses(measured)["wider_v100x1_s64_b1_full_r1"] == "completed"


def one_run(place: Workplace, **slurm: Any) -> None:
    """A study of a single run."""
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"a100": stand_in("a100", **slurm)}
    raw["grid"][0] |= {"hardware": "a100", "recipes": "full"}
    place.write(raw)


def test_kills_by_slurm_are_outcomes_and_are_not_run_again(place: Workplace) -> None:
    """SLURM's limits are set below what a run needs to say itself how it ended."""
    raw = copy.deepcopy(TINY_STUDY)
    # Less than the supervisor takes, which would write the record: nothing of the run survives.
    raw["hardware"] = {"small": stand_in("a100", mem_gib_per_gpu=0.02), "slow": stand_in("v100")}
    # Steps of some seconds, so that the run is at work when its minute is over.
    raw["models"]["tiny"]["architecture"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6}
    raw["training"] = {"effective_batch_size": 8}
    raw["protocol"] |= {"num_timed_steps": 60, "time_limit_minutes": 30}
    raw["data"] |= {"num_dialogues": 600, "num_eval_samples": 0}
    raw["grid"][0] |= {"hardware": ["small", "slow"], "recipes": "full", "sequence_length": 256}
    place.write(raw)
    answer = submit(place, "--set-resources", "finetune:runtime=1")
    assert answer.returncode == 0, answer.stdout
    assert statuses(place) == {"tiny_smallx1_s256_b1_full_r1": "host_oom", "tiny_slowx1_s256_b1_full_r1": "timeout"}
    killed = record.read_record(place.record("small"))
    assert "OUT_OF_MEMORY" in str(killed.ending.reason)
    assert killed.slurm_job_id == jobs_of(place, killed.run.run_id)[0].slurm_id
    late = record.read_record(place.record("slow"))
    assert "TIMEOUT" in str(late.ending.reason)
    assert late.ranks[0]["steps"], "what was measured until then is kept"
    again = submit(place)
    assert "Nothing to be done" in again.stdout, again.stdout
    assert set(submissions(place).values()) == {1}


def test_run_that_landed_on_the_wrong_type_is_measured_on_another_node(place: Workplace) -> None:
    """Of a partition with two kinds of GPU, which is asked for a GPU of any kind, SLURM gives the other kind first."""
    one_run(place)
    answer = submit(place, "--set-resources", "finetune:gres='gpu:1'", "finetune:slurm_partition=mixed")
    assert answer.returncode == 0, answer.stdout
    assert "node v100-2 is not what was asked for (status 69); submitting it again (1 of 3)" in answer.stdout
    assert set(statuses(place).values()) == {"completed"}
    (folder,) = place.run_folders()
    assert [(job.state, job.node) for job in jobs_of(place, folder.name)] == [
        ("FAILED", "v100-2"),
        ("COMPLETED", "a100-2"),
    ]
    assert record.read_record(folder / "record.json").attempt == 1


def test_run_for_which_no_node_is_fit_fails_without_a_number(place: Workplace) -> None:
    one_run(place)
    answer = submit(place, "--set-resources", "finetune:gres='gpu:1'", "finetune:slurm_partition=v100")
    assert answer.returncode != 0
    (folder,) = place.run_folders()
    assert not (folder / "record.json").exists()
    failure = record.read_failure(folder / "failure.json")
    assert "v100, not a100" in failure.cause
    assert (failure.unfit_node, failure.attempt) == (True, 0)
    assert "(without the nodes v100-1, v100-2, which were not what was asked for)" in answer.stdout
    # Accounting keeps a row without a node of the request that SLURM refused, and all rows come with a lag.
    wait_for(
        lambda: {job.node for job in jobs_of(place, folder.name)} - {"None assigned"} == {"v100-1", "v100-2"},
        "accounting has both jobs",
    )
    # Mended, the same command measures it.
    answer = submit(place)
    assert answer.returncode == 0, answer.stdout
    assert set(statuses(place).values()) == {"completed"}


def test_driver_that_was_killed_is_followed_by_one_that_goes_on(place: Workplace) -> None:
    """At least one run is at work; each is measured once."""
    one_run(place)
    raw = place.read()
    raw["grid"][0]["recipes"] = ["full", "lora"]
    place.write(raw)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--profile", PROFILE]
    with (place.folder / "driver.log").open("w") as log:
        driver = subprocess.Popen([*command, "--jobs", JOBS], cwd=place.folder, stdout=log, stderr=log)
    wait_for(
        lambda: any(job.state == "RUNNING" for job in queue() if job.workdir == place.folder),
        "one of its runs is at work",
    )
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    # What belongs to the run's job and not to the run is no reason to begin again.
    raw["protocol"]["time_limit_minutes"] += 1
    place.write(raw)
    answer = submit(place)
    assert answer.returncode == 0, answer.stdout
    assert "goes on as SLURM job" in answer.stdout
    assert set(statuses(place).values()) == {"completed"}
    assert set(submissions(place).values()) == {1}


OFTEN = ("--slurm-init-seconds-before-status-checks", "5", "--seconds-between-status-checks", "5")


def test_official_executor_runs_the_study_too_and_there_a_kill_is_a_failure(place: Workplace) -> None:
    one_run(place)
    answer = submit(place, "--executor", "slurm", *OFTEN, "--set-resources", "finetune:mem_mb=60")
    assert answer.returncode != 0
    assert statuses(place) == {}
    answer = submit(place, "--executor", "slurm", *OFTEN)
    assert answer.returncode == 0, answer.stdout
    assert set(statuses(place).values()) == {"completed"}
