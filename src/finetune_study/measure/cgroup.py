"""What the memory cgroup of a process says: its limit, and whether the kernel killed for it."""

import os
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def _folders(pid: int) -> list[tuple[Path, str, str]]:
    """Folder of the memory controller, name of its event file and of its limit file: version 2, else 1."""
    try:
        lines = Path(f"/proc/{pid}/cgroup").read_text(encoding="ascii").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found += [(root / path.lstrip("/"), "memory.events", "memory.max") for root in (ROOT, ROOT / "unified")]
        elif "memory" in controllers.split(","):
            found.append((ROOT / "memory" / path.lstrip("/"), "memory.oom_control", "memory.limit_in_bytes"))
    return found


def _counter(path: Path) -> int | None:
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def oom_kills(pid: int | None = None) -> int | None:
    """Processes that the kernel killed so far because this process's memory cgroup was full.

    Where no cgroup can be read, the count of the whole machine stands in (/proc/vmstat); None where that is hidden too.
    """
    for folder, events, _ in _folders(pid or os.getpid()):
        if (count := _counter(folder / events)) is not None:
            return count
    return _counter(Path("/proc/vmstat"))


def memory_limit_bytes(pid: int | None = None) -> int | None:
    """The limit of the process's own memory cgroup; None when there is none."""
    for folder, _, limit in _folders(pid or os.getpid()):
        try:
            text = (folder / limit).read_text(encoding="ascii").strip()
        except OSError:
            continue
        # Version 1 writes "no limit" as the largest page-aligned number.
        return None if text == "max" or int(text) >= 2**62 else int(text)
    return None
