"""The supervisor of a run on its node: starts the ranks, watches, and always writes down how it ended.

    python -m finetune_study.launch results/runs/<run_id>/run.yaml

repeats a run, Snakemake or not. It needs neither torch nor Snakemake, so it stays small when memory runs out around it.
"""

import argparse
import ctypes
import datetime
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO, cast

from finetune_study import allocation, data, facts, implied, oom, places, record, variables
from finetune_study import run as run_module
from finetune_study.allocation import NOTHING_MORE, Asked
from finetune_study.config import Places
from finetune_study.errors import UNFIT_NODE_STATUS, RunFailedError, StudyError, UnfitNodeError
from finetune_study.measure import cgroup
from finetune_study.paths import MANIFEST, Results, RunPaths
from finetune_study.prepared import read_manifest
from finetune_study.record import About, Ending, Failure, Record, Status
from finetune_study.run import Run

GRACE_SECONDS = 10.0
"""Peers of a rank that ended have this long to end by themselves: gloo notices a closed connection after about 3 s."""

PROGRESS_SECONDS = 20.0
"""How often a line says how far a run is."""

LOG_TAIL_LINES = 40

STOPS = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2}
"""Signals that end a run from outside: a scheduler's, a terminal's."""

PR_SET_PDEATHSIG = 1
"""prctl(2): the signal a process gets when its parent dies."""


@dataclass
class Rank:
    """One process of the run, and what is known of its end."""

    number: int
    process: subprocess.Popen[bytes]
    facts_path: Path
    ended_at: float | None = None
    killed_by_us: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def reap(self) -> bool:
        """Whether the process is over; its facts are read then."""
        if self.ended_at is None and self.process.poll() is not None:
            self.facts = facts.read(self.facts_path)
            self.ended_at = self.facts.get("ended", {}).get("at", time.time())
        return self.ended_at is not None

    @property
    def how(self) -> str:
        """`completed`, `device_oom`, `host_oom`, `error`, or `died` for a process that could not say."""
        return str(self.facts.get("ended", {}).get("how", "died"))


@dataclass(frozen=True)
class Verdict:
    """How a run ended: an outcome, or the cause of a failure."""

    ending: Ending | None = None
    cause: str = ""
    traceback: str | None = None
    interrupted: bool = False
    unfit_node: bool = False

    @property
    def exit_status(self) -> int:
        """Of the supervisor."""
        if self.ending is not None:
            return 0
        return UNFIT_NODE_STATUS if self.unfit_node else 1


