"""What is not submitted, or not yet: canaries, works that fail alike, a budget, unfit nodes, limits of the cluster."""

import re
from typing import Any

import pytest

from tests.slurm.cluster import queue, set_limit, wait_for
from tests.slurm.place import EAT_300_MB, UNTIL_GO, Place

pytestmark = pytest.mark.slurm

ARRAYS = "--submitit-array-limit=1000"
GPU_HOUR: Any = {"gres": "gpu:a100:2", "runtime": 30}


def submitted(place: Place) -> list[str]:
    """Rules in the order in which they were asked for."""
    events = place.events() if place.ledger.exists() else []
    return [event["name"].removeprefix(place.name) for event in events if event["event"] == "intent"]


# --- canaries --------------------------------------------------------------------------------------------------------


def test_one_of_each_kind_is_a_success_before_the_others_are_submitted(place: Place) -> None:
    for number in range(3):
        place.rule(f"a{number}", UNTIL_GO, submit_kind="a")
        place.rule(f"b{number}", UNTIL_GO, submit_kind="b")
    place.rule("none", UNTIL_GO)
    driver = place.start(ARRAYS)
    wait_for(lambda: len(submitted(place)) == 3, "two canaries, and what has no kind")
    assert sorted(rule[0] for rule in submitted(place)) == ["a", "b", "n"]
    driver.kill()
    # The next call waits for the same ones.
    driver = place.start(ARRAYS)
    driver.wait_until_said("goes on as SLURM job")
    place.go()
    assert driver.wait().status == 0
    assert sorted(submitted(place)) == ["a0", "a1", "a2", "b0", "b1", "b2", "none"]
    # And later ones none: each kind is known.
    place.path("go").unlink()
    for number in range(3, 5):
        place.rule(f"a{number}", UNTIL_GO, submit_kind="a")
    driver = place.start(ARRAYS)
    place.wait_until_begun("a3", "a4")
    place.go()
    assert driver.wait().status == 0


@pytest.mark.long
def test_failing_canary_is_followed_by_another_one_until_three_have_failed_alike(place: Place) -> None:
    for number in range(6):
        place.rule(
            f"job{number}", f"echo working for {number} s; echo no module named torch >&2; exit 3", submit_kind="a"
        )
    place.rule("other", "true", submit_kind="b")
    ended = place.snakemake(ARRAYS)
    assert len(submitted(place)) == 4
    assert ended.failed == {f"job{number}" for number in range(6)}
    assert place.path("other.out").exists()
    refused = [rule for rule in ended.failed if not place.begun(rule)]
    assert len(refused) == 3
    message = ended.message(refused[0])
    assert message.startswith("not submitted: 3 jobs of the kind `a` failed alike, and none was a success meanwhile (")
    assert "FAILED, status 3" in message
    # What was mended is tried again.
    for number in range(6):
        place.rule(f"job{number}", "true", submit_kind="a")
    assert place.snakemake(ARRAYS).status == 0


def test_failures_that_differ_stop_nobody(place: Place) -> None:
    for number, why in enumerate(["one thing", "another thing", "something else", "one thing", "another thing"]):
        place.rule(f"job{number}", f"echo {why}; exit 3", submit_kind="a")
    place.snakemake(ARRAYS, "--submitit-no-canary")
    assert len(submitted(place)) == 5


@pytest.mark.long
def test_result_that_was_made_of_a_kill_proves_nothing(place: Place) -> None:
    """Nor does a success that says so itself; three alike stop their kind all the same."""
    hook = place.hook("after_kill.py", 'pathlib.Path(given["output"][0]).write_text("killed")')
    for number in range(5):
        place.rule(f"killed{number}", EAT_300_MB, submit_kind="killed")
        place.rule(f"humble{number}", 'touch "$UNPROVED_FILE"', submit_kind="humble")
    ended = place.snakemake(ARRAYS, "--submitit-after-kill", hook)
    assert len([rule for rule in submitted(place) if rule.startswith("killed")]) == 3
    assert ended.failed == {f"killed{number}" for number in range(5) if not place.begun(f"killed{number}")}
    # One after the other, each in a job of its own.
    assert len({event["slurm_id"] for event in place.events() if event["event"] == "submitted"}) == 3 + 5


