"""What SLURM prints becomes states, sizes and words; the rows and messages here are real ones of SLURM 22.05."""

import dataclasses
from collections.abc import Sequence

import pytest

from snakemake_executor_plugin_submitit.slurm import ACTIVE, KILLED, NODE_LOST, TRANSIENT, JobStatus, parse_accounting

FIELDS = (
    "JobID",
    "JobIDRaw",
    "State",
    "ExitCode",
    "Reason",
    "NodeList",
    "ElapsedRaw",
    "ReqMem",
    "MaxRSS",
    "TimelimitRaw",
)
"""Of `sacct --parsable2`."""

REFUSALS = """\
sbatch: error: invalid partition specified: nosuch
sbatch: error: Batch job submission failed: Invalid partition name specified
sbatch: error: Batch job submission failed: Requested node configuration is not available
sbatch: error: Batch job submission failed: Invalid account or account/partition combination specified
sbatch: error: Batch job submission failed: Invalid qos specification
sbatch: error: Batch job submission failed: Requested time limit is invalid (missing or exceeds some limit)
sbatch: error: Memory specification can not be satisfied
sbatch: error: Batch job submission failed: Invalid generic resource (gres) specification
sbatch: error: Invalid generic resource (gres) specification
sbatch: error: Batch job submission failed: Invalid feature specification
sbatch: error: Batch job submission failed: Invalid node name specified
sbatch: error: Batch job submission failed: Requested reservation is invalid
sbatch: error: Batch job submission failed: Invalid license specification
sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size and/or \
time limits)
sbatch: error: Batch job submission failed: More processors requested than permitted
sbatch: error: Batch job submission failed: Job dependency problem
sbatch: error: Batch job submission failed: User's group not permitted to use this partition
sbatch: error: Batch job submission failed: Access/permission denied
sbatch: error: No cluster 'nope' known by database.
sbatch: error: Invalid --time specification
sbatch: error: Invalid --mem specification
sbatch: unrecognized option '--foo'
slurm_load_jobs error: Invalid job id specified
"""
"""Nothing that time mends."""

BUSY = """\
sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect failure)
slurm_load_jobs error: Unable to contact slurm controller (connect failure)
scancel: error: Kill job error on job id 1: Unable to contact slurm controller (connect failure)
sbatch: error: Batch job submission failed: Unable to contact slurm controller (receive failure)
sbatch: error: Batch job submission failed: Unable to contact slurm controller (shutdown failure)
sbatch: error: Batch job submission failed: Socket timed out on send/recv operation
slurm_load_jobs error: Socket timed out on send/recv operation
sbatch: error: Batch job submission failed: Resource temporarily unavailable
sbatch: error: Slurm temporarily unable to accept job, sleeping and retrying
sbatch: error: Batch job submission failed: Unable to create job record, try again
sbatch: error: Batch job submission failed: Zero Bytes were transmitted or received
sbatch: error: Batch job submission failed: Unexpected message received
sbatch: error: Batch job submission failed: Slurm backup controller in standby mode
sbatch: error: Batch job submission failed: Controller is in standby mode, try a different controller
sbatch: error: Batch job submission failed: Protocol authentication error
sbatch: error: Munge encode failed: Failed to access "/run/munge/munge.socket.2": No such file or directory
sbatch: error: get_addr_info: getaddrinfo() failed: Temporary failure in name resolution
sbatch: error: Unable to establish control machine address
sacct: error: slurm_persist_conn_open_without_init: failed to open persistent connection to host:localhost:6819: \
Connection refused
sacct: error: Sending PersistInit msg: Connection refused
sacct: error: Problem talking to the database: Connection refused
sacct: error: slurmdbd: Unable to connect to database
sbatch: error: connect: Connection timed out
sbatch: error: connect: No route to host
sbatch timed out after 120 s
"""
"""A SLURM that is restarting, busy or out of reach."""


def status(*rows: str) -> JobStatus:
    """Of the one job in rows of `sacct --parsable2`."""
    (only,) = parse(*rows, ids=[rows[0].split("|")[0].split(".")[0]]).values()
    return only


def parse(*rows: str, ids: Sequence[str]) -> dict[str, JobStatus]:
    """Rows begin with the job's id; here it is its number, too, as outside of arrays."""
    return parse_accounting((dict(zip(FIELDS, row.split("|"), strict=True)) for row in map(numbered, rows)), ids)


def numbered(row: str) -> str:
    slurm_id, _, rest = row.partition("|")
    return f"{slurm_id}|{slurm_id}|{rest}"


