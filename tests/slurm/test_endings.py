"""However SLURM ends a job: the job's own word, SLURM's and `after_kill` make one ending of it, with its reason."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, attempts, wait_for
from tests.slurm.place import EAT_300_MB, PENDING, UNTIL_GO, Driver, Ended, Place

pytestmark = pytest.mark.slurm

MAKE_RESULT = """
name = given["rule"]
pathlib.Path("killed").mkdir(exist_ok=True)
pathlib.Path("killed", name).write_text(json.dumps(given))
if name == "makes_nothing":
    print("all is well")
elif name == "hook_fails":
    sys.exit("there is nothing to be made of it")
else:
    pathlib.Path(given["output"][0]).write_text("killed")
    print("noted")
"""
OUT_OF_MEMORY = f"echo before; {EAT_300_MB}"
ON_V100: dict[str, Any] = {"slurm_partition": "v100"}
"""Where no test of this file stops a node."""


class Background:
    """A place in which Snakemake began when the first test of this file did: a time limit takes a minute and more."""

    def __init__(self, place: Place, *arguments: str) -> None:
        self.place = place
        self.driver: Driver = place.start(*arguments)
        self._ended: Ended | None = None

    @property
    def ended(self) -> Ended:
        """How it ended; waited for by the first test that asks."""
        self._ended = self._ended or self.driver.wait()
        return self._ended


@pytest.fixture(scope="module")
def started(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Background, Background]]:
    plain = Place(tmp_path_factory.mktemp("plain"))
    plain.rule("good", "true", **ON_V100)
    plain.rule("fails", "echo the last words; exit 3", **ON_V100)
    plain.rule("signalled", "kill -SEGV $$", **ON_V100)
    plain.rule("script_killed", "kill -KILL $PPID; sleep 600", **ON_V100)
    plain.rule("out_of_memory", OUT_OF_MEMORY, **ON_V100)
    plain.rule("child_out_of_memory", f"({EAT_300_MB}) || echo a child less", **ON_V100)
    plain.rule("step_out_of_memory", f"srun --ntasks=1 bash -c '{EAT_300_MB}; exit 7' || exit 5", mem_mb=150, **ON_V100)
    plain.rule("timeout", "sleep 600", **ON_V100 | {"runtime": 1})
    plain.rule("ends_well_on_term", "trap 'exit 0' TERM; echo done > {output}; sleep 600 & wait", makes=["term.out"],
               **ON_V100 | {"runtime": 1})  # fmt: skip
    plain.rule("cancelled", UNTIL_GO, **ON_V100)
    plain.rule("cancelled_pending", "true", **PENDING, **ON_V100)
    plain.rule("requeued", UNTIL_GO, **ON_V100)

    hooked = Place(tmp_path_factory.mktemp("hooked"))
    for rule in ("out_of_memory", "makes_nothing", "hook_fails"):
        hooked.rule(rule, OUT_OF_MEMORY, **ON_V100)
    hooked.rule("timeout", "sleep 600", **ON_V100 | {"runtime": 1})
    hooked.rule("fails", "exit 3", **ON_V100)

    yield (
        Background(plain),
        Background(hooked, "--submitit-after-kill", hooked.hook("after_kill.py", MAKE_RESULT)),
    )
    for place in (plain, hooked):
        place.leave()
        cluster.clear(place.folder)
    cluster.mend()


@pytest.fixture(autouse=True)
def plain(started: tuple[Background, Background]) -> Background:
    """Jobs of a driver without hooks."""
    return started[0]


@pytest.fixture
def hooked(started: tuple[Background, Background]) -> Background:
    """Jobs of a driver with `after_kill`."""
    return started[1]


@pytest.fixture
def given(hooked: Background) -> Any:
    """What `after_kill` was given of the job of a rule."""

    def read(rule: str) -> dict[str, Any]:
        assert hooked.ended
        given: dict[str, Any] = json.loads(hooked.place.path(f"killed/{rule}").read_text(encoding="utf-8"))
        return given

    return read


# --- what somebody does while they run -------------------------------------------------------------------------------


def test_cancelled_by_somebody_is_noticed_and_told(plain: Background) -> None:
    plain.place.wait_until_begun("cancelled")
    (job,) = plain.place.queued("cancelled")
    (pending,) = plain.place.queued("cancelled_pending")
    subprocess.run(["scancel", job.slurm_id, pending.slurm_id], check=True)
    plain.driver.wait_until_said(r"message: \S+-cancelled: .*state CANCELLED by root \(uid 0\), .*node v100-\d")
    plain.driver.wait_until_said(r"message: \S+-cancelled_pending: .*state CANCELLED by root \(uid 0\), .*node none")


def test_requeued_job_is_the_same_job_and_starts_at_once(plain: Background) -> None:
    plain.place.wait_until_begun("requeued")
    (slurm_id,) = plain.place.begun("requeued")
    subprocess.run(["scontrol", "requeue", slurm_id], check=True)
    plain.place.wait_until_begun("requeued", times=2)
    assert plain.place.begun("requeued") == [slurm_id, slurm_id]
    plain.place.go()
    plain.driver.wait_until_said(r"Finished jobid: \d+ \(Rule: requeued\)")


def test_lost_node_costs_one_more_run_each(place: Place, cluster: Cluster) -> None:
    """One that SLURM requeues, one that it doesn't; and both where none may be run again."""
    place.rule("requeued", UNTIL_GO)
    place.rule("failed", UNTIL_GO, slurm_extra="--no-requeue")
    driver = place.start()
    never_again = place.other("never again")
    never_again.rule("requeued", UNTIL_GO)
    never_again.rule("failed", UNTIL_GO, slurm_extra="--no-requeue")
    strict = never_again.start("--submitit-resubmit-limit=0")

    for one in (place, never_again):
        one.wait_until_begun("requeued", "failed")
    nodes = {job.node for one in (place, never_again) for rule in ("requeued", "failed") for job in one.queued(rule)}
    (node,) = nodes  # the other one takes over
    cluster.stop_node(node)
    driver.wait_until_said(
        rf"{place.name}failed: SLURM state NODE_FAIL, .*node a100-\d; submitting it again \(1 of 3\)"
    )
    driver.wait_until_said(rf"{place.name}requeued: SLURM job \d+ was requeued")
    place.wait_until_begun("requeued", "failed", times=2)
    place.go()
    ended, gave_up = driver.wait(), strict.wait()
    # Not before: what SLURM could not tell the node, to kill its jobs, it tells it now, and means those of the same id.
    cluster.start_node(node)
    assert ended.status == 0, ended.output
    first, second = place.begun("requeued")
    assert first == second
    first, second = place.begun("failed")
    assert first != second
    place.wait_until_accounted("failed", "NODE_FAIL", "COMPLETED")

    assert gave_up.failed == {"requeued", "failed"}
    assert "state NODE_FAIL, reason: " in gave_up.message("failed")
    assert "it was submitted 1 times" in gave_up.message("failed")
    assert "SLURM had requeued it more than 0 times" in gave_up.message("requeued")
    assert len(never_again.begun("requeued")) == len(never_again.begun("failed")) == 1


