"""A driver may die at any moment: the same command goes on with its jobs, and no work is done twice."""

import os
import signal
import subprocess
from collections.abc import Iterable

import pytest

from tests.slurm.cluster import wait_for
from tests.slurm.place import EAT_300_MB, PENDING, UNTIL_GO, Driver, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

FAILS_ONCE = f"{UNTIL_GO}; mkdir tried 2> /dev/null && exit 3 || true"
NOTED = 'pathlib.Path(given["output"][0]).write_text("killed")'


def wait_until_submitted(place: Place, driver: Driver, rules: Iterable[str]) -> None:
    for rule in rules:
        driver.wait_until_said(rf"{place.name}{rule}: submitted as SLURM job \d+")


def lose_the_word_of(place: Place, *rules: str) -> None:
    """As if the driver had died between sbatch and its note of the id."""
    batches = {place.submission(rule)["batch"] for rule in rules}
    events = [e for e in place.events() if not (e["event"] == "submitted" and e.get("batch") in batches)]
    assert len(events) == len(place.events()) - len(batches)
    place.edit_ledger(events)


def test_killed_driver_is_taken_over_from(place: Place) -> None:
    """Whatever became of the jobs meanwhile."""
    place.rule("pending", "true", **PENDING)
    place.rule("running", "until [ -e go2 ]; do sleep 0.1; done")
    place.rule("finished", UNTIL_GO)
    place.rule("out_of_memory", f"{UNTIL_GO}; {EAT_300_MB}")
    place.rule("failed", FAILS_ONCE)
    place.rule("failed_pending", "true", **PENDING)
    hook = ("--submitit-after-kill", place.hook("after_kill.py", NOTED))

    driver = place.start(*hook)
    place.wait_until_begun("running", "finished", "out_of_memory", "failed")
    wait_until_submitted(place, driver, ("pending", "failed_pending"))
    driver.kill()
    place.go()
    (failed_pending,) = place.queued("failed_pending")
    subprocess.run(["scancel", failed_pending.slurm_id], check=True)
    place.wait_until_over("finished", "out_of_memory", "failed", "failed_pending")

    driver = place.start(*hook)
    for rule in ("pending", "running", "finished", "out_of_memory", "failed"):
        driver.wait_until_said(rf"{place.name}{rule}: goes on as SLURM job \d+")
    driver.wait_until_said(rf"{place.name}failed_pending: submitted as SLURM job \d+")
    place.release("pending", "failed_pending")
    place.path("go2").touch()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert ended.failed == set()
    assert {rule: len(place.begun(rule)) for rule in ("pending", "running", "finished", "out_of_memory")} == {
        "pending": 1,
        "running": 1,
        "finished": 1,
        "out_of_memory": 1,
    }
    assert place.path("out_of_memory.out").read_text() == "killed"
    assert len(set(place.begun("failed"))) == 2
    assert len(place.begun("failed_pending")) == 1
    for rule in ("pending", "running", "finished"):
        place.wait_until_accounted(rule, "COMPLETED")
    place.wait_until_accounted("failed", "FAILED", "COMPLETED")
    assert not place.open_tokens()


def test_killed_driver_that_had_no_time_to_note_an_id_is_taken_over_from(place: Place) -> None:
    """The job of a noted intention is found where it is: in the queue, at work, over, or nowhere."""
    place.rule("pending", "true", **PENDING)
    place.rule("running", "until [ -e go2 ]; do sleep 0.1; done")
    place.rule("finished", UNTIL_GO)
    place.rule("nowhere", "true", **PENDING)

    driver = place.start()
    wait_until_submitted(place, driver, ("pending", "running", "finished", "nowhere"))
    place.wait_until_begun("running", "finished")
    driver.kill()
    place.go()
    place.wait_until_over("finished")
    (nowhere,), (pending,), (running,) = (place.queued(rule) for rule in ("nowhere", "pending", "running"))
    lose_the_word_of(place, "pending", "running", "finished", "nowhere")
    subprocess.run(["scancel", nowhere.slurm_id], check=True)
    events = place.events()
    for event in events:
        if event.get("token") == place.submission("nowhere")["token"]:
            event["token"] = "0" * 16  # of which SLURM has never heard
    place.edit_ledger(events)

    driver = place.start()
    for rule, job in (("pending", pending), ("running", running)):
        driver.wait_until_said(rf"{place.name}{rule}: goes on as SLURM job {job.slurm_id}\n")
    driver.wait_until_said(rf"{place.name}nowhere: submitted as SLURM job \d+")
    place.release("pending", "nowhere")
    place.path("go2").touch()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    for rule in ("pending", "running", "finished"):
        assert len(place.begun(rule)) == 1
        place.wait_until_accounted(rule, "COMPLETED")
    assert len(place.begun("nowhere")) == 1


