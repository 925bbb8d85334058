"""Endings of a run over two nodes; here both are this machine, and what srun says is in the variables of the launchers.

tests/slurm/test_nodes.py has the same under a real srun.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetune_study import record
from tests.training import lab as lab_module
from tests.training.lab import LIMIT_SECONDS, WIDE, Lab, is_alive, rank_facts, rank_pids, wait_for

pytestmark = [pytest.mark.training, pytest.mark.long]

STEP = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NUM_TASKS": "2"}


class Going:
    """A slow run whose ranks, one on each node, have finished their first step."""

    def __init__(self, tmp_path: Path, *arguments: str) -> None:
        lab = Lab(tmp_path)
        run = lab.run(
            num_gpus=2,
            nodes=2,
            architecture=WIDE,
            micro_batch=1,
            training={"effective_batch_size": 2},
            protocol={"num_timed_steps": 150},
            data={"dataset": lab.plenty, "num_eval_samples": 0},
        )
        self.paths = lab.prepare(run)
        self.launchers: list[Any] = [
            lab_module.start(self.paths, *arguments, variables=STEP | {"SLURM_PROCID": str(node)}) for node in (0, 1)
        ]
        wait_for(self._stepped, "both ranks have finished a step")
        self.ranks = [rank_pids(launcher.pid)[0] for launcher in self.launchers]

    def _stepped(self) -> bool:
        assert all(launcher.poll() is None for launcher in self.launchers), self.end()
        return all(rank_facts(self.paths, rank).get("steps") for rank in (0, 1))

    def end(self) -> list[tuple[int, str]]:
        """Exit status and output of both launchers."""
        outputs = [launcher.communicate(timeout=LIMIT_SECONDS)[0] for launcher in self.launchers]
        return [(launcher.returncode, output) for launcher, output in zip(self.launchers, outputs, strict=True)]


@pytest.fixture
def going(tmp_path: Path) -> Iterator[Going]:
    started = Going(tmp_path)
    yield started
    for launcher in started.launchers:
        launcher.kill()
        launcher.communicate()


def test_time_that_runs_out_keeps_what_both_nodes_measured(tmp_path: Path) -> None:
    ended = Going(tmp_path, "--time-limit-minutes", "0.6").end()
    assert [status for status, _ in ended] == [0, 0], ended
    (written,) = [record.read_record(path) for path in tmp_path.glob("results/runs/*/record.json")]
    assert written.ending.status == "timeout"
    assert [bool(rank["steps"]) for rank in written.ranks] == [True, True]
    assert written.environment["variables"]["GLOO_SOCKET_IFNAME"]


def test_rank_of_the_second_node_that_is_killed_is_named(going: Going) -> None:
    os.kill(going.ranks[1], signal.SIGKILL)
    (first, _), (second, _) = going.end()
    assert (first, second) == (1, 0)
    failure = record.read_failure(going.paths.failure)
    assert failure.cause == "rank 1 was killed by SIGKILL and left no word"
    assert failure.log == str(going.paths.log_of_node(1))


def test_rank_that_is_killed_is_named_where_its_launcher_is_late_to_say_so(going: Going) -> None:
    going.launchers[1].send_signal(signal.SIGSTOP)
    os.kill(going.ranks[1], signal.SIGKILL)
    wait_for(lambda: "ended" in rank_facts(going.paths, 0), "the peer said that its connection was closed")
    going.launchers[1].send_signal(signal.SIGCONT)
    assert [status for status, _ in going.end()] == [1, 0]
    assert record.read_failure(going.paths.failure).cause == "rank 1 was killed by SIGKILL and left no word"


def test_second_node_that_is_asked_to_end_is_no_failure_of_the_run(going: Going) -> None:
    going.launchers[1].terminate()
    assert [status for status, _ in going.end()] == [1, 0]
    failure = record.read_failure(going.paths.failure)
    assert failure.cause.startswith("ended from outside by SIGTERM on node 1 (")
    assert (failure.attempt, failure.interrupted) == (0, True)


def test_nothing_goes_on_without_the_first_node(going: Going) -> None:
    going.launchers[0].kill()
    (_, (status, output)) = going.end()
    assert status == 1
    assert "the first node's launcher is gone without a word" in output
    wait_for(lambda: not any(map(is_alive, going.ranks)), "both ranks are dead")
    assert not going.paths.record.exists()
