"""Files of the repository that are made from the code, and committed."""

import difflib
from pathlib import Path

from finetune_study.errors import StudyError

LINES_SHOWN = 20
"""Of the difference."""


def put(path: Path, text: str, *, check: bool, source: str, repair: str) -> None:
    """Writes a file, or compares it.

    Args:
        path: of the file.
        text: all of it.
        check: change nothing.
        source: what it is made from, in words.
        repair: the command that makes it.

    Raises:
        StudyError: with `check`, where the file is out of step; it names the command.
    """
    if not check:
        path.write_text(text, encoding="utf-8")
        return
    found = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != text:
        changes = difflib.unified_diff(found.splitlines(), text.splitlines(), "committed", "generated", lineterm="")
        raise StudyError(
            f"{path} is out of step with {source}",
            given="\n".join(list(changes)[:LINES_SHOWN]),
            do=f"run `{repair}` and commit the result",
        )
