"""Calls that end and leave their jobs; the same command comes back to them, by hand, from cron, or as a job itself."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import LIMIT_SECONDS, attempts, queue, set_limit, wait_for
from tests.slurm.place import ALWAYS, PENDING, UNTIL_GO, Ended, Place

pytestmark = [pytest.mark.slurm, pytest.mark.long]

ON_SIGNAL, WHEN_SUBMITTED = "--submitit-detach=on-signal", "--submitit-detach=when-submitted"
WORK_IS_LEFT = 75
HERE: dict[str, Any] = {"SLURM_JOB_ID": "here"}
"""What rules that run on this machine note instead of a job's id."""
DRIVER_JOB = Path(__file__).parents[2] / "slurm" / "driver.sbatch"
UNTIL_GO_2 = UNTIL_GO.replace("go", "go2")

INNER = """
rule inner:
    output: "inner.out"
    resources: job_name=NAME + "inner", mem_mb=1000, slurm_extra="--begin=now+1hour"
    run:
        shell("echo $SLURM_JOB_ID >> begun/inner; touch {output}")
"""


def add_to_snakefile(place: Place, text: str) -> None:
    path = place.path("Snakefile")
    path.write_text(f"{path.read_text(encoding='utf-8')}\n{text}\n", encoding="utf-8")


def note_onerror(place: Place) -> None:
    add_to_snakefile(place, "onerror: open('onerror', 'w').close()")


def assert_left(place: Place, ended: Ended, *rules: str) -> None:
    """The call ended, nothing was called a failure, and the jobs of those rules are where they were."""
    assert ended.status == WORK_IS_LEFT, ended.output
    assert "Traceback" not in ended.output
    assert not place.path("onerror").exists()
    left = [place.queued(rule)[0].slurm_id for rule in rules]
    (said,) = re.findall(r"(\d+) SLURM job\(s\) are left as they are: ([\d, ]+)\.", ended.output)
    assert int(said[0]) == len(rules)
    assert sorted(said[1].split(", ")) == sorted(left)


def assert_each_ran_once(place: Place, *rules: str) -> None:
    assert {rule: len(place.begun(rule)) for rule in rules} == dict.fromkeys(rules, 1)
    for rule in rules:
        place.wait_until_accounted(rule, "COMPLETED")
    assert not place.open_tokens()


# On a signal


def test_signals_leave_the_jobs_and_the_next_call_takes_them_over(place: Place) -> None:
    """One that runs, one that waits, and one whose command is Snakemake, which looks for a folder of its driver's."""
    place.rule("running", f"echo half > {{output}}; {UNTIL_GO}; echo done > {{output}}", makes=["running.out"])
    place.rule("pending", "true", **PENDING)
    add_to_snakefile(place, INNER)
    note_onerror(place)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        driver = place.start(ON_SIGNAL, "all", "inner.out")
        for rule in ("running", "pending", "inner"):
            driver.wait_until_said(rf"{place.name}{rule}: (submitted|goes on) as SLURM job \d+")
        place.wait_until_begun("running")
        driver.signal_all(number)
        assert_left(place, driver.wait(), "running", "pending", "inner")
        assert place.path("running.out").read_text() == "half\n"

    driver = place.start(ON_SIGNAL, "all", "inner.out")
    driver.wait_until_said(f"{place.name}inner: goes on as SLURM job")
    place.release("pending", "inner")
    place.go()
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert_each_ran_once(place, "running", "pending", "inner")


def test_rule_that_runs_here_is_waited_for(place: Place) -> None:
    place.rule("running", UNTIL_GO)
    place.rule("here", UNTIL_GO_2)
    place.rule("next", "true", needs=["here.out"])
    add_to_snakefile(place, "localrules: here, next")
    note_onerror(place)
    driver = place.start(ON_SIGNAL, **HERE)
    place.wait_until_begun("running", "here")
    driver.process.terminate()
    driver.wait_until_said("Will exit after finishing currently running jobs")
    place.path("go2").touch()
    assert_left(place, driver.wait(), "running")
    assert place.path("here.out").exists()
    assert not place.begun("next")

    place.go()
    ended = place.snakemake(ON_SIGNAL, **HERE)
    assert ended.status == 0, ended.output
    assert {rule: len(place.begun(rule)) for rule in ("running", "here", "next")} == {
        "running": 1,
        "here": 1,
        "next": 1,
    }


