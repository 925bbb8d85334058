"""What it costs the host to start an operation: small models on one core, against the figures that forecasts take.

    python benchmarks/launches.py [--rounds 5] [--write benchmarks/results]

What `calibrate` measures for a hardware entry (finetune_study.calibrate, `TINY`), for each of its models: seconds of a
forward and of a backward pass, through the number of operations in it that start a kernel. On a CPU a kernel of a few
numbers takes next to no time, so that this is dispatch, autograd and the model's Python, as on a GPU that waits for its
host. The ratios are to `forecast.time.LAUNCH_SECONDS`, which stand for every host that is not calibrated: another
processor, or another version of torch, has others.
"""

import argparse
import datetime
import json
import os
import statistics
import sys
from pathlib import Path

import torch

from finetune_study.calibrate import TINY, launches_of
from finetune_study.forecast.time import LAUNCH_SECONDS
from finetune_study.measure import environment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--write", type=Path, help="folder for the result")
    given = parser.parse_args()
    load = os.getloadavg()[0]
    torch.set_num_threads(1)
    samples = {name: [launches_of(name, "cpu") for _ in range(given.rounds)] for name in TINY}
    medians = {
        name: {way: statistics.median(one[way] for one in some) for way in LAUNCH_SECONDS}
        for name, some in samples.items()
    }
    means = {way: statistics.fmean(one[way] for one in medians.values()) for way in LAUNCH_SECONDS}
    for name, of_model in [*medians.items(), ("mean", means)]:
        print(f"{name}: " + ", ".join(f"{way} {1e6 * seconds:.1f} µs" for way, seconds in of_model.items()))
    ratios = {way: round(seconds / LAUNCH_SECONDS[way], 3) for way, seconds in means.items()}
    print("of what forecasts take: " + ", ".join(f"{way} {ratio}" for way, ratio in ratios.items()))
    if given.write:
        about = environment.describe("cpu")
        found = {
            "command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "load_before": load,
            **{name: about[name] for name in ("versions", "lock_sha256", "commit", "processor", "processor_cores")},
            "unit": "seconds of host time for an operation that starts a kernel; median of the rounds",
            "medians": medians, "means": means, "ratio_to_forecast": ratios, "samples": samples,
        }  # fmt: skip
        path = given.write / f"launches-{found['date']}.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        print(path)


if __name__ == "__main__":
    main()
