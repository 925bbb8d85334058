"""Works that ask for the same share a job, one after another: losing one loses that one alone."""

import shutil
import signal
from typing import Any

import pytest

from tests.slurm.cluster import Cluster, wait_for
from tests.slurm.place import EAT_300_MB, PENDING, UNTIL_GO, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

ARRAYS = "--submitit-array-limit=1000"
SHARED: Any = {"max_job_minutes": 40, "runtime": 10}
"""Four to a job."""


def jobs_of(place: Place, *rules: str) -> list[str]:
    """The jobs in which they began, each once."""
    return sorted({slurm_id for rule in rules for slurm_id in place.begun(rule)})


def test_works_that_ask_for_the_same_share_jobs_as_their_time_allows(place: Place) -> None:
    for number in range(6):
        place.rule(f"job{number}", "echo $$ > pid{rule}", **SHARED)
    place.rule("other", "true", **SHARED, cpus_per_task=2)
    place.rule("alone", "true", runtime=10)
    place.rule("kind", "true", **SHARED, submit_kind="other software")
    ended = place.snakemake(ARRAYS)
    assert ended.status == 0, ended.output
    rules = [f"job{number}" for number in range(6)]
    assert len(set(jobs_of(place, "other", "alone", "kind")) - set(jobs_of(place, *rules))) == 3
    assert len(jobs_of(place, *rules)) == 2
    batches = {event["slurm_id"] for event in place.events() if event["event"] == "submitted"}
    assert len(batches) == 4  # the six are one array of two jobs
    assert not list((place.ledger.parent / "batches").iterdir())


def test_what_one_does_is_its_own(place: Place) -> None:
    """It fails, runs out of memory, is killed with its script, or takes too long: the next one begins all the same."""
    hook = place.hook("after_kill.py", 'pathlib.Path(given["output"][0]).write_text(given["state"])')
    shared: Any = {"max_job_minutes": 12, "runtime": 1, "priority": 1}
    place.rule("a_fails", "echo the reason; exit 3", **shared)
    place.rule("b_memory", EAT_300_MB, **shared)
    place.rule("c_killed", "kill -KILL $PPID; sleep 1", **shared)
    place.rule("d_slow", "trap '' TERM; while :; do sleep 1; done", **shared)  # nor does it heed SIGTERM
    place.rule("e_good", "true", **shared)
    ended = place.snakemake(ARRAYS, "--submitit-after-kill", hook)
    assert ended.failed == {"a_fails", "c_killed"}, ended.output
    assert len(jobs_of(place, "a_fails", "b_memory", "c_killed", "d_slow", "e_good")) == 1
    assert "the command ended with status 3" in ended.message("a_fails")
    assert "killed by signal 9" in ended.message("c_killed")
    assert place.path("b_memory.out").read_text() == "OUT_OF_MEMORY"
    assert place.path("d_slow.out").read_text() == "TIMEOUT"
    assert place.path("e_good.out").read_text() == "done\n"


def test_killed_driver_is_taken_over_from_inside_a_job(place: Place) -> None:
    rules = ("a", "b", "c", "d")
    for rule in rules:
        first = "if mkdir one 2> /dev/null; then echo > {output}; exit; fi"
        place.rule(rule, f"{first}; mkdir two 2> /dev/null && exit 3; {UNTIL_GO}", **SHARED)
    driver = place.start(ARRAYS)
    wait_for(lambda: sum(len(place.begun(rule)) for rule in rules) == 3, "the third one runs")
    driver.kill()
    again = place.start(ARRAYS)
    again.wait_until_said(r"goes on as SLURM job \d+")
    place.go()
    ended = again.wait()
    assert ended.status == 0, ended.output
    assert sorted(len(place.begun(rule)) for rule in rules) == [1, 1, 1, 2]


def first_and_others(place: Place, *rules: str) -> tuple[str, list[str]]:
    """Which of works that wait for `go` began first; Snakemake chooses their order."""
    wait_for(lambda: any(map(place.begun, rules)), "one of them runs")
    (first,) = (rule for rule in rules if place.begun(rule))
    return first, [rule for rule in rules if rule != first]