# --- budget ----------------------------------------------------------------------------------------------------------


def test_budget_is_never_exceeded_in_all_calls_together(place: Place) -> None:
    for number in range(5):
        place.rule(f"job{number}", "true", **GPU_HOUR)
    place.rule("cpu", "true", runtime=600)
    ended = place.snakemake(ARRAYS, "--submitit-max-gpu-hours=3")
    assert len(ended.failed) == 2
    assert len(submitted(place)) == 4
    message = ended.message(sorted(ended.failed)[0])
    assert "not submitted: it asks for 1.00 GPU-hours, and of max-gpu-hours=3 3.00 were asked for already" in message
    assert place.snakemake(ARRAYS, "--submitit-max-gpu-hours=4").failed < ended.failed
    assert sum(bool(place.begun(f"job{number}")) for number in range(5)) == 4


def test_pending_jobs_beyond_a_budget_that_is_given_later_are_taken_back(place: Place) -> None:
    for number in range(4):
        place.rule(f"job{number}", "true", **GPU_HOUR, slurm_extra="--begin=now+1hour")
    assert place.snakemake(ARRAYS, "--submitit-detach=when-submitted").status == 75
    ended = place.snakemake(ARRAYS, "--submitit-detach=when-submitted", "--submitit-max-gpu-hours=2", "--keep-going")
    assert ended.output.count("was more than max-gpu-hours allows") == 2
    assert len(ended.failed) == 2
    assert ended.output.count("not submitted: it asks for 1.00 GPU-hours, and of max-gpu-hours=2 2.00 were asked") == 2
    assert len(place.open_tokens()) == 2
    (array,) = [job for job in queue() if job.workdir == place.folder]  # of the other two
    assert array.state == "PENDING"


def test_whole_nodes_can_not_be_counted(place: Place) -> None:
    place.rule("whole", "true", **GPU_HOUR, slurm_extra="--exclusive")
    ended = place.snakemake("--submitit-max-gpu-hours=100")
    assert "slurm_extra holds --exclusive, and max-gpu-hours is to be kept to" in ended.output
    assert not place.begun("whole")


def test_what_never_began_is_given_back(place: Place) -> None:
    place.rule("pending", "true", **GPU_HOUR, slurm_extra="--begin=now+1hour")
    driver = place.start("--submitit-max-gpu-hours=1")
    wait_for(lambda: place.queued("pending"), "it is in the queue")
    driver.kill()
    place.rule("pending", "true", **GPU_HOUR)
    assert place.snakemake("--submitit-max-gpu-hours=1").status == 0


def test_job_without_a_time_limit_can_not_be_counted(place: Place) -> None:
    place.rule("endless", "true", gres="gpu:a100:1", runtime=None)
    ended = place.snakemake("--submitit-max-gpu-hours=1", "--default-resources", "mem_mb=100")
    assert "can't be kept to by a job without a time limit; set its `runtime`" in ended.message("endless")


# --- unfit nodes -----------------------------------------------------------------------------------------------------

UNFIT = 'if [ "$SLURMD_NODENAME" = {node} ]; then echo not the GPU that was asked for; exit 69; fi'


def test_unfit_node_is_excluded_and_the_job_submitted_again(place: Place) -> None:
    for number in range(4):
        place.rule(f"job{number}", UNFIT.format(node="v100-1"), slurm_partition="v100", unfit_node_status=69)
    ended = place.snakemake(ARRAYS)
    assert ended.status == 0, ended.output
    assert "node v100-1 is not what was asked for (status 69); submitting it again (1 of 3)" in ended.output
    assert all(len(place.begun(f"job{number}")) <= 2 for number in range(4))


