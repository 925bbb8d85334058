"""A synthetic study of the size of arXiv 2406.02290: to look at every figure and every status, with no GPU.

    python benchmarks/synthetic.py build/synthetic [--repeats 3] [--seed 0]

Nothing in it was measured: memory and time follow from the textbook formulas below, with noise of nodes and of tries
drawn from a seed. Every page made of it says so at its top, and so do its records: host, source of the weights and
commit are called synthetic. It is written as a study is, config.yaml and results/, so that every command works on it.
"""

import argparse
import datetime
import json
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finetune_study import accounting, implied
from finetune_study import config as config_module
from finetune_study.config import Config
from finetune_study.measure.peaks import peak_tflops
from finetune_study.paths import Results
from finetune_study.plan import PlannedRun, plan
from finetune_study.record import Ending, Failure, Phase, Record, write_atomically, write_failure, write_record
from finetune_study.run import Run

GIB = 2**30
NOTICE = (
    "Synthetic: no run took place. Every number here was drawn by benchmarks/synthetic.py, to look at the "
    "report itself. Nothing here says anything about a model or a GPU."
)

LORA = {"r": 64, "lora_alpha": 32}
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"eager": {}},
    "full-gc": {"eager": {}, "gradient_checkpointing": {}},
    "lora": {"eager": {}, "lora": LORA},
    "lora-gc": {"eager": {}, "lora": LORA, "gradient_checkpointing": {}},
    "zero2": {"eager": {}, "zero2": {}},
    "zero3": {"eager": {}, "zero3": {}},
    "zero2-lora": {"eager": {}, "zero2": {}, "lora": LORA},
    "zero2-lora-gc": {"eager": {}, "zero2": {}, "lora": LORA, "gradient_checkpointing": {}},
    "zero2-lora-flash": {"flash_attention_2": {}, "zero2": {}, "lora": LORA},
    "zero3-lora": {"eager": {}, "zero3": {}, "lora": LORA},
    "zero3-lora-gc": {"eager": {}, "zero3": {}, "lora": LORA, "gradient_checkpointing": {}},
    "zero3-lora-gc-flash": {"flash_attention_2": {}, "zero3": {}, "lora": LORA, "gradient_checkpointing": {}},
    "zero3-gc-offload": {"eager": {}, "zero3": {}, "gradient_checkpointing": {}, "offload_optimizer": {}},
}


@dataclass(frozen=True)
class Shape:
    """What the formulas need of a model."""

    parameters: float
    layers: int
    hidden: int
    heads: int


SHAPES = {
    "llama2-7b": Shape(6.74e9, 32, 4096, 32),
    "llama2-13b": Shape(13.0e9, 40, 5120, 40),
    "llama2-70b": Shape(69.0e9, 80, 8192, 64),
    "falcon-180b": Shape(179.5e9, 80, 14848, 232),
}
HARDWARE: dict[str, dict[str, Any]] = {
    "a100-80gb": {
        "gpu": "NVIDIA A100-SXM4-80GB",
        "memory_gib": 80,
        "compute_capability": 8.0,
        "max_gpus": 8,
        "price_usd_per_gpu_hour": 5.12,
    },
    "v100-32gb": {
        "gpu": "Tesla V100-SXM2-32GB",
        "memory_gib": 32,
        "compute_capability": 7.0,
        "max_gpus": 8,
        "price_usd_per_gpu_hour": 3.90,
    },
}
LINK_GBPS = {"a100-80gb": 200e9, "v100-32gb": 60e9}
"""Rate of a collective, bytes a second."""
BILLING_UNITS = {"a100-80gb": 64, "v100-32gb": 24}
"""Of SLURM, for one GPU."""
HOST_GBPS, HOST_GIB = 12e9, 1000.0
"""Between host and device, bytes a second; memory of a node, GiB."""
KERNELS_GIB, FRAGMENTATION = 1.1, 1.05
NODES = 6
NODE_SPREAD, TRY_SPREAD, STEP_SPREAD = 0.02, 0.008, 0.01
"""Standard deviations of logarithms: among nodes (one of them is 8 % slower still), tries, steps."""
TIME_LIMIT_MINUTES = 8
"""Short, so that the slowest runs end in a timeout."""
SKIP_PREDICTED_OOM = 9.0
"""What is predicted to need ten times the device's memory is not tried."""
TRAIN_SEQUENCES = 14732
"""Of Samsum."""


