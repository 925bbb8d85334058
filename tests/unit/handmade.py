"""Studies made by hand: a small config, and records with the facts that ranks report."""

from pathlib import Path
from typing import Any

import polars as pl

from finetune_study import config as config_module
from finetune_study import table
from finetune_study.cells import cells
from finetune_study.config import Config
from finetune_study.outcome import GIB
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun, plan
from finetune_study.record import Ending, Failure, Record, write_failure, write_record
from finetune_study.run import Run

MIB = 2**20
LLAMA = {"architecture": {"model_type": "llama", "hidden_size": 64}, "weights": "random"}


def study(**changes: Any) -> Config:
    """A CPU study of one target: recipes full and lora at context 128, one micro-batch, once."""
    settings: dict[str, Any] = {
        "models": {"tiny": LLAMA},
        "hardware": {"cpu": {"device": "cpu", "memory_gib": 1.0}},
        "recipes": {"full": [], "lora": ["lora"]},
        "grid": [{"targets": "tiny", "hardware": "cpu", "recipes": ["full", "lora"], "sequence_length": 128}],
        "protocol": {"num_untimed_steps": 1, "num_timed_steps": 3},
    }
    return config_module.parse(settings | changes)


def steps(*seconds: float, untimed: float = 9.0, loss: float = 3.0) -> list[dict[str, Any]]:
    """One untimed step, then the timed ones; the loss falls by 0.1 in each."""
    return [
        {
            "step": number,
            "seconds": value,
            "timed": number > 1,
            "stepped": True,
            "loss": loss - 0.1 * (number - 1),
            "real_tokens": 1000,
            "loss_tokens": 900,
        }
        for number, value in enumerate((untimed, *seconds), start=1)
    ]


def environment(
    software: str = "a" * 64, device: str = "Some CPU @ 2.5GHz", host: str = "node-1", lock: str = "e" * 64
) -> dict[str, Any]:
    return {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8"},
        "host": host,
        "device_name": device,
        "model": {"source": "random weights"},
        "data": {"sha256": "d" * 64, "num_train_available": 400},
        "software_sha256": software,
        "lock_sha256": lock,
        "commit": "c" * 40,
    }


def completed(run: Run, *seconds: float, used: float = 0.5, **environment_changes: str) -> Record:
    """A run whose ranks all took these seconds a step and at most `used` GiB of their device."""
    rank = {
        "steps": steps(*seconds),
        "memory": {"peak_device_used_bytes": int(used * GIB), "peak_rss_bytes": 2 * GIB},
        "evaluations": {"before": 3.5, "after": 2.5},
        "trainable_parameters": 10,
        "total_parameters": 100,
        "compute_dtype": "float32",
    }
    return Record(
        run=run,
        ending=Ending(status="completed"),
        started_at="2025-01-01T00:00:00Z",
        duration_seconds=36.0,
        environment=environment(**environment_changes),
        ranks=[rank] * run.num_gpus,
    )


def out_of_memory(run: Run, asked: int = 64 * MIB, held: int = 900 * MIB) -> Record:
    ending = Ending(
        status="device_oom",
        reason="DefaultCPUAllocator: can't allocate memory",
        phase="backward",
        step=1,
        rank=0,
        bytes_requested=asked,
        bytes_held=held,
    )
    return Record(run=run, ending=ending, environment=environment(), duration_seconds=20.0)


def unsupported(run: Run, reason: str) -> Record:
    return Record(run=run, ending=Ending(status="unsupported", reason=reason))


def timed_out(run: Run) -> Record:
    ending = Ending(status="timeout", reason="the time limit is over")
    return Record(run=run, ending=ending, environment=environment(), duration_seconds=1800.0)


def failure(run: Run, cause: str = "a bug", log_tail: str = "", attempt: int = 1) -> Failure:
    return Failure(run_id=run.run_id, attempt=attempt, cause=cause, log="results/launch.log", log_tail=log_tail)


def write(root: Path, *documents: Record | Failure) -> Results:
    """A results folder with these records and failures."""
    results = Results(root)
    for document in documents:
        if isinstance(document, Record):
            write_record(results.run(document.run.run_id), document)
        else:
            write_failure(results.run(document.run_id), document)
    return results


def runs(config: Config) -> dict[tuple[str, int], Run]:
    """Runs of the study by recipe and repeat."""
    return {(one.run.recipe, one.run.repeat): one.run for one in plan(config)}


def frame(config: Config, root: Path, *documents: Record | Failure) -> pl.DataFrame:
    return cells(plan(config), write(root, *documents), config.hardware)


def compared(config: Config, root: Path, *documents: Record | Failure) -> pl.DataFrame:
    return table.compare(frame(config, root, *documents), table.baseline_of(config))


def planned(config: Config) -> list[PlannedRun]:
    return plan(config)
