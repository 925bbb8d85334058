import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from rich.console import Console

from finetune_study import facts, record, status
from finetune_study.record import Failure, Record
from finetune_study.status import InQueue, Status
from finetune_study.study import Study
from tests.unit import handmade

CONFIG = handmade.study()
RUNS = handmade.runs(CONFIG)
FULL, LORA = RUNS["full", 1], RUNS["lora", 1]
NOW = 1_000_000.0


def study(root: Path, *documents: Record | Failure) -> Study:
    results = handmade.write(root / "results", *documents)
    return Study(CONFIG, results, {one.run.run_id: one for one in handmade.planned(CONFIG)})


def ledger(root: Path, *events: dict[str, Any] | str) -> Path:
    path = root / "ledger.jsonl"
    path.write_text("".join((e if isinstance(e, str) else json.dumps(e)) + "\n" for e in events), encoding="utf-8")
    return path


def intent(name: str, token: str, **more: Any) -> dict[str, Any]:
    whole = {"event": "intent", "key": f"key of {token}", "token": token, "name": name, "batch": f"batch of {token}"}
    return whole | {"place": None, "slurm_id": None} | more


def submitted(token: str, slurm_id: str, **more: Any) -> dict[str, Any]:
    return {"event": "submitted", "token": token, "slurm_id": slurm_id} | more


def closed(token: str) -> dict[str, Any]:
    return {"event": "closed", "token": token, "how": "success", "began": True}


def shown(seen: Status) -> str:
    console = Console(width=200, record=True, file=None, highlight=False)
    with console.capture() as capture:
        console.print(status.render(seen, NOW), soft_wrap=True)
    return capture.get()


def narrow(seen: Status) -> str:
    """As a terminal of 80 columns shows it, without the escape sequences; printed as the command does."""
    console = Console(width=80, highlight=False, color_system=None)
    with console.capture() as capture:
        console.print(status.render(seen, NOW), soft_wrap=True)
    return capture.get()


def no_slurm(ids: Iterable[str]) -> dict[str, InQueue]:
    return {}


def test_runs_are_counted_and_hours_expected_of_what_is_left(tmp_path: Path) -> None:
    seen = status.look(study(tmp_path, handmade.completed(LORA, 1.0)), tmp_path / "none.jsonl", no_slurm)
    assert seen.counts == [("completed", 1), ("not_run", 1)]
    assert (seen.used_gpu_hours, seen.expected_gpu_hours, seen.num_left) == (0.01, 0.01, 1)
    assert seen.driver == ""
    assert "2 runs: 1 completed, 1 not run" in shown(seen)
    assert "GPU-hours: 0.0100 used by the last try of each run; of 1 run still to come: about 0.0100" in shown(seen)


def test_a_run_that_is_given_up_is_not_still_to_come(tmp_path: Path) -> None:
    found = study(tmp_path, handmade.completed(LORA, 1.0), handmade.failure(FULL, attempt=3))
    seen = status.look(found, tmp_path / "none.jsonl", no_slurm)
    assert seen.counts == [("completed", 1), ("failed", 1)]
    assert (seen.num_left, seen.num_given_up, seen.expected_gpu_hours) == (0, 1, 0)
    assert "of 0 runs still to come: about 0.00; 1 given up" in shown(seen)
    again = status.look(study(tmp_path / "again", handmade.failure(FULL, attempt=2)), tmp_path / "none.jsonl", no_slurm)
    assert (again.num_left, again.num_given_up) == (2, 0)
    assert "given up" not in shown(again)


def test_nothing_is_expected_where_nothing_is_known(tmp_path: Path) -> None:
    seen = status.look(study(tmp_path), tmp_path / "none.jsonl", no_slurm)
    assert seen.expected_gpu_hours is None
    assert "still to come: not known yet" in shown(seen)


def test_what_the_forecast_says_is_expected_of_kinds_that_were_not_measured(tmp_path: Path) -> None:
    found = study(tmp_path)
    forecast = {"plan": found.plan_digest, "runs": {i: [2.5, None] for i in found.planned}}
    found.results.root.mkdir(exist_ok=True)
    found.results.forecast.write_text(json.dumps(forecast), encoding="utf-8")
    assert status.look(found, tmp_path / "none.jsonl", no_slurm).expected_gpu_hours == 5.0


def test_a_measured_run_does_not_stand_for_another_recipe_that_has_a_forecast(tmp_path: Path) -> None:
    found = study(tmp_path, handmade.completed(LORA, 1.0))
    forecast = {"plan": found.plan_digest, "runs": {i: [2.5, None] for i in found.planned}}
    found.results.forecast.write_text(json.dumps(forecast), encoding="utf-8")
    assert status.look(found, tmp_path / "none.jsonl", no_slurm).expected_gpu_hours == 2.5


