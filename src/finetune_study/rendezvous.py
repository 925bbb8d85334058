"""The launchers of a run, one on each of its nodes: they find each other, and tell each other what happens there.

The first one leads. It writes down in the run's folder where it listens; the others connect to it, and every
connection stays open until the run is over, so that a launcher that dies is noticed at once, however it dies. What is
said are JSON objects, one a line. A run on one node is a team of one, which speaks with nobody.
"""

import fcntl
import json
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from finetune_study import record, signals
from finetune_study.errors import RunFailedError, UnfitNodeError
from finetune_study.paths import RunPaths
from finetune_study.run import Run
from finetune_study.slurm import srun

JOIN_SECONDS = 300.0
"""srun starts all launchers within seconds; what they load first may come from a slow file system on one node, and not
on another. GPUs of all nodes are held meanwhile."""

CHECK_SECONDS = 120.0
"""A node has been checked by then: more than the patience with its GPUs and with SLURM (allocation.py) together."""

CONNECT_SECONDS = 5.0
"""An address that does not answer by then is not the right one."""

SEND_SECONDS = 30.0
"""A launcher that takes nothing for so long hangs."""

LOOK_SECONDS = 0.2
"""Between two looks for the leader's file."""

F_SETOWN_EX, F_OWNER_TID = 15, 0
"""fcntl(2): who gets the signal is named by its kind and number; Python has no names for these (Linux's fcntl.h)."""

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Place:
    """Which of a run's nodes this is."""

    number: int = 0
    """0 leads."""
    nodes: int = 1
    step: str | None = None
    """The step of SLURM that started the launchers, each start by another name; None: there is none."""

    @classmethod
    def of(cls, run: Run, environment: Mapping[str, str]) -> Self:
        """The place of this process, from the variables that srun sets."""
        if run.nodes == 1:
            return cls()
        number = int(environment.get("SLURM_PROCID", 0))
        counts = {environment.get(f"SLURM_STEP_NUM_{what}") for what in ("NODES", "TASKS")}
        if counts != {str(run.nodes)}:
            return cls(number, run.nodes)
        parts = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID")
        return cls(number, run.nodes, ".".join(environment.get(name, "0") for name in parts))

    def check(self, run: Run) -> None:
        """
        Raises:
            RunFailedError: when nobody starts a launcher on each of the other nodes.
        """
        if self.nodes > 1 and self.step is None:
            raise RunFailedError(
                f"This run takes {self.nodes} nodes, and was not started on each of them",
                where=own_name(),
                allowed=f"one launcher on each of {self.nodes} nodes, in one step of a SLURM job",
                do="run it with `snakemake --profile slurm`; by hand, inside an allocation of so many nodes: "
                f"{' '.join(srun(run))} python -m finetune_study.launch <run.yaml>",
            )


def own_name() -> str:
    """Of this node: SLURM's for it, where there is one."""
    return os.environ.get("SLURMD_NODENAME") or os.uname().nodename