class Launch:
    """One try of a run."""

    def __init__(
        self,
        run: Run,
        run_yaml: Path,
        results: Results,
        paths: RunPaths,
        time_limit_seconds: float | None,
        memory_snapshot: bool,
        asked: Asked = NOTHING_MORE,
        folders: Places = places.DEFAULT,
    ) -> None:
        """
        Args:
            run: what to do.
            run_yaml: where it is written.
            results: where prepared models and data lie.
            paths: where record or failure, log and facts go.
            time_limit_seconds: the run ends as `timeout` after it; None: never.
            memory_snapshot: keep the CUDA allocator's history of an OOM.
            asked: what the node must offer beside what the run says.
            folders: where caches and temporary files go.
        """
        self.folders = folders
        self.run, self.run_yaml, self.results, self.paths = run, run_yaml, results, paths
        self.time_limit, self.memory_snapshot, self.asked = time_limit_seconds, memory_snapshot, asked
        self.started = time.monotonic()
        self.about = About(
            attempt=record.previous_attempts(paths) + 1,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            environment={
                "host": socket.gethostname(),
                "command": [sys.executable, "-m", "finetune_study.launch", str(run_yaml)],
            },
        )
        self.ranks: list[Rank] = []

    def execute(self) -> Verdict:
        """Runs to the end, and writes record.json or failure.json; signals wait until that is done."""
        with _blocked_signals():
            with self.paths.log.open("w", encoding="utf-8") as log:
                try:
                    verdict = self._supervise(log)
                except StudyError as error:
                    verdict = Verdict(cause=str(error), unfit_node=isinstance(error, UnfitNodeError))
                except Exception as error:
                    verdict = Verdict(cause=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
            if verdict.ending is not None:
                record.write_record(self.paths, self._record(verdict.ending))
                shutil.rmtree(self.paths.scratch, ignore_errors=True)
            else:
                # What the ranks told stays until the next try: a kill by the scheduler may yet become an outcome.
                record.write_failure(self.paths, self._failure(verdict))
        return verdict

    def _supervise(self, log: TextIO) -> Verdict:
        self.about.environment["allocation"] = allocation.check(self.run, self.asked, os.environ)
        self._check_prepared()
        kills_before = cgroup.oom_kills()
        with places.opened(self.folders, self.run, self.results) as where:
            try:
                self._start(log, where)
                stopped_by = self._wait()
            finally:
                self._end_all()
        if stopped_by == "timeout":
            return Verdict(ending=Ending(status="timeout", reason=f"time limit of {self.time_limit:g} s reached"))
        if stopped_by is not None:
            return Verdict(cause=f"ended from outside by {stopped_by}", interrupted=True)
        return self._conclude(kills_before)

    def _check_prepared(self) -> None:
        model_manifest = self._prepared("model", self.results.model(self.run.model_key))
        data_manifest = self._prepared("data", self.results.data(self.run.data_key))
        self.about.environment |= {"model": model_manifest, "data": data_manifest}
        data.check_vocabulary(data_manifest, model_manifest)
        available = data_manifest["num_train_available"]
        if available < self.run.num_train_samples:
            raise RunFailedError(
                "The data has too few sequences for the steps of this run",
                where=str(self.results.data(self.run.data_key)),
                given=f"{available} sequences",
                allowed=f"at least {self.run.num_train_samples}, so that none is seen twice",
                do="use more data, fewer steps or a smaller effective_batch_size",
            )

    def _prepared(self, what: str, folder: Path) -> dict[str, Any]:
        manifest = read_manifest(folder)
        if manifest is None:
            purged = (folder / MANIFEST).exists()
            raise RunFailedError(
                f"The run's {what} is {'no longer whole' if purged else 'not prepared'}",
                where=str(folder),
                do=f"{'delete the folder and ' if purged else ''}run `snakemake`, or `finetune-study prepare` with the "
                "run.yaml; a run.yaml outside its study needs --results",
            )
        return manifest

    def _start(self, log: TextIO, where: dict[str, str]) -> None:
        run, world_size = self.run, self.run.num_gpus
        shutil.rmtree(self.paths.scratch, ignore_errors=True)
        self.paths.scratch.mkdir(parents=True)
        port = _free_port()
        threads = run.hardware.threads_per_gpu or variables.threads_of_rank(world_size, os.environ)
        chosen = where | variables.set_for(run, threads, os.environ)
        self.about.environment["variables"] = chosen
        record.write_about(self.paths, self.about)
        for number in range(world_size):
            cores = variables.cores_of_rank(number, world_size, os.environ)
            distributed = world_size > 1 or any(t.is_deepspeed for t in run.parsed_techniques.values())
            environment = (
                variables.passed_on(os.environ)
                | chosen
                | (variables.for_rank(number, world_size, port) if distributed else {})
            )
            facts_path = self.paths.rank_facts(number)
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "finetune_study.train"),
                    *(
                        "--run-yaml",
                        str(self.run_yaml),
                        "--results",
                        str(self.results.root),
                        "--facts",
                        str(facts_path),
                    ),
                    *(("--memory-snapshot", str(self.paths.memory_snapshot(number))) if self.memory_snapshot else ()),
                ],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches the supervisor alone
                preexec_fn=lambda cores=cores: _prepare_child(cores),  # type: ignore[misc]
            )
            self.ranks.append(Rank(number, process, facts_path))

    def _wait(self) -> str | None:
        """Sleeps until the run is over; the name of what ended it from outside, if anything did."""
        limit = None if self.time_limit is None else self.started + self.time_limit
        grace_over: float | None = None
        said = ""
        while not self._all_ended():
            now = time.monotonic()
            if limit is not None and now >= limit:
                return "timeout"
            if grace_over is None and any(r.ended_at is not None and r.how != "completed" for r in self.ranks):
                grace_over = now + GRACE_SECONDS
            if grace_over is not None and now >= grace_over:
                return None
            wake_at = min(t for t in (now + PROGRESS_SECONDS, limit, grace_over) if t is not None)
            received = signal.sigtimedwait({signal.SIGCHLD, *STOPS}, max(0.0, wake_at - now))
            if received is not None and received.si_signo in STOPS:
                return signal.Signals(received.si_signo).name
            if received is None and (line := self._last_line()) != said:
                said = line
                print(f"{self.run.run_id}: {line}", flush=True)
        return None

    def _all_ended(self) -> bool:
        return sum(rank.reap() for rank in self.ranks) == len(self.ranks)

    def _last_line(self) -> str:
        lines = _tail(self.paths.log, LOG_TAIL_LINES)
        return next((line for line in reversed(lines) if line.startswith(("step ", "model ", "held-out"))), "starting")

    def _end_all(self) -> None:
        for rank in self.ranks:
            if not rank.reap():
                rank.killed_by_us = True
                _signal_group(rank.process.pid, signal.SIGKILL)
        for rank in self.ranks:
            rank.process.wait()
            rank.reap()

    def _conclude(self, kills_before: int | None) -> Verdict:
        """The earliest end that was not ours and not `completed` decides; what its peers said is a consequence."""
        bad = [rank for rank in self.ranks if rank.how != "completed" and not rank.killed_by_us]
        if not bad:
            return Verdict(ending=Ending(status="completed"))
        first = min(bad, key=lambda rank: rank.ended_at or 0.0)
        ended = first.facts.get("ended", {})
        if first.how in ("device_oom", "host_oom"):
            known = {name: ended[name] for name in Ending.model_fields if name in ended}
            return Verdict(ending=Ending(status=cast(Status, first.how), rank=first.number, **known))
        if first.how == "error":
            return Verdict(cause=f"rank {first.number}: {ended['cause']}", traceback=ended["traceback"])
        return self._conclude_death(first, kills_before)

    def _conclude_death(self, rank: Rank, kills_before: int | None) -> Verdict:
        """A rank that could not say why it ended: its exit status, the kernel and the log may."""
        status = rank.process.returncode
        kills = cgroup.oom_kills()
        if status == -signal.SIGKILL and kills is not None and kills_before is not None and kills > kills_before:
            limit = cgroup.memory_limit_bytes()
            reason = f"the kernel killed rank {rank.number}: host memory ran out" + (
                f" (the cgroup's limit is {limit / 2**30:.2f} GiB)" if limit else ""
            )
            return Verdict(ending=Ending(status="host_oom", reason=reason, rank=rank.number))
        budget_holds = self.run.hardware.memory_budget_gib is not None and rank.facts.get("device_ready")
        words = oom.HOST_ELSEWHERE.search("\n".join(_tail(self.paths.log, LOG_TAIL_LINES)))
        if budget_holds and words:
            reason = f"rank {rank.number} ended with status {status} and the words {words[0]!r}"
            return Verdict(ending=Ending(status="device_oom", reason=reason, rank=rank.number))
        how = f"was killed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
        return Verdict(cause=f"rank {rank.number} {how} and left no word")

    def _record(self, ending: Ending) -> Record:
        facts_of_ranks = {rank.number: rank.facts for rank in self.ranks}
        return record.assemble(self.run, ending, self.about, facts_of_ranks, time.monotonic() - self.started)

    def _failure(self, verdict: Verdict) -> Failure:
        return Failure(
            run_id=self.run.run_id,
            attempt=self.about.attempt - (verdict.interrupted or verdict.unfit_node),
            interrupted=verdict.interrupted,
            unfit_node=verdict.unfit_node,
            cause=verdict.cause,
            traceback=verdict.traceback,
            log=str(self.paths.log),
            log_tail="\n".join(_tail(self.paths.log, LOG_TAIL_LINES)),
            started_at=self.about.started_at,
            duration_seconds=time.monotonic() - self.started,
            slurm_job_id=self.about.slurm_job_id,
        )