def settings(repeats: int = 3, targets: int | None = None) -> dict[str, Any]:
    """The configuration as YAML holds it.

    Args:
        repeats: of each configuration.
        targets: as many entries under `models`, the four shapes in turn; default: the paper's four.
    """
    shapes = list(SHAPES)
    names = shapes if targets is None else [f"{shapes[i % 4]}.{i // 4 + 1}" for i in range(targets)]
    small = [name for name in names if "7b" in name or "13b" in name]
    return {
        "models": {
            name: {
                "weights": "random",
                "architecture": {"model_type": "llama", "hidden_size": _shape(name).hidden, "comment": name},
            }
            for name in names
        },
        "hardware": HARDWARE,
        "recipes": RECIPES,
        "grid": [
            {
                "targets": names,
                "hardware": list(HARDWARE),
                "num_gpus": [1, 2, 4, 8],
                "sequence_length": [256, 512, 1024, 2048, 4096],
                "recipes": list(RECIPES),
            },
            {
                "targets": small,
                "hardware": "a100-80gb",
                "num_gpus": [1, 2, 4],
                "sequence_length": [256, 1024],
                "per_device_train_batch_size": [2],
                "recipes": ["lora", "lora-gc", "zero2-lora", "zero2-lora-flash"],
            },
        ],
        "training": {"effective_batch_size": 8},
        "protocol": {
            "num_untimed_steps": 2,
            "num_timed_steps": 8,
            "repeats": repeats,
            "time_limit_minutes": TIME_LIMIT_MINUTES,
            "skip_predicted_oom": SKIP_PREDICTED_OOM,
        },
        "report": {"title": "Synthetic study of the paper's size", "notice": NOTICE, "baseline": "full"},
    }


def records(
    config: Config, seed: int = 0, *, complete: bool = False
) -> Iterator[tuple[PlannedRun, Record | Failure | None]]:
    """What became of each run of the study; None: it has not been tried.

    Args:
        config: the study.
        seed: of all that is drawn.
        complete: every run has an outcome; else a few failed or were not tried.
    """
    draw = random.Random(seed)
    nodes = {
        hardware: [draw.gauss(0, NODE_SPREAD) + (0.08 if number == NODES - 1 else 0) for number in range(NODES)]
        for hardware in config.hardware
    }
    runs = plan(config)
    rungs = implied.rungs(planned.run for planned in runs)
    ran_out: dict[str, list[implied.Rung]] = {}
    for number, (planned, rung) in enumerate(zip(runs, rungs, strict=True)):
        run = planned.run
        if planned.unsupported:
            yield planned, Record(run=run, ending=Ending(status="unsupported", reason=planned.unsupported))
            continue
        skipped = _skipped(run) or _implied(rung, ran_out.get(rung.kind, []))
        if skipped is not None:
            yield planned, Record(run=run, ending=skipped)
            continue
        chance = 1.0 if complete else draw.random()
        if chance < 0.006:
            yield planned, None
        elif chance < 0.010:
            yield (
                planned,
                Failure(
                    run_id=run.run_id,
                    attempt=1 + number % 3,
                    cause="NCCL error: unhandled system error (synthetic)",
                    log=f"results/runs/{run.run_id}/launch.log",
                    log_tail="rank 3: ncclSystemError\n<b>synthetic</b> log",
                    duration_seconds=71.0,
                    started_at=_start(number),
                ),
            )
        else:
            node = draw.randrange(NODES)
            record = _record(run, node, nodes[run.hardware.name][node], number, draw)
            if implied.ran_out(record.ending.model_dump(), run.hardware.device):
                ran_out.setdefault(rung.kind, []).append(rung)
            yield planned, record