class Link:
    """A connection to another launcher. SIGIO tells that something came."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket, self._rest = connection, b""
        self._said: list[dict[str, Any]] = []
        self.is_lost = False
        """The other one is gone, and has said all that it will ever say."""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        _tell_by_signal(connection)

    @property
    def own_address(self) -> str:
        """Address of this node on the network that leads to the other one."""
        return str(self._socket.getsockname()[0])

    def send(self, **message: Any) -> None:
        """Says something; to one that is gone in vain, which `hear` notices."""
        with suppress(OSError):
            self._socket.settimeout(SEND_SECONDS)
            self._socket.sendall((json.dumps(message) + "\n").encode())

    def hear(self) -> list[dict[str, Any]]:
        """What the other one said since the last time."""
        self._socket.setblocking(False)
        try:
            while data := self._socket.recv(1 << 16):
                self._rest += data
            self.is_lost = True
        except BlockingIOError:
            pass
        except OSError:
            self.is_lost = True
        *lines, self._rest = self._rest.split(b"\n")
        new = [json.loads(line) for line in lines]
        self._said += new
        return new

    def heard(self, key: str) -> Any:
        """The last thing of this name that the other one has said so far; None where there is none."""
        return next((message[key] for message in reversed(self._said) if key in message), None)

    def wait_for(self, *keys: str, seconds: float) -> bool:
        """Waits until the other one has said one of these; whether it did in time.

        Raises:
            StoppedError: when a signal comes first.
        """
        until = time.monotonic() + seconds
        while True:
            self.hear()  # before any sleep: the signal may have come while somebody else was waited for
            if any(self.heard(key) is not None for key in keys):
                return True
            if self.is_lost or time.monotonic() >= until:
                return False
            signals.sleep(until - time.monotonic())

    def close(self) -> None:
        self._socket.close()


def _tell_by_signal(connection: socket.socket) -> None:
    """The kernel sends SIGIO when something can be read: to this thread, since others may not be waiting for it."""
    fcntl.fcntl(connection, F_SETOWN_EX, struct.pack("ii", F_OWNER_TID, threading.get_native_id()))
    fcntl.fcntl(connection, fcntl.F_SETFL, fcntl.fcntl(connection, fcntl.F_GETFL) | os.O_ASYNC)


# --- the first node --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Member:
    """Another node of the run, as the first one knows it."""

    number: int
    host: str
    link: Link

    @property
    def name(self) -> str:
        """For a reader."""
        return f"node {self.number} ({self.host})"


class Team:
    """The other nodes of a run, led from the first one."""

    def __init__(self, paths: RunPaths, place: Place) -> None:
        """
        Args:
            paths: of the run, where its run.yaml lies.
            place: of this node.
        """
        self.place = place
        self.members: dict[int, Member] = {}
        """The others by their numbers."""
        self._token = secrets.token_hex(16)
        self._strangers: list[Link] = []
        self._paths, self._listener = paths, None if place.step is None else self._listen(paths.rendezvous(place.step))

    def _listen(self, path: Path) -> socket.socket:
        listener = socket.create_server(("", 0), backlog=self.place.nodes)
        listener.setblocking(False)
        _tell_by_signal(listener)
        where = {"addresses": _addresses(), "port": listener.getsockname()[1], "token": self._token}
        record.write_atomically(path, json.dumps(where), mode=0o600)
        return listener

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Lets the others go home, those that come later too."""
        if self._listener is None or self.place.step is None:
            return
        path = self._paths.rendezvous(self.place.step)
        if self._is_complete():
            path.unlink(missing_ok=True)
        else:
            record.write_atomically(path, json.dumps({"over": True}))
        self.tell(over=True)
        for link in (*self._strangers, *(member.link for member in self.members.values())):
            link.close()
        self._listener.close()

    def _is_complete(self) -> bool:
        return len(self.members) == self.place.nodes - 1

    @property
    def address(self) -> str:
        """Of this node, as the others reach it."""
        return next((member.link.own_address for member in self.members.values()), LOOPBACK)

    @property
    def interface(self) -> str:
        """Network interface of this node that leads to the others."""
        return interface_of(self.address)

    @property
    def stopped_by(self) -> str | None:
        """The signal that ended the run on another node, and where."""
        stops = ((member.link.heard("stopped_by"), member.name) for member in self.members.values())
        return next((f"{signal} on {name}" for signal, name in stops if signal), None)

    def gather(self, seconds: float = JOIN_SECONDS) -> None:
        """Waits until every node has its launcher.

        Raises:
            RunFailedError: when one does not come.
            StoppedError: when a signal comes first.
        """
        for left in self._paths.folder.glob(self._paths.rendezvous("*").name):
            if left != self._paths.rendezvous(self.place.step or ""):
                left.unlink(missing_ok=True)  # of a try whose launcher was killed
        until = time.monotonic() + seconds
        while True:
            self.hear()
            if self._is_complete():
                return
            if time.monotonic() >= until:
                came = ", ".join(member.name for member in self.members.values()) or "none"
                raise RunFailedError(
                    f"Not every node of the run has a launcher {seconds:g} s after the first one",
                    where=own_name(),
                    given=f"of {self.place.nodes - 1} others came: {came}",
                    do="the job's log says what happened on the others: the software must start on every node, and the "
                    "nodes must reach each other by TCP",
                )
            signals.sleep(until - time.monotonic())

    def checks(self, seconds: float = CHECK_SECONDS) -> dict[int, dict[str, Any]]:
        """What the others found on their nodes, by their numbers.

        Raises:
            UnfitNodeError: when one is not what the run asks for.
            RunFailedError: when one can't be checked, or its launcher is gone.
            StoppedError: when a signal comes first.
        """
        for member in self.members.values():
            if not member.link.wait_for("allocation", "refusal", seconds=seconds):
                raise RunFailedError(
                    "A node's launcher ended, or hangs, before anything was measured",
                    where=member.name,
                    do="the job's log says what happened there",
                )
        if refusals := [refusal for m in self.members.values() if (refusal := m.link.heard("refusal")) is not None]:
            unfit = tuple(member.host for member in self.members.values() if member.link.heard("is_unfit"))
            error = (UnfitNodeError if unfit else RunFailedError)("\n".join(refusals))
            if isinstance(error, UnfitNodeError):
                error.nodes = unfit
            raise error
        return {number: member.link.heard("allocation") for number, member in self.members.items()}

    def tell(self, **message: Any) -> None:
        """Says something to all others."""
        for member in self.members.values():
            member.link.send(**message)

    def hear(self) -> list[dict[str, Any]]:
        """What the others said since the last time."""
        self._welcome()
        return [message for member in self.members.values() for message in member.link.hear()]

    def _welcome(self) -> None:
        """Those who connect must know what only the run's folder says; all else that knocks is sent away."""
        if self._listener is None:
            return
        with suppress(BlockingIOError):
            while True:
                self._strangers.append(Link(self._listener.accept()[0]))
        for link in [*self._strangers]:
            greeting = next(iter(_greetings(link)), None)
            if greeting is not None and greeting.get("token") == self._token:
                link.send(welcome=time.time())
                number = int(greeting["node"])
                self.members[number] = Member(number, str(greeting["host"]), link)
            elif greeting is not None or link.is_lost:
                link.close()
            else:
                continue
            self._strangers.remove(link)


