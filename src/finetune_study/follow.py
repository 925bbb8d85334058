"""A run's supervisor on every node but the first: starts its ranks when the first one says so, tells how they ended."""

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

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
    results: Results,
    paths: RunPaths,
    place: Place,
    asked: Asked,
    folders: Places,
) -> int:
    """Does this node's part of a run.

    Args:
        run: what to do.
        results: where prepared models and data lie.
        paths: of the run, where its run.yaml lies.
        place: of this node.
        asked: what the node must offer beside what the run says.
        folders: where caches and temporary files go.

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
                        for start in _starts(link):
                            _work(run, results, leader, place, where, start)
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


def _starts(link: Link) -> Iterator[dict[str, Any]]:
    """What the first node says of each training, as it begins; a run of `max` has several."""
    done = 0
    while link.heard("over") is None and not link.is_lost:
        if (start := link.heard("start"))["number"] > done:
            done = start["number"]
            yield start
        else:
            signals.sleep(LOOK_SECONDS)
        link.hear()


def _work(
    run: Run, results: Results, leader: Leader, place: Place, where: dict[str, str], start: dict[str, Any]
) -> None:
    link, number = leader.link, start["number"]
    address, port = start["master"]
    ranks = Ranks(run, RunPaths(Path(start["folder"])), place, leader.ahead_seconds)
    with ranks.log.open("w" if number == 1 else "a", encoding="utf-8") as log:
        try:
            chosen, snapshot = where | ranks.variables(leader.interface), start["memory_snapshot"]
            ranks.start(Path(start["run_yaml"]), results, log, chosen, (address, port), memory_snapshot=snapshot)
            while not _is_stopped(link, number) and not link.is_lost:
                _tell(link, number, ranks.news())
                signals.sleep(LOOK_SECONDS)
        except StoppedError as stop:
            link.send(stopped_by=str(stop))
        finally:
            _tell(link, number, ranks.end_all())


def _is_stopped(link: Link, number: int) -> bool:
    link.hear()
    return (link.heard("stop") or 0) >= number


def _tell(link: Link, number: int, ends: Iterable[End]) -> None:
    for end in ends:
        link.send(training=number, end=dataclasses.asdict(end))