def _tail(path: Path, lines: int) -> list[str]:
    try:
        with path.open("rb") as stream:
            stream.seek(0, os.SEEK_END)
            stream.seek(max(0, stream.tell() - 64 * 1024))
            return stream.read().decode("utf-8", errors="replace").splitlines()[-lines:]
    except FileNotFoundError:
        return []


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _prepare_child(cores: list[int]) -> None:
    """In the new process, before it becomes a rank: no signal blocked, its own cores, death with the supervisor."""
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    os.sched_setaffinity(0, cores)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(pid, number)


@contextmanager
def _blocked_signals() -> Iterator[None]:
    """Signals wait to be fetched by sigtimedwait: the supervisor sleeps in between and misses none."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD, *STOPS})
    try:
        yield
    finally:
        while signal.sigtimedwait(STOPS, 0) is not None:
            pass  # they asked for the end, and this is the end
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One supervisor per folder; the kernel lets go of the lock when its process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFailedError("Another process is measuring this run", where=str(path.parent)) from None
        yield


def _folder_for_repetition(paths: RunPaths) -> RunPaths:
    """A run that has an outcome is repeated beside it; the study's record stays as it is."""
    number = 1
    while (paths.folder / f"again-{number}").exists():
        number += 1
    return RunPaths(paths.folder / f"again-{number}")


