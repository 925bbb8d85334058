"""A run's supervisor on every node but the first: starts its ranks when the first one says so, tells how they ended."""

import dataclasses
import os
import sys
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from finetune_study import allocation, places, rendezvous, signals
from finetune_study.allocation import Asked
from finetune_study.config import Places
from finetune_study.errors import RunFailedError, UnfitNodeError
from finetune_study.paths import Results, RunPaths
from finetune_study.ranks import End, Ranks
from finetune_study.rendezvous import Leader, Link, Place
from finetune_study.run import Run
from finetune_study.signals import StoppedError

LOOK_SECONDS = 60.0
"""Signals tell of everything; so often it is looked all the same."""


def follow(
    run: Run,
    run_yaml: Path,
    results: Results,
    paths: RunPaths,
    place: Place,
    asked: Asked,
    folders: Places,
    *,
    memory_snapshot: bool = False,
) -> int:
    """Does this node's part of a run.

    Args:
        run: what to do.
        run_yaml: where it is written.
        results: where prepared models and data lie.
        paths: of the run, where its run.yaml lies.
        place: of this node.
        asked: what the node must offer beside what the run says.
        folders: where caches and temporary files go.
        memory_snapshot: keep the CUDA allocator's history of an OOM.

    Returns:
        Exit status: 0 when the first node has heard all, and says itself how the run ended.

    Raises:
        RunFailedError: when the first node is not found.
    """
    place.check(run)
    with signals.blocked():
        try:
            leader = rendezvous.join(paths, place)
            if leader is None:
                return 0
            with closing(leader.link) as link:  # a closed one sends no signal when those are no longer blocked
                link.send(ahead_seconds=leader.ahead_seconds, **_check(run, asked))
                while not link.wait_for("start", "over", seconds=LOOK_SECONDS) and not link.is_lost:
                    pass
                if link.heard("start") is not None:
                    with places.opened(folders, run, results) as where:
                        _work(run, run_yaml, results, leader, place, where, memory_snapshot=memory_snapshot)
                while not link.wait_for("over", seconds=LOOK_SECONDS) and not link.is_lost:
                    pass
        except StoppedError as stop:
            print(f"{run.run_id}: node {place.number} was ended from outside by {stop}", file=sys.stderr, flush=True)
            return 1
    if link.heard("over") is None:
        print(f"{run.run_id}: the first node's launcher is gone without a word", file=sys.stderr, flush=True)
        return 1
    return 0


def _check(run: Run, asked: Asked) -> dict[str, object]:
    """What this node is, or why it will not do."""
    try:
        return {"allocation": allocation.check(run, asked, os.environ)}
    except RunFailedError as error:
        return {"refusal": str(error), "is_unfit": isinstance(error, UnfitNodeError)}


def _work(
    run: Run,
    run_yaml: Path,
    results: Results,
    leader: Leader,
    place: Place,
    where: dict[str, str],
    *,
    memory_snapshot: bool,
) -> None:
    link = leader.link
    start = link.heard("start")
    address, port = start["master"]
    ranks = Ranks(run, RunPaths(Path(start["folder"])), place, leader.ahead_seconds)
    with ranks.log.open("w", encoding="utf-8") as log:
        try:
            chosen = where | ranks.variables(leader.interface)
            ranks.start(run_yaml, results, log, chosen, (address, port), memory_snapshot=memory_snapshot)
            while not link.wait_for("stop", seconds=0) and not link.is_lost:
                _tell(link, ranks.news())
                signals.sleep(LOOK_SECONDS)
        except StoppedError as stop:
            link.send(stopped_by=str(stop))
        finally:
            _tell(link, ranks.end_all())


def _tell(link: Link, ends: Iterable[End]) -> None:
    for end in ends:
        link.send(end=dataclasses.asdict(end))
