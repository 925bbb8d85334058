"""Aggregation and report of a large synthetic study, against the limits that a lab was promised.

    python benchmarks/report.py [--runs 100000] [--write benchmarks/results]

One process takes outcomes.parquet (100,000 rows of benchmarks/synthetic.py, which is not timed) through the plan,
comparisons, recommendations, figures, tables and the page, as the rules `aggregate` and `report` do. Measured: wall
time of each part, seconds, and the largest resident size of that process, GiB. The ratio is to the limits.
"""

import argparse
import datetime
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import synthetic

from finetune_study import cells, outcome, plan, recommend, report
from finetune_study import config as config_module
from finetune_study.paths import Results
from finetune_study.record import Record

LIMIT_SECONDS, LIMIT_GIB = 60.0, 3.0
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
    return raw, pl.DataFrame(rows, schema=outcome.SCHEMA)


def measure(folder: Path) -> dict[str, Any]:
    """In a process of its own: what the rules do, timed."""
    parts: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        value = work()
        parts[name] = round(time.perf_counter() - start, 2)
        return value

    results = Results(folder)
    config = config_module.parse(json.loads((folder / "config.json").read_text()))
    planned = timed("plan", lambda: plan.plan(config))
    timed("aggregate", lambda: recommend.aggregate(config, planned, results))
    frame = timed("cells", lambda: cells.of_outcomes(planned, results))
    timed("report", lambda: report.build(config, frame, results))
    return {
        "runs": len(planned),
        "outcomes": frame["status"].is_not_null().sum(),
        "seconds": parts,
        "total_seconds": round(sum(parts.values()), 2),
        "max_rss_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 3),
        "page_mib": round(results.report.stat().st_size / 2**20, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument("--write", type=Path, help="folder for the result")
    parser.add_argument("--keep", type=Path, help="folder in which the study is left, to look at its page")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(measure(given.measure)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        raw, frame = outcomes(given.runs)
        (folder / "config.json").write_text(json.dumps(raw))
        frame.write_parquet(Results(folder).outcomes_parquet)
        del frame
        command = [sys.executable, __file__, "--measure", str(folder)]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    found |= {
        "share_of_60_seconds": round(found["total_seconds"] / LIMIT_SECONDS, 3),
        "share_of_3_gib": round(found["max_rss_gib"] / LIMIT_GIB, 3),
        "command": " ".join(sys.argv), "date": datetime.date.today().isoformat(), "cores": os.cpu_count(),
        "machine": platform.processor() or platform.machine(), "python": platform.python_version(),
        "polars": pl.__version__, "load_before": os.getloadavg()[0],
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    if given.write:
        (given.write / f"report-{found['date']}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