def _greetings(link: Link) -> list[dict[str, Any]]:
    try:
        return [message if isinstance(message, dict) else {} for message in link.hear()]
    except ValueError:  # no JSON: somebody else's
        return [{}]


def _addresses() -> list[str]:
    """Where other nodes may find this one: its name, then its addresses on all networks."""
    import psutil

    own = [address.address for found in psutil.net_if_addrs().values() for address in found if _is_ip4(address)]
    return [socket.gethostname(), *(address for address in own if address != LOOPBACK)]


def _is_ip4(address: Any) -> bool:
    return bool(address.family == socket.AF_INET)


def interface_of(address: str) -> str:
    """Name of the network interface that has an address of this node."""
    import psutil

    # A name may stand for any address of the loopback, as Debian's own does; the interface lists one of them.
    wanted = LOOPBACK if address.startswith("127.") else address
    found = psutil.net_if_addrs().items()
    return next(str(name) for name, addresses in found if any(one.address == wanted for one in addresses))


# --- the other nodes -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Leader:
    """The first node, as another one knows it."""

    link: Link
    ahead_seconds: float
    """Of its clock over this node's."""

    @property
    def interface(self) -> str:
        """Network interface of this node that leads to the first one."""
        return interface_of(self.link.own_address)


def join(paths: RunPaths, place: Place, seconds: float = JOIN_SECONDS) -> Leader | None:
    """Finds the run's first node; None when it is over there already.

    Args:
        paths: of the run, where its run.yaml lies.
        place: of this node.
        seconds: how long it is looked for.

    Raises:
        RunFailedError: when it is not found.
        StoppedError: when a signal comes first.
    """
    assert place.step is not None
    path, until = paths.rendezvous(place.step), time.monotonic() + seconds
    while time.monotonic() < until:
        where = _read(path)
        if where.get("over"):
            return None
        for address in where.get("addresses", ()):
            if (leader := _connect(address, where, place)) is not None:
                return leader
        signals.sleep(LOOK_SECONDS)
    raise RunFailedError(
        f"The launcher of the run's first node can't be reached after {seconds:g} s",
        where=own_name(),
        given=f"it listens at {', '.join(where['addresses'])}, port {where['port']}"
        if where
        else f"there is no {path}",
        do="the job's log says what happened on the first node; nodes must share the run's folder and reach each other "
        "by TCP",
    )


def _read(path: Path) -> dict[str, Any]:
    os.listdir(path.parent)  # a network file system looks again then
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError):
        return {}


def _connect(address: str, where: Mapping[str, Any], place: Place) -> Leader | None:
    """The leader, if it is what answers at this address; another machine may have the same one on a private network."""
    try:
        connection = socket.create_connection((address, where["port"]), CONNECT_SECONDS)
    except OSError:
        return None
    link = Link(connection)
    link.send(token=where["token"], node=place.number, host=own_name())
    if link.wait_for("welcome", seconds=CONNECT_SECONDS):
        return Leader(link, link.heard("welcome") - time.time())
    link.close()
    return None