def test_of_many_failures_the_last_are_shown_and_all_are_counted(tmp_path: Path) -> None:
    seen = status.look(study(tmp_path, handmade.failure(FULL)), tmp_path / "none.jsonl", no_slurm)
    assert "failures:" not in shown(seen)
    assert "The last 1 of 12 failures:" in shown(dataclasses.replace(seen, num_failures=12))


def test_the_last_failures_come_with_cause_and_log(tmp_path: Path) -> None:
    text = shown(
        status.look(
            study(tmp_path, handmade.failure(FULL, cause="a [bold]bug", log_tail="one\ntwo")),
            tmp_path / "none.jsonl",
            no_slurm,
        )
    )
    assert f"{FULL.run_id} failed (try 1): a [bold]bug" in text
    assert "log: results/launch.log" in text
    assert "    two" in text


def test_a_log_does_nothing_to_the_terminal(tmp_path: Path) -> None:
    failed = handmade.failure(FULL).model_copy(update={"log_tail": "a\tb\n\x1b[31mred\x9b2J\x07"})
    text = shown(status.look(study(tmp_path, failed), tmp_path / "none.jsonl", no_slurm))
    assert "�[31mred�2J�" in text
    assert not {"\x1b", "\x9b", "\x07"} & {*text}


def test_jobs_come_from_the_ledger_and_closed_ones_are_gone(tmp_path: Path) -> None:
    path = ledger(
        tmp_path,
        intent("run-a", "t1", at=NOW - 3700),
        submitted("t1", "41"),
        intent("run-b", "t2"),
        submitted("t2", "42"),
        closed("t2"),
        intent("run-c", "t3"),
        {"event": "something new", "token": "t1", "and": "more"},
        '{"event": "intent", "tok',
    )
    jobs, problems = status.read_ledger(path)
    assert [(job.name, job.slurm_id) for job in jobs] == [("run-a", "41"), ("run-c", None)]
    assert problems == []
    queue = {"41": InQueue("RUNNING", "node-7", "12:00")}
    text = shown(status.look(study(tmp_path), path, lambda ids: queue))
    assert "1:01:40" in text
    assert "node-7" in text
    assert "not submitted yet" in text


def test_a_line_that_is_no_event_is_named_unless_it_is_the_last(tmp_path: Path) -> None:
    _, problems = status.read_ledger(ledger(tmp_path, "[]", intent("a", "t1")))
    assert problems == [f"{tmp_path / 'ledger.jsonl'}: no event in 1 of 2 lines, first in line 1"]


@pytest.mark.parametrize(
    ("reason", "hopeless"),
    [("Resources", False), ("Priority", False), ("QOSMaxGRESPerUser", False), ("PartitionTimeLimit", True),
     ("BadConstraints", True), ("AssocGrpGRESMinutes", True),
     ("QOSMaxGRESPerJob", True), ("AssocMaxGRESPerNode", True), ("QOSGrpBillingMinutes", True),
     ("AssocGrpCPURunMinutesLimit", False), ("launch failed requeued held", True),
     ("QOSMinGRES", True), ("QOSMinCpuNotSatisfied", True), ("QOSTimeLimit", True), ("AssociationTimeLimit", True),
     ("ReservationDeleted", True), ("user env retrieval failed requeued held", True), ("Reservation", False),
     ("QOSJobLimit", False)],
)  # fmt: skip
def test_reasons_that_never_clear_are_said_so(tmp_path: Path, reason: str, hopeless: bool) -> None:
    path = ledger(tmp_path, intent("run-a", "t1"), submitted("t1", "41"))
    text = shown(status.look(study(tmp_path), path, lambda ids: {"41": InQueue("PENDING", reason, "0:00")}))
    assert reason in text
    assert ("NEVER CLEARS BY WAITING" in text) == hopeless
    if hopeless:
        assert str(status.advice(reason)) in text


