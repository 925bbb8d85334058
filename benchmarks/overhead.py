"""What our instruments cost: the same tiny model trained by our loop and by a bare transformers.Trainer.

    python benchmarks/overhead.py [--rounds 7] [--steps 40] [--write benchmarks/results]

A round is one process of each kind, the order changing from round to round: ours is a rank as the supervisor starts it
(finetune_study.train), the bare one benchmarks/bare.py. Both read the same prepared model and data, make the same
optimizer steps and have the same threads. Measured: seconds of each optimizer step, and the largest resident size of
the whole process. The first steps of every process are left out. The ratio of step times is the median over the rounds
of ours over bare, each the median of its steps; that of memory likewise.
"""

import argparse
import copy
import datetime
import json
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


def ours(run: Run, results: Results, variables: dict[str, str]) -> dict[str, Any]:
    """One rank, as the supervisor starts it."""
    paths = results.run(run.run_id)
    command = [sys.executable, "-m", "finetune_study.train", "--run-yaml", str(paths.run_yaml)]
    command += ["--results", str(results.root), "--facts", str(paths.rank_facts(0))]
    subprocess.run(command, check=True, capture_output=True, env=variables)
    told = facts.read(paths.rank_facts(0))
    return {"seconds": [s["seconds"] for s in told["steps"]], "peak_rss_bytes": told["memory"]["peak_rss_bytes"]}


def bare(run: Run, results: Results, variables: dict[str, str]) -> dict[str, Any]:
    """One process without anything of ours."""
    arguments = arguments_of(run, "")
    # What is ours to measure with goes; the Trainer's own defaults come back.
    arguments = {name: value for name, value in arguments.items() if name not in (*MEASURING, "output_dir")}
    arguments |= {"max_steps": run.num_steps, "report_to": [], "save_strategy": "no", "disable_tqdm": True}
    folders = (str(results.model(run.model_key)), str(results.data(run.data_key) / "train"))
    command = [sys.executable, str(Path(__file__).with_name("bare.py")), *folders, json.dumps(arguments)]
    done = subprocess.run(command, check=True, capture_output=True, env=variables, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(rounds: int, steps: int) -> dict[str, Any]:
    """Every sample, and the two ratios."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        results = Results(Path(folder))
        run = prepare(steps, results)
        threads = max(1, len(os.sched_getaffinity(0)) // 2)  # a core is left to whatever else runs
        variables = passed_on(os.environ) | set_for(run, threads, os.environ)
        variables |= {"XDG_CACHE_HOME": folder, "TMPDIR": folder}
        for number in range(rounds):
            kinds = [("ours", ours), ("bare", bare)]
            for name, measure in kinds if number % 2 else reversed(kinds):
                one = measure(run, results, variables)
                found[name].append(one | {"seconds": one["seconds"][LEFT_OUT:]})
                median = statistics.median(found[name][-1]["seconds"])
                print(
                    f"round {number + 1}, {name}: {median:.4f} s, {one['peak_rss_bytes'] / 2**20:.0f} MiB", flush=True
                )
    pairs = list(zip(found["ours"], found["bare"], strict=True))
    times = [statistics.median(a["seconds"]) / statistics.median(b["seconds"]) for a, b in pairs]
    memory = [a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in pairs]
    return {
        "step_time_ratio": round(statistics.median(times), 4),
        "step_time_ratio_of_rounds": [round(one, 4) for one in sorted(times)],
        "step_time_aim": AIM_TIME,
        "peak_memory_ratio": round(statistics.median(memory), 4),
        "peak_memory_ratio_of_rounds": [round(one, 4) for one in sorted(memory)],
        "peak_memory_aim": AIM_MEMORY,
        "study": STUDY,
        "steps": steps,
        "steps_left_out": LEFT_OUT,
        "samples": found,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
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
    print(f"step time: {found['step_time_ratio']} of the bare Trainer's (aim: at most {AIM_TIME})")
    print(f"peak memory: {found['peak_memory_ratio']} of the bare Trainer's (aim: at most {AIM_MEMORY})")
    print(f"{platform.processor() or platform.machine()}, load before: {load:.2f}")
    if given.write:
        path = given.write / f"overhead-{found['date']}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
