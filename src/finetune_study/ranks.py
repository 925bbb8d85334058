"""The ranks of a run on one node: started, watched and ended, and how each of them ended."""

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from finetune_study import facts, oom, variables
from finetune_study.measure import cgroup
from finetune_study.paths import Results, RunPaths
from finetune_study.rendezvous import Place
from finetune_study.run import Run

LOG_TAIL_LINES = 40

KILLED_SECONDS = 5.0
"""By so much the news of a rank that was killed may be behind what its peers say of the connection that it closed: a
launcher on a busy node must wake first, and clocks of nodes differ. No error of a peer kills a rank: the kill is never
the consequence."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""


@dataclass(frozen=True)
class End:
    """How a rank ended."""

    number: int
    how: str
    """`completed`, `device_oom`, `host_oom` or `error`."""
    at: float
    """Unix time by the first node's clock, seconds."""
    said: dict[str, Any]
    """Fields of `record.Ending` where memory ran out; of an error `cause`, and `traceback` where it left one."""
    facts: dict[str, Any]
    """All that the rank told."""
    killed_by_us: bool = False

    @property
    def is_bad(self) -> bool:
        """It did not complete, and that was not our doing."""
        return self.how != "completed" and not self.killed_by_us


@dataclass
class Rank:
    """One process of the run."""

    number: int
    process: subprocess.Popen[bytes]
    facts_path: Path
    killed_by_us: bool = False
    is_over: bool = False


def told(number: int, facts_path: Path, ahead_seconds: float) -> End | None:
    """How a rank says that it ended; None for one that could not say.

    Args:
        number: of the rank.
        facts_path: what it told.
        ahead_seconds: of the first node's clock over its own.
    """
    known = facts.read(facts_path)
    ended = known.get("ended")
    if ended is None:
        return None
    cause = {"cause": f"rank {number}: {ended['cause']}"} if "cause" in ended else {}
    return End(number, ended["how"], ended["at"] + ahead_seconds, ended | cause, known)


class Ranks:
    """All ranks of one node."""

    def __init__(self, run: Run, paths: RunPaths, place: Place, ahead_seconds: float = 0.0) -> None:
        """
        Args:
            run: what they do.
            paths: where they write.
            place: of this node.
            ahead_seconds: of the first node's clock over this node's.
        """
        self.run, self.paths, self.place, self._ahead = run, paths, place, ahead_seconds
        self.log = paths.log_of_node(place.number)
        self._ranks: list[Rank] = []
        self._kills_before: int | None = None

    @property
    def numbers(self) -> range:
        """Of the ranks on this node."""
        return numbers_of(self.run, self.place.number)

    def variables(self, interface: str) -> dict[str, str]:
        """What is set for all ranks of this node."""
        threads = self.run.hardware.threads_per_gpu or variables.threads_of_rank(self.run.gpus_per_node, os.environ)
        return variables.set_for(self.run, threads, os.environ, interface)

    def start(
        self,
        run_yaml: Path,
        results: Results,
        log: TextIO,
        chosen: dict[str, str],
        master: tuple[str, int],
        *,
        memory_snapshot: bool,
    ) -> None:
        """Starts them.

        Args:
            run_yaml: where the run is written.
            results: where prepared models and data lie.
            log: takes what they print.
            chosen: what `variables` says.
            master: address and port of the first rank, where all find each other.
            memory_snapshot: keep the CUDA allocator's history of an OOM.
        """
        run, each = self.run, self.run.gpus_per_node
        self._kills_before = cgroup.oom_kills()
        distributed = run.num_gpus > 1 or any(t.is_deepspeed for t in run.parsed_techniques.values())
        for number in self.numbers:
            cores = variables.cores_of_rank(number % each, each, os.environ)
            environment = (
                variables.passed_on(os.environ)
                | chosen
                | (variables.for_rank(number, run.num_gpus, each, master) if distributed else {})
            )
            facts_path = self.paths.rank_facts(number)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "finetune_study.train"),
                    *("--run-yaml", str(run_yaml), "--results", str(results.root), "--facts", str(facts_path)),
                    *(("--memory-snapshot", str(self.paths.memory_snapshot(number))) if memory_snapshot else ()),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
                preexec_fn=lambda cores=cores: _prepare_child(cores),  # type: ignore[misc]
            )
            self._ranks.append(Rank(number, process, facts_path))

    def news(self) -> list[End]:
        """Ends since the last time."""
        new = [rank for rank in self._ranks if not rank.is_over and rank.process.poll() is not None]
        for rank in new:
            rank.is_over = True
        return [self._end(rank) for rank in new]

    def end_all(self) -> list[End]:
        """Kills those that are still there; their ends."""
        ends = self.news()
        left = [rank for rank in self._ranks if not rank.is_over]
        for rank in left:
            rank.killed_by_us = True
            _signal_group(rank.process.pid, signal.SIGKILL)
        for rank in left:
            rank.process.wait()
        return ends + self.news()

    def _end(self, rank: Rank) -> End:
        end = told(rank.number, rank.facts_path, self._ahead)
        if end is None:
            how, said = self._death(rank)
            late = KILLED_SECONDS if rank.process.returncode == -signal.SIGKILL else 0.0
            at = time.time() + self._ahead - late
            end = End(rank.number, how, at, said, facts.read(rank.facts_path), rank.killed_by_us)
        return end

    def _death(self, rank: Rank) -> tuple[str, dict[str, Any]]:
        """A rank that could not say why it ended: its exit status, the kernel and the log may."""
        status = rank.process.returncode
        kills = cgroup.oom_kills()
        before = self._kills_before
        if status == -signal.SIGKILL and kills is not None and before is not None and kills > before:
            limit = cgroup.memory_limit_bytes()
            reason = f"the kernel killed rank {rank.number}: host memory ran out" + (
                f" (the cgroup's limit is {limit / 2**30:.2f} GiB)" if limit else ""
            )
            return "host_oom", {"reason": reason}
        words = self._words_of(rank, oom.HOST_ELSEWHERE)
        if self.run.hardware.memory_budget_gib is not None and words:
            return "device_oom", {"reason": f"rank {rank.number} ended with status {status} and the words {words!r}"}
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return "error", {"cause": f"rank {rank.number} {how} and left no word"}

    def _words_of(self, rank: Rank, pattern: re.Pattern[str]) -> str | None:
        """Of the end of the log, for a rank that had its budget."""
        found = pattern.search("\n".join(tail(self.log, LOG_TAIL_LINES)))
        return found[0] if found and facts.read(rank.facts_path).get("device_ready") else None


def numbers_of(run: Run, node: int) -> range:
    """The ranks on one of the run's nodes."""
    return range(node * run.gpus_per_node, (node + 1) * run.gpus_per_node)


def tail(path: Path, lines: int) -> list[str]:
    """The last lines of a log, as far as they fit into 64 KiB."""
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 64 * 1024))
            return stream.read().decode("utf-8", errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def free_port() -> int:
    """A port of this node that nobody uses."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _prepare_child(cores: list[int]) -> None:
    """In the new process, before it becomes a rank: the same as for any child, and its own cores."""
    os.sched_setaffinity(0, cores)
    prepare_child()


def prepare_child() -> None:
    """In a new process of the supervisor: no signal blocked, death with the supervisor."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)