# --- rows ------------------------------------------------------------------------------------------------------------


def test_all_that_a_row_holds_is_read() -> None:
    assert status(
        "38|FAILED|11:0|None|v100-1|7|100M||10",
        "38.batch|FAILED|11:0||v100-1|7||1100K|",
        "38.extern|COMPLETED|0:0||v100-1|7||2048K|",
    ) == JobStatus(
        slurm_id="38",
        state="FAILED",
        exit_code="11:0",
        node="v100-1",
        elapsed_seconds=7,
        requested_memory_mib=100.0,
        max_rss_mib=2.0,
        time_limit_minutes=10,
        number="38",
    )


def test_rows_belong_to_their_jobs() -> None:
    rows = (
        "55|COMPLETED|0:0|None|a100-1|0|100M||10",
        "55.batch|COMPLETED|0:0||a100-1|0||1100K|",
        "5|RUNNING|0:0|None|a100-2|2|100M||10",
        "5.0|RUNNING|0:0||a100-2|2|||",
    )
    parsed = parse(*rows, ids=["5", "55", "6"])
    assert {slurm_id: one.state for slurm_id, one in parsed.items()} == {"55": "COMPLETED", "5": "RUNNING"}
    assert parse_accounting([], ["5"]) == {}


@pytest.mark.parametrize(
    ("waiting", "indices"),
    [("12_[0-5]", "012345"), ("12_[0-1,4-5]", "0145"), ("12_[3]", "3"), ("12_[2-4%2]", "234"),
     ("12_[0-1,...]", "0123459"), ("12_[0-4:2]", "01234"), ("1_[0-5]", "")],
)  # fmt: skip
def test_tasks_of_an_array_wait_in_one_row(waiting: str, indices: str) -> None:
    ids = [f"12_{index}" for index in (0, 1, 2, 3, 4, 5, 9)]
    parsed = parse_accounting([dict.fromkeys(FIELDS, "") | {"JobID": waiting, "State": "PENDING"}], ids)
    assert sorted(parsed) == [f"12_{index}" for index in indices if f"12_{index}" in ids]
    assert {one.state for one in parsed.values()} <= {"PENDING"}


def test_task_of_an_array_has_a_number_of_its_own_once_it_has_begun() -> None:
    rows = ("2_3|3|RUNNING|0:0|None|a100-1|2|100M||10", "2_3.batch|3.batch|RUNNING|0:0||a100-1|2|||",
            "2_[0-2]|2|PENDING|0:0|BeginTime|None assigned|0|100M||10")  # fmt: skip
    parsed = parse_accounting((dict(zip(FIELDS, row.split("|"), strict=True)) for row in rows), ["2_3", "2_1", "2_9"])
    assert {one.slurm_id: (one.state, one.number) for one in parsed.values()} == {
        "2_3": ("RUNNING", "3"), "2_1": ("PENDING", None),
    }  # fmt: skip


def test_step_out_of_memory_explains_the_failure_of_its_job() -> None:
    found = status(
        "119|FAILED|5:0|None|a100-1|0|150M||5",
        "119.batch|FAILED|5:0||a100-1|0||1096K|",
        "119.0|COMPLETED|0:0||a100-1|0||816K|",
        "119.1|OUT_OF_MEMORY|0:125||a100-1|0||2916K|",
    )
    assert (found.state, found.exit_code) == ("OUT_OF_MEMORY", "0:125")


@pytest.mark.parametrize(
    ("rows", "state"),
    [
        (("57|TIMEOUT|0:0|None|a100-1|84|3G||1", "57.batch|FAILED|15:0||a100-1|87||725528K|"), "TIMEOUT"),
        (("16|TIMEOUT|0:0|None|v100-1|60|100M||1", "16.batch|CANCELLED|0:15||v100-1|61||3180K|"), "TIMEOUT"),
        (("52|NODE_FAIL|0:0|None|a100-1|18|100M||10", "52.batch|CANCELLED|||a100-1|18|||"), "NODE_FAIL"),
        (("47|FAILED|0:9|None|v100-1|1|100M||10", "47.batch|CANCELLED|0:9||v100-1|1||3180K|"), "FAILED"),
        (("31|OUT_OF_MEMORY|0:125|None|a100-1|0|30M||11", "31.batch|OUT_OF_MEMORY|0:125||a100-1|0||1104K|"),
         "OUT_OF_MEMORY"),
    ],
)  # fmt: skip
def test_worst_row_gives_the_state(rows: tuple[str, ...], state: str) -> None:
    assert status(*rows).state == state


