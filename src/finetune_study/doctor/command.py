"""`finetune-study doctor`: examines, shows, describes."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from finetune_study.config import Config
from finetune_study.doctor import describe as describe_module
from finetune_study.doctor import show
from finetune_study.doctor.examine import examine
from finetune_study.errors import StudyError
from finetune_study.paths import Results

WIDE = 160
"""Characters of a table where there is no terminal: the 80 that rich takes are too few for five columns."""


def run(
    config: Config | None,
    results: Results,
    *,
    only: Sequence[str],
    with_jobs: bool,
    wait_minutes: float,
    as_json: bool,
    describe: bool,
    file: Path | None,
    force: bool,
) -> bool:
    """Does what the command line says; whether nothing is wrong.

    Raises:
        StudyError: for options that do not go together, or a description that can't be written.
    """
    if (file is not None or force) and not describe:
        raise StudyError(
            "A file is named, and nothing is to be written",
            given=file or "--force",
            do="add --describe, or leave the file out",
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDE)
    done = examine(
        config,
        results,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        only=only,
        with_jobs=with_jobs,
        wait_minutes=wait_minutes,
        with_drafts=describe,
    )
    written: Path | None = None
    if describe and done.cluster is not None and (text := done.description()) is not None:
        path = file or Path("slurm") / f"{done.cluster.name}.yaml"
        written = describe_module.write(path, text, force=force)
    if as_json:
        print(show.as_json(done, str(written) if written else None))
    else:
        show.table(done, console)
        if written is not None:
            kept = f" ({path} was there already and is as it was; --force replaces it)" if written != path else ""
            console.print(f"description: {written}{kept}", highlight=False)
    return done.is_well
