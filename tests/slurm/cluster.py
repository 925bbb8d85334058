"""The test cluster: its daemons and nodes, and what SLURM says of jobs."""

import re
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LIMIT_SECONDS = 240.0
"""Nothing here takes so long; an event that does not come fails its test."""

SCRIPT = Path(__file__).parent / "cluster.sh"
NODES = ("a100-1", "a100-2", "v100-1", "v100-2")
DAEMONS = ("slurmdbd", "slurmctld")


def set_limit(account: str, limit: str) -> None:
    """Of root in an account, in the words of sacctmgr."""
    command = ["sacctmgr", "-i", "modify", "user", "root", "where", f"account={account}", "set", limit]
    subprocess.run(command, check=True, capture_output=True)


def wait_for(condition: Callable[[], Any], what: str, seconds: float = LIMIT_SECONDS) -> Any:
    """What the condition gives, as soon as it is true; the queue and other people's processes can't be waited for."""
    until = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.1)
    return found


def ask(*words: str) -> str:
    """What a command of SLURM prints; nothing while SLURM does not answer."""
    return subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_SECONDS).stdout


@dataclass(frozen=True)
class Attempt:
    """One time that SLURM took a job up: a requeued job has several under the same id."""

    slurm_id: str
    state: str
    node: str
    partition: str
    tres: str
    """What it was given, as `cpu=1,mem=100M`."""


def attempts(name: str) -> list[Attempt]:
    """What accounting has of all jobs of a name, in order."""
    answer = ask(
        *("sacct", "--noheader", "--parsable2", "--allocations", "--duplicates"),
        *("--starttime", "now-2hours", "--endtime", "now+2days"),  # of those that wait, too
        *("--name", name, "--format", "JobIDRaw,State,NodeList,Partition,AllocTRES"),
    )
    return [Attempt(*line.split("|")) for line in answer.splitlines()]


@dataclass(frozen=True)
class Queued:
    """One job that the controller has and that is not over."""

    slurm_id: str
    name: str
    state: str
    node: str
    workdir: Path


def queue() -> list[Queued]:
    """All jobs that are not over."""
    answer = ask("squeue", "--noheader", "--format=%A|%j|%T|%N|%Z")
    rows = [line.split("|", 4) for line in answer.splitlines() if line.count("|") >= 4]
    return [Queued(slurm_id, name, state, node, Path(workdir)) for slurm_id, name, state, node, workdir in rows]


class Cluster:
    """Nodes and daemons, to be lost and had back."""

    def _script(self, *words: str) -> None:
        done = subprocess.run([str(SCRIPT), *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    def stop_node(self, node: str) -> None:
        """Kills a node with all that runs on it; SLURM is not told."""
        self._script("stop-node", node)

    def start_node(self, node: str) -> None:
        """Has it back, and waits until it is usable."""
        self._script("start-node", node)

    def stop_daemon(self, name: str) -> None:
        self._script("stop-daemon", name)

    def start_daemon(self, name: str) -> None:
        """Has it back, and waits until it answers."""
        self._script("start-daemon", name)

    def restart_daemon(self, name: str) -> None:
        self.stop_daemon(name)
        self.start_daemon(name)

    def node_states(self) -> dict[str, str]:
        """States by node, as `idle` and `down*`."""
        words = ask("sinfo", "--noheader", "--Node", "--Format=NodeList:40,StateLong:20").split()
        return dict(zip(words[::2], words[1::2], strict=True))

    def is_healthy(self) -> bool:
        usable = re.compile("idle|mixed|allocated|completing")
        states = self.node_states()
        return bool(
            len(states) == len(NODES)
            and all(usable.fullmatch(state) for state in states.values())
            and ask("sacctmgr", "--noheader", "list", "cluster")
        )

    def clear(self, folder: Path) -> None:
        """Cancels what is left of the jobs that were submitted from below a folder."""
        mine = [job.slurm_id for job in queue() if job.workdir.is_relative_to(folder)]
        if mine:
            subprocess.run(["scancel", *mine], check=True)
            wait_for(lambda: not {job.slurm_id for job in queue()} & set(mine), f"SLURM has ended {mine}")

    def mend(self) -> None:
        """Puts everything right that a test may have left broken."""
        if self.is_healthy():
            return
        for daemon in DAEMONS:
            self.start_daemon(daemon)
        for node, state in self.node_states().items():
            if state.startswith("drain"):
                subprocess.run(["scontrol", "update", f"NodeName={node}", "State=resume"], check=True)
        for node in NODES:
            self.start_node(node)
        assert self.is_healthy(), self.node_states()
