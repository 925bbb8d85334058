"""How a rank tells its supervisor what happens: one JSON object a line, written at once, read after its death, too."""

import json
import os
import time
from pathlib import Path
from typing import Any


class Facts:
    """The writing end. Facts of one kind either replace each other (`tell`) or add up (`append`)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Opened once and written without a buffer: when memory has run out, nothing new is needed to say so.
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)

    def _write(self, fact: dict[str, Any]) -> None:
        os.write(self._descriptor, (json.dumps(fact) + "\n").encode())

    def tell(self, **facts: Any) -> None:
        """Something about the run as a whole; later values replace earlier ones."""
        self._write(facts)

    def append(self, key: str, value: Any) -> None:
        """One more entry of a list."""
        self._write({"append": key, "value": value})

    def ended(self, how: str, **facts: Any) -> None:
        """How this rank ended: `completed`, `device_oom`, `host_oom` or `error`; the first word is the last."""
        self._write({"ended": {"how": how, "at": time.time(), **facts}})


def read(path: Path) -> dict[str, Any]:
    """Everything that a rank told, lists joined; a line that was cut off by a kill is left out."""
    facts: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except FileNotFoundError:
        return facts
    for line in lines:
        try:
            fact = json.loads(line)
        except ValueError:
            continue
        if "append" in fact:
            facts.setdefault(fact["append"], []).append(fact["value"])
        elif "ended" in fact:
            facts.setdefault("ended", fact["ended"])
        else:
            facts.update(fact)
    return facts
