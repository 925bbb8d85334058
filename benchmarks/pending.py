"""What many pending jobs cost a driver that waits for them: memory and calls of SLURM's commands, few against many.

    python benchmarks/pending.py [--jobs 30 300] [--seconds 60] [--write benchmarks/results]

Jobs that may begin in an hour only are submitted by `--executor submitit`, as arrays and one by one. Measured of the
driver when all are in the queue and for some time after:
    memory      resident, at the end of that time, MiB
    growth      of it during that time, MiB
    calls       of SLURM's commands per minute during that time (status-interval: 5 s), counted by wrappers on PATH
    submitting  calls until all are in the queue
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from driver import environment, machine, wrappers

SNAKEFILE = """
rule all:
    input: [f"out/{{i}}.txt" for i in range({jobs})]

rule waits:
    output: "out/{{i}}.txt"
    resources: mem_mb=100, runtime=10, slurm_extra="--begin=now+1hour"
    shell: "echo > {{output}}"
"""
WAYS = {"arrays": "1000", "one by one": "1"}
MEASURES = {
    "memory_mib": "memory, MiB",
    "growth_mib": "growth, MiB",
    "calls_per_minute": "calls per minute",
    "calls_to_submit": "calls to submit",
}


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return int(found[1]) / 1024


def one(python: Path, jobs: int, way: str, seconds: float) -> dict[str, Any]:
    """One driver, from its start until some time after all jobs are pending; they are cancelled then."""
    place = Path(tempfile.mkdtemp(prefix="bench-pending-"))
    (place / "Snakefile").write_text(SNAKEFILE.format(jobs=jobs))
    calls, log = place / "calls", place / "log"
    calls.touch()
    wrappers(place / "bin", calls)
    words = [str(python), "-m", "snakemake", "--executor", "submitit", "--jobs", str(jobs), "--nolock",
             "--submitit-status-interval", "5", "--submitit-array-limit", WAYS[way]]  # fmt: skip
    with log.open("w") as stream:
        path = f"{place / 'bin'}:{os.environ['PATH']}"
        driver = subprocess.Popen(
            words, cwd=place, env=os.environ | {"PATH": path}, stdout=stream, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
    while log.read_text().count("submitted as SLURM job") < jobs:
        if driver.poll() is not None:
            raise SystemExit(f"The driver ended:\n{log.read_text()[-3000:]}")
        time.sleep(0.5)
    time.sleep(5)  # until its own steps after submitting are over
    submitted, before = len(calls.read_text().split()), resident_mib(driver.pid)
    time.sleep(seconds)
    after, asked = resident_mib(driver.pid), len(calls.read_text().split()) - submitted
    driver.send_signal(signal.SIGINT)
    driver.wait()
    shutil.rmtree(place)
    return {
        "jobs": jobs,
        "way": way,
        "memory_mib": after,
        "growth_mib": after - before,
        "calls_per_minute": 60 * asked / seconds,
        "calls_to_submit": submitted,
    }


def table(samples: list[dict[str, Any]], few: int, many: int) -> str:
    lines = [f"| | {few} pending | {many} pending | ratio |", "|---|---|---|---|"]
    for way in WAYS:
        of = {sample["jobs"]: sample for sample in samples if sample["way"] == way}
        for key, label in MEASURES.items():
            a, b = of[few][key], of[many][key]
            ratio = f"{b / a:.2f}" if a and key != "growth_mib" else ""
            lines.append(f"| {way}: {label} | {a:.1f} | {b:.1f} | {ratio} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, nargs=2, default=[30, 300], help="few, many")
    parser.add_argument("--seconds", type=float, default=60.0, help="of watching")
    parser.add_argument("--write", type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    python, facts = environment("submitit"), machine()
    samples = [one(python, jobs, way, arguments.seconds) for way in WAYS for jobs in arguments.jobs]
    text = table(samples, *arguments.jobs)
    print(text)
    if arguments.write:
        path = arguments.write / f"pending-{facts['date'][:10]}.json"
        path.write_text(json.dumps({"command": sys.argv, "machine": facts, "samples": samples}, indent=1) + "\n")
        rows = "\n".join(f"- {key}: {value}" for key, value in facts.items())
        path.with_suffix(".md").write_text(f"# A driver that waits for pending jobs\n\n{text}\n\n{rows}\n")
        print(f"written: {path}")


if __name__ == "__main__":
    main()
