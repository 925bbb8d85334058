import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetune_study import record
from finetune_study import run as run_module
from finetune_study.after_kill import after_kill
from finetune_study.errors import RecordError, RunFailedError
from finetune_study.facts import Facts
from finetune_study.launch import locked
from finetune_study.paths import Results, RunPaths
from finetune_study.record import About, Record
from tests.unit import handmade

STUDY = handmade.study()
RUN = handmade.runs(STUDY)["full", 1]


@pytest.fixture
def paths(tmp_path: Path) -> RunPaths:
    """A planned run whose job was killed before it could say anything."""
    paths = Results(tmp_path / "results").run(RUN.run_id)
    record.write_atomically(paths.run_yaml, run_module.dump(RUN))
    return paths


def kill(state: str, **more: Any) -> str:
    """What the executor says of a job of 100 MiB and one minute."""
    job: dict[str, Any] = {
        "rule": "finetune",
        "wildcards": {"run_id": RUN.run_id},
        "output": [f"results/runs/{RUN.run_id}/record.json"],
        "log": [],
        "slurm_job_id": "123",
        "state": state,
        "reason": None,
        "exit_code": "0:125",
        "node": "a100-1",
        "elapsed_seconds": 12,
        "requested_memory_mib": 100,
        "max_rss_mib": 95.0,
        "time_limit_minutes": 1,
        "job_log": "/somewhere/job.log",
    }
    return json.dumps(job | more)


def conclude(paths: RunPaths, text: str) -> Record:
    """The record after the kill."""
    after_kill(text, Results(paths.folder.parent.parent))
    return record.read_record(paths.record)


def test_out_of_memory_is_host_oom(paths: RunPaths) -> None:
    found = conclude(paths, kill("OUT_OF_MEMORY"))
    assert found.ending.model_dump(exclude_none=True) == {
        "status": "host_oom",
        "reason": "SLURM ended job 123 on a100-1 as OUT_OF_MEMORY: it needed more than its 100 MiB of host memory",
    }
    assert (found.run, found.attempt, found.slurm_job_id, found.duration_seconds) == (RUN, 1, "123", 12)
    assert found.environment["host"] == "a100-1"
    assert (found.environment["slurm"]["exit_code"], found.environment["slurm"]["max_rss_mib"]) == ("0:125", 95.0)
    assert found.ranks == []


@pytest.mark.parametrize("state", ["TIMEOUT", "DEADLINE"])
def test_the_end_of_its_time_is_timeout(paths: RunPaths, state: str) -> None:
    found = conclude(paths, kill(state))
    assert found.ending.status == "timeout"
    assert found.ending.reason == f"SLURM ended job 123 on a100-1 as {state}: its limit of 1 min was reached"


def test_what_is_not_known_is_not_said(paths: RunPaths) -> None:
    optional = (
        "slurm_job_id",
        "exit_code",
        "node",
        "elapsed_seconds",
        "requested_memory_mib",
        "max_rss_mib",
        "job_log",
    )
    found = conclude(paths, kill("OUT_OF_MEMORY", **dict.fromkeys(optional), time_limit_minutes=None))
    assert found.ending.reason == "SLURM ended job as OUT_OF_MEMORY: host memory ran out"
    assert (found.slurm_job_id, found.duration_seconds) == (None, None)


def leave_behind(paths: RunPaths, job: str) -> None:
    """What supervisor and rank of a job wrote until they were killed."""
    told = {"host": "vm", "allocation": {"by": "none"}}
    record.write_about(paths, About(3, "2026-01-01T00:00:00+00:00", job, told))
    facts = Facts(paths.rank_facts(0))
    facts.tell(startup_seconds=3.0, environment={"device_name": "a card"})
    for step in handmade.steps(2.0, 2.5):
        facts.append("steps", step)


def test_what_was_measured_until_then_is_kept(paths: RunPaths) -> None:
    leave_behind(paths, "123")
    found = conclude(paths, kill("TIMEOUT"))
    assert [step["seconds"] for step in found.ranks[0]["steps"]] == [9.0, 2.0, 2.5]
    assert (found.attempt, found.started_at) == (3, "2026-01-01T00:00:00+00:00")
    assert found.environment["device_name"] == "a card"
    assert found.environment["allocation"] == {"by": "none"}
    assert not paths.scratch.exists()


def test_of_another_try_nothing_is_taken(paths: RunPaths) -> None:
    leave_behind(paths, "122")
    found = conclude(paths, kill("TIMEOUT"))
    assert (found.ranks, found.attempt, found.started_at) == ([], 1, None)


def test_the_failure_that_a_signal_left_is_removed(paths: RunPaths) -> None:
    record.write_failure(paths, handmade.failure(RUN, "ended from outside by SIGTERM", attempt=1))
    assert conclude(paths, kill("TIMEOUT")).attempt == 2
    assert not paths.failure.exists()


def test_the_runs_own_record_outranks_the_jobs_state(paths: RunPaths) -> None:
    record.write_record(paths, handmade.completed(RUN, 1.0))
    before = paths.record.read_bytes()
    assert "has its outcome" in after_kill(kill("OUT_OF_MEMORY"), Results(paths.folder.parent.parent))
    assert paths.record.read_bytes() == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (kill("NODE_FAIL"), "The state NODE_FAIL is no result"),
        (kill("TIMEOUT", rule="prepare_model"), "A kill of the rule `prepare_model` is no result"),
        (kill("TIMEOUT", wildcards={}), "A kill of the rule `finetune` is no result"),
        ("nonsense", "This does not describe a job: Invalid JSON"),
        ("{}", "This does not describe a job: rule Field required"),
    ],
)
def test_anything_else_is_no_result(paths: RunPaths, text: str, words: str) -> None:
    with pytest.raises(RunFailedError, match=words.split(":")[0]) as caught:
        after_kill(text, Results(paths.folder.parent.parent))
    assert words in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert sorted(path.name for path in paths.folder.iterdir()) == ["run.yaml"]


def test_a_run_that_is_not_planned(paths: RunPaths) -> None:
    with pytest.raises(RecordError, match="can't be read"):
        after_kill(kill("TIMEOUT", wildcards={"run_id": "no-such-run"}), Results(paths.folder.parent.parent))
    assert not (paths.folder.parent / "no-such-run").exists()


def test_a_supervisor_that_is_still_at_work_is_not_overruled(paths: RunPaths) -> None:
    with locked(paths.lock), pytest.raises(RunFailedError, match="Another process is measuring this run"):
        after_kill(kill("TIMEOUT"), Results(paths.folder.parent.parent))
    assert not paths.record.exists()


def test_the_command(paths: RunPaths, tmp_path: Path) -> None:
    """As the executor calls it: in the study's folder, the job on standard input."""

    def called(text: str) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "finetune_study.cli", "after-kill"]
        return subprocess.run(command, cwd=tmp_path, env=os.environ, input=text, capture_output=True, text=True)

    answer = called(kill("NODE_FAIL"))
    assert (answer.returncode, answer.stdout) == (1, "")
    assert answer.stderr.startswith("The state NODE_FAIL is no result")
    answer = called(kill("TIMEOUT"))
    assert (answer.returncode, answer.stderr) == (0, "")
    assert answer.stdout.startswith(f"{RUN.run_id}: timeout: SLURM ended job 123")
    assert record.read_record(paths.record).ending.status == "timeout"