def test_of_many_works_there_are_counts_then_those_in_vain_then_the_first_others(tmp_path: Path) -> None:
    name = "llama2-70b_h100-80gbx8_s4096_b1_zero3-lora-gc-flash_r1-{:06d}"
    events = [intent(name.format(n), f"t{n}", batch="array", place=n) for n in range(3000)]
    path = ledger(tmp_path, *events, {"event": "submitted", "batch": "array", "slurm_id": "8"})
    queue = {f"8_{n}": InQueue("PENDING", "Priority", "0:00") for n in range(5, 2900)}
    queue |= {f"8_{n}": InQueue("PENDING", "PartitionTimeLimit", "0:00") for n in (0, 2950)}
    queue |= {f"8_{n}": InQueue("RUNNING", f"node-{n}", "1:00") for n in range(1, 5)}
    queue["8_2951"] = InQueue("PENDING", "ReqNodeNotAvail, UnavailableNodes:a,b", "0:00")
    text = narrow(status.look(study(tmp_path), path, lambda ids: queue))
    lines = text.splitlines()
    assert "3,000 submitted and not done:" in lines
    assert "  2,895 PENDING (Priority)" in lines
    assert "  98 not in SLURM's queue" in lines
    assert "  4 RUNNING" in lines
    assert "  1 PENDING (ReqNodeNotAvail): a node that was asked for is down or reserved" in lines
    hopeless = next(line for line in lines if line.startswith("  2 PENDING (PartitionTimeLimit): NEVER CLEARS"))
    assert "lower protocol.time_limit_minutes" in hopeless
    assert lines[-1] == "  and 2,978 more"
    listed = [lines[number + 1].split(",")[0].strip() for number, line in enumerate(lines) if "_r1-" in line]
    assert listed == ["8_0", "8_2950", *(f"8_{n}" for n in range(1, 21))]
    assert [line.strip() for line in lines if "_r1-" in line] == [
        name.format(n) for n in (0, 2950, *range(1, 21))
    ]  # whole, on lines of their own
    assert "    8_1, RUNNING, node-1, 1:00" in lines
    assert len(lines) < 100


def test_a_damaged_record_is_a_problem_and_no_end(tmp_path: Path) -> None:
    one = study(tmp_path)
    paths = one.results.run(FULL.run_id)
    paths.folder.mkdir(parents=True)
    paths.record.write_text("{")
    seen = status.look(one, tmp_path / "none.jsonl", no_slurm)
    assert seen.counts == [("not_run", 2)]
    assert "record.json is damaged" in shown(seen)


def test_what_squeue_says_is_read() -> None:
    text = "41|PENDING|(Resources)|0:00|\n42|RUNNING|a100-1|1:02:03|\n\n"
    assert status.parse_squeue(text) == {
        "41": InQueue("PENDING", "Resources", "0:00"),
        "42": InQueue("RUNNING", "a100-1", "1:02:03"),
    }


def test_a_dead_driver_is_told_from_a_live_one(tmp_path: Path) -> None:
    import os

    path = ledger(tmp_path)
    lock = tmp_path / "lock"
    lock.write_text(f"process {os.getpid()} on {os.uname().nodename}\n")
    assert status.look(study(tmp_path), path, no_slurm).driver.startswith("driver: process")
    lock.write_text(f"process 999999999 on {os.uname().nodename}\n")
    assert "is gone" in status.look(study(tmp_path), path, no_slurm).driver
    lock.write_text("process 1 on another-host\n")
    assert status.look(study(tmp_path), path, no_slurm).driver == "last driver: process 1 on another-host"


def test_the_executors_ledger_follows_the_schema(tmp_path: Path) -> None:
    """The executor writes it, the schema describes it, and this reads it: held together here."""
    from snakemake_executor_plugin_submitit.ledger import Ledger, Submission

    def work(name: str, batch: str, place: int | None = None) -> Submission:
        return Submission(f"key of {name}", f"token of {name}", "digest", "asked", name, batch, place, gpu_hours=2.0)

    written = Ledger(tmp_path / "submitit")
    alone, done, moved = work("run-a", "one"), work("run-b", "other"), work("run-c", "third")
    tasks = [work(f"run-{place}", "array", place) for place in (0, 1)]
    for batch in ([alone], tasks, [done], [moved], [work("run-d", "last")]):
        written.intend(batch)
    written.submitted("one", "7")
    written.submitted("array", "8")
    written.submitted("other", "9")
    written.submitted("third", "10")
    written.moved(moved, "11")
    written.prove("a100")
    written.close(done, "success", keep_files=False)
    expected = [("run-a", "7"), ("run-0", "8_0"), ("run-1", "8_1"), ("run-c", "11"), ("run-d", None)]
    written.release()
    path = tmp_path / "submitit" / "ledger.jsonl"
    for _ in ("as it was written", "as the next driver compacts it"):
        events = [json.loads(line) for line in path.read_text().splitlines()]
        for event in events:
            jsonschema.validate(event, status.schema())
        assert {event["event"] for event in events} >= {"intent", "submitted", "asked", "proved"}
        assert [(job.name, job.slurm_id) for job in status.read_ledger(path)[0]] == expected
        Ledger(tmp_path / "submitit").release()


def test_the_schema_describes_every_event_and_field_of_the_executor() -> None:
    from snakemake_executor_plugin_submitit.ledger import EVENTS, Submission

    described = status.schema()["properties"]
    assert {*Submission.__dataclass_fields__} <= {*described}
    assert {rule["if"]["properties"]["event"]["const"] for rule in status.schema()["allOf"]} == {*EVENTS}


