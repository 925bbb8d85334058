"""Prepared folders: written whole or not at all, with a manifest that says what they hold."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from finetune_study.errors import StudyError
from finetune_study.paths import MANIFEST
from finetune_study.record import write_atomically


def say(message: str) -> None:
    """One plain line of progress; no bars, which fill logs."""
    print(message, flush=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a prepared folder holds; None where it is not prepared, or not whole."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    # Weights are links to where they lie: a purged cache or a moved model leaves them dangling.
    whole = isinstance(manifest, dict) and all((folder / name).exists() for name in manifest.get("files", []))
    return manifest if whole else None


@contextmanager
def new_folder(out: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A folder to fill, and its manifest; both are put in place together when the block ends without an error.

    Raises:
        StudyError: when the place can't be written.
    """
    temporary = out.parent / f".{out.name}.partial"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        raise StudyError("Nothing can be prepared here", where=str(out.parent), given=error.strerror) from None
    manifest: dict[str, Any] = {}
    try:
        yield temporary, manifest
        manifest["files"] = sorted(str(p.relative_to(temporary)) for p in temporary.rglob("*") if not p.is_dir())
        write_atomically(temporary / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        shutil.rmtree(out, ignore_errors=True)
        temporary.rename(out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def first_line(error: BaseException) -> str:
    """An error in one line, for a message that names it as a cause."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0] if text else 'no message'}"