def test_changed_command_takes_the_place_of_the_pending_old_one(place: Place) -> None:
    place.rule("changed", "echo old > which", **PENDING)
    driver = place.start()
    wait_until_submitted(place, driver, ("changed",))
    driver.kill()
    (old,) = place.queued("changed")

    place.rule("changed", "echo new > which")
    ended = place.snakemake()
    assert ended.status == 0, ended.output
    assert f"changed: it has changed; SLURM job {old.slurm_id} is cancelled" in ended.output
    assert place.path("which").read_text() == "new\n"
    assert len(place.begun("changed")) == 1
    place.wait_until_accounted("changed", "CANCELLED", "COMPLETED")


def test_second_driver_in_the_same_folder_is_refused(place: Place) -> None:
    place.rule("running", UNTIL_GO)
    first = place.start()
    place.wait_until_begun("running")
    second = place.snakemake()
    assert second.status == 75
    assert f"Another Snakemake drives the jobs of this folder: process {first.process.pid} on " in second.output
    place.go()
    ended = first.wait()
    assert ended.status == 0, ended.output
    assert len(place.begun("running")) == 1


def test_closed_terminal_leaves_the_jobs(place: Place) -> None:
    place.rule("running", UNTIL_GO)
    driver = place.start()
    place.wait_until_begun("running")
    driver.signal_all(signal.SIGHUP)
    assert driver.wait().status != 0
    (job,) = place.queued("running")
    assert job.state == "RUNNING"

    driver = place.start()
    driver.wait_until_said(f"running: goes on as SLURM job {job.slurm_id}")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert len(place.begun("running")) == 1


def test_ctrl_c_cancels_all_jobs(place: Place) -> None:
    place.rule("running", UNTIL_GO)
    place.rule("pending", "true", **PENDING)
    driver = place.start()
    wait_until_submitted(place, driver, ("running", "pending"))
    place.wait_until_begun("running")
    driver.signal_all(signal.SIGINT)
    ended = driver.wait()
    assert ended.status != 0
    place.wait_until_over("running", "pending")
    for rule in ("running", "pending"):
        place.wait_until_accounted(rule, "CANCELLED")
    assert not place.path("running.out").exists()
    place.go()
    place.rule("pending", "true")
    again = place.snakemake()
    assert again.status == 0, again.output
    assert [len(place.begun(rule)) for rule in ("running", "pending")] == [2, 1]
    assert not place.open_tokens()


def test_job_that_could_not_be_cancelled_is_followed_by_the_next_call(place: Place) -> None:
    """SLURM does not hear of the Ctrl-C: the job runs on, and nothing is started beside it."""
    place.rule("running", UNTIL_GO)
    broken = place.folder / "bin"
    broken.mkdir()
    (broken / "scancel").write_text("#!/bin/sh\necho 'Socket timed out' >&2\nexit 1\n", encoding="utf-8")
    (broken / "scancel").chmod(0o755)
    driver = place.start(PATH=f"{broken}:{os.environ['PATH']}")
    place.wait_until_begun("running")
    driver.signal_all(signal.SIGINT)
    assert "could not be cancelled" in driver.wait().output
    again = place.start()
    again.wait_until_said("running: goes on as SLURM job")
    place.go()
    ended = again.wait()
    assert ended.status == 0, ended.output
    assert len(place.begun("running")) == 1


def test_job_that_gives_way_has_ended_before_its_successor_begins(place: Place) -> None:
    """The command has changed, and the old one takes its time to end."""
    place.rule("one", "trap 'sleep 3; echo old >> order' TERM; " + UNTIL_GO)
    driver = place.start()
    place.wait_until_begun("one")
    driver.kill()
    place.rule("one", "echo new >> order")
    ended = place.snakemake()
    assert ended.status == 0, ended.output
    assert place.path("order").read_text(encoding="utf-8").split()[-1] == "new"
    assert len(place.attempts("one")) == 2


def test_terminated_driver_waits_for_what_runs_and_submits_no_more(place: Place) -> None:
    """Snakemake's own way with SIGTERM."""
    place.rule("one", UNTIL_GO)
    place.rule("other", UNTIL_GO)
    driver = place.start(jobs=1)
    wait_for(lambda: place.begun("one") or place.begun("other"), "one of them runs")
    driver.process.terminate()
    driver.wait_until_said("Will exit after finishing currently running jobs")
    place.go()
    driver.wait()
    assert len(place.begun("one")) + len(place.begun("other")) == 1
    assert place.path("one.out").exists() or place.path("other.out").exists()
    assert not place.open_tokens()