# When all is submitted


def test_repeated_calls_finish_a_chain(place: Place) -> None:
    """As from cron; between the stages something is done here, and one job fails at first."""
    place.rule("first", UNTIL_GO)
    place.rule("here", "true", needs=["first.out"])
    place.rule("second", UNTIL_GO_2, needs=["here.out"])
    place.rule("third", UNTIL_GO.replace("go", "go3"), needs=["second.out"])
    place.rule("fails_once", "mkdir tried 2> /dev/null && exit 3 || true", needs=["first.out"])
    add_to_snakefile(place, "localrules: here")
    note_onerror(place)

    assert_left(place, place.snakemake(WHEN_SUBMITTED, **HERE), "first")
    assert_left(place, place.snakemake(WHEN_SUBMITTED, **HERE), "first")
    place.go()
    place.wait_until_over("first")
    while not place.path("fails_once.out").exists():
        ended = place.snakemake(WHEN_SUBMITTED, **HERE)
        assert ended.status == WORK_IS_LEFT, ended.output
        place.wait_until_over("fails_once")
    assert_left(place, place.snakemake(WHEN_SUBMITTED, **HERE), "second")
    for go, rule, following in (("go2", "second", "third"), ("go3", "third", None)):
        place.path(go).touch()
        place.wait_until_over(rule)
        ended = place.snakemake(WHEN_SUBMITTED, **HERE)
        if following:
            assert_left(place, ended, following)
    assert ended.status == 0, ended.output
    assert len(place.begun("here")) == 1
    assert len(place.begun("fails_once")) == 2
    assert_each_ran_once(place, "first", "second", "third")


def test_what_finds_no_room_is_left_to_a_later_call(account: str, place: Place) -> None:
    """Room among Snakemake's `--jobs`, and room in the queue."""
    for number in range(3):
        place.rule(f"job{number}", UNTIL_GO, slurm_account=account)
    narrow = place.snakemake(WHEN_SUBMITTED, jobs=1)
    (first,) = [f"job{number}" for number in range(3) if place.queued(f"job{number}")]
    assert_left(place, narrow, first)

    set_limit(account, "MaxSubmitJobs=2")
    full = place.snakemake(WHEN_SUBMITTED)
    assert full.status == WORK_IS_LEFT, full.output
    assert "1 more are not submitted yet. The same command goes on with them." in full.output

    place.go()
    ended = place.snakemake(ON_SIGNAL)
    assert ended.status == 0, ended.output
    assert_each_ran_once(place, "job0", "job1", "job2")


def test_unknown_way_to_detach_is_refused(place: Place) -> None:
    place.rule("one", "true")
    ended = place.snakemake("--submitit-detach=sometimes")
    assert ended.status != 0
    assert "sometimes" in ended.output
    assert "on-signal" in ended.output
    assert not place.begun("one")


# The driver as a job


class DriverJob:
    """slurm/driver.sbatch, in a folder with a profile of its own."""

    def __init__(self, place: Place) -> None:
        self.place, self.name = place, f"{place.name}driver"
        place.path("slurm").mkdir()
        options = dict(option.removeprefix("--").partition("=")[::2] for option in ALWAYS)
        options |= {"jobs": "50", "default-resources": "['mem_mb=100', 'runtime=10']"}
        place.write("slurm/config.yaml", "".join(f"{key}: {value or 'true'}\n" for key, value in options.items()))

    def submit(self, *arguments: str, minutes: int = 10) -> Path:
        """Submits it; returns the log that it shares with its successors."""
        options = ("--parsable", f"--job-name={self.name}", "--mem=600", f"--time={minutes}")
        slurm_id = subprocess.run(
            ["sbatch", *options, str(DRIVER_JOB), *arguments],
            cwd=self.place.folder,
            env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
            check=True, stdout=subprocess.PIPE, text=True,
        ).stdout.strip()  # fmt: skip
        return self.place.path(f"driver-{slurm_id}.log")

    def running(self) -> str:
        """Id of the one that runs, as soon as one does."""
        job = wait_for(lambda: [j for j in queue() if j.name == self.name and j.state == "RUNNING"], "a driver runs")
        assert len(job) == 1
        return str(job[0].slurm_id)

    def states(self) -> list[str]:
        """How the drivers ended that ever began."""
        return [attempt.state.split()[0] for attempt in attempts(self.name)]

    def wait_until_over(self) -> None:
        wait_for(lambda: not [job for job in queue() if job.name == self.name], "drivers and successors are gone")


