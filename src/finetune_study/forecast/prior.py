"""prior.json of a run: what was predicted of it before it was submitted, frozen then.

A forecast stands in runs/<run_id>/forecast.json and may change as long as the run waits: a calibration, or runs that
were measured meanwhile, refine it. When the run is submitted, it is copied to prior.json, which nothing changes any
more and the error is counted against. The copying is done by who submits (before_submit), or else by the run's own
supervisor (launch) before it starts anything: no edge of the workflow, no job of its own, and no import of torch.
"""

import json
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from finetune_study import run as run_module
from finetune_study.errors import StudyError
from finetune_study.paths import Results, RunPaths
from finetune_study.record import write_atomically
from finetune_study.run import Run

SECONDS = 60.0
"""What a submission waits at most for predictions of runs that nobody has forecast; the others go without a prior."""


def is_hopeless(row: Mapping[str, Any], margin: float | None) -> bool:
    """Whether what is expected of a run (`margin_gib`, `memory_gib`) is beyond the device by this share of it."""
    left, memory = row.get("margin_gib"), row.get("memory_gib")
    if margin is None or left is None or memory is None:
        return False
    return bool(-left > margin * memory)


def still_hopeless(paths: RunPaths, margin: float | None) -> bool:
    """The same of a run that was not tried, from its forecast as it lies there; where it does not say, it holds."""
    row = expected(paths)
    known = row.get("margin_gib") is not None and row.get("memory_gib") is not None
    return is_hopeless(row, margin) if known else margin is not None


def expected(paths: RunPaths) -> dict[str, Any]:
    """The forecast of a run as it lies there; empty where there is none."""
    try:
        found = json.loads(paths.forecast.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def freeze(paths: RunPaths) -> None:
    """Makes the present forecast of a run its prior, unless it has one.

    A run that was measured before gets none: what is forecast of it now may have been learnt from it.
    """
    if paths.prior.exists() or paths.record.exists() or paths.superseded.exists():
        return
    with suppress(FileNotFoundError):
        write_atomically(paths.prior, paths.forecast.read_text(encoding="utf-8"))


def freeze_all(run_ids: Iterable[str], results: Results, seconds: float = SECONDS) -> None:
    """The same for runs that are submitted now; of GPU runs what nobody forecast is predicted, as far as time allows.

    A run on a CPU, which costs nothing, has a prior where a forecast was asked for.
    """
    missing: dict[str, Run] = {}
    for run_id in run_ids:
        paths = results.run(run_id)
        freeze(paths)
        if not paths.prior.exists() and not paths.superseded.exists():
            with suppress(StudyError, OSError):  # a run that can't be read says so in its own log
                missing[run_id] = run_module.load(paths.run_yaml)
    on_gpus = [run for run in missing.values() if run.hardware.device != "cpu"]
    if on_gpus:
        _predict(on_gpus, results, time.monotonic() + seconds)


def _predict(runs: list[Run], results: Results, until: float) -> None:
    from finetune_study.forecast import predict, study  # these import torch, once traces are missing

    traces = predict.Traces(results.traces)
    for run in runs:
        if time.monotonic() > until:
            return
        paths = results.run(run.run_id)
        with suppress(StudyError, OSError):  # the run goes without
            study.keep(paths, study.row_of_run(run, results, traces))
            freeze(paths)
