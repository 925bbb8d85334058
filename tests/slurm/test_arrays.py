"""Jobs that ask for the same make an array; each of its tasks is a job of its own in every other way."""

import subprocess

import pytest

from tests.slurm.cluster import queue, wait_for
from tests.slurm.place import PENDING, UNTIL_GO, Place

pytestmark = pytest.mark.slurm

ARRAYS = "--submitit-array-limit=1000"


def arrays_of(place: Place) -> dict[str, set[str]]:
    """Rules of each sbatch, by SLURM's id, as the ledger has them."""
    ids = {event["batch"]: event["slurm_id"] for event in place.events() if event["event"] == "submitted"}
    found: dict[str, set[str]] = {}
    for event in place.events():
        if event["event"] == "intent" and event["batch"] in ids:
            found.setdefault(ids[event["batch"]], set()).add(event["name"].removeprefix(place.name))
    return found


def test_jobs_that_ask_for_the_same_are_one_array_and_nobody_gets_anothers_resources(place: Place) -> None:
    count = "echo ${{CUDA_VISIBLE_DEVICES:-}} | tr ',' '\\n' | grep -c . > {rule}.gpus || true"
    for number in range(5):
        place.rule(f"a{number}", f"{count}; {UNTIL_GO}", gres="gpu:a100:1")
        place.rule(f"b{number}", f"{count}; {UNTIL_GO}", gres="gpu:v100:2", slurm_partition="v100", mem_mb=60)
    place.rule("alone", f"{count}; {UNTIL_GO}", cpus_per_task=2)
    driver = place.start(ARRAYS)
    a, b = ([f"{letter}{number}" for number in range(5)] for letter in "ab")
    place.wait_until_begun(*a, *b, "alone")
    assert sorted(map(sorted, arrays_of(place).values())) == [a, ["alone"], b]
    # Each is found in squeue by the name of its own.
    wait_for(lambda: {f"{place.name}{rule}" for rule in a + b} <= {job.name for job in queue()}, "tasks are renamed")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert [place.path(f"{rule}.gpus").read_text().strip() for rule in [*a, *b, "alone"]] == ["1"] * 5 + ["2"] * 5 + [
        "0"
    ]
    for rule in a + b:
        wait_for(lambda rule=rule: place.attempts(rule), f"{rule} is accounted")  # type: ignore[misc]
        (attempt,) = place.attempts(rule)
        assert attempt.partition == ("a100" if rule in a else "v100")
    assert not list((place.ledger.parent / "jobs").iterdir())
    assert not list((place.ledger.parent / "batches").iterdir())


def test_one_task_is_cancelled_or_fails_and_the_others_go_on(place: Place) -> None:
    place.rule("good", "true")
    place.rule("fails", "echo the reason; exit 3")
    place.rule("memory", "head -c 300M /dev/zero | tail -n 1 | wc -c")
    place.rule("running", UNTIL_GO)
    place.rule("other", UNTIL_GO)
    driver = place.start(ARRAYS)
    place.wait_until_begun("running", "other", "memory", "fails")
    assert len(arrays_of(place)) == 1
    running = driver.wait_until_said(rf"{place.name}running: submitted as SLURM job (\d+_\d+)")[1]
    subprocess.run(["scancel", running], check=True)
    place.wait_until_over("running")
    place.go()
    ended = driver.wait()
    assert ended.failed == {"fails", "memory", "running"}
    assert f"SLURM job {running}: SLURM state CANCELLED by root (uid 0)" in ended.message("running")
    assert "the command ended with status 3" in ended.message("fails")
    assert "SLURM state OUT_OF_MEMORY" in ended.message("memory")
    again = place.snakemake(ARRAYS)
    assert again.failed == {"fails", "memory"}
    assert {rule: len(place.begun(rule)) for rule in ("good", "other", "running", "fails")} == {
        "good": 1, "other": 1, "running": 2, "fails": 2,
    }  # fmt: skip


def test_task_that_was_cancelled_in_the_queue_leaves_no_trace_in_slurm_and_is_told(place: Place) -> None:
    place.rule("gone", "true", **PENDING)
    place.rule("stays", "true", **PENDING)
    driver = place.start(ARRAYS)
    gone = driver.wait_until_said(rf"{place.name}gone: submitted as SLURM job (\d+_\d+)")[1]
    subprocess.run(["scancel", gone], check=True)
    driver.wait_until_said(f"SLURM job {gone}: SLURM state CANCELLED, reason: it was cancelled in the queue")
    stays = driver.wait_until_said(rf"{place.name}stays: submitted as SLURM job (\d+_\d+)")[1]
    subprocess.run(["scontrol", "update", f"JobId={stays}", "StartTime=now"], check=True)
    ended = driver.wait()
    assert ended.failed == {"gone"}
    assert place.begun("stays")


def test_killed_driver_of_an_array_is_taken_over_from(place: Place) -> None:
    """With its tasks at work, over, failed, and its id noted or not."""
    for rule, command in {"slow": UNTIL_GO, "quick": "true", "fails_once": "mkdir tried && exit 3 || true"}.items():
        place.rule(rule, command)
    driver = place.start(ARRAYS)
    place.wait_until_begun("slow", "quick", "fails_once")
    driver.kill()
    place.edit_ledger([event for event in place.events() if event["event"] != "submitted"])
    again = place.start(ARRAYS)
    again.wait_until_said(rf"{place.name}slow: goes on as SLURM job \d+_\d+")
    place.go()
    ended = again.wait()
    assert ended.status == 0, ended.output
    assert {rule: len(place.begun(rule)) for rule in ("slow", "quick", "fails_once")} == {
        "slow": 1, "quick": 1, "fails_once": 2,
    }  # fmt: skip


def test_array_is_no_larger_than_allowed(place: Place) -> None:
    for number in range(7):
        place.rule(f"job{number}", "true")
    ended = place.snakemake("--submitit-array-limit=3")
    assert ended.status == 0, ended.output
    assert sorted(map(len, arrays_of(place).values())) == [1, 3, 3]
