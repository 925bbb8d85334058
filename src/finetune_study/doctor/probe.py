"""One short job for each kind of place: submitted, waited for, cancelled when it can't start."""

import fcntl
import shlex
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_study import facts, software
from finetune_study.allocation import Asked
from finetune_study.doctor import entries as entries_module
from finetune_study.doctor import scheduler
from finetune_study.doctor.entries import Entry
from finetune_study.doctor.limits import gpus_of
from finetune_study.doctor.node import (
    BEGAN,
    ENDED,
    GPUS,
    LOCK,
    PING,
    PONG,
    REQUEST,
    Request,
    facts_of_node,
    facts_of_rank,
)
from finetune_study.doctor.scheduler import UNLIMITED, Cluster, Queued, SchedulerError
from finetune_study.paths import Results
from finetune_study.record import write_atomically

NEVER_STARTS = (
    "PartitionTimeLimit", "PartitionNodeLimit", "PartitionDown", "PartitionInactive", "BadConstraints",
    "InvalidAccount", "InvalidQOS", "AccountNotAllowed", "QOSNotAllowed", "JobHeldAdmin", "JobHeldUser",
)  # fmt: skip
"""Reasons of squeue(1)'s JOB REASON CODES that do not pass by themselves."""

KILLED = ("CANCELLED", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "TIMEOUT")
"""States of squeue(1)'s JOB STATE CODES of a job that could not say its last word: nothing is to be waited for."""

LATENCY_SECONDS = 30.0
"""How long a file of a node may take to be seen here: `latency-wait` of slurm/config.yaml."""

LOOK_SECONDS, ASK_SECONDS = 0.2, 2.0
"""How often files are looked at, and SLURM is asked about all jobs at once."""

LOG_LINES = 15

SCRIPT = """\
#!/bin/bash
# Written by `finetune-study doctor`: looks at a node as a run on {names} would find it.
cd {workdir} || exit 1
date +%s.%N > {began}
# By the driver's own tool, which needs none of our software; older ones do not know the last field.
fields=name,memory.total,driver_version
nvidia-smi --query-gpu=$fields,compute_cap --format=csv,noheader,nounits > {gpus} 2> /dev/null ||
    nvidia-smi --query-gpu=$fields --format=csv,noheader,nounits > {gpus} 2> /dev/null || rm -f {gpus}
(set -euo pipefail; {command})
echo $? > {ended}
"""


@dataclass
class Probe:
    """One job, the entries that it answers for, and what became of it."""

    entries: list[Entry]
    num_gpus: int
    folder: Path
    resources: dict[str, str | int | None]
    """What it asks of SLURM, as `slurm.resources` names it."""
    slurm_id: str | None = None
    queued: Queued | None = None
    """What SLURM said of it last."""
    gone_since: float | None = None
    problem: str = ""
    """Why there is no answer; empty where there is one."""
    mend: str = ""
    seconds: float = 0.0
    """From its submission to its end."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What the node said."""
    ranks: list[dict[str, Any]] = field(default_factory=list)
    """What each rank said."""
    gpus: list[dict[str, str]] = field(default_factory=list)
    """What nvidia-smi said; empty where there is none."""
    log: str = ""

    @property
    def is_over(self) -> bool:
        return bool(self.problem) or (self.folder / ENDED).exists()

    def answer(self) -> None:
        """Tells the node that its file was seen here."""
        if (self.folder / PING).exists() and not (self.folder / PONG).exists():
            (self.folder / PONG).touch()

    def read(self) -> None:
        """Takes in all that the job left."""
        self.facts = facts.read(facts_of_node(self.folder))
        self.ranks = [facts.read(facts_of_rank(self.folder, rank)) for rank in range(self.num_gpus)]
        self.gpus = parse_gpus(_text(self.folder / GPUS))
        self.log = "\n".join(_text(self.folder / "job.log").splitlines()[-LOG_LINES:])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


GPU_FIELDS = ("name", "memory_mib", "driver", "compute_capability")


def parse_gpus(text: str) -> list[dict[str, str]]:
    """GPUs from `nvidia-smi --format=csv,noheader,nounits`, by GPU_FIELDS; what it does not know is left out."""
    rows = [[word.strip() for word in line.split(",")] for line in text.splitlines() if line.count(",") >= 2]
    return [
        {name: value for name, value in zip(GPU_FIELDS, row, strict=False) if not value.startswith("[")} for row in rows
    ]


def prepare(group: list[Entry], cluster: Cluster, results: Results) -> Probe:
    """Everything that a job needs, in a folder of its own in the study's."""
    entry = group[0]
    partition = cluster.partition(entry.hardware.slurm.partition)
    name = partition.name if partition else ""
    model = entry.hardware.slurm.gpu_model
    per_node = max((gpus_of(node, model) for node in cluster.nodes_of(name, model)), default=0)
    most = [
        entries_module.MAX_RANKS,
        entry.hardware.max_gpus,
        *([per_node] if per_node and entry.asks_for_gpus else []),
    ]
    num_gpus = 1 if entry.is_draft else min(most)
    runs = {one.name: entries_module.pretended(one, num_gpus) for one in group}
    longest = partition.max_minutes if partition else UNLIMITED
    asked = entries_module.probe_resources(entry, runs[entry.name], longest)
    folder = Path(tempfile.mkdtemp(prefix=f"{entry.name}-", dir=results.doctor)).absolute()
    request = Request(
        runs=runs,
        asked={one.name: Asked.of(one.hardware) for one in group},
        uses_offload=any(one.uses_offload for one in group),
        packages=sorted({package for one in group for package in one.packages_needed}),
        places=entry.places,
    )
    write_atomically(folder / REQUEST, request.model_dump_json())
    (folder / LOCK).touch()
    quoted = {
        key: shlex.quote(str(folder / file)) for key, file in (("began", BEGAN), ("gpus", GPUS), ("ended", ENDED))
    }
    cache = entry.places.cache or str(results.cache.absolute())
    interpreter = software.interpreter(entry.hardware.software, sys.executable, cache)
    script = SCRIPT.format(
        names=", ".join(runs),
        workdir=shlex.quote(str(Path.cwd())),
        command="true" if entry.is_draft else f"{interpreter} -m finetune_study.doctor.node {shlex.quote(str(folder))}",
        **quoted,
    )
    write_atomically(folder / "job.sh", script)
    return Probe(group, num_gpus, folder, asked)