def test_failed_step_of_a_job_that_completed_is_nothing() -> None:
    found = status(
        "70|COMPLETED|0:0|None|a100-1|1|100M||10",
        "70.batch|COMPLETED|0:0||a100-1|1||1100K|",
        "70.0|FAILED|7:0||a100-1|1||800K|",
    )
    assert (found.state, found.exit_code) == ("COMPLETED", "0:0")


def test_step_that_is_over_does_not_end_a_job_that_runs() -> None:
    assert status("60|RUNNING|0:0|None|a100-1|2|200M||5", "60.0|OUT_OF_MEMORY|0:125||a100-1|1||80K|").state == "RUNNING"


@pytest.mark.parametrize("state", ["PENDING", "RUNNING", "REQUEUED", "SUSPENDED", "COMPLETING"])
def test_active_states_are_active(state: str) -> None:
    assert status(f"120|{state}|0:0|None|a100-1|2|200M||5").is_active


@pytest.mark.parametrize("state", ["COMPLETED", "CANCELLED", "FAILED", *sorted(KILLED), *sorted(NODE_LOST)])
def test_final_states_are_not_active(state: str) -> None:
    assert not status(f"120|{state}|0:0|None|a100-1|2|200M||5").is_active
    assert state not in ACTIVE


def test_pending_job_has_a_reason_and_no_node() -> None:
    found = status("121|PENDING|0:0|JobHeldUser|None assigned|0|500M||5")
    assert (found.state, found.reason, found.node, found.is_whole) == ("PENDING", "JobHeldUser", None, True)


def test_why_a_job_once_waited_is_not_why_it_ended() -> None:
    found = status("53|FAILED|3:0|BeginTime|a100-1|0|100M||10", "53.batch|FAILED|3:0||a100-1|0||3172K|")
    assert found.reason is None
    assert "BeginTime" not in found.explanation()


def test_requeued_job_is_active_again() -> None:
    assert status("120|REQUEUED|0:0|None|a100-1|5|200M||5", "120.batch|CANCELLED|0:15||a100-1|6||3144K|").is_active
    assert status("120|PENDING|0:0|BeginTime|None assigned|0|200M||5").reason == "BeginTime"


@pytest.mark.parametrize(
    "rows",
    [
        ("119|PENDING|0:0|None|a100-1|0|16?||", "119.batch|RUNNING|0:0||a100-1|0|||"),
        ("119|FAILED|5:0|None|a100-1|0|16?||", "119.1|OUT_OF_MEMORY|0:125||a100-1|0||2916K|"),
        ("119.batch|FAILED|5:0||a100-1|0||1096K|",),
    ],
)
def test_half_written_rows_are_not_whole(rows: tuple[str, ...]) -> None:
    """Accounting has the batch script before the job's sizes."""
    found = status(*rows)
    assert not found.is_whole
    assert (found.slurm_id, found.requested_memory_mib, found.time_limit_minutes) == ("119", None, None)


def test_words_that_nobody_knows_do_no_harm() -> None:
    found = status("7|VANISHED|||||||Partition_Limit")
    assert found == JobStatus("7", "VANISHED", number="7")
    assert not found.is_active
    assert status("7||||||||").state == "UNKNOWN"


# --- who cancelled it ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "by"),
    [
        ("CANCELLED", None),
        ("CANCELLED+", None),
        ("CANCELLED by 0", "root (uid 0)"),
        ("CANCELLED by 4123456789", "uid 4123456789"),
    ],
)
def test_cancelled_job_names_who_did_it(words: str, by: str | None) -> None:
    found = status(f"122|{words}|0:0|None|a100-1|5|500M||5", "122.0|CANCELLED|0:15||a100-1|7||1676K|")
    assert (found.state, found.by) == ("CANCELLED", by)


