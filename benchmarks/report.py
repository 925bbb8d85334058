"""Aggregation and report of a large synthetic study, against the limits that a lab was promised.

    python benchmarks/report.py [--runs 100000] [--write benchmarks/results]

Two processes, one after the other, do what the scripts of the rules `aggregate` and `report` do with outcomes.parquet
(100,000 rows of benchmarks/synthetic.py, which is not timed): each imports what it needs and makes the plan; one writes
comparisons and recommendations, the other figures, tables and the page. Measured: wall time of each from its start to
its end and of its parts, seconds, and the largest resident size, GiB. The ratio is to the limits.

Then the page is opened in a browser, from its file: until its table stands, a sort and a search over all runs, and the
frames while it is scrolled from its top to its end.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import psutil
import synthetic
from playwright import sync_api

from finetune_study import cells, outcome, recommend, report
from finetune_study import config as config_module
from finetune_study import study as study_module
from finetune_study.measure import environment
from finetune_study.paths import Results
from finetune_study.record import Record

LIMIT_SECONDS, LIMIT_GIB = 60.0, 3.0
MACHINE = ("commit", "commit_has_local_changes", "lock_sha256", "processor", "processor_cores", "host_memory_bytes")
"""What a result says of where it was measured."""
RULES = ("aggregate", "report")
RUNS_PER_TARGET = 1596
"""Of the synthetic study, at three repeats, on average over its shapes."""


def outcomes(num_runs: int) -> tuple[dict[str, Any], pl.DataFrame]:
    """The configuration, and at least that many rows of outcomes (runs that failed have none)."""
    raw = synthetic.settings(repeats=3, targets=-(-num_runs // RUNS_PER_TARGET))
    config = config_module.parse(raw)
    documents = (document for _, document in synthetic.records(config))
    prices = {name: entry.price_usd_per_gpu_hour for name, entry in config.hardware.items()}
    rows = [
        outcome.row(one, prices[one.run.hardware.name], synthetic.prior(one.run))
        for one in documents
        if isinstance(one, Record)
    ]
    frame = pl.DataFrame(rows, schema=outcome.SCHEMA)
    tail = pl.format(
        "{}: synthetic\n" + "torch.OutOfMemoryError: CUDA out of memory (synthetic)\n" * 8, pl.col("run_id")
    )
    return raw, frame.with_columns(log_tail=pl.when(pl.col("oom_phase").is_not_null()).then(tail))


def measure(rule: str, folder: Path) -> dict[str, Any]:
    """In a process of its own: what a rule's script does, timed."""
    parts: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        parts[name] = round(time.perf_counter() - start, 2)
        return value

    memory = MemoryOfAll()
    memory.start()
    raw = json.loads((folder / "config.json").read_text())
    study = timed("plan", lambda: study_module.as_planned(raw, Results(folder)))
    planned = list(study.planned.values())
    if rule == "aggregate":
        timed("comparisons and recommendations", lambda: recommend.aggregate(study.config, planned, study.results))
    else:
        frame = timed("outcomes read", lambda: cells.of_outcomes(planned, study.results))
        timed("figures, tables and page", lambda: report.build(study.config, frame, study.results))
    return {"seconds": parts, "max_rss_gib": round(memory.peak_bytes / 2**30, 3), "runs": len(planned)}


def both(folder: Path) -> dict[str, Any]:
    """Both rules, one after the other, each from the start of its process to its end."""
    found: dict[str, Any] = {"seconds": {}, "max_rss_gib": 0.0}
    used = sum(os.times()[2:4])
    for rule in RULES:
        start = time.perf_counter()
        command = [sys.executable, __file__, "--rule", rule, "--keep", str(folder)]
        one = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        found["seconds"][rule] = {"in all": round(time.perf_counter() - start, 2), **one["seconds"]}
        found["max_rss_gib"] = max(found["max_rss_gib"], one["max_rss_gib"])
        found["runs"] = one["runs"]
    found["cpu_seconds"] = round(sum(os.times()[2:4]) - used, 2)
    found["total_seconds"] = round(sum(one["in all"] for one in found["seconds"].values()), 2)
    found["page_mib"] = round(Results(folder).report.stat().st_size / 2**20, 2)
    return found