def _skipped(run: Run) -> Ending | None:
    """What is not tried because the forecast is far beyond the device."""
    needed, there = sum(memory_gib(run).values()), HARDWARE[run.hardware.name]["memory_gib"]
    if needed <= there * (1 + SKIP_PREDICTED_OOM):
        return None
    return Ending(status="predicted_oom", reason=f"{needed:.0f} GiB are predicted, the device has {there} (synthetic)")


def _implied(rung: implied.Rung, ran_out: list[implied.Rung]) -> Ending | None:
    """What is not tried because an easier run of its kind ran out of memory."""
    witness = next((one.run_id for one in ran_out if rung.is_harder_than(one)), None)
    if witness is None:
        return None
    return Ending(status="implied_oom", reason=f"{witness} ran out of memory (synthetic)", witness=witness)


def _shape(target: str) -> Shape:
    return SHAPES[target.partition(".")[0]]


def _start(number: int) -> str:
    minutes = 7 * (number // 40)
    day = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(minutes=minutes, seconds=number % 60)
    return day.isoformat().replace("+00:00", "Z")


def memory_gib(run: Run) -> dict[str, float]:
    """Peak of each part on one device, GiB, by the usual budgets.

    Mixed precision: 2 bytes for a frozen weight, 4 for a trained one, 4 for its gradient, 8 for Adam's
    states. Activations: 34 s b h of each layer, and 5 a s² b for attention that is written out (arXiv 2205.05198).
    """
    shape, used = _shape(run.target), run.parsed_techniques
    shards = run.num_gpus
    trained = trainable(run)
    zero = next((int(name[4]) for name in used if name.startswith("zero")), 0)
    weights = 2 * shape.parameters + 2 * trained
    gradients, states = 4 * trained, 8 * trained
    s, b = run.sequence_length, run.micro_batch
    layer = 34 * s * b * shape.hidden + (0 if "flash_attention_2" in used else 5 * shape.heads * s * s * b)
    kept = shape.layers * 2 * s * b * shape.hidden + layer if "gradient_checkpointing" in used else shape.layers * layer
    parts = {
        "weights": weights / (shards if zero == 3 else 1),
        "gradients": gradients / (shards if zero >= 2 else 1),
        "optimizer states": 0 if "offload_optimizer" in used else states / (shards if zero >= 1 else 1),
        "activations": kept * (0.75 if "lora" in used else 1.0),
    }
    return {name: value / GIB for name, value in parts.items()} | {"kernels": KERNELS_GIB}


def trainable(run: Run) -> float:
    shape = _shape(run.target)
    return 4 * LORA["r"] * shape.hidden * shape.layers if "lora" in run.techniques else shape.parameters


def step_seconds(run: Run) -> float:
    """Operations over the rate, what the collectives take, and what the optimizer takes on the host."""
    shape, used = _shape(run.target), run.parsed_techniques
    gpu = HARDWARE[run.hardware.name]["gpu"]
    rate = (peak_tflops(gpu, "float16") or 1.0) * 1e12
    tokens = run.training.effective_batch_size * run.sequence_length
    attention = 12 * shape.layers * shape.hidden * run.sequence_length
    flops = tokens * (_flops_per_weight(run) * shape.parameters + attention)
    recomputed = 1.30 if "gradient_checkpointing" in used else 1.0
    efficiency = 0.46 * run.sequence_length * run.micro_batch / (run.sequence_length * run.micro_batch + 300)
    written_out = 0 if "flash_attention_2" in used else 40 * shape.layers * shape.heads * run.sequence_length**2
    seconds = recomputed * (flops / efficiency / rate + written_out * run.training.effective_batch_size / 1.4e12)
    seconds /= run.num_gpus
    trained = trainable(run)
    if run.num_gpus > 1:
        link = LINK_GBPS[run.hardware.name]
        seconds += 4 * trained / link + 0.01
        if "zero3" in used:
            seconds += (run.gradient_accumulation_steps or 1) * (6 * shape.parameters / link + 0.02)
    if "offload_optimizer" in used:
        seconds += 12 * trained / run.num_gpus / HOST_GBPS
    return seconds


def _flops_per_weight(run: Run) -> int:
    return 4 if "lora" in run.techniques else 6


def _record(run: Run, node: int, slower: float, number: int, draw: random.Random) -> Record:
    parts = memory_gib(run)
    allocated = sum(parts.values()) * math.exp(draw.gauss(0, 0.003)) - KERNELS_GIB
    reserved = allocated * FRAGMENTATION
    limit = HARDWARE[run.hardware.name]["memory_gib"] - KERNELS_GIB - 0.5
    base = step_seconds(run) * math.exp(slower + draw.gauss(0, TRY_SPREAD))
    limit_seconds = TIME_LIMIT_MINUTES * 60
    about: dict[str, Any] = {
        "run": run,
        "started_at": _start(number),
        "slurm_job_id": str(4_000_000 + number),
        "environment": _environment(run, node),
    }
    on_host = 16 * trainable(run) / GIB if "offload_optimizer" in run.techniques else 0
    if on_host > HOST_GIB:
        reason = "SLURM: the job's memory ran out (oom_kill), synthetic"
        return Record(**about, ending=Ending(status="host_oom", reason=reason), duration_seconds=240.0)
    if reserved > limit:
        return Record(**about, ending=_out_of_memory(parts, limit, draw), duration_seconds=90.0 + 10 * draw.random())
    steps = list(_steps(run, base, draw))
    loading = 20 + run.num_gpus + 2 * _shape(run.target).parameters / 8e9
    duration = loading + sum(one["seconds"] for one in steps)
    ending = Ending(status="completed")
    if duration > limit_seconds:
        done = sum(1 for i in range(1, 11) if loading + sum(s["seconds"] for s in steps[:i]) < limit_seconds)
        steps, duration = steps[:done], float(limit_seconds)
        ending = Ending(status="timeout", reason=f"{TIME_LIMIT_MINUTES} minutes are over.")
    rank = {
        "steps": steps,
        "startup_seconds": 12.0,
        "load_seconds": loading - 12,
        "memory": {
            "peak_allocated_bytes": int(allocated * GIB),
            "peak_reserved_bytes": int(reserved * GIB),
            "peak_device_used_bytes": int((reserved + KERNELS_GIB) * GIB),
            "peak_rss_bytes": int((6 + on_host) * GIB),
            "peak_allocated_bytes_by_phase": _by_phase(parts, allocated),
        },
        "evaluations": {
            "before": 3.1,
            "after": 3.1 - 1.4 * (0.9 if "lora" in run.techniques else 1) + 0.01 * draw.random(),
        },
        "trainable_parameters": int(trainable(run)),
        "total_parameters": int(_shape(run.target).parameters),
        "compute_dtype": "bfloat16" if "bf16" in run.techniques else "float16",
        "attention_implementation": "flash_attention_2" if "flash_attention_2" in run.techniques else "eager",
        "model_flops_per_step": run.training.effective_batch_size
        * run.sequence_length
        * _flops_per_weight(run)
        * _shape(run.target).parameters
        / run.num_gpus,
        "energy_joules": 330.0 * sum(s["seconds"] for s in steps if s["timed"]),
    }
    return Record(**about, ending=ending, duration_seconds=duration, ranks=[rank] * run.num_gpus)


def _by_phase(parts: dict[str, float], allocated: float) -> dict[str, int]:
    """Bytes: weights when it is loaded, then all but gradients, all, and all but activations."""
    there = parts | {"kernels": 0.0}
    scale = allocated / sum(there.values())
    without = {"forward": "gradients", "backward": None, "optimizer": "activations"}
    peaks = {phase: sum(v for name, v in there.items() if name != left_out) for phase, left_out in without.items()}
    return {phase: int(gib * scale * GIB) for phase, gib in ({"load": parts["weights"]} | peaks).items()}


def _out_of_memory(parts: dict[str, float], limit: float, draw: random.Random) -> Ending:
    static = parts["weights"]
    phase: Phase = (
        "load" if static > limit else "optimizer" if static + parts["optimizer states"] > limit else "backward"
    )
    asked = int(GIB * draw.uniform(0.1, 2.0))
    held = int(min(limit, sum(parts.values())) * GIB * 0.98)
    return Ending(
        status="device_oom",
        reason=f"CUDA out of memory. Tried to allocate {asked / GIB:.2f} GiB (synthetic)",
        phase=phase,
        step=0 if phase == "load" else 1,
        rank=0,
        bytes_requested=asked,
        bytes_held=held,
        fragmented=draw.random() < 0.1,
    )


def _steps(run: Run, base: float, draw: random.Random) -> Iterator[dict[str, Any]]:
    positions = run.training.effective_batch_size * run.sequence_length // run.num_gpus
    for number in range(1, run.num_steps + 1):
        timed = number > run.protocol.num_untimed_steps
        yield {
            "step": number,
            "seconds": base * math.exp(draw.gauss(0, STEP_SPREAD)) * (1 if timed else 1.6),
            "timed": timed,
            "stepped": True,
            "loss": 3.1 - 0.1 * number,
            "real_tokens": positions,
            "loss_tokens": positions // 4,
        }


def _environment(run: Run, node: int) -> dict[str, Any]:
    return {
        "versions": {"torch": "2.13.0", "transformers": "5.23.0", "deepspeed": "0.19.8"},
        "host": f"synthetic-{run.hardware.name}-{node + 1}",
        "device_name": HARDWARE[run.hardware.name]["gpu"],
        "model": {"source": "synthetic, no weights"},
        "data": {"sha256": "0" * 64, "num_train_available": TRAIN_SEQUENCES},
        "software_sha256": "0" * 64,
        "lock_sha256": "0" * 64,
        "commit": "synthetic",
    }


def write(folder: Path, repeats: int = 3, seed: int = 0, *, complete: bool = False) -> Config:
    """Writes config.yaml and results/ of a synthetic study."""
    raw = settings(repeats)
    config = config_module.parse(raw)
    write_atomically(folder / "config.yaml", yaml.safe_dump(raw, sort_keys=False))
    results, draw = Results(folder / "results"), random.Random(seed + 1)
    billing: dict[str, int] = {}
    for planned, document in records(config, seed, complete=complete):
        paths = results.run(planned.run.run_id)
        paths.folder.mkdir(parents=True, exist_ok=True)
        if isinstance(document, Record):
            write_record(paths, document)
            if document.slurm_job_id:
                billing[document.slurm_job_id] = BILLING_UNITS[planned.run.hardware.name] * planned.run.num_gpus
        elif document is not None:
            write_failure(paths, document)
        error = {"gib": math.exp(draw.gauss(0, 0.05)), "seconds": math.exp(draw.gauss(0, 0.05))}
        guess = {name: round(v * error[name.rpartition("_")[2]], 3) for name, v in prior(planned.run).items()}
        paths.prior.write_text(json.dumps(guess))
    write_atomically(results.accounting, json.dumps({"format": accounting.FORMAT, "billing_units": billing}))
    return config


def prior(run: Run) -> dict[str, float]:
    """A forecast that knows the formulas, by the columns of the outcomes."""
    parts = memory_gib(run)
    names = {"weights": "parameters", "optimizer states": "optimizer", "kernels": "context"}
    return {
        "predicted_peak_memory_allocated_gib": sum(parts.values()) - KERNELS_GIB,
        "predicted_step_time_seconds": step_seconds(run),
        **{f"predicted_memory_{names.get(name, name)}_gib": gib for name, gib in parts.items()},
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--complete", action="store_true", help="every run has an outcome")
    given = parser.parse_args()
    write(given.folder, given.repeats, given.seed, complete=given.complete)
    print(f"{given.folder}/config.yaml and {given.folder}/results: synthetic, nothing was measured")
