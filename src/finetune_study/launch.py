"""The supervisor of a run: starts the ranks, watches, and always writes down how it ended.

    python -m finetune_study.launch results/runs/<run_id>/run.yaml

repeats a run, Snakemake or not. A run on several nodes has one supervisor on each: the first node's decides and writes,
the others (follow.py) start the ranks of their nodes and tell it how they ended. It needs neither torch nor Snakemake,
so it stays small when memory runs out around it.
"""

import argparse
import dataclasses
import datetime
import fcntl
import os
import shutil
import socket
import sys
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

from finetune_study import (
    allocation,
    data,
    facts,
    implied,
    micro_batch,
    places,
    ranks,
    record,
    rendezvous,
    signals,
    slurm,
    variables,
)
from finetune_study import run as run_module
from finetune_study.allocation import NOTHING_MORE, Asked
from finetune_study.config import Places
from finetune_study.errors import UNFIT_NODE_STATUS, RunFailedError, StudyError, UnfitNodeError
from finetune_study.follow import follow
from finetune_study.forecast import prior
from finetune_study.micro_batch import OUT_OF_MEMORY, Search, Try
from finetune_study.paths import MANIFEST, Results, RunPaths
from finetune_study.prepared import read_manifest
from finetune_study.ranks import LOG_TAIL_LINES, End, Ranks
from finetune_study.record import About, Ending, Failure, Record, Status
from finetune_study.rendezvous import Member, Place, Team
from finetune_study.run import Run
from finetune_study.signals import StoppedError

UNPROVED_FILE = "UNPROVED_FILE"
"""Environment variable: this file tells the executor that an outcome does not show that hardware entry and software can
complete a run."""

UNPROVED = ("host_oom", "timeout")
"""Outcomes that too small a request of SLURM gives to all runs alike."""

UNFIT_NODES_FILE = "UNFIT_NODES_FILE"
"""Environment variable: where the executor reads which nodes are not what a job asks for, a name on each line."""

GRACE_SECONDS = 10.0
"""Peers of a rank that ended have this long to end by themselves: gloo notices a closed connection after about 3 s."""

PROGRESS_SECONDS = 20.0
"""How often a line says how far a run is."""

ENDS_SECONDS = 30.0
"""How long other nodes may take to kill their ranks and say so."""


@dataclass(frozen=True)
class Verdict:
    """How a run ended: an outcome, or the cause of a failure."""

    ending: Ending | None = None
    cause: str = ""
    traceback: str | None = None
    interrupted: bool = False
    node: int = 0
    """Whose log tells of the failure."""
    unfit_nodes: tuple[str, ...] = ()
    """SLURM's names of nodes that are not what the run asks for."""

    @property
    def exit_status(self) -> int:
        """Of the supervisor."""
        if self.ending is not None:
            return 0
        return UNFIT_NODE_STATUS if self.unfit_nodes else 1


