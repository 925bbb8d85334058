"""A process that traces: python -m finetune_study.forecast.worker FOLDER."""

import contextlib
import json
import sys
from pathlib import Path

from finetune_study.errors import StudyError
from finetune_study.forecast.layout import Layout
from finetune_study.forecast.predict import Traces


def main(folder: Path) -> None:
    """Traces the layouts that come as JSON lines into a folder; one that can't be traced is passed over."""
    traces = Traces(folder)
    for line in sys.stdin:
        with contextlib.suppress(StudyError):
            traces.get(Layout(**json.loads(line)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
