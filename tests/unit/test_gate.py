"""What two failures have in common, and what a budget lets through."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from snakemake_executor_plugin_submitit.gate import Gate, _signature
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


def said(number: int, text: str, node: str, **wildcards: str) -> str:
    task = make_task(number, kind="a", description={"wildcards": wildcards})
    log = f"job 23{number}_{number} on {node}, 2026-11-{10 + number}T12:00:00+00:00\n{text}"
    return _signature(task, f"FAILED, status 3\n{log}", [node])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("no module named torch on a100-1", "a100-1", "1"), ("no module named torch on v100-1", "v100-1", "2")),
        (("no driver on gpu-alpha", "gpu-alpha", "11"), ("no driver on gpu-beta", "gpu-beta", "8")),
        (("full: '/tmp/study-k3x_9aqz/torch'", "n1", "a"), ("full: '/tmp/study-0bq81_xx/torch'", "n2", "b")),
        (("can't open tmp.Ab12Cd", "n1", "a"), ("can't open tmp.zZ9yY8", "n1", "b")),
        (("runs/tiny_full-9f/run.yaml", "n1", "tiny_full-9f"), ("runs/tiny_lora-77/run.yaml", "n1", "tiny_lora-77")),
    ],
)  # fmt: skip
def test_what_differs_from_run_to_run_is_no_difference(one: tuple[str, str, str], other: tuple[str, str, str]) -> None:
    (text, node, wildcard), (also, there, another) = one, other
    assert said(1, text, node, i=wildcard) == said(2, also, there, i=another)


def test_what_differs_in_words_is_a_difference() -> None:
    assert said(1, "no module named torch", "n1", i="1") != said(2, "no module named peft", "n1", i="2")


def test_of_a_shared_job_that_began_all_was_asked_for(ledger: Ledger) -> None:
    works = [Submission(f"key{n}", f"token{n}", "", batch="batch", shared=True, gpu_hours=1.0) for n in range(4)]
    ledger.intend(works)
    ledger.submitted("batch", "71")
    (ledger.folder_of(works[0]) / "claim").write_text("71", encoding="utf-8")
    ledger.close(works[0], "failure", keep_files=False)
    again = Ledger(reopened(ledger).folder)
    for work in list(again.open.values()):
        again.close(work, "submitted again", keep_files=False)
    assert again.gpu_hours_asked == 4.0
    again.release()