class Launch:
    """One try of a run, on its first node."""

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
        team: Team | None = None,
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
            team: the run's other nodes; None: there are none.
        """
        self.folders, self.team = folders, team or Team(paths, Place())
        self.run, self.run_yaml, self.results, self.paths = run, run_yaml, results, paths
        self.time_limit, self.memory_snapshot, self.asked = time_limit_seconds, memory_snapshot, asked
        self.started = time.monotonic()
        self.about = About(
            attempt=record.previous_attempts(paths) + 1,
            started_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            slurm_job_id=os.environ.get("SLURM_JOB_ID"),
            environment={
                "host": socket.gethostname(),
                "node": rendezvous.own_name(),
                "command": [*slurm.srun(run), sys.executable, "-m", "finetune_study.launch", str(run_yaml)],
            },
        )
        self.ranks = Ranks(run, paths, self.team.place)
        self.ends: dict[int, End] = {}
        """Of all ranks on all nodes, as they become known."""
        self.num_trainings = 0
        """A run of `max` trains several times, its short runs included; else it is one."""

    def execute(self) -> Verdict:
        """Runs to the end, and writes record.json or failure.json."""
        with self.paths.log.open("w", encoding="utf-8") as log:
            try:
                verdict = self._supervise(log)
            except StoppedError as stop:
                verdict = Verdict(cause=f"ended from outside by {stop}", interrupted=True)
            except UnfitNodeError as error:
                verdict = Verdict(cause=str(error), unfit_nodes=error.nodes or (rendezvous.own_name(),))
                _tell_executor(verdict.unfit_nodes)
            except StudyError as error:
                verdict = Verdict(cause=str(error))
            except Exception as error:
                verdict = Verdict(cause=f"{type(error).__name__}: {error}", traceback=traceback.format_exc())
        if verdict.ending is not None:
            if verdict.ending.status in UNPROVED and (path := os.environ.get(UNPROVED_FILE)):
                Path(path).touch()
            record.write_record(self.paths, self._record(verdict.ending))
            shutil.rmtree(self.paths.scratch, ignore_errors=True)
        else:
            # What the ranks told stays until the next try: a kill by the scheduler may yet become an outcome.
            record.write_failure(self.paths, self._failure(verdict))
        return verdict

    def _supervise(self, log: TextIO) -> Verdict:
        self.team.place.check(self.run)
        self.team.gather()
        self._check_nodes()
        self._check_prepared()
        self.started = time.monotonic()  # waiting for other nodes is not the run's time
        shutil.rmtree(self.paths.scratch, ignore_errors=True)
        self.paths.scratch.mkdir(parents=True)
        with places.opened(self.folders, self.run, self.results) as where:
            chosen = where | self.ranks.variables(self.team.interface)
            self.about.environment["variables"] = chosen
            if micro_batch.is_searched(self.run):
                return self._search(log, chosen)
            return self._train(self.run_yaml, log, chosen, memory_snapshot=self.memory_snapshot)

    def _search(self, log: TextIO, chosen: dict[str, str]) -> Verdict:
        """Trains at the largest micro-batch that fits; it runs out of memory when none does."""
        environment = variables.passed_on(os.environ) | chosen
        said = micro_batch.ask(self.run_yaml, self.results, self.asked.memory_gib, self.paths.scratch, environment)
        search = Search(micro_batch.sizes(self.run), *said)
        refused: list[tuple[Ending, dict[int, End]]] = []
        while (size := search.next_size or search.chosen) is not None:
            is_short = search.next_size is not None
            self.about.environment[micro_batch.FACT] = search.report()
            run = (micro_batch.short if is_short else micro_batch.at)(self.run, size)
            run_yaml = self.paths.scratch / f"micro-batch-{size}{'-short' if is_short else ''}.yaml"
            record.write_atomically(run_yaml, run_module.dump(run))
            started = time.monotonic()
            verdict = self._train(run_yaml, log, chosen, memory_snapshot=self.memory_snapshot and not is_short)
            ending = verdict.ending
            if ending is None or not ((is_short and ending.status == "completed") or ending.status in OUT_OF_MEMORY):
                return self._cut_short(verdict, size) if is_short else verdict
            search.tried.append(Try.of(size, ending, time.monotonic() - started, is_short=is_short))
            print(f"{self.run.run_id}: micro-batch {size}: {search.tried[-1].words}", flush=True)
            if ending.status in OUT_OF_MEMORY:
                refused.append((ending, self.ends))
        self.about.environment[micro_batch.FACT] = search.report()
        # Sizes may have run out of memory in different ways: one that proves nothing of harder runs decides.
        ending, self.ends = min(refused, key=lambda one: implied.ran_out(one[0].model_dump(), self.run.hardware.device))
        return Verdict(ending=ending.model_copy(update={"reason": f"at every micro-batch; {ending.reason}"}))

    def _cut_short(self, verdict: Verdict, size: int) -> Verdict:
        """The run ended in a short run: what that measured is not the run's."""
        self.ends = {}
        return dataclasses.replace(verdict, cause=verdict.cause and f"short run at micro-batch {size}: {verdict.cause}")

    def _train(self, run_yaml: Path, log: TextIO, chosen: dict[str, str], *, memory_snapshot: bool) -> Verdict:
        """One training by processes of its own."""
        self.ranks, self.ends = Ranks(self.run, self.paths, self.team.place), {}
        self.num_trainings += 1
        try:
            self._start(run_yaml, log, chosen, memory_snapshot=memory_snapshot)
            is_late = self._wait()
        finally:
            self._end_all()
        if is_late:
            return Verdict(ending=Ending(status="timeout", reason=f"time limit of {self.time_limit:g} s reached"))
        return self._conclude()

    def _check_nodes(self) -> None:
        """Each launcher looks at its own node."""
        here = allocation.check(self.run, self.asked, os.environ)
        others = self.team.checks()
        self.about.environment["allocation"] = here
        self.about.environment["other_nodes"] = [
            {"node": member.host, "allocation": others[number]} for number, member in sorted(self.team.members.items())
        ]

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

    def _start(self, run_yaml: Path, log: TextIO, chosen: dict[str, str], *, memory_snapshot: bool) -> None:
        for number in range(self.run.num_gpus):
            self.paths.rank_facts(number).unlink(missing_ok=True)  # of a short run
        record.write_about(self.paths, self.about)
        master = (self.team.address, ranks.free_port())
        self.team.tell(
            start={
                "number": self.num_trainings,
                "folder": str(self.paths.folder),
                "run_yaml": str(run_yaml),
                "master": master,
                "memory_snapshot": memory_snapshot,
            }
        )
        self.ranks.start(run_yaml, self.results, log, chosen, master, memory_snapshot=memory_snapshot)

    def _wait(self) -> bool:
        """Sleeps until the run is over; whether its time was."""
        limit = None if self.time_limit is None else self.started + self.time_limit
        grace_over: float | None = None
        said = ""
        while not self._is_over():
            now = time.monotonic()
            if limit is not None and now >= limit:
                return True
            if grace_over is None and any(end.how != "completed" for end in self.ends.values()):
                grace_over = now + GRACE_SECONDS
            if grace_over is not None and now >= grace_over:
                return False
            wake_at = min(t for t in (now + PROGRESS_SECONDS, limit, grace_over) if t is not None)
            if not signals.sleep(wake_at - now) and (line := self._last_line()) != said:
                said = line
                print(f"{self.run.run_id}: {line}", flush=True)
        return False

    def _is_over(self) -> bool:
        """Whether all ranks on all nodes have ended.

        Raises:
            StoppedError: when a signal asked for the end on another node.
        """
        self._note(self.ranks.news())
        self._listen()
        if (stop := self.team.stopped_by) is not None:
            raise StoppedError(stop)
        return len(self.ends) == self.run.num_gpus

    def _note(self, ends: Iterable[End]) -> None:
        self.ends |= {end.number: end for end in ends}

    def _listen(self) -> None:
        """What other nodes say of their ranks; where a launcher is gone, its ranks went with it."""
        heard = self.team.hear()
        self._note(End(**message["end"]) for message in heard if message.get("training") == self.num_trainings)
        for member in self.team.members.values():
            if member.link.is_lost:
                self._note(self._lost(member, f"its launcher on {member.name} is gone without a word"))

    def _lost(self, member: Member, cause: str) -> Iterator[End]:
        """Ends of a node that says nothing any more, as far as its ranks wrote them down."""
        at, ahead = time.time() - ranks.KILLED_SECONDS, member.link.heard("ahead_seconds") or 0.0
        for number in ranks.numbers_of(self.run, member.number):
            if number not in self.ends:
                path = self.paths.rank_facts(number)
                said = {"cause": f"rank {number}: {cause}"}
                yield ranks.told(number, path, ahead) or End(number, "error", at, said, facts.read(path))

    def _last_line(self) -> str:
        lines = ranks.tail(self.paths.log, LOG_TAIL_LINES)
        return next((line for line in reversed(lines) if line.startswith(("step ", "model ", "held-out"))), "starting")

    def _end_all(self) -> None:
        self.team.tell(stop=self.num_trainings)
        self._note(self.ranks.end_all())
        until = time.monotonic() + ENDS_SECONDS
        while len(self.ends) < self.run.num_gpus and time.monotonic() < until:
            self._listen()
            if len(self.ends) < self.run.num_gpus:
                signals.sleep(until - time.monotonic(), unstoppable=True)
        for member in self.team.members.values():
            self._note(self._lost(member, f"its launcher on {member.name} does not answer"))

    def _conclude(self) -> Verdict:
        """The earliest end that was not ours and not `completed` decides; what its peers said is a consequence."""
        bad = [end for end in self.ends.values() if end.is_bad]
        if not bad:
            return Verdict(ending=Ending(status="completed"))
        first = min(bad, key=lambda end: end.at)
        if first.how == "error":
            node = first.number // self.run.gpus_per_node
            return Verdict(cause=first.said["cause"], traceback=first.said.get("traceback"), node=node)
        known = {name: first.said[name] for name in Ending.model_fields if name in first.said}
        return Verdict(ending=Ending(status=cast(Status, first.how), rank=first.number, **known))

    def _record(self, ending: Ending) -> Record:
        facts_of_ranks = {end.number: end.facts for end in self.ends.values()}
        return record.assemble(self.run, ending, self.about, facts_of_ranks, time.monotonic() - self.started)

    def _failure(self, verdict: Verdict) -> Failure:
        log = self.paths.log_of_node(verdict.node)
        return Failure(
            run_id=self.run.run_id,
            attempt=self.about.attempt - (verdict.interrupted or bool(verdict.unfit_nodes)),
            interrupted=verdict.interrupted,
            unfit_node=bool(verdict.unfit_nodes),
            cause=verdict.cause,
            traceback=verdict.traceback,
            log=str(log),
            log_tail="\n".join(ranks.tail(log, LOG_TAIL_LINES)),
            started_at=self.about.started_at,
            duration_seconds=time.monotonic() - self.started,
            slurm_job_id=self.about.slurm_job_id,
        )