def launch(
    run_yaml: Path,
    results: Results | None = None,
    *,
    if_needed: bool = False,
    implied_oom: bool = False,
    time_limit_seconds: float | None = None,
    memory_snapshot: bool = False,
    asked: Asked = NOTHING_MORE,
    folders: Places = places.DEFAULT,
) -> int:
    """Runs one run to its end and says how it ended.

    Args:
        run_yaml: the run.
        results: the study's results; default: the folder that `runs/<run_id>/run.yaml` lies in.
        if_needed: do nothing where there is a record; otherwise such a run is repeated in a folder of its own.
        implied_oom: do not train a run that an easier one of the plan decides (finetune_study.implied).
        time_limit_seconds: the run ends as `timeout` after it.
        memory_snapshot: keep the CUDA allocator's history of an OOM.
        asked: what the node must offer beside what the run says.
        folders: where caches and temporary files go.

    Returns:
        Exit status: 0 for an outcome, `UNFIT_NODE_STATUS` where the node is not what the run asks for, 1 for any other
        failure.
    """
    run = run_module.load(run_yaml)
    paths = RunPaths(run_yaml.absolute().parent)
    results = results or Results.of_run_yaml(run_yaml)
    with locked(paths.lock):
        if paths.record.exists():
            if if_needed:
                print(f"{run.run_id}: measured already, see {paths.record}")
                return 0
            paths = _folder_for_repetition(paths)
            paths.folder.mkdir()
            print(f"{run.run_id}: measured already; repeating it in {paths.folder}")
        elif implied_oom and (witness := implied.kin(results).witness(run.run_id)):
            implied.write(paths, run, witness)
            print(f"{run.run_id}: implied_oom by {witness}")
            return 0
        started = Launch(
            run,
            run_yaml.absolute(),
            results,
            paths,
            time_limit_seconds,
            memory_snapshot,
            asked,
            folders,
        )
        verdict = started.execute()
    if verdict.ending is None:
        print(f"{run.run_id}: FAILED: {verdict.cause}\n  log: {paths.log}", file=sys.stderr, flush=True)
        return verdict.exit_status
    reason = f": {verdict.ending.reason.splitlines()[0]}" if verdict.ending.reason else ""
    print(f"{run.run_id}: {verdict.ending.status} after {time.monotonic() - started.started:.0f} s{reason}", flush=True)
    return verdict.exit_status


ALLOCATION_HELP = f"what the node must offer beside what the run says, as JSON: {', '.join(Asked.model_fields)}"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m finetune_study.launch", description=__doc__.splitlines()[0])
    parser.add_argument("run_yaml", type=Path, help="the run, as the plan wrote it")
    parser.add_argument("--results", type=Path, help="the study's results folder, if run.yaml lies elsewhere")
    parser.add_argument("--if-needed", action="store_true", help="do nothing where there is a record")
    parser.add_argument(
        "--implied-oom", action="store_true", help="do not train what an easier run of the plan decides"
    )
    parser.add_argument("--time-limit-minutes", type=float, help="end the run as `timeout` after so many minutes")
    parser.add_argument("--memory-snapshot", action="store_true", help="keep the CUDA allocator's history of an OOM")
    parser.add_argument("--allocation", type=Asked.model_validate_json, default=NOTHING_MORE, help=ALLOCATION_HELP)
    parser.add_argument("--cache", help="folder of caches and compiled ops (default: the results' own)")
    parser.add_argument("--temporary", help="folder of temporary files (default: TMPDIR)")
    arguments = parser.parse_args()
    try:
        sys.exit(
            launch(
                arguments.run_yaml,
                Results(arguments.results.absolute()) if arguments.results else None,
                if_needed=arguments.if_needed,
                implied_oom=arguments.implied_oom,
                time_limit_seconds=None if arguments.time_limit_minutes is None else 60 * arguments.time_limit_minutes,
                memory_snapshot=arguments.memory_snapshot,
                asked=arguments.allocation,
                folders=Places(cache=arguments.cache, temporary=arguments.temporary),
            )
        )
    except StudyError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
