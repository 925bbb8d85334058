"""Runs over several nodes: one launcher on each, under srun, and one outcome."""

import copy
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from finetune_study import facts, record
from finetune_study.paths import RunPaths
from finetune_study.record import Record
from tests.slurm.cluster import LIMIT_SECONDS, ask, queue, wait_for
from tests.slurm.test_study import PROFILE, jobs_of, place, stand_in, submit
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import REPOSITORY, Workplace

__all__ = ["place"]

pytestmark = [pytest.mark.slurm, pytest.mark.long]


def study(**grid: Any) -> dict[str, Any]:
    """Runs of ZeRO on two devices of the partition a100."""
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = {"a100": stand_in("a100")}
    raw["recipes"] = {"zero3": {"zero3": {}}}
    raw["grid"] = [{"targets": "tiny", "hardware": "a100", "sequence_length": 64, "num_gpus": 2, "nodes": 2} | grid]
    raw["grid"][0].setdefault("recipes", "zero3")
    return raw


def slow_study() -> dict[str, Any]:
    """One run over two nodes that takes minutes."""
    raw = study()
    raw["models"]["tiny"]["architecture"] |= {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
    raw["protocol"] |= {"num_timed_steps": 200}
    raw["data"] |= {"num_dialogues": 600, "num_eval_samples": 0}
    return raw


def of_nodes(place: Workplace, nodes: int) -> Record:
    """The record of the run on so many nodes."""
    found = [record.read_record(folder / "record.json") for folder in place.run_folders()]
    (one,) = [one for one in found if one.run.nodes == nodes]
    return one


def losses(one: Record) -> list[list[float]]:
    """Of every step, and the held-out losses, of each rank."""
    return [[*(step["loss"] for step in rank["steps"]), *rank["evaluations"].values()] for rank in one.ranks]


def test_zero3_over_two_nodes_learns_what_it_learns_on_one(place: Workplace) -> None:
    place.write(study(nodes=[1, 2]))
    answer = submit(place, "--submitit-keep-logs")
    assert answer.returncode == 0, answer.stdout
    one, two = of_nodes(place, 1), of_nodes(place, 2)
    assert (one.ending.status, two.ending.status) == ("completed", "completed")
    assert "a100x2n2_" in two.run.run_id
    assert [rank["rank"] for rank in two.ranks] == [0, 1]
    for on_one, on_two in zip(losses(one), losses(two), strict=True):
        assert on_two == pytest.approx(on_one, rel=1e-4)
    first, (other,) = two.environment["allocation"], two.environment["other_nodes"]
    assert (two.environment["node"], other["node"]) == ("a100-1", "a100-2")
    assert first["found"]["gpus"] == other["allocation"]["found"]["gpus"] == ["a100"]
    assert first["found"]["nodes"] == other["allocation"]["found"]["nodes"] == 2
    (job,) = jobs_of(place, two.run.run_id)
    assert "gres/gpu=2" in job.tres
    assert "node=2" in job.tres
    (step,) = ask("sacct", "-j", f"{job.slurm_id}.0", "-nPo", "NTasks,AllocNodes").split()
    assert step == "2|2"
    left = {path.name for path in (place.results / "runs" / two.run.run_id).iterdir()}
    assert left == {"record.json", "run.yaml", "launch.lock", "launch.log", "launch-node-1.log"}


class Going:
    """A slow run over two nodes, at work."""

    def __init__(self, place: Workplace) -> None:
        place.write(slow_study())
        command = ["-m", "snakemake", "--snakefile", str(REPOSITORY / "Snakefile"), "--profile", PROFILE, "--jobs", "1"]
        self.log = place.folder / "driver.log"
        with self.log.open("w") as log:
            self.driver = subprocess.Popen([sys.executable, *command], cwd=place.folder, stdout=log, stderr=log)
        wait_for(lambda: place.results.exists() and [*place.results.glob("runs/*/ranks/1.jsonl")], "rank 1 is there")
        (folder,) = place.run_folders()
        self.paths = RunPaths(folder)
        wait_for(lambda: self._told(0, "device_ready") and self._told(1, "device_ready"), "both ranks are ready")
        (job,) = [job for job in queue() if job.name == folder.name and job.workdir == place.folder]
        self.job = job.slurm_id

    def _told(self, rank: int, key: str) -> Any:
        return facts.read(self.paths.rank_facts(rank)).get(key)

    def wait_until_both_step(self) -> None:
        wait_for(lambda: self._told(0, "steps") and self._told(1, "steps"), "both ranks have finished a step")

    def rank(self, number: int) -> int:
        """Its process: both nodes are on this machine."""
        return _process(f"RANK={number}", "finetune_study.train", f"{self.paths.folder.name}/ranks/{number}.jsonl")

    def launcher(self, node: int) -> int:
        """The process of a node's launcher."""
        return _process(f"SLURM_PROCID={node}", "finetune_study.launch", f"{self.paths.folder.name}/run.yaml")

    def end(self) -> float:
        """Waits for the driver; seconds that it took."""
        began = time.monotonic()
        self.driver.wait(LIMIT_SECONDS)
        return time.monotonic() - began


def _process(variable: str, module: str, file: str) -> int:
    """The one Python that has this variable, runs this module and works on this file."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it ended meanwhile
            command = (folder / "cmdline").read_bytes().decode().split("\0")
            variables = (folder / "environ").read_bytes().decode().split("\0")
            if command[1:3] == ["-m", module] and any(w.endswith(file) for w in command) and variable in variables:
                found.append(int(folder.name))
    (one,) = found
    return one


@pytest.fixture
def going(place: Workplace) -> Iterator[Going]:
    started = Going(place)
    yield started
    started.driver.kill()
    started.driver.wait()


def test_memory_that_runs_out_on_the_second_node_is_an_outcome(going: Going) -> None:
    """The operating system leaves rank 1 less than its budget, and its peer none the wiser."""
    going.wait_until_both_step()  # all threads and libraries are there: what needs memory next is training
    pid = going.rank(1)
    held = next(
        int(line.split()[1])
        for line in Path(f"/proc/{pid}/status").read_text(encoding="ascii").splitlines()
        if line.startswith("VmData:")
    )
    resource.prlimit(pid, resource.RLIMIT_DATA, (1024 * held, resource.RLIM_INFINITY))
    assert going.end() < 60
    written = record.read_record(going.paths.record)
    assert (written.ending.status, written.ending.rank) == ("device_oom", 1)
    assert "DefaultCPUAllocator" in str(written.ending.reason)
    assert (written.ending.bytes_requested or 0) > 0
    assert [rank["rank"] for rank in written.ranks] == [0, 1]


def test_launcher_of_the_second_node_that_is_killed_is_a_failure_at_once(going: Going) -> None:
    going.wait_until_both_step()
    rank = going.rank(1)
    os.kill(going.launcher(1), signal.SIGKILL)
    assert going.end() < 30
    assert going.driver.returncode != 0
    failure = record.read_failure(going.paths.failure)
    assert failure.cause == "rank 1: its launcher on node 1 (a100-2) is gone without a word"
    assert (failure.attempt, failure.interrupted) == (1, False)
    assert failure.log == str(going.paths.log_of_node(1))
    assert not Path(f"/proc/{rank}").exists()


def test_cancelled_job_is_no_failure_of_the_run(going: Going) -> None:
    """SLURM asks the launchers to end; srun, which it asks too, must not kill them before they are done."""
    going.wait_until_both_step()
    subprocess.run(["scancel", going.job], check=True)
    assert going.end() < 30
    failure = record.read_failure(going.paths.failure)
    assert failure.cause.startswith("ended from outside by SIGTERM")
    assert (failure.attempt, failure.interrupted) == (0, True)
    assert not going.paths.record.exists()