class MemoryOfAll(threading.Thread):
    """Most resident memory of this process and of those that convert figures; pages that they share count twice."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak_bytes = 0

    def run(self) -> None:
        own = psutil.Process()
        while True:
            resident = 0
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    resident += process.memory_info().rss
            self.peak_bytes = max(self.peak_bytes, resident)
            time.sleep(0.05)


SCROLL = """async () => {
    const frames = [];
    let last = performance.now();
    for (let y = 0; y < document.documentElement.scrollHeight; y += 200) {
        scrollTo(0, y);
        const now = await new Promise(requestAnimationFrame);
        frames.push(now - last);
        last = now;
    }
    frames.sort((a, b) => a - b);
    const at = (share) => frames[Math.floor(share * (frames.length - 1))];
    return { frames: frames.length, median: at(0.5), p95: at(0.95), longest: at(1) };
}"""
"""Two hundred pixels a frame, about as fast as a wheel is turned; milliseconds."""


def browse(page_file: Path) -> dict[str, Any]:
    """The page in headless Chromium: seconds until it can be used, of a sort and of a search; frames, ms."""
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = launched.new_page(viewport={"width": 1280, "height": 1000})
        found: dict[str, Any] = {"browser": launched.version}

        def timed(name: str, work: Callable[[], Any]) -> None:
            start = time.perf_counter()
            work()
            found[f"{name}_seconds"] = round(time.perf_counter() - start, 2)

        def opened() -> None:
            page.goto(f"file://{page_file}")
            page.wait_for_selector("html[data-ready]", timeout=120_000)

        timed("open", opened)
        timed("sort", lambda: page.get_by_role("button", name="Step time s, median").click())
        timed("search", lambda: page.fill("#find", "zero3-lora-gc-flash"))
        found["scroll_ms"] = {name: round(value, 1) for name, value in page.evaluate(SCROLL).items()}
        found["elements"] = page.evaluate("document.querySelectorAll('*').length")
        found["heap_mib"] = round(page.evaluate("performance.memory.usedJSHeapSize") / 2**20, 1)
        launched.close()
    return found


def markdown(found: dict[str, Any]) -> str:
    """The same for a reader."""
    seconds, page, machine = found["seconds"], found["page"], found["machine"]
    scroll = page["scroll_ms"]
    rows = {
        **{f"{rule}: {part}": f"{value} s" for rule, parts in seconds.items() for part, value in parts.items()},
        "**both rules, of 60 s**": f"**{found['total_seconds']} s**, {found['share_of_60_seconds']:.0%}",
        "the same in processor time, on all cores": f"{found['cpu_seconds']} s",
        "largest resident size, of 3 GiB": f"{found['max_rss_gib']} GiB, {found['share_of_3_gib']:.0%}",
        "the page": f"{found['page_mib']} MiB, {page['elements']:,} elements, {page['heap_mib']} MiB of heap",
        "opened, with its table of runs": f"{page['open_seconds']} s",
        "all runs sorted; searched": f"{page['sort_seconds']} s; {page['search_seconds']} s",
        f"frames while scrolling ({scroll['frames']})": f"{scroll['median']} ms median, {scroll['p95']} ms at 95 %, "
        f"{scroll['longest']} ms longest",
    }
    facts = {
        "command": found["command"],
        "date": found["date"],
        **{name: machine[name] for name in ("commit", "lock_sha256", "processor", "processor_cores")},
        "memory_gib": round(machine["host_memory_bytes"] / 2**30, 1),
        "load_before": found["load_before"],
        "python": platform.python_version(),
        "polars": pl.__version__,
        "chromium": page["browser"],
        "repeated": "once",
    }
    lines = [f"# Report of {found['outcomes']:,} synthetic outcomes ({found['runs']:,} runs)", ""]
    lines += ["| what | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items()), ""]
    lines += [*(f"- {name}: {value}" for name, value in facts.items()), ""]
    lines += [
        "The outcomes are drawn by a generator: nothing here says anything about a model or a GPU. Not shown: how long",
        "it takes to read the records into outcomes.parquet, which is a rule of its own, and Snakemake's own start.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--write", type=Path, help="folder for the result")
    parser.add_argument("--keep", type=Path, help="folder in which the study is left, to look at its page")
    parser.add_argument("--rule", choices=RULES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rule:
        print(json.dumps(measure(given.rule, given.keep)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        raw, frame = outcomes(given.runs)
        (folder / "config.json").write_text(json.dumps(raw))
        frame.write_parquet(Results(folder).outcomes_parquet)
        num_outcomes = frame.height
        del frame
        load = os.getloadavg()[0]
        found = both(folder) | {"outcomes": num_outcomes}
        found["page"] = browse(Results(folder).report.absolute())
    found |= {
        "share_of_60_seconds": round(found["total_seconds"] / LIMIT_SECONDS, 3),
        "share_of_3_gib": round(found["max_rss_gib"] / LIMIT_GIB, 3),
        "command": " ".join(["python", *sys.argv]), "date": datetime.date.today().isoformat(),
        "machine": {name: value for name, value in environment.describe("cpu").items() if name in MACHINE},
        "load_before": round(load, 2),
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.write:
        (given.write / f"report-{found['date']}.json").write_text(json.dumps(found, indent=1) + "\n")
        (given.write / f"report-{found['date']}.md").write_text(markdown(found))


if __name__ == "__main__":
    main()