def run(probes: Iterable[Probe], wait_minutes: float, say: Callable[[str], None]) -> None:
    """Submits all jobs and waits for them; none is left behind, also when the doctor is interrupted.

    Args:
        probes: prepared ones.
        wait_minutes: how long a job may wait in the queue; one that runs is waited for.
        say: takes lines of progress.
    """
    waiting: list[Probe] = []
    with ExitStack() as held:
        try:
            for probe in probes:
                lock = held.enter_context((probe.folder / LOCK).open("rb"))
                with suppress(OSError):  # that it can't be locked is found by another check
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _submit(probe, say)
                if probe.slurm_id is not None:
                    waiting.append(probe)
            _wait(waiting, wait_minutes, say)
        finally:
            for probe in waiting:
                if not (probe.folder / ENDED).exists():
                    with suppress(SchedulerError):
                        scheduler.cancel(str(probe.slurm_id))


def _submit(probe: Probe, say: Callable[[str], None]) -> None:
    names = ", ".join(entry.name for entry in probe.entries)
    output = str(probe.folder / "job.log").replace("%", "%%")
    try:
        words = [*scheduler.options(probe.resources), f"--output={output}", "--no-requeue"]
        probe.slurm_id = scheduler.submit(words, probe.folder / "job.sh")
        say(f"{names}: SLURM job {probe.slurm_id}")
    except SchedulerError as error:
        probe.problem = f"SLURM refuses it: {error}"
        probe.mend = f"mend hardware.{probe.entries[0].name}.slurm"


def _wait(probes: list[Probe], wait_minutes: float, say: Callable[[str], None]) -> None:
    began = time.monotonic()
    ask_at = began
    said: dict[str, str] = {}
    while waiting := [probe for probe in probes if not probe.is_over]:
        for probe in waiting:
            probe.answer()
        now = time.monotonic()
        if now >= ask_at:
            ask_at = now + ASK_SECONDS
            queued = _queue(waiting)
            for probe in waiting:
                _follow(probe, queued, now, began + 60 * wait_minutes)
                words = f"{probe.queued.state} ({probe.queued.reason})" if probe.queued else "ended"
                if said.get(str(probe.slurm_id)) != words:
                    said[str(probe.slurm_id)] = words
                    say(f"{probe.entries[0].name}: SLURM job {probe.slurm_id} {words}")
        time.sleep(LOOK_SECONDS)
    for probe in probes:
        probe.seconds = time.monotonic() - began
        probe.read()


def _queue(probes: list[Probe]) -> dict[str, Queued] | None:
    """What SLURM says of the jobs; None while it does not answer."""
    try:
        return scheduler.queue(str(probe.slurm_id) for probe in probes)
    except SchedulerError:
        return None


def _follow(probe: Probe, queued: dict[str, Queued] | None, now: float, wait_until: float) -> None:
    """Decides whether there is still something to wait for."""
    job = str(probe.slurm_id)
    if queued is not None:
        probe.queued = queued.get(job)
        if probe.queued is None:
            probe.gone_since = probe.gone_since or now
            ending = scheduler.end_of(job)
            was_killed = ending.startswith(KILLED)
            if not probe.is_over and (was_killed or now > probe.gone_since + LATENCY_SECONDS):
                probe.problem = f"job {job} ended without a word seen here: {ending}"
                probe.mend = (
                    "call the doctor again: somebody or something ended the job"
                    if was_killed
                    else f"is {probe.folder} seen on the nodes under this path? Its log, if there is one: job.log there"
                )
            return
        probe.gone_since = None
        if probe.queued.state == "PENDING":
            never = any(word in probe.queued.reason for word in NEVER_STARTS) or "PerJob" in probe.queued.reason
            if never or now > wait_until:
                will = "will never start" if never else "did not start in time"
                probe.problem = f"job {job} {will}, and was cancelled: {probe.queued.reason}"
                probe.mend = (
                    f"mend hardware.{probe.entries[0].name}.slurm (`man squeue` explains the reason)"
                    if never
                    else "wait longer with --wait-minutes, or try when the queue is shorter (`squeue --start`)"
                )
            return
    if now > wait_until + 60 * (float(probe.resources["runtime"] or 0) + 2):
        probe.problem = f"job {job} does not end"
        probe.mend = "look at `scontrol show job` and at the node's state"


def tidy(probe: Probe) -> None:
    """Takes the job's folder away, and the folder of all jobs with the last of them."""
    shutil.rmtree(probe.folder, ignore_errors=True)
    with suppress(OSError):
        probe.folder.parent.rmdir()


def exit_status(probe: Probe) -> str:
    """What the node's part ended with."""
    return _text(probe.folder / ENDED).strip()


def dump(probe: Probe) -> dict[str, Any]:
    """For scripts: everything that was found."""
    return {
        "hardware": [entry.name for entry in probe.entries],
        "slurm_job_id": probe.slurm_id,
        "problem": probe.problem or None,
        "node": probe.facts,
        "ranks": probe.ranks,
        "gpus": probe.gpus,
    }
