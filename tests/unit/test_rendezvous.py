"""Launchers of several nodes, here all on one machine; they speak over its real network."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_study import record, rendezvous, signals
from finetune_study import run as run_module
from finetune_study.errors import RunFailedError
from finetune_study.paths import Results, RunPaths
from finetune_study.rendezvous import Place, Team
from finetune_study.run import Run
from finetune_study.signals import StoppedError
from tests.unit import handmade

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}
"""As srun sets them for a step with one task on each of two nodes."""


def a_run(nodes: int = 2) -> Run:
    block = {"targets": "tiny", "hardware": "cpu", "recipes": "full", "sequence_length": 128}
    study = handmade.study(grid=[block | {"num_gpus": 2, "nodes": nodes}])
    return handmade.planned(study)[0].run


def place(number: int, nodes: int = 2) -> Place:
    return Place(number, nodes, "7.0.0")


@pytest.fixture(autouse=True)
def _signals_wait() -> Iterator[None]:
    with signals.blocked():
        yield


# --- which node this is ----------------------------------------------------------------------------------------------


def test_a_run_on_one_node_is_its_own_first_node_wherever_it_runs() -> None:
    assert Place.of(a_run(1), STEP | {"SLURM_PROCID": "1"}) == Place(0, 1, None)


def test_place_of_a_node_is_what_srun_says() -> None:
    second = Place.of(a_run(), STEP | {"SLURM_PROCID": "1", "SLURM_RESTART_COUNT": "3"})
    assert second == Place(1, 2, "7.3.0")
    second.check(a_run())


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_PROCID": "0"},
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"},
        STEP | {"SLURM_PROCID": "0", "SLURM_STEP_NUM_NODES": "3", "SLURM_STEP_NUM_TASKS": "3"},
    ],
    ids=["no SLURM", "the batch script", "two tasks on a node", "too many nodes"],
)
def test_what_is_not_one_launcher_on_each_node_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(RunFailedError, match="takes 2 nodes, and was not started on each of them"):
        Place.of(a_run(), environment).check(a_run())


# --- how they find each other ----------------------------------------------------------------------------------------


FORK = multiprocessing.get_context("fork")


class Other:
    """The launcher of another node, in a process of its own: it joins, says something, and waits for the end."""

    def __init__(self, paths: RunPaths, number: int = 1, nodes: int = 2, **message: Any) -> None:
        self._came, self._says = FORK.Pipe(duplex=False)
        self.process = FORK.Process(target=self._act, args=(paths, place(number, nodes), message), daemon=True)
        self.process.start()

    def said(self) -> str:
        """What came to it next."""
        assert self._came.poll(30), "nothing came"
        return str(self._came.recv())

    def _act(self, paths: RunPaths, place: Place, message: dict[str, Any]) -> None:
        leader = rendezvous.join(paths, place, seconds=20)
        if leader is None:
            self._says.send("over")
            return
        assert abs(leader.ahead_seconds) < 5
        assert leader.interface
        leader.link.send(**message)
        if leader.link.wait_for("start", seconds=20):
            self._says.send(leader.link.heard("start"))
        if leader.link.wait_for("over", seconds=20):
            self._says.send("over")


def test_three_nodes_find_each_other_and_speak(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    others = [Other(paths, number, 3, allocation={"of": number}) for number in (1, 2)]
    with Team(paths, place(0, 3)) as team:
        assert (team.address, paths.rendezvous("7.0.0").stat().st_mode & 0o077) == ("127.0.0.1", 0)
        team.gather(20)
        assert team.checks(20) == {1: {"of": 1}, 2: {"of": 2}}
        assert team.interface in [name for _, name in socket.if_nameindex()]
        team.tell(start="it begins")
        assert [other.said() for other in others] == ["it begins", "it begins"]
    assert [other.said() for other in others] == ["over", "over"]
    assert list(tmp_path.iterdir()) == []


def test_interface_is_that_of_the_address() -> None:
    assert [rendezvous.interface_of(address) for address in ("127.0.0.1", "127.0.1.1")] == ["lo", "lo"]


def test_one_that_comes_when_all_is_over_goes_home(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with Team(paths, place(0)) as team, pytest.raises(RunFailedError, match=r"(?s)Not every node.*came: none"):
        team.gather(0.2)
    assert Other(paths).said() == "over"


def test_what_an_earlier_try_left_is_not_taken_for_this_one(tmp_path: Path) -> None:
    """A launcher that was killed could not tidy up: of the same step of a requeued job, and of another one."""
    paths = RunPaths(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as gone:
        left = {"addresses": ["127.0.0.1"], "port": gone.getsockname()[1], "token": "x"}
    for step in ("7.0.0", "6.0.0"):
        paths.rendezvous(step).write_text(json.dumps(left))
    other = Other(paths)
    time.sleep(0.5)
    with Team(paths, place(0)) as team:
        team.gather(20)
        assert list(tmp_path.iterdir()) == [paths.rendezvous("7.0.0")]
    assert other.said() == "over"


def test_a_stranger_is_sent_away(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    with Team(paths, place(0)) as team:
        port = json.loads(paths.rendezvous("7.0.0").read_text())["port"]
        for greeting in (b"GET / HTTP/1.1\n", b'{"token": "wrong", "node": 1, "host": "x"}\n', b"[1]\n"):
            with socket.create_connection(("127.0.0.1", port), 20) as stranger:
                stranger.sendall(greeting)
                with pytest.raises(RunFailedError, match="Not every node"):
                    team.gather(0.2)
                assert stranger.recv(1) == b""
        assert team.members == {}


def test_a_leader_that_is_not_there_is_missed(tmp_path: Path) -> None:
    with pytest.raises(RunFailedError, match=r"first node can't be reached after 0\.3 s"):
        rendezvous.join(RunPaths(tmp_path), place(1), seconds=0.3)


def test_waiting_ends_with_a_signal(tmp_path: Path) -> None:
    with Team(RunPaths(tmp_path), place(0)) as team:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)
        with pytest.raises(StoppedError, match="SIGTERM"):
            team.gather(20)


def test_one_whose_node_will_not_do_is_heard(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    other = Other(paths, refusal="the GPU of node-2 is in use")
    with Team(paths, place(0)) as team:
        team.gather(20)
        with pytest.raises(RunFailedError, match="the GPU of node-2 is in use"):
            team.checks(20)
    assert other.said() == "over"


def test_one_that_dies_is_missed_at_once(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    other = Other(paths)
    with Team(paths, place(0)) as team:
        team.gather(20)
        other.process.kill()
        began = time.monotonic()
        with pytest.raises(RunFailedError, match=r"(?s)ended, or hangs, before anything was measured.*node 1 \("):
            team.checks(20)
        assert time.monotonic() - began < 5


# --- whole launchers -------------------------------------------------------------------------------------------------


def launchers(tmp_path: Path, *environments: dict[str, str]) -> tuple[RunPaths, list["subprocess.Popen[str]"]]:
    """Launchers of a run that nothing is prepared for."""
    run = a_run()
    paths = Results(tmp_path).run(run.run_id)
    record.write_atomically(paths.run_yaml, run_module.dump(run))
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
    return paths, [
        subprocess.Popen(
            [sys.executable, "-m", "finetune_study.launch", str(paths.run_yaml), "--if-needed"],
            env=clean | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for environment in environments
    ]


def test_local_start_of_a_run_over_nodes_is_a_failure_that_says_what_to_do(tmp_path: Path) -> None:
    paths, (alone,) = launchers(tmp_path, {})
    output, _ = alone.communicate(timeout=60)
    assert alone.returncode == 1
    assert "srun --nodes=2 --ntasks=2 --ntasks-per-node=1 python -m finetune_study.launch" in output
    assert "was not started on each of them" in record.read_failure(paths.failure).cause


def test_a_failure_of_the_first_node_is_the_only_one(tmp_path: Path) -> None:
    """Nothing is prepared: the first node's launcher says so, and the second one goes home in peace."""
    paths, processes = launchers(tmp_path, STEP | {"SLURM_PROCID": "0"}, STEP | {"SLURM_PROCID": "1"})
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 0], outputs
    assert outputs[1] == ""
    assert "The run's model is not prepared" in record.read_failure(paths.failure).cause
    assert {path.name for path in paths.folder.iterdir()} == {"run.yaml", "failure.json", "launch.log", "launch.lock"}


def test_a_run_that_is_measured_is_left_alone_by_all_nodes(tmp_path: Path) -> None:
    run = a_run()
    handmade.write(tmp_path, handmade.completed(run, 1.0))
    paths, processes = launchers(tmp_path, STEP | {"SLURM_PROCID": "1"}, STEP | {"SLURM_PROCID": "0"})
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "measured already" in outputs[1]
    assert not paths.failure.exists()
