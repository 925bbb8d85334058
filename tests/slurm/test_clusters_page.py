"""docs/clusters.md, followed to the letter: its configurations and commands, in a folder like the project's."""

import copy
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune_study import record
from tests.slurm.cluster import ask, queue, wait_for
from tests.slurm.test_software import make_venv
from tests.slurm.test_study import jobs_of, place, stand_in, statuses
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import REPOSITORY, Workplace

__all__ = ["place"]

pytestmark = [pytest.mark.slurm, pytest.mark.long]

PAGE = REPOSITORY / "docs" / "clusters.md"
WORK_IS_LEFT = 75
CRON = "*/10 * * * * "


@dataclass(frozen=True)
class HowTo:
    """A section of the page."""

    config: Mapping[str, Any]
    commands: tuple[str, ...]


@cache
def how_tos() -> dict[str, HowTo]:
    """The sections, by their headings."""
    found = {}
    for section in PAGE.read_text(encoding="utf-8").split("\n## ")[1:]:
        heading, _, text = section.partition("\n")
        blocks = re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)
        commands = re.findall(r"^    (\S.*)$", re.sub(r"```yaml\n.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
        config: dict[str, Any] = {}
        for block in blocks:
            config |= yaml.safe_load(block)
        found[heading] = HowTo(config, tuple(commands))
    return found


def merged(raw: dict[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with another one on top, as Snakemake merges them."""
    for key, value in more.items():
        raw[key] = merged(raw[key], value) if isinstance(value, dict) and isinstance(raw.get(key), dict) else value
    return raw


@dataclass
class Follower:
    """Somebody who does what a section says."""

    place: Workplace
    heading: str

    def __post_init__(self) -> None:
        for name in ("Snakefile", "workflow", "slurm", "profiles"):
            target = self.place.folder / name
            if name == "slurm":  # in which the doctor writes
                target.mkdir()
                for path in (REPOSITORY / name).iterdir():
                    (target / path.name).symlink_to(path)
            else:
                target.symlink_to(REPOSITORY / name)

    @property
    def how_to(self) -> HowTo:
        return how_tos()[self.heading]

    def configure(self, *recipes: str, **more: Any) -> None:
        """The study that the page speaks of, with a section's configuration on top."""
        raw = copy.deepcopy(TINY_STUDY)
        raw["hardware"] = {"a100": stand_in("a100") | {"gpu": "a100"}}
        raw["recipes"] |= {"zero3": {"zero3": {}}}
        raw["grid"][0] |= {"hardware": "a100", "recipes": list(recipes or ("full",))}
        self.place.write(merged(merged(raw, more), copy.deepcopy(dict(self.how_to.config))))

    def do(self, command: str, **environment: str) -> "subprocess.CompletedProcess[str]":
        """A line of the page, in a shell, with the project's programs on its path."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.place.folder,
            env=os.environ | {"PATH": path} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=300,
        )

    def follow(self, **environment: str) -> list[str]:
        """All commands of the section; what they said."""
        said = []
        for command in self.how_to.commands:
            done = self.do(command, **environment)
            assert done.returncode == 0, f"{command}\n{done.stdout}"
            said.append(done.stdout)
        return said

    def queued(self) -> list[str]:
        """SLURM's ids of what is not over."""
        return [job.slurm_id for job in queue() if job.workdir == self.place.folder]


@pytest.fixture
def follower(place: Workplace, request: pytest.FixtureRequest) -> Follower:
    heading: str = request.node.get_closest_marker("section").args[0]
    return Follower(place, heading)


def section(heading: str) -> pytest.MarkDecorator:
    """Which section a test follows."""
    return pytest.mark.section(heading)


def completed(follower: Follower) -> list[str]:
    """The runs; all of them were measured once."""
    folders = [folder.name for folder in follower.place.run_folders()]
    assert set(statuses(follower.place).values()) == {"completed"}
    assert all(len(jobs_of(follower.place, run_id)) == 1 for run_id in folders)
    return folders


@section("Find out whether all is there")
def test_doctor(follower: Follower) -> None:
    follower.configure()
    examined, described = follower.follow()
    assert "a100" in examined
    text = (follower.place.folder / "slurm" / "mine.yaml").read_text()
    assert yaml.safe_load(text)["hardware"]["a100"]["slurm"]["gpu_model"] == "a100", described
    # What only a driver tells of a GPU that no entry names is left open: there is none here.
    assert "# v100:" in text


@section("Submit many runs at once")
def test_arrays(follower: Follower) -> None:
    """The canary is alone; the others are an array."""
    follower.configure("full", "lora", "gc", recipes={"gc": {"gradient_checkpointing": {}}})
    follower.follow()
    numbers = [jobs_of(follower.place, run_id)[0].slurm_id for run_id in completed(follower)]
    ids = ask(
        "sacct", "--noheader", "--allocations", "--parsable2", "--jobs", ",".join(numbers), "--format=JobID"
    ).split()
    tasks = [slurm_id.split("_") for slurm_id in ids if "_" in slurm_id]
    assert len({array for array, _ in tasks}) == 1, ids
    assert {index for _, index in tasks} == {"0", "1"}


@section("Wait once for several runs")
def test_shared_jobs(follower: Follower) -> None:
    """The canary is alone; the others share a job."""
    follower.configure("full", "lora", "gc", recipes={"gc": {"gradient_checkpointing": {}}})
    follower.follow()
    assert set(statuses(follower.place).values()) == {"completed"}
    ids = [record.read_record(folder / "record.json").slurm_job_id for folder in follower.place.run_folders()]
    assert len(ids) == 3
    assert len(set(ids)) == 2


@section("Let the driver run as a job")
def test_driver_as_a_job(follower: Follower) -> None:
    follower.configure()
    _, submitted = follower.follow()
    driver = submitted.split()[-1]
    wait_for(lambda: follower.place.results.joinpath("report", "index.html").exists(), "the driver has made the report")
    wait_for(lambda: not follower.queued(), "nothing is left in the queue")
    completed(follower)
    assert (follower.place.folder / f"driver-{driver}.log").exists()
    assert "rule prepare_model" not in (follower.place.folder / f"driver-{driver}.log").read_text()


@section("Leave, and come back")
def test_calls_that_leave(follower: Follower) -> None:
    follower.configure()
    call, cron = follower.how_to.commands
    assert cron.startswith(CRON)
    cron = cron.removeprefix(CRON).replace("/path/of/finetune-study", str(follower.place.folder))
    cron = cron.replace(".venv/bin/snakemake", str(Path(sys.executable).parent / "snakemake"))
    # What cron gives a command, and where SLURM's are.
    cron = f"env -i HOME=$HOME PATH=/usr/bin:/bin bash -c {shlex.quote(cron)}"
    statuses_of_calls = []
    for command in (call, cron):
        while (done := follower.do(command)).returncode == WORK_IS_LEFT:
            statuses_of_calls.append(WORK_IS_LEFT)
            wait_for(lambda: not follower.queued(), "the runs are over")
        assert done.returncode == 0, done.stdout
    assert WORK_IS_LEFT in statuses_of_calls
    assert "Nothing to be done" in (follower.place.folder / "driver-cron.log").read_text()
    completed(follower)


@section("Live with limits")
def test_limits(follower: Follower) -> None:
    """One run's partition gives less time than it asks for; the other one is measured."""
    too_long = stand_in("a100") | {"slurm": {**stand_in("a100")["slurm"], "startup_minutes": 3000}}
    follower.configure(hardware={"too-long": too_long})
    raw = follower.place.read()
    raw["grid"].append(raw["grid"][0] | {"hardware": "too-long"})
    follower.place.write(raw)
    (command,) = follower.how_to.commands
    done = follower.do(command)
    assert done.returncode == 1
    assert "PartitionTimeLimit" in done.stdout
    assert "partition a100 allows 2880 min per job (MaxTime), and the job asks for 3010 min" in done.stdout
    assert set(statuses(follower.place).values()) == {"completed"}


@section("Keep to a budget")
def test_budget(follower: Follower) -> None:
    """Each run asks for a GPU for 10 minutes."""
    follower.configure("full", "lora")
    (command,) = follower.how_to.commands
    small = follower.do(command.replace("100", "0.2"))
    assert small.returncode == 1
    assert "of max-gpu-hours=0.2 0.17 were asked for already" in small.stdout
    assert list(statuses(follower.place).values()) == ["completed"]
    follower.follow()
    completed(follower)


@section("Use several nodes")
def test_several_nodes(follower: Follower) -> None:
    follower.configure()
    follower.follow()
    (run_id,) = completed(follower)
    written = record.read_record(follower.place.record(run_id))
    assert written.run.nodes == 2
    assert len(written.environment["other_nodes"]) == 1


@section("Say where files go")
def test_places(follower: Follower, tmp_path_factory: pytest.TempPathFactory) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    follower.configure()
    _, _, dry = follower.follow(SCRATCH=str(scratch))
    (run_id,) = completed(follower)
    variables = record.read_record(follower.place.record(run_id)).environment["variables"]
    assert variables["TMPDIR"].startswith(f"{scratch}/temporary/")
    assert variables["XDG_CACHE_HOME"].startswith(f"{scratch}/finetune-study")
    assert "Nothing to be done" in dry


@section("Train on nodes without a network")
def test_no_network(follower: Follower) -> None:
    """That the jobs need none, tests/slurm/test_places.py shows: its nodes have none."""
    follower.configure()
    shutil.rmtree(follower.place.results / "prepared")
    prepared, trained = follower.follow()
    assert "prepare_data" in prepared
    assert "prepare" not in trained
    completed(follower)


@section("Use the software of the place")
def test_software(follower: Follower) -> None:
    follower.configure()
    make_venv(follower.place.folder / "envs" / "gpu", follower.place.folder / "notes")
    _, dry = follower.follow()
    (run_id,) = completed(follower)
    python = record.read_record(follower.place.record(run_id)).environment["command"][0]
    assert python == str(follower.place.folder / "envs" / "gpu" / "bin" / "python")
    assert "Nothing to be done" in dry
    (shown,) = (command for command in follower.how_to.commands if "-n" in command)
    follower.place.record(run_id).unlink()
    for software, words in {
        "{modules: [cuda/12.6], python: envs/gpu/bin/python}": "load_modules.sh cuda/12.6 && envs/gpu/bin/python",
        "{apptainer: docker://example.org/gpu}": "apptainer exec --nv",
        "{conda: gpu}": "run --no-capture-output -n gpu python",
    }.items():
        raw = follower.place.read()
        raw["hardware"]["a100"]["software"] = yaml.safe_load(software)
        follower.place.write(raw)
        assert words in follower.do(shown).stdout


@section("Mix GPUs behind one partition")
def test_mixed_gpus(follower: Follower) -> None:
    follower.configure()
    (said,) = follower.follow()
    assert "node v100-2 is not what was asked for" in said
    (folder,) = follower.place.run_folders()
    assert [job.node for job in jobs_of(follower.place, folder.name)] == ["v100-2", "a100-2"]


@section("Use a slice of a GPU")
def test_slices(follower: Follower) -> None:
    """Planning needs no GPU, and there is none here; a fake driver tells of slices in tests/unit/test_mig.py."""
    follower.configure()
    (said,) = follower.follow()
    words = " ".join(said.split())
    assert "2 runs, 0 measured, 1 to train, 1 unsupported" in words


def test_every_section_has_a_test() -> None:
    tested = {
        mark.args[0]
        for name, one in globals().items()
        if name.startswith("test_")
        for mark in getattr(one, "pytestmark", [])
        if mark.name == "section"
    }
    assert tested == how_tos().keys()
