"""What every script of the workflow does: its log, its study, and messages for users without a traceback."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

from finetune_study import places
from finetune_study.errors import StudyError
from finetune_study.paths import RESULTS_FOLDER, Results
from finetune_study.study import CONFIG_FILE, Study, open_study


class _Tee:
    """Writes to the log and to the terminal."""

    def __init__(self, *streams: Any) -> None:
        self._streams = streams

    def write(self, text: str) -> int:
        for stream in self._streams:
            stream.write(text)
        return len(text)

    def flush(self) -> None:
        for stream in self._streams:
            stream.flush()


@contextmanager
def opened(snakemake: Any, open_it: Callable[..., Study] = open_study) -> Iterator[Study]:
    """The study, with everything that is printed going to the rule's log as well.

    Args:
        snakemake: the object that Snakemake gives its scripts.
        open_it: `study.as_planned` for a script that reads tables alone: of 100,000 runs, records take their time.
    """
    log = Path(snakemake.log[0])
    log.parent.mkdir(parents=True, exist_ok=True)
    with (
        log.open("w", encoding="utf-8", buffering=1) as stream,
        redirect_stdout(_Tee(sys.stdout, stream)),
        redirect_stderr(stream),
    ):
        try:
            files = snakemake.params.get("config_files", [CONFIG_FILE])
            study = open_it(snakemake.config, Results(RESULTS_FOLDER), files=files)
            places.enter(study.config.places, study.results)
            yield study
        except StudyError as error:
            print(f"\n{error}\n  log:     {log}\n")
            sys.exit(1)