def test_job_that_slurm_does_not_know_is_never_a_success(place: Place) -> None:
    place.rule("lost", "true", **PENDING)
    driver = place.start()
    wait_for(lambda: place.queued("lost"), "the job is in the queue")
    driver.wait_until_said("submitted as SLURM job")
    driver.kill()
    place.edit_ledger(
        [event | {"slurm_id": "99999999"} if event["event"] == "submitted" else event for event in place.events()]
    )
    place.write("lost.out", "what an earlier call left")
    ended = place.snakemake("--submitit-lost-after-seconds=3", "--forcerun", "lost")
    assert ended.failed == {"lost"}
    assert "SLURM job 99999999 is lost: neither sacct nor squeue has known it for 3 s" in ended.message("lost")
    assert not place.begun("lost")
    assert not place.open_tokens()


# --- endings ---------------------------------------------------------------------------------------------------------


def test_completed(plain: Background) -> None:
    assert "good" not in plain.ended.failed
    assert len(plain.place.begun("good")) == 1
    assert plain.place.path("good.out").exists()


def test_each_piece_of_work_was_one_job(plain: Background, hooked: Background) -> None:
    for one in (plain, hooked):
        assert one.ended
        for path in one.place.path("begun").iterdir():
            if path.name != "requeued":
                assert len(one.place.begun(path.name)) == 1, path.name
                assert len(one.place.attempts(path.name)) == 1, path.name
        assert not one.place.open_tokens()


def test_failed_command_is_told_with_state_status_node_and_log(plain: Background) -> None:
    message = plain.ended.message("fails")
    (attempt,) = plain.place.attempts("fails")
    assert message.startswith(
        f"SLURM job {attempt.slurm_id}: SLURM state FAILED, reason: the command ended with status 3, exit code 3:0, "
        f"node {attempt.node}, log: "
    )
    log = message.split("log: ")[1].split(". For")[0]
    assert "the last words" in Path(log).read_text(encoding="utf-8")


