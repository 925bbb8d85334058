"""What a job of the doctor does on its node: looks, and writes down what it sees; what that means is judged elsewhere.

    python -m finetune_study.doctor.node <folder>

imports neither torch nor its libraries: that these are missing, or broken, is something to be told.
"""

import fcntl
import hashlib
import importlib.metadata
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
from pathlib import Path
from typing import Any

import finetune_study
from finetune_study import allocation, places, ranks, variables
from finetune_study.allocation import Asked
from finetune_study.config import Places
from finetune_study.errors import StudyError
from finetune_study.facts import Facts
from finetune_study.measure import cgroup
from finetune_study.paths import Results
from finetune_study.run import Run
from finetune_study.section import Section

REQUEST, BEGAN, GPUS, ENDED, LOCK, PING, PONG = "request.json", "began", "gpus.csv", "ended", "lock", "ping", "pong"
"""Names in the folder of a job."""

SEEN_SECONDS = 60.0
"""How long the login node may take to see a file: as long as NFS keeps what it knows of a folder (acdirmax)."""

PEERS_SECONDS = 10.0
"""Peers of a rank that failed have so long to end by themselves."""

RANKS_SECONDS = 420.0
"""For all that the ranks do: imports from a slow file system and a compiler for DeepSpeed's optimizer take minutes."""

NETWORK_SECONDS = 3.0

GIB = 2**30


class Request(Section):
    """What the node is asked to look at."""

    runs: dict[str, Run]
    """A pretended run for each hardware entry; they differ in what the entries say of the GPU."""
    asked: dict[str, Asked]
    uses_offload: bool
    """Whether the study needs DeepSpeed's compiled optimizer, which is then built and loaded."""
    packages: list[str] = []
    """What the study's techniques import beside what all training uses."""
    places: Places = Places()
    """Where caches and temporary files go."""


def facts_of_node(folder: Path) -> Path:
    return folder / "node.jsonl"


def facts_of_rank(folder: Path, rank: int) -> Path:
    return folder / f"rank-{rank}.jsonl"


def look(folder: Path) -> None:
    """Tells everything about this node, one fact after the other: what ends it leaves what was told."""
    facts = Facts(facts_of_node(folder))
    facts.tell(
        host=os.environ.get("SLURMD_NODENAME") or socket.gethostname(),
        python=platform.python_version(),
        executable=sys.executable,
        version=importlib.metadata.version("finetune-study"),
        sources=sources_digest(),
        package=str(Path(finetune_study.__file__).parent),
        startup_seconds=round(time.time() - float((folder / BEGAN).read_text(encoding="ascii")), 1),
    )
    request = Request.model_validate_json((folder / REQUEST).read_text(encoding="utf-8"))
    facts.tell(seen_after_seconds=_ping(folder), lock=_lock(folder / LOCK))
    facts.tell(
        temporary=_folder(str(places.temporary_of(request.places) or tempfile.gettempdir())),
        home=_folder(os.path.expanduser("~")),
        cores=len(os.sched_getaffinity(0)),
        memory_limit_bytes=cgroup.memory_limit_bytes(),
    )
    for name, run in request.runs.items():
        facts.append("allocation", {"entry": name, **_allocation(run, request.asked[name])})
    some_run = next(iter(request.runs.values()))
    kills_before = cgroup.oom_kills()
    with places.opened(request.places, some_run, Results(folder.parents[1])) as where:
        facts.tell(ranks=_ranks(some_run, folder, where, request))
    kills = cgroup.oom_kills()
    facts.tell(oom_kills=None if kills is None or kills_before is None else kills - kills_before)
    facts.tell(network=_network())
    facts.ended("completed")


def sources_digest() -> str:
    """Digest of this project's own code, which has to be the same on all machines."""
    folder = Path(finetune_study.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _allocation(run: Run, asked: Asked) -> dict[str, Any]:
    """What a run finds here before it measures, or why it would refuse."""
    try:
        return allocation.check(run, asked, os.environ)
    except StudyError as error:
        return {"error": str(error)}


def _ping(folder: Path) -> float | None:
    """Seconds until the login node has seen a file of ours and we its answer; None when that does not happen."""
    began = time.monotonic()
    (folder / PING).touch()
    while time.monotonic() < began + SEEN_SECONDS:
        if (folder / PONG).exists():
            return round(time.monotonic() - began, 2)
        time.sleep(0.05)
    return None


def _lock(path: Path) -> str:
    """Whether a file that the login node holds locked is locked here too: `held`, `free`, or the error."""
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "held"
        except OSError as error:
            return str(error.strerror)
    return "free"


def _folder(path: str) -> dict[str, Any]:
    try:
        with tempfile.NamedTemporaryFile(dir=path) as file:
            file.write(b"x")
            file.flush()
        return {"path": path, "free_gib": round(shutil.disk_usage(path).free / GIB, 1)}
    except OSError as error:
        return {"path": path, "error": error.strerror}


def _network() -> dict[str, Any]:
    """Whether the hub can be reached from here; nothing of a run needs that."""
    host = urllib.parse.urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname or ""
    try:
        socket.create_connection((host, 443), NETWORK_SECONDS).close()
    except OSError as error:
        return {"host": host, "error": str(error)}
    return {"host": host}


def _ranks(run: Run, folder: Path, where: dict[str, str], request: Request) -> list[str]:
    """Starts the ranks as `launch` does, each with its own environment; how each ended."""
    master = ("127.0.0.1", ranks.free_port())
    chosen = where | variables.set_for(run, variables.threads_of_rank(run.num_gpus, os.environ), os.environ)
    processes = []
    for rank in range(run.num_gpus):
        command = [
            sys.executable,
            "-m",
            "finetune_study.doctor.rank",
            str(facts_of_rank(folder, rank)),
            run.hardware.device,
        ]
        environment = (
            variables.passed_on(os.environ) | chosen | variables.for_rank(rank, run.num_gpus, run.num_gpus, master)
        )
        process = subprocess.Popen(
            [*command, *request.packages, *(["--build"] if request.uses_offload else [])],
            env=environment,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        processes.append(process)
    return _ends(processes)


def _ends(processes: list["subprocess.Popen[bytes]"]) -> list[str]:
    """Waits for all; the peers of one that failed, which wait for it in vain, have a moment left."""
    until = time.monotonic() + RANKS_SECONDS
    while time.monotonic() < until and any(process.poll() is None for process in processes):
        if any(process.poll() for process in processes):
            until = min(until, time.monotonic() + PEERS_SECONDS)
        time.sleep(0.1)
    endings = []
    for process in processes:
        status = process.poll()
        if status is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        endings.append(
            "did not end, and was killed" if status is None
            else "ended" if status == 0
            else f"killed by {signal.Signals(-status).name}" if status < 0
            else f"exit status {status}"
        )  # fmt: skip
    return endings


if __name__ == "__main__":
    look(Path(sys.argv[1]))
