"""The same no-op jobs on the same cluster under `--executor slurm` and `--executor submitit`, side by side.

    python benchmarks/driver.py [--jobs 60] [--repeats 3] [--write benchmarks/results]

Measured for each call of Snakemake, on an otherwise idle machine:
    wall        from its start to its end, seconds
    cpu         of the driver and the commands it starts (user and system; not the jobs), seconds
    memory      largest resident size of the driver, MiB
    calls       of SLURM's commands by the driver, counted by wrappers on PATH
    delay       from a job's end (sacct's End, whole seconds) to Snakemake's line that it finished, seconds
Each executor has an environment of its own with nothing but Snakemake and that executor, at the versions of the lock:
Snakemake imports every executor that is installed.
"""

import argparse
import collections
import datetime
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SNAKEFILE = """
rule all:
    input: [f"out/{{i}}.txt" for i in range({jobs})]

rule noop:
    output: "out/{{i}}.txt"
    resources: mem_mb=400, runtime=10
    threads: 1
    shell: "echo $SLURM_JOB_ID > {{output}}"
"""
# 400 MB: the official executor runs two Snakemakes in the job before the rule.

VARIANTS: dict[str, list[str]] = {
    "slurm": ["--executor", "slurm"],
    "slurm, asked often": [
        *(
            "--executor",
            "slurm",
            "--slurm-init-seconds-before-status-checks",
            "2",
            "--seconds-between-status-checks",
            "2",
        ),
    ],
    "submitit": ["--executor", "submitit"],
    "submitit, Snakemake in each job": ["--executor", "submitit", "--submitit-snakemake-in-job"],
}
PEER, OURS = "slurm", "submitit"

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "slurm": "snakemake-executor-plugin-slurm",
    "submitit": str(ROOT / "src" / "snakemake_executor_plugin_submitit"),
}

COMMANDS = ("sbatch", "sacct", "squeue", "scontrol", "scancel", "sinfo", "sacctmgr", "srun", "sstat", "sshare")

MEASURES = {
    "wall_seconds": "wall time, s",
    "cpu_seconds": "driver CPU, s",
    "peak_memory_mib": "driver peak memory, MiB",
    "slurm_calls": "SLURM calls",
    "delay_seconds_median": "median delay of a job's end, s",
}


def environment(variant: str) -> Path:
    """The Python of an executor's own environment; made once, under build/."""
    executor = VARIANTS[variant][1]
    python = ROOT / "build" / f"bench-{executor}" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
    install = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(ROOT / "envs" / "local.lock")]
    subprocess.run([*install, "--upgrade", "snakemake", PACKAGES[executor]], check=True)
    return python


def wrappers(folder: Path, log: Path) -> None:
    """Commands of SLURM that note that they were called; a job gets PATH without them."""
    folder.mkdir()
    for command in COMMANDS:
        real = shutil.which(command)
        if real is None:
            continue
        script = folder / command
        # A job inherits the driver's environment; what is called there is not the driver's doing.
        script.write_text(f'#!/bin/sh\n[ -n "$SLURM_JOB_ID" ] || echo {command} >> {log}\nexec {real} "$@"\n')
        script.chmod(0o755)