def test_an_array_is_asked_for_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    squeue = tmp_path / "squeue"
    squeue.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\necho "8_1|RUNNING|a100-1|1:00|"\n')
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    assert status.squeue(["8_0", "8_1", "9", "odd"]) == {"8_1": InQueue("RUNNING", "a100-1", "1:00")}
    assert "--jobs 8,9 " in (tmp_path / "asked").read_text()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        (
            "echo 'slurm_load_jobs error: Unable to contact slurm controller' >&2; exit 1",
            "in a state that is not known",
        ),
        (None, "in a state that is not known"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "not in SLURM's queue"),
        ("true", "not in SLURM's queue"),
    ],
    ids=["no controller", "no squeue", "forgotten alone", "forgotten among others"],
)
def test_a_slurm_that_does_not_answer_is_told_from_one_that_knows_no_such_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, said: str
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    if script is not None:
        (tools / "squeue").write_text(f"#!/bin/sh\n{script}\n")
        (tools / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    path = ledger(tmp_path, intent("run-a", "t1"), submitted("t1", "41"), intent("run-b", "t2"))
    text = shown(status.look(study(tmp_path), path))
    assert f"  run-a\n    41, {said}\n" in text
    assert "  run-b\n    not submitted yet\n" in text
    assert ("SLURM did not answer (squeue)" in text) == ("known" in said)


def test_watch_looks_again_until_it_is_stopped(tmp_path: Path) -> None:
    """As in a log, one look after the other; and a run that ends meanwhile is seen."""
    settings = {
        "models": {"tiny": handmade.LLAMA},
        "hardware": {"cpu": {"device": "cpu", "memory_gib": 1.0}},
        "recipes": {"full": [], "lora": ["lora"]},
        "grid": [{"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}],
        "protocol": {"num_untimed_steps": 1, "num_timed_steps": 3},
    }
    (tmp_path / "config.yaml").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "finetune_study.cli", "status", "-c", "config.yaml", "--watch", "--every", "1"]
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, env=variables) as watching:
        assert watching.stdout is not None
        assert next(watching.stdout) == "2 runs: 2 not run\n"
        handmade.write(tmp_path / "results", handmade.out_of_memory(FULL))
        assert "2 runs: 1 out of memory, 1 not run\n" in itertools.islice(watching.stdout, 100)
        watching.send_signal(signal.SIGINT)
        watching.stdout.read()
    assert watching.returncode == 0


def begin(one: Study, run_id: str, started_at: str) -> None:
    """What a supervisor and its first rank leave while a run goes on."""
    paths = one.results.run(run_id)
    paths.scratch.mkdir(parents=True)
    record.write_about(paths, record.About(2, started_at, environment={"host": "a100-1"}))
    told = facts.Facts(paths.rank_facts(0))
    for step in range(3):
        told.append("steps", {"step": step, "seconds": 0.5})
    for path in paths.scratch.iterdir():
        os.utime(path, (NOW - 5, NOW - 5))


def test_a_run_that_goes_on_is_seen_without_a_ledger_and_whether_it_still_writes(tmp_path: Path) -> None:
    one = study(tmp_path, handmade.failure(FULL).model_copy(update={"started_at": "1970-01-12T13:00:00+00:00"}))
    begin(one, FULL.run_id, "1970-01-12T13:45:40+00:00")
    text = shown(status.look(one, tmp_path / "none.jsonl", no_slurm))
    assert "1 run begun and not ended" in text
    assert f"  {FULL.run_id}\n    try 2, on a100-1, for 0:01:00, 3 steps, wrote 0:00:05 ago\n" in text
    assert "driver" not in text


def test_notes_of_a_try_that_ended_are_no_run_that_goes_on(tmp_path: Path) -> None:
    at = "1970-01-12T13:45:40+00:00"
    failed = handmade.failure(FULL).model_copy(update={"started_at": at})
    one = study(tmp_path, failed, handmade.completed(LORA, 1.0))
    begin(one, FULL.run_id, at)  # what the ranks told stays beside a failure
    begin(one, LORA.run_id, at)
    assert status.look(one, tmp_path / "none.jsonl", no_slurm).begun == []


def test_a_run_that_the_executor_submitted_is_told_once_with_its_steps(tmp_path: Path) -> None:
    one = study(tmp_path)
    begin(one, FULL.run_id, "1970-01-12T13:45:40+00:00")
    jobs = ledger(tmp_path, intent(FULL.run_id, "t1"), submitted("t1", "41", at=NOW - 60))
    queue = {"41": InQueue("RUNNING", "a100-1", "0:50")}
    text = shown(status.look(one, jobs, lambda ids: queue))
    assert text.count(FULL.run_id) == 1
    assert "41, RUNNING, a100-1, 0:50, submitted 0:01:00 ago, 3 steps, wrote 0:00:05 ago\n" in text