@pytest.fixture
def job(place: Place) -> DriverJob:
    return DriverJob(place.other("a place"))


def wait_until_said(log: Path, text: str, times: int = 1, seconds: float = LIMIT_SECONDS) -> None:
    def count() -> int:
        return len(re.findall(text, log.read_text(encoding="utf-8"))) if log.exists() else 0

    wait_for(lambda: count() >= times, f"{text} stands {times} times in {log}", seconds)


def test_driver_job_is_cut_off_three_times(job: DriverJob) -> None:
    """Twice by SLURM's early signal, once without any warning; each run is done once."""
    place = job.place
    place.rule("long", UNTIL_GO)
    for stage in (1, 2, 3):
        needs = [f"stage{stage - 1}.out"] if stage > 1 else []
        place.rule(f"stage{stage}", f"until [ -e go{stage} ]; do sleep 0.1; done", needs=needs)
    log = job.submit("--config", "words=of more than one")
    drivers = []
    for stage, cut in ((1, "USR1"), (2, "KILL"), (3, "USR1")):
        place.wait_until_begun("long", f"stage{stage}")
        drivers.append(job.running())
        wait_until_said(log, f"{place.name}long: (submitted|goes on) as SLURM job", stage)
        subprocess.run(["scancel", f"--signal={cut}", "--batch", drivers[-1]], check=True)
        wait_for(lambda: job.running() not in drivers, "its successor runs")
        place.path(f"go{stage}").touch()
    wait_until_said(log, f"{place.name}long: goes on as SLURM job", 3)
    place.go()
    job.wait_until_over()

    said = log.read_text(encoding="utf-8")
    assert "Snakemake has ended by itself (status 0)" in said
    assert "Traceback" not in said
    runs = ("long", "stage1", "stage2", "stage3")
    assert_each_ran_once(place, *runs)
    wait_for(lambda: job.states() == ["COMPLETED", "FAILED", "COMPLETED", "COMPLETED"], "accounting has four drivers")


@pytest.mark.exhaustive
def test_driver_job_with_two_minutes_is_cut_off_three_times(job: DriverJob) -> None:
    """By its real time limit; six minutes of work, each run done once."""
    place = job.place
    runs = [f"run{number}" for number in range(12)]
    for number, run in enumerate(runs):
        needs = [f"{runs[number - 1]}.out"] if number else []
        place.rule(run, "sleep 25", needs=needs)
    log = job.submit(minutes=2)
    wait_until_said(log, r"Snakemake has ended by itself \(status 0\)", seconds=900)
    job.wait_until_over()
    assert_each_ran_once(place, *runs)
    assert log.read_text(encoding="utf-8").count("its time is over") >= 3


def test_driver_job_is_stopped_by_scancel_and_by_failures(job: DriverJob) -> None:
    place = job.place
    place.rule("running", UNTIL_GO)
    log = job.submit()
    place.wait_until_begun("running")
    wait_until_said(log, f"{place.name}running: submitted as SLURM job")
    subprocess.run(["scancel", job.running()], check=True)
    job.wait_until_over()
    (run,) = place.queued("running")
    assert run.state == "RUNNING"

    place.rule("fails", "exit 3")
    log = job.submit()
    wait_until_said(log, "Error in rule fails")
    place.go()
    job.wait_until_over()
    assert "Snakemake has ended by itself (status 1)" in log.read_text(encoding="utf-8")
    assert len(place.begun("running")) == 1
    assert len(place.begun("fails")) == 1
    wait_for(lambda: job.states() == ["CANCELLED", "FAILED"], "accounting has two drivers")