def test_one_that_has_changed_is_cancelled_and_the_others_go_on(place: Place) -> None:
    """Whether it has begun or not."""
    rules = ("a", "b", "c")
    for rule in rules:
        place.rule(rule, UNTIL_GO, **SHARED)
    driver = place.start(ARRAYS)
    runs, (waits, keeps) = first_and_others(place, *rules)
    driver.kill()
    (job,) = jobs_of(place, runs)
    for rule in (runs, waits):
        place.rule(rule, "echo new", **SHARED)
    again = place.start(ARRAYS)
    place.wait_until_begun(keeps)
    place.go()
    ended = again.wait()
    assert ended.status == 0, ended.output
    assert place.begun(keeps) == [job]
    assert len(place.begun(waits)) == 1
    assert place.begun(waits) != [job]
    assert [slurm_id == job for slurm_id in place.begun(runs)] == [True, False]


def test_one_that_is_resolved_before_its_turn_does_not_run(place: Place) -> None:
    rules = ("a", "b", "c")
    for rule in rules:
        place.rule(rule, UNTIL_GO, **SHARED)
    hook = place.hook(
        "before_submit.py",
        """
        if not os.path.exists("implied"):
            print("{}")
            sys.exit()
        implied = [job for job in given["jobs"] if job["rule"] == pathlib.Path("implied").read_text()]
        for job in implied:
            pathlib.Path(job["output"][0]).write_text("implied")
        print(json.dumps({job["id"]: "resolved" for job in implied}))
        """,
    )
    driver = place.start(ARRAYS, "--submitit-before-submit", hook, "--submitit-before-submit-interval=1")
    first, (implied, last) = first_and_others(place, *rules)
    place.write("implied", implied)
    driver.wait_until_said(f"{place.name}{implied}: resolved by before_submit")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert place.begun(implied) == []
    assert place.begun(last) == place.begun(first)


def test_lost_node_loses_the_work_that_ran_and_nothing_else(place: Place, cluster: Cluster) -> None:
    rules = ("a", "b", "c")
    for rule in rules:
        place.rule(rule, "mkdir first 2> /dev/null || [ -e go ] || sleep 600", **SHARED)
    driver = place.start(ARRAYS)
    wait_for(lambda: sum(len(place.begun(rule)) for rule in rules) == 2, "the second one runs")
    done = next(rule for rule in rules if place.path(f"{rule}.out").exists())
    runs = next(rule for rule in rules if place.begun(rule) and rule != done)
    node = wait_for(lambda: "".join(job.node for job in place.queued(runs)), "it has a node")
    cluster.stop_node(node)
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert {rule: len(place.begun(rule)) for rule in rules} == dict.fromkeys(rules, 1) | {runs: 2}


def test_all_are_cancelled_with_their_job(place: Place) -> None:
    rules = ("a", "b")
    for rule in rules:
        place.rule(rule, UNTIL_GO, **SHARED)
    place.rule("pending", "true", **SHARED, **PENDING)
    driver = place.start(ARRAYS)
    runs, (waits,) = first_and_others(place, *rules)
    driver.signal_all(signal.SIGINT)
    assert driver.wait().status != 0
    place.wait_until_over(runs, "pending")
    assert place.begun(waits) == []
    place.rule("pending", "true", **SHARED)
    place.go()
    ended = place.snakemake(ARRAYS)
    assert ended.status == 0, ended.output


def test_works_that_are_too_long_together_have_jobs_of_their_own(place: Place) -> None:
    """The partition gives two days."""
    for number in range(2):
        place.rule(f"job{number}", "true", max_job_minutes=5000, runtime=2000)
    ended = place.snakemake(ARRAYS)
    assert ended.status == 0, ended.output
    assert "max_job_minutes=5000 is too much, every work gets a job of its own" in ended.output
    assert len(jobs_of(place, "job0", "job1")) == 2


def test_job_whose_scripts_are_gone_is_no_success(place: Place) -> None:
    place.rule("job", "true", **PENDING)
    driver = place.start("--submitit-resubmit-limit=0")
    wait_for(lambda: place.queued("job"), "it is in the queue")
    for folder in (place.ledger.parent / "jobs").iterdir():
        shutil.rmtree(folder)
    place.release("job")
    ended = driver.wait()
    assert ended.failed == {"job"}