def test_what_the_batch_script_said_after_somebody_cancelled_it_changes_nothing() -> None:
    found = status("122|CANCELLED by 0|0:0|None|a100-1|5|500M||5", "122.batch|FAILED|3:0||a100-1|5||10464K|")
    assert found.explanation().startswith("SLURM state CANCELLED by root (uid 0), reason: somebody cancelled it")


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "mib"),
    [
        ("100M", 100.0),
        ("100Mn", 100.0),
        ("4G", 4096.0),
        ("4Gn", 4096.0),
        ("1.50G", 1536.0),
        ("2T", 2097152.0),
        ("512K", 0.5),
        ("1048576", 1.0),
        ("4Gc", None),  # for each CPU
        ("500Mc", None),
        ("16?", None),  # half written
        ("0", None),
        ("0n", None),
        ("", None),
    ],
)
def test_memory_is_mib(words: str, mib: float | None) -> None:
    found = status(f"1|RUNNING|0:0|None|a100-1|1|{words}||5", f"1.batch|RUNNING|0:0||a100-1|1||{words}|")
    assert (found.requested_memory_mib, found.max_rss_mib) == (mib, mib)


def test_largest_resident_size_of_all_steps_counts() -> None:
    steps = ("1.batch|FAILED|1:0||a100-1|1||3180K|", "1.0|FAILED|1:0||a100-1|1||96M|", "1.1|FAILED|1:0||a100-1|1|||")
    assert status("1|FAILED|1:0|None|a100-1|1|100M||5", *steps).max_rss_mib == 96.0


@pytest.mark.parametrize("words", ["UNLIMITED", "Partition_Limit"])
def test_time_without_limit_is_unknown(words: str) -> None:
    found = status(f"1|RUNNING|0:0|None|a100-1|1|100M||{words}")
    assert found.time_limit_minutes is None
    assert found.is_whole


# --- explanations ----------------------------------------------------------------------------------------------------

OVER = JobStatus(
    "9", "", exit_code="0:0", node="a100-1", requested_memory_mib=100.0, max_rss_mib=98.5, time_limit_minutes=10
)
END = ", exit code 0:0, node a100-1"


@pytest.mark.parametrize(
    ("state", "words"),
    [
        ("CANCELLED", "reason: somebody cancelled it"),
        ("DEADLINE", "reason: its deadline passed"),
        ("TIMEOUT", "reason: the job's time limit of 10 min was reached"),
        ("BOOT_FAIL", "reason: its node did not boot"),
        ("PREEMPTED", "reason: a job of higher priority took its place"),
        ("NODE_FAIL", "reason: its node failed"),
        ("OUT_OF_MEMORY",
         "reason: the job's memory limit of 100 MiB was reached (largest resident size seen: 98 MiB)"),
        ("FAILED", "reason: the command ended with status 0"),
        ("VANISHED", "reason: SLURM gives none"),
    ],
)  # fmt: skip
def test_explanation_of_each_state(state: str, words: str) -> None:
    assert dataclasses.replace(OVER, state=state).explanation() == f"SLURM state {state}, {words}{END}"


def test_explanation_names_the_reason_that_slurm_gives() -> None:
    found = dataclasses.replace(OVER, state="CANCELLED", reason="JobHeldUser", by="root (uid 0)")
    assert found.explanation() == f"SLURM state CANCELLED by root (uid 0), reason: JobHeldUser{END}"


def test_explanation_without_sizes_says_what_it_knows() -> None:
    words = "reason: the job's memory limit was reached, exit code unknown, node none"
    assert JobStatus("9", "OUT_OF_MEMORY").explanation() == f"SLURM state OUT_OF_MEMORY, {words}"
    assert "reason: the job's time limit was reached," in JobStatus("9", "TIMEOUT").explanation()


@pytest.mark.parametrize(
    ("exit_code", "reason", "command_status", "words"),
    [
        ("3:0", None, None, "the command ended with status 3"),
        ("3:0", "NonZeroExitCode", None, "the command ended with status 3"),
        ("0:9", "JobLaunchFailure", None, "killed by signal 9 (JobLaunchFailure)"),
        ("11:0", None, 139, "the command ended with status 139, killed by signal 11"),
        ("3:0", "RaisedSignal:53", 3, "the command ended with status 3 (RaisedSignal:53)"),
    ],
)
def test_explanation_of_a_failure_has_status_and_signal(
    exit_code: str, reason: str | None, command_status: int | None, words: str
) -> None:
    found = dataclasses.replace(OVER, state="FAILED", exit_code=exit_code, reason=reason)
    expected = f"SLURM state FAILED, reason: {words}, exit code {exit_code}, node a100-1"
    assert found.explanation(command_status) == expected


# --- messages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("message", BUSY.splitlines())
def test_slurm_out_of_reach_may_be_asked_again(message: str) -> None:
    assert TRANSIENT.search(message)


@pytest.mark.parametrize("message", REFUSALS.splitlines())
def test_refusal_is_final(message: str) -> None:
    assert not TRANSIENT.search(message)
