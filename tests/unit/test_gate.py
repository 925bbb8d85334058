"""What two failures have in common, and what a budget lets through."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.gate import Gate
from snakemake_executor_plugin_submitit.ledger import Ledger, Submission
from snakemake_executor_plugin_submitit.settings import ExecutorSettings
from tests.unit.test_batch import make_task

LOG = "job 12_{n} on a100-{n}, 2026-01-0{n}T10:00:00+00:00\nrun{n}: step {n} 0.{n} s\n{cause}\n  log: runs/run{n}/log"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    ledger = Ledger(tmp_path / "ledger")
    yield ledger
    ledger.release()


def reopened(ledger: Ledger) -> Ledger:
    """What the next driver reads; closed again."""
    ledger.release()
    again = Ledger(ledger.folder)
    again.release()
    return again


def fail(gate: Gate, number: int, cause: str, kind: str = "a") -> str | None:
    return gate.failed(make_task(number, kind=kind), "FAILED, status 1", LOG.format(n=number, cause=cause))


def test_third_failure_that_says_the_same_stops_its_kind_and_no_other(ledger: Ledger) -> None:
    gate = Gate(ledger, ExecutorSettings())
    assert [fail(gate, number, "no module named torch") is None for number in (1, 2, 3)] == [True, True, False]
    assert "3 jobs of the kind `a` failed alike" in str(gate.why_never(make_task(4, kind="a")))
    assert gate.why_never(make_task(4, kind="b")) is None
    assert gate.why_never(make_task(4)) is None


def test_success_or_another_cause_begins_the_count_anew(ledger: Ledger) -> None:
    gate = Gate(ledger, ExecutorSettings())
    for number in (1, 2):
        fail(gate, number, "no module named torch")
    gate.succeeded(make_task(3, kind="a"))
    assert fail(gate, 4, "no module named torch") is None
    assert fail(gate, 5, "the GPU fell off the bus") is None
    assert fail(gate, 6, "no module named torch") is None
    assert gate.why_never(make_task(7, kind="a")) is None


def test_limit_of_zero_stops_nothing(ledger: Ledger) -> None:
    gate = Gate(ledger, ExecutorSettings(failure_limit=0))
    assert not any(fail(gate, number, "the same") for number in range(9))


def test_one_of_each_unproved_kind_goes_through(ledger: Ledger) -> None:
    gate = Gate(ledger, ExecutorSettings())
    new = [make_task(number, kind=kind) for number, kind in enumerate(["a", "a", "b", None, "b", None])]
    assert gate.let_through(new, []) == [new[0], new[2], new[3], new[5]]
    assert gate.let_through(new, [make_task(9, kind="a")]) == [new[2], new[3], new[5]]
    gate.succeeded(new[0])
    assert gate.let_through(new, []) == [new[0], new[1], new[2], new[3], new[5]]
    assert reopened(ledger).proved == {"a"}


def test_budget_counts_all_calls_and_gives_back_what_never_began(ledger: Ledger) -> None:
    settings = ExecutorSettings(max_gpu_hours=1.0)
    tasks = [make_task(number, num_gpus=2, minutes=10) for number in range(4)]  # a third of an hour each
    assert Gate(ledger, settings).affordable(tasks) == tasks[:3]
    submissions = [Submission(f"key{n}", f"token{n}", "", batch=f"batch{n}", gpu_hours=1 / 3) for n in range(3)]
    ledger.intend(submissions)
    assert Gate(ledger, settings).affordable(tasks) == []
    assert "asks for 0.33 GPU-hours, and of max-gpu-hours=1 1.00" in str(Gate(ledger, settings).why_never(tasks[0]))
    (ledger.folder_of(submissions[0]) / "claim").write_text("7")
    for submission in submissions[:2]:
        ledger.close(submission, "over", keep_files=False)
    again = reopened(ledger)
    assert again.gpu_hours_asked == pytest.approx(2 / 3)
    assert Gate(again, settings).affordable(tasks) == tasks[:1]
    assert reopened(again).gpu_hours_asked == pytest.approx(2 / 3)
    assert Gate(again, ExecutorSettings()).affordable(tasks) == tasks


def test_failures_count_over_the_calls_of_a_crontab(ledger: Ledger) -> None:
    unattended = ExecutorSettings(detach="when-submitted")
    for number in (1, 2):
        assert fail(Gate(ledger, unattended), number, "no module named torch") is None
    again = Ledger(reopened(ledger).folder)
    assert "failed alike" in str(fail(Gate(again, unattended), 3, "no module named torch"))
    stopped = str(Gate(again, unattended).why_never(make_task(4, kind="a")))
    assert "call once without --submitit-detach when-submitted" in stopped
    # Somebody who calls by hand has seen it.
    assert Gate(again, ExecutorSettings()).why_never(make_task(4, kind="a")) is None
    assert Gate(again, unattended).why_never(make_task(4, kind="a")) is None
    again.release()


def test_a_work_that_always_fails_alike_is_left_and_its_kind_goes_on(ledger: Ledger) -> None:
    unattended = ExecutorSettings(detach="when-submitted")
    for _ in range(3):
        assert fail(Gate(ledger, unattended), 1, "no such option") is None
    gate = Gate(ledger, unattended)
    assert "it failed 3 times alike" in str(gate.why_never(make_task(1, kind="a")))
    assert gate.why_never(make_task(2, kind="a")) is None


def test_failures_are_kept_while_jobs_of_the_call_before_are_left(ledger: Ledger) -> None:
    ledger.intend([Submission("key", "token", "digest", batch="batch")])
    for number in (1, 2):
        fail(Gate(ledger, ExecutorSettings()), number, "no module named torch")
    assert "failed alike" in str(fail(Gate(ledger, ExecutorSettings()), 3, "no module named torch"))