def _tell_executor(nodes: tuple[str, ...]) -> None:
    """Which nodes to leave out; without a word it would be the first one of the job."""
    path = os.environ.get(UNFIT_NODES_FILE)
    if path is not None:
        Path(path).write_text("\n".join(nodes) + "\n", encoding="utf-8")


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
    infer_oom: bool = False,
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
        infer_oom: do not train a run that an easier one of the plan decides (finetune_study.implied).
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
    place = Place.of(run, os.environ)
    results = results or Results.of_run_yaml(run_yaml)
    if place.number > 0:
        return follow(run, results, paths, place, asked, folders)
    with signals.blocked(), Team(paths, place) as team, locked(paths.lock):
        if paths.record.exists():
            if if_needed:
                print(f"{run.run_id}: measured already, see {paths.record}")
                return 0
            paths = _folder_for_repetition(paths)
            paths.folder.mkdir()
            print(f"{run.run_id}: measured already; repeating it in {paths.folder}")
        elif infer_oom and (witness := implied.kin(results).witness(run.run_id)):
            implied.write(paths, run, witness)
            print(f"{run.run_id}: implied_oom by {witness}")
            return 0
        prior.freeze(paths)
        started = Launch(
            run,
            run_yaml.absolute(),
            results,
            paths,
            time_limit_seconds,
            memory_snapshot,
            asked,
            folders,
            team,
        )
        verdict = started.execute()
    if verdict.ending is None:
        log = paths.log_of_node(verdict.node)
        print(f"{run.run_id}: FAILED: {verdict.cause}\n  log: {log}", file=sys.stderr, flush=True)
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
    parser.add_argument("--infer-oom", action="store_true", help="do not train what an easier run of the plan decides")
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
                infer_oom=arguments.infer_oom,
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
