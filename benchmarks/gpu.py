"""A small measured matrix on one GPU: Llama-2-7B's shape, random weights, in benchmarks/results/gpu/<gpu>.json.

    python benchmarks/gpu.py --write benchmarks/results/gpu [--minutes 20] [--ran techniques.json]
    python benchmarks/gpu.py --check

It needs Python, PyTorch with CUDA, and the packages of this project and its extra `training` (`make gpu-wheels`
collects them for a machine that can fetch nothing); the second call says what is missing. The file is written anew
after every run, so that one that is stopped keeps what it measured; that of an earlier call stays, as
<gpu>-<date>.json.
"""

# ruff: noqa: E402  (what is missing is said before anything imports it)

import argparse
import datetime
import importlib.util
import itertools
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

NEEDED = (
    "torch", "transformers", "accelerate", "peft", "deepspeed", "datasets", "bitsandbytes", "polars", "pydantic",
    "yaml", "psutil", "packaging",
)  # fmt: skip
"""Imports without which nothing here starts, or a recipe of the matrix fails."""
if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
    raise SystemExit(
        f"gpu.py: {sys.executable} lacks {', '.join(missing)}\n"
        "  do: install this project there, `python -m pip install '.[training]' pytest`, or make an environment with "
        "`make gpu-env`; for a machine that can fetch nothing, carry what `make gpu-wheels` collects elsewhere"
    )

from finetune_study import config, data, model_source, outcome, plan, record, techniques
from finetune_study import run as run_module
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun

LLAMA_2_7B: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "vocab_size": 32000,
    "rms_norm_eps": 1e-5,
}
"""config.json of meta-llama/Llama-2-7b-hf."""

LORA: dict[str, Any] = {"lora": {"r": 64, "lora_alpha": 32}}  # arXiv 2406.02290
QLORA: dict[str, Any] = {"qlora": {"r": 64, "lora_alpha": 32}}
CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": {}}

RECIPES: dict[str, dict[str, Any]] = {
    "lora-checkpoints": {**LORA, **CHECKPOINTS},
    "lora": LORA,
    "lora-eager": {**LORA, "eager": {}},
    "qlora-checkpoints": {**QLORA, **CHECKPOINTS},
    "full-checkpoints": {"bf16_pure": {}, **CHECKPOINTS},
    "full-checkpoints-adamw-8bit": {"bf16_pure": {}, **CHECKPOINTS, "adamw_8bit": {}},
    "full-mixed": {},
}
CONTEXTS = (512, 4096, 2048, 1024)
"""The ends first: a matrix that is cut off has them."""

KEPT = (
    "status", "reason", "oom_phase", "step_time_seconds_median", "step_time_seconds_samples", "tokens_per_second",
    "peak_memory_allocated_gib", "peak_memory_reserved_gib", "peak_device_used_gib", "mfu_percent", "load_seconds",
    "trainable_parameters", "total_parameters", "optimizer_class", "attention_implementation", "attention_kernel",
    "compute_dtype",
)  # fmt: skip


def study(hardware: dict[str, Any]) -> list[PlannedRun]:
    """The matrix as a study."""
    raw = {
        "models": {"llama2-7b": {"weights": "random", "architecture": LLAMA_2_7B}},
        "hardware": {"gpu": hardware},
        "recipes": RECIPES,
        "grid": [
            {"targets": "llama2-7b", "hardware": "gpu", "sequence_length": length, "recipes": list(RECIPES)}
            for length in CONTEXTS
        ],
        "data": {"num_dialogues": 600, "num_eval_samples": 0, "overlong": "truncate"},
        "training": {"effective_batch_size": 1},
        "protocol": {"num_untimed_steps": 2, "num_timed_steps": 5, "time_limit_minutes": 6},
    }
    return plan.plan(config.parse(raw))