def test_unfit_nodes_are_known_to_the_next_call_and_to_nobody_else(place: Place) -> None:
    asks: Any = {"slurm_partition": "mixed", "gres": "gpu:1", "unfit_node_status": 69}
    place.rule("a100", UNFIT.format(node="v100-2"), submit_kind="a100", **asks)
    assert place.snakemake().status == 0
    place.rule("again", UNFIT.format(node="v100-2"), submit_kind="a100", **asks)
    place.rule("v100", UNFIT.format(node="a100-2"), submit_kind="v100", **asks)
    ended = place.snakemake()
    assert ended.status == 0, ended.output
    assert [len(place.begun(rule)) for rule in ("a100", "again", "v100")] == [2, 1, 1]


def test_work_names_the_nodes_itself_and_names_that_are_none_are_left_out(place: Place) -> None:
    names = 'if mkdir first 2> /dev/null; then echo nowhere "$SLURMD_NODENAME" > "$UNFIT_NODES_FILE"; exit 69; fi'
    place.rule("job", f"{names}; echo $SLURMD_NODENAME > node", slurm_partition="v100", unfit_node_status=69)
    ended = place.snakemake()
    assert ended.status == 0, ended.output
    (unfit,) = re.findall(r"node (\S+) is not what was asked for \(status 69\); submitting it again", ended.output)
    assert {unfit, place.path("node").read_text().strip()} == {"v100-1", "v100-2"}


def test_job_fails_when_no_node_is_fit(place: Place) -> None:
    place.rule("job", "exit 69", slurm_partition="v100", unfit_node_status=69, slurm_extra="--exclude=v100-2")
    ended = place.snakemake()
    assert "Requested node configuration is not available" in ended.message("job")
    assert "(without the nodes v100-1, which were not what was asked for)" in ended.message("job")


def test_status_is_a_failure_where_it_does_not_mean_the_node(place: Place) -> None:
    place.rule("job", "exit 69")
    assert "the command ended with status 69" in place.snakemake().message("job")


# --- limits ----------------------------------------------------------------------------------------------------------


def test_twenty_jobs_finish_where_three_may_be_submitted(account: str, place: Place) -> None:
    set_limit(account, "MaxSubmitJobs=3")
    for number in range(20):
        place.rule(f"job{number}", "true", slurm_account=account)
    ended = place.snakemake(ARRAYS)
    assert ended.status == 0, ended.output
    assert f"user root in account {account} allows 3 jobs at a time (MaxSubmitJobs)" in ended.output
    assert all(len(place.begun(f"job{number}")) == 1 for number in range(20))


def test_limit_that_never_passes_fails_at_once_beside_one_that_does(account: str, place: Place) -> None:
    """SLURM lets both wait, for `AssocGrpGRES` and `AssocMaxWallDurationPerJobLimit`."""
    set_limit(account, "GrpTRES=gres/gpu=2")
    set_limit(account, "MaxWall=20")
    asks: Any = {"slurm_account": account}
    place.rule("holds", UNTIL_GO, gres="gpu:a100:2", **asks)
    driver = place.start("--until", "holds")
    place.wait_until_begun("holds")
    driver.kill()
    place.rule("passes", "true", gres="gpu:a100:1", **asks)
    place.rule("too_many", "true", gres="gpu:a100:3", **asks)
    place.rule("too_long", "true", runtime=30, **asks)
    place.rule("no_account", "true", slurm_account="nobody")
    driver = place.start()
    for rule in ("too_many", "too_long", "no_account"):
        driver.wait_until_said(f"message: {place.name}{rule}: ")
    assert not place.begun("passes")
    place.go()
    ended = driver.wait()
    assert ended.failed == {"too_many", "too_long", "no_account"}
    assert "will never start it: SLURM state PENDING, reason: AssocGrpGRES" in ended.message("too_many")
    assert "allows 2 GPU(s) in all (GrpTRES), and the job asks for 3 GPU(s)" in ended.message("too_many")
    assert "allows 20 min per job (MaxWall), and the job asks for 30 min" in ended.message("too_long")
    assert "Invalid account" in ended.message("no_account")