def test_death_by_a_signal_is_told(plain: Background) -> None:
    message = plain.ended.message("signalled")
    assert "SLURM state FAILED, reason: the command ended with status 139, killed by signal 11" in message


def test_killed_batch_script_left_no_word_and_is_a_failure(plain: Background) -> None:
    message = plain.ended.message("script_killed")
    assert "SLURM state FAILED, reason: the command ended with status 137, killed by signal 9" in message
    assert not plain.place.path("script_killed.out").exists()


def test_out_of_memory_is_told_with_the_limit(plain: Background) -> None:
    message = plain.ended.message("out_of_memory")
    assert "SLURM state OUT_OF_MEMORY, reason: the job's memory limit of 100 MiB was reached" in message
    assert not plain.place.path("out_of_memory.out").exists()


def test_success_of_a_job_that_survived_the_death_of_a_child_counts(plain: Background) -> None:
    assert "child_out_of_memory" not in plain.ended.failed
    assert plain.place.path("child_out_of_memory.out").exists()
    plain.place.wait_until_accounted("child_out_of_memory", "OUT_OF_MEMORY")


def test_step_out_of_memory_explains_the_failure_of_its_job(plain: Background) -> None:
    assert "SLURM state OUT_OF_MEMORY" in plain.ended.message("step_out_of_memory")


def test_timeout_is_told_with_the_limit(plain: Background) -> None:
    assert "SLURM state TIMEOUT, reason: the job's time limit of 1 min was reached" in plain.ended.message("timeout")


def test_success_of_a_job_that_ended_well_when_its_time_was_over_counts(plain: Background) -> None:
    assert "ends_well_on_term" not in plain.ended.failed
    assert plain.place.path("term.out").exists()


def test_only_what_failed_is_told_as_failed(plain: Background) -> None:
    assert plain.ended.status == 1
    assert plain.ended.failed == {
        *("fails", "signalled", "script_killed", "out_of_memory", "step_out_of_memory", "timeout"),
        *("cancelled", "cancelled_pending"),
    }


# --- after_kill ------------------------------------------------------------------------------------------------------


def test_after_kill_makes_results_of_memory_and_time(hooked: Background) -> None:
    output = hooked.ended.output
    assert hooked.ended.failed == {"makes_nothing", "hook_fails", "fails"}
    assert "out_of_memory: OUT_OF_MEMORY, which after_kill made a result: noted" in output
    assert "timeout: TIMEOUT, which after_kill made a result: noted" in output
    assert hooked.place.path("timeout.out").read_text() == "killed"


def test_after_kill_is_told_all_of_the_job(hooked: Background, given: Any) -> None:
    job = given("out_of_memory")
    (attempt,) = attempts(hooked.place.name + "out_of_memory")
    assert isinstance(job.pop("elapsed_seconds"), int)
    assert 0 < job.pop("max_rss_mib") < 300
    log = Path(job.pop("job_log"))
    assert log.is_absolute()
    assert log.name == "log"
    assert job == {
        "rule": "out_of_memory",
        "wildcards": {},
        "input": [],
        "output": ["out_of_memory.out"],
        "log": [],
        "slurm_job_id": attempt.slurm_id,
        "state": "OUT_OF_MEMORY",
        "reason": job["reason"],
        "exit_code": "0:125",
        "node": attempt.node,
        "requested_memory_mib": 100.0,
        "time_limit_minutes": 10,
    }
    assert "the job's memory limit of 100 MiB was reached" in job["reason"]


def test_after_kill_is_told_of_the_time_limit(given: Any) -> None:
    job = given("timeout")
    assert job["state"] == "TIMEOUT"
    assert job["time_limit_minutes"] == 1
    assert job["elapsed_seconds"] >= 60


def test_after_kill_without_the_output_made_no_result(hooked: Background) -> None:
    assert "after_kill ended with 0 but did not make makes_nothing.out" in hooked.ended.output
    assert "SLURM state OUT_OF_MEMORY" in hooked.ended.message("makes_nothing")


def test_after_kill_that_fails_is_heard(hooked: Background) -> None:
    assert "after_kill ended with status 1: there is nothing to be made of it" in hooked.ended.output
    assert "SLURM state OUT_OF_MEMORY" in hooked.ended.message("hook_fails")


def test_after_kill_is_not_asked_about_what_failed_by_itself(hooked: Background) -> None:
    assert hooked.ended
    assert not hooked.place.path("killed/fails").exists()