def measure(planned: PlannedRun, results: Results) -> dict[str, Any]:
    """A row of the matrix: how the run ended and what it measured."""
    run, paths = planned.run, results.run(planned.run.run_id)
    row: dict[str, Any] = {
        "run_id": run.run_id,
        "techniques": list(run.parsed_techniques),
        "recipe": run.recipe,
        "settings": techniques.chosen_settings(run.parsed_techniques),
        "num_gpus": run.num_gpus,
        "sequence_length": run.sequence_length,
    }
    if planned.unsupported:
        return row | {"ended": "unsupported", "reason": planned.unsupported}
    model_source.prepare(run.model, results.model(run.model_key))
    data.prepare(run, run.num_train_samples, results.model(run.tokenizer_key), results.data(run.data_key))
    record.write_atomically(paths.run_yaml, run_module.dump(run))
    subprocess.run([sys.executable, "-m", "finetune_study.launch", str(paths.run_yaml)], check=False)
    if not paths.record.exists():
        failure = record.read_failure(paths.failure) if paths.failure.exists() else None
        return row | {"ended": "failed", "reason": failure.cause if failure else "no word was left"}
    measured = outcome.row(record.read_record(paths.record))
    return row | {"ended": measured["status"], **{name: measured.get(name) for name in KEPT}}


def nvidia_smi(fields: str, form: str) -> list[str]:
    """What the driver's own tool says of each GPU; nothing where it is missing."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", f"--query-gpu={fields}", f"--format={form}"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip().splitlines()


def driver() -> str | None:
    """Its version."""
    return next(iter(nvidia_smi("driver_version", "csv,noheader")), None)


def about(hardware: dict[str, Any]) -> dict[str, Any]:
    """Where and with what it is measured, as benchmarks/README.md asks."""
    import torch
    from tests.gpu.hardware import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": hardware["gpu"],
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "commit": commit or None,
        "hardware": hardware,
        "nvidia_smi": nvidia_smi("name,driver_version,clocks.max.sm,clocks.sm,power.limit", "csv"),
        "machine": {"processor": platform.processor() or platform.machine(), "python": platform.python_version()},
        "versions": versions()
        | {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "driver": driver()},
        "what": "one GPU, micro-batch 1, no accumulation; 2 untimed, 5 timed steps; memory of torch's allocator, GiB",
    }


def new_file(folder: Path, gpu: str) -> Path:
    """Where a result goes; one that lies there gets its date into its name first."""
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = folder / f"{name}.json"
    if path.exists():
        date = json.loads(path.read_text(encoding="utf-8"))["date"]
        names = itertools.chain([f"{name}-{date}"], (f"{name}-{date}-{number}" for number in itertools.count(2)))
        path.rename(next(one for one in (folder / f"{name}.json" for name in names) if not one.exists()))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--write", type=Path, help="folder for <gpu>.json")
    where.add_argument("--check", action="store_true", help="only say what is missing")
    parser.add_argument("--minutes", type=float, default=60, help="no run is started after so many")
    parser.add_argument("--ran", type=Path, help="what the tests of tests/gpu wrote (TECHNIQUES_RAN)")
    given = parser.parse_args()
    from tests.gpu.hardware import gpu_hardware

    try:
        hardware = gpu_hardware()
    except RuntimeError as error:
        raise SystemExit(f"gpu.py: {error}: this part is for a machine with one") from None
    if given.check:
        return
    until = time.monotonic() + 60 * given.minutes
    runs = (
        json.loads(given.ran.read_text(encoding="utf-8"))["technique_runs"] if given.ran and given.ran.exists() else []
    )
    result = about(hardware) | {"technique_runs": runs, "matrix": []}
    path = new_file(given.write, hardware["gpu"])
    with tempfile.TemporaryDirectory() as folder:
        for planned in study(hardware):
            if time.monotonic() > until:
                row: dict[str, Any] = {"run_id": planned.run.run_id, "ended": "not run: the time was over"}
            else:
                row = measure(planned, Results(Path(folder) / "results"))
            result["matrix"].append(row)
            record.write_atomically(path, json.dumps(result, indent=1) + "\n")
            print(
                json.dumps({key: row.get(key) for key in ("run_id", "ended", "step_time_seconds_median")}), flush=True
            )
    print(f"gpu.py: {path}")


if __name__ == "__main__":
    main()
