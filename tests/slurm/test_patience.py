"""A SLURM that is down for a while costs time, and nothing else; a request that can never run fails at once."""

import subprocess

import pytest

from tests.slurm.cluster import Cluster, ask, wait_for
from tests.slurm.place import EAT_300_MB, PENDING, UNTIL_GO, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def test_jobs_end_while_accounting_is_down(place: Place, cluster: Cluster) -> None:
    """The controller's word has to do, and the job's own."""
    place.rule("good", UNTIL_GO)
    place.rule("fails", f"{UNTIL_GO}; exit 3")
    place.rule("out_of_memory", f"{UNTIL_GO}; {EAT_300_MB}")
    place.rule("child_out_of_memory", f"{UNTIL_GO}; ({EAT_300_MB}) || true")
    driver = place.start()
    place.wait_until_begun("good", "fails", "out_of_memory", "child_out_of_memory")
    cluster.stop_daemon("slurmdbd")
    driver.wait_until_said("sacct fails, squeue answers; asking again in 2 s: ")
    place.go()
    ended = driver.wait()
    cluster.start_daemon("slurmdbd")
    assert ended.failed == {"fails", "out_of_memory"}
    assert "SLURM state FAILED, reason: the command ended with status 3" in ended.message("fails")
    assert "SLURM state OUT_OF_MEMORY" in ended.message("out_of_memory")
    for rule in ("good", "fails", "out_of_memory", "child_out_of_memory"):
        assert len(place.begun(rule)) == 1


def test_controller_is_away_while_jobs_are_submitted_and_run(place: Place, cluster: Cluster) -> None:
    """A patient driver goes on when it is back; one without patience ends, and its next call goes on."""
    place.rule("running", "until [ -e go2 ]; do sleep 0.1; done")
    place.rule("ends", UNTIL_GO)
    later = [f"later_{number}" for number in range(3)]
    for rule in later:
        place.rule(rule, "true", needs=["ends.out"])
    impatient = place.other("impatient")
    impatient.rule("one", "true")
    impatient.rule("other", "true")

    driver = place.start()
    place.wait_until_begun("running", "ends")
    cluster.stop_daemon("slurmctld")
    place.go()
    gave_up = impatient.snakemake("--submitit-patience-minutes=0")
    driver.wait_until_said(r"SLURM can't take jobs at the moment; asking again in 2 s: .*Unable to contact")
    cluster.start_daemon("slurmctld")
    place.path("go2").touch()
    goes_on = impatient.start()

    ended = driver.wait()
    assert ended.status == 0, ended.output
    for rule in ("running", "ends", *later):
        assert len(place.begun(rule)) == 1
        place.wait_until_accounted(rule, "COMPLETED")

    assert gave_up.status == 75
    assert "SLURM has not answered for 0 min: sbatch: error: Batch job submission failed: Unable to contact" in (
        gave_up.output
    )
    assert goes_on.wait().status == 0, goes_on.output
    for rule in ("one", "other"):
        assert len(impatient.begun(rule)) == 1
        impatient.wait_until_accounted(rule, "COMPLETED")


def test_slurm_that_stays_away_is_given_up_and_its_jobs_go_on(place: Place, cluster: Cluster) -> None:
    place.rule("running", f"echo half > {{output}}; {UNTIL_GO}", makes=["running.out"])
    place.rule("pending", "true", **PENDING)
    driver = place.start("--submitit-patience-minutes=0")
    place.wait_until_begun("running")
    wait_for(place.path("running.out").exists, "the job has begun to write")
    driver.wait_until_said(f"{place.name}pending: submitted as")
    cluster.stop_daemon("slurmdbd")
    cluster.stop_daemon("slurmctld")
    gave_up = driver.wait()
    cluster.start_daemon("slurmdbd")
    cluster.start_daemon("slurmctld")
    assert gave_up.status == 75
    assert gave_up.failed == set()
    jobs = [job for rule in ("running", "pending") for job in place.queued(rule)]
    assert "SLURM has not answered for 0 min: " in gave_up.output
    assert f"2 SLURM job(s) are left as they are: {jobs[0].slurm_id}, {jobs[1].slurm_id}. " in gave_up.output
    assert "The same command goes on with them." in gave_up.output
    assert place.path("running.out").read_text() == "half\n"

    driver = place.start()
    for job in jobs:
        driver.wait_until_said(f"{job.name}: goes on as SLURM job {job.slurm_id}")
    place.release("pending")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    for rule in ("running", "pending"):
        assert len(place.begun(rule)) == 1
        place.wait_until_accounted(rule, "COMPLETED")


def test_what_can_never_run_fails_at_once_in_the_words_of_slurm(place: Place) -> None:
    place.rule("good", "true")
    place.rule("partition", "true", slurm_partition="nowhere")
    place.rule("account", "true", slurm_account="nobody")
    place.rule("gpus", "true", gpu=12)
    place.rule("model", "true", gpu_model="h100")
    place.rule("memory", "true", mem_mb=10**6)
    ended = place.snakemake()
    assert ended.status == 1
    assert ended.failed == {"partition", "account", "gpus", "model", "memory"}
    for rule, words in {
        "partition": "invalid partition specified: nowhere",
        "account": "Invalid account or account/partition combination specified",
        "gpus": "Requested node configuration is not available",
        "model": "Requested node configuration is not available",
        "memory": "Memory specification can not be satisfied",
    }.items():
        assert "SLURM did not take the job: " in ended.message(rule)
        assert words in ended.message(rule)
        assert not place.begun(rule)
    assert len(place.begun("good")) == 1
    assert "asking again" not in ended.output
    assert not place.open_tokens()


def test_full_queue_is_waited_for(place: Place) -> None:
    """The account may have two jobs at a time; four are there to be submitted."""
    limit = ["sacctmgr", "--immediate", "modify", "user", "root", "set"]
    for number in range(4):
        place.rule(f"job{number}", UNTIL_GO)
    subprocess.run([*limit, "MaxSubmitJobs=2"], check=True, stdout=subprocess.DEVNULL)
    try:
        wait_for(lambda: "MaxSubmitJobs=2" in ask("scontrol", "show", "assoc_mgr"), "the controller knows of the limit")
        driver = place.start()
        driver.wait_until_said("SubmitJobLimit")
        place.go()
        ended = driver.wait()
    finally:
        subprocess.run([*limit, "MaxSubmitJobs=-1"], check=True, stdout=subprocess.DEVNULL)
    assert ended.status == 0, ended.output
    assert [len(place.begun(f"job{number}")) for number in range(4)] == [1, 1, 1, 1]