def one(variant: str, python: Path, jobs: int) -> dict[str, Any]:
    """One call of Snakemake in an empty folder."""
    place = Path(tempfile.mkdtemp(prefix="bench-driver-"))
    (place / "Snakefile").write_text(SNAKEFILE.format(jobs=jobs))
    calls = place / "calls"
    calls.touch()
    wrappers(place / "bin", calls)
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SLURM_")} | {"PATH": path}
    words = [str(python), "-m", "snakemake", "--jobs", str(jobs), *VARIANTS[variant]]
    started = time.monotonic()
    process = subprocess.Popen(
        words, cwd=place, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    output_of: dict[str, str] = {}
    said_at: dict[str, float] = {}
    lines, output = [], ""
    for line in process.stdout:
        now = time.time()
        lines.append(line)
        if found := re.match(r"\s+output: (\S+)", line):
            output = found[1]
        elif found := re.match(r"\s+jobid: (\d+)", line):
            output_of[found[1]] = output
        elif found := re.match(r"Finished jobid: (\d+)", line):
            said_at[output_of.get(found[1], "")] = now
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.monotonic() - started
    if status:
        raise SystemExit(f"{variant} failed:\n{''.join(lines[-40:])}")
    counted = collections.Counter(calls.read_text().split())
    measured = {
        "variant": variant,
        "wall_seconds": wall,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mib": usage.ru_maxrss / 1024,
        "slurm_calls": sum(counted.values()),
        "slurm_calls_by_command": dict(counted),
        **delays(place, said_at),
    }
    shutil.rmtree(place)
    return measured


def delays(place: Path, said_at: dict[str, float]) -> dict[str, Any]:
    """From each job's end to the driver's word, seconds."""
    id_of = {(place / path).read_text().strip(): path for path in said_at if path}
    time.sleep(2)  # accounting follows the jobs by a moment
    answer = subprocess.run(
        ["sacct", "-X", "-n", "-P", "-o", "JobIDRaw,End", "-j", ",".join(id_of)],
        env=os.environ | {"SLURM_TIME_FORMAT": "%s"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    ends = dict(line.split("|") for line in answer.splitlines())
    # sacct cuts the second off: the end lies half a second later on average.
    found = sorted(
        max(0.0, said_at[path] - int(ends[job]) - 0.5) for job, path in id_of.items() if ends.get(job, "").isdigit()
    )
    return {
        "delay_seconds_median": statistics.median(found),
        "delay_seconds_max": found[-1],
        "delays_known": len(found),
    }


def start_cpu(python: Path) -> float:
    """CPU seconds that Snakemake takes to start and do one local no-op; what each job pays that starts one."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "Snakefile").write_text('rule all:\n    output: "x"\n    shell: "touch {output}"\n')
        before = os.times()
        words = [str(python), "-m", "snakemake", "--cores", "1", "--quiet", "all"]
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
        after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def machine() -> dict[str, Any]:
    """Where it was measured."""
    model = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    slurm = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    packages = ("snakemake", "snakemake-executor-plugin-slurm", "snakemake-executor-plugin-submitit", "submitit")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "commit": commit.stdout.strip(),
        "processor": model[1] if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "load_before": os.getloadavg()[0],
        "python": platform.python_version(),
        "slurm": slurm,
        **{name: version(name) for name in packages},
    }


def table(samples: list[dict[str, Any]]) -> str:
    """Medians of all variants, and ours against the peer's."""
    variants = [name for name in VARIANTS if any(sample["variant"] == name for sample in samples)]
    median = {
        name: {key: statistics.median(s[key] for s in samples if s["variant"] == name) for key in MEASURES}
        for name in variants
    }
    lines = [f"| | {' | '.join(variants)} | {OURS} / {PEER} |", "|---" * (len(variants) + 2) + "|"]
    for key, label in MEASURES.items():
        ratio = (
            f"{median[OURS][key] / median[PEER][key]:.2f}"
            if {OURS, PEER} <= set(variants) and median[PEER][key]
            else ""
        )
        lines.append(f"| {label} | {' | '.join(f'{median[name][key]:.1f}' for name in variants)} | {ratio} |")
    counts = {name: sum(sample["variant"] == name for sample in samples) for name in variants}
    lines.append(f"| calls of Snakemake | {' | '.join(str(counts[name]) for name in variants)} | |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=60)
    parser.add_argument(
        "--repeats", type=int, default=3, help="of the two that are compared, in turns; others run once"
    )
    parser.add_argument(
        "--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), help="must hold both executors"
    )
    parser.add_argument("--write", type=Path, help="folder for the figures")
    arguments = parser.parse_args()
    pythons = {variant: environment(variant) for variant in arguments.variants}
    facts = machine()
    samples: list[dict[str, Any]] = []
    for number in range(arguments.repeats):
        for variant in arguments.variants:
            if number and variant not in (PEER, OURS):
                continue
            samples.append(one(variant, pythons[variant], arguments.jobs))
            print(f"{number + 1}. {variant}: " + ", ".join(f"{k} {samples[-1][k]:.1f}" for k in MEASURES), flush=True)
    facts["snakemake_start_cpu_seconds"] = statistics.median(start_cpu(pythons[OURS]) for _ in range(3))
    text = table(samples)
    floor = arguments.jobs * facts["snakemake_start_cpu_seconds"] / facts["cores"]
    text += (
        f"\n\nSnakemake's own start takes {facts['snakemake_start_cpu_seconds']:.1f} s of CPU here: "
        f"{arguments.jobs} jobs that each start one can't be done in less than {floor:.0f} s on {facts['cores']} cores."
    )
    print(text)
    if arguments.write:
        arguments.write.mkdir(parents=True, exist_ok=True)
        path = arguments.write / f"driver-{facts['date'][:10]}.json"
        document = {
            "command": sys.argv,
            "machine": facts,
            "snakefile": SNAKEFILE,
            "variants": VARIANTS,
            "samples": samples,
        }
        path.write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".md").write_text(
            f"# {arguments.jobs} no-op jobs under both executors\n\n{text}\n\n"
            + "\n".join(f"- {key}: {value}" for key, value in facts.items())
            + "\n"
        )
        print(f"written: {path}")


if __name__ == "__main__":
    main()
