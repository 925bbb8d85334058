"""What our instruments cost: the same tiny model trained by our loop and by a bare transformers.Trainer.

    python benchmarks/overhead.py [--rounds 7] [--steps 40] [--write benchmarks/results]

A round is a process of each kind at the same time, each with one thread on a core of its own: whatever else a machine
does, it does to both. Ours is a rank as the supervisor starts it (finetune_study.train), the bare one
benchmarks/bare.py. Both read the same prepared model and data and make the same optimizer steps. Measured: seconds of
each optimizer step, and the largest resident size of the whole process. The first steps of every process are left out.
They change cores from round to round, and a pair of rounds gives one ratio of step times, the geometric mean of both
rounds' ratios of medians, in which what differs between the cores cancels. The result is the mean of these, with an
interval of 95 % by Student's t; that of memory is the median over the rounds.
"""

import argparse
import copy
import datetime
import functools
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from finetune_study import config, data, facts, model_source, plan, record
from finetune_study import run as run_module
from finetune_study.export import MEASURING
from finetune_study.measure import environment
from finetune_study.paths import Results
from finetune_study.ratio import student
from finetune_study.run import Run
from finetune_study.train import arguments_of
from finetune_study.variables import passed_on, set_for

AIM_TIME, AIM_MEMORY = 1.02, 1.05
LEFT_OUT = 5
"""Steps at the start of a process, in which caches and allocator settle."""

STUDY: dict[str, Any] = {
    "models": {
        "tiny": {
            "weights": "random",
            "architecture": {
                "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4,
                "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 8192, "tie_word_embeddings": True,
            },
        }
    },
    "hardware": {"cpu": {"device": "cpu", "memory_gib": 8.0}},
    "recipes": {"full": {}},
    "grid": [{"targets": "tiny", "hardware": "cpu", "sequence_length": 512, "recipes": "full"}],
    "data": {"num_eval_samples": 0, "overlong": "truncate"},
    "training": {"effective_batch_size": 2},
}  # fmt: skip
"""5 million weights; a step takes about half a second on one core."""


def prepare(steps: int, results: Results) -> Run:
    """The run, its model and its data."""
    raw = copy.deepcopy(STUDY)
    raw["protocol"] = {"num_untimed_steps": LEFT_OUT, "num_timed_steps": steps}
    raw["data"]["num_dialogues"] = 2 * (LEFT_OUT + steps)
    (planned,) = plan.plan(config.parse(raw))
    run = planned.run
    model_source.prepare(run.model, results.model(run.model_key))
    data.prepare(run, run.num_train_samples, results.model(run.tokenizer_key), results.data(run.data_key))
    record.write_atomically(results.run(run.run_id).run_yaml, run_module.dump(run))
    return run


def ours(run: Run, results: Results) -> list[str]:
    """The command of one rank, as the supervisor starts it."""
    paths = results.run(run.run_id)
    command = [sys.executable, "-m", "finetune_study.train", "--run-yaml", str(paths.run_yaml)]
    return [*command, "--results", str(results.root), "--facts", str(paths.rank_facts(0))]


def bare(run: Run, results: Results) -> list[str]:
    """The command of one process without anything of ours."""
    arguments = arguments_of(run, "")
    # What is ours to measure with goes; the Trainer's own defaults come back.
    arguments = {name: value for name, value in arguments.items() if name not in (*MEASURING, "output_dir")}
    arguments |= {"max_steps": run.num_steps, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    folders = (str(results.model(run.model_key)), str(results.data(run.data_key) / "train"))
    return [sys.executable, str(Path(__file__).with_name("bare.py")), *folders, json.dumps(arguments)]


def together(run: Run, results: Results, variables: dict[str, str], cores: list[int]) -> dict[str, dict[str, Any]]:
    """Both at once, ours on the first of two cores."""
    paths = results.run(run.run_id)
    paths.rank_facts(0).unlink(missing_ok=True)
    processes = [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=variables,
            preexec_fn=functools.partial(os.sched_setaffinity, 0, {core}),
        )
        for command, core in zip((ours(run, results), bare(run, results)), cores, strict=True)
    ]
    printed = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"overhead.py: one of both failed: {[process.returncode for process in processes]}")
    told = facts.read(paths.rank_facts(0))
    mine = {"seconds": [s["seconds"] for s in told["steps"]], "peak_rss_bytes": told["memory"]["peak_rss_bytes"]}
    return {"ours": mine, "bare": json.loads(printed[1].splitlines()[-1])}


def compare(rounds: int, steps: int) -> dict[str, Any]:
    """Every sample, and the two ratios."""
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        raise SystemExit("overhead.py: two cores are needed: both kinds run at the same time")
    samples: list[dict[str, Any]] = []
    times: list[float] = []
    memory: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder))
        run = prepare(steps, results)
        variables = passed_on(os.environ) | set_for(run, 1, os.environ)
        variables |= {"XDG_CACHE_HOME": folder, "TMPDIR": folder}
        for number in range(2 * rounds):
            found = together(run, results, variables, cores if number % 2 else cores[::-1])
            for one in found.values():
                one["seconds"] = one["seconds"][LEFT_OUT:]
            samples.append(found)
            first, second = found["ours"], found["bare"]
            times.append(statistics.median(first["seconds"]) / statistics.median(second["seconds"]))
            memory.append(first["peak_rss_bytes"] / second["peak_rss_bytes"])
            print(f"round {number + 1}: step time {times[-1]:.4f}, peak memory {memory[-1]:.4f}", flush=True)
    pairs = [(math.log(first) + math.log(second)) / 2 for first, second in zip(times[::2], times[1::2], strict=True)]
    mean = statistics.fmean(pairs)
    half = student(len(pairs) - 1) * statistics.stdev(pairs) / math.sqrt(len(pairs))
    return {
        "step_time_ratio": round(math.exp(mean), 4),
        "step_time_ratio_interval": [round(math.exp(mean + side * half), 4) for side in (-1, 1)],
        "step_time_ratio_of_pairs": [round(math.exp(one), 4) for one in pairs],
        "step_time_aim": AIM_TIME,
        "peak_memory_ratio": round(statistics.median(memory), 4),
        "peak_memory_ratio_of_rounds": [round(one, 4) for one in sorted(memory)],
        "peak_memory_aim": AIM_MEMORY,
        "study": STUDY,
        "steps": steps,
        "steps_left_out": LEFT_OUT,
        "samples": samples,
    }


def verdict(found: dict[str, Any]) -> str:
    """Whether the aim of the step time is met, as far as the rounds can tell."""
    low, high = found["step_time_ratio_interval"]
    return "met" if high <= AIM_TIME else "missed" if low > AIM_TIME else "not told: the interval holds the aim"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7, help="pairs of rounds, at least 2")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--write", type=Path, help="folder for the result")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    found = compare(given.rounds, given.steps)
    about = environment.describe("cpu")
    found |= {
        "command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "load_before": load,
        **{name: about[name] for name in ("versions", "software_sha256", "lock_sha256", "commit", "processor",
                                          "processor_cores", "host_memory_bytes")},
    }  # fmt: skip
    low, high = found["step_time_ratio_interval"]
    print(
        f"step time: {found['step_time_ratio']} of the bare Trainer's, {low} to {high} (aim: at most {AIM_TIME}; "
        f"{verdict(found)})"
    )
    print(f"peak memory: {found['peak_memory_ratio']} of the bare Trainer's (aim: at most {AIM_MEMORY})")
    print(f"{platform.processor() or platform.machine()}, load before: {load:.2f}")
    if given.write:
        path = given.write / f"overhead-{found['date']}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
