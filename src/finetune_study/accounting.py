"""What SLURM's accounting says of the runs' jobs: the billing units of what they were given."""

import json
import re
import subprocess
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from finetune_study.record import write_atomically

FORMAT = 1
"""Version of accounting.json."""
JOBS_AT_ONCE = 1000
"""Jobs that one call asks for: far below the longest argument of a command (128 KiB)."""
TIMEOUT_SECONDS = 60
"""Accounting that does not answer by then is left out; the next call asks again."""
BILLING = re.compile(r"(?:^|,)billing=(\d+)")
"""In `AllocTRES`: what the allocation weighs by the partition's TRESBillingWeights (slurm.conf(5))."""


def billing_units(jobs: Iterable[str], kept: Path) -> dict[str, int]:
    """Billing units of each job; those that accounting does not know are left out, and asked for again.

    Accounting forgets jobs after a while, so what it said is kept. No sacct, or one that does not answer, is no error:
    costs are then given without billing units.

    Args:
        jobs: SLURM's ids, as `SLURM_JOB_ID` gives them.
        kept: accounting.json of the study.
    """
    known = _read(kept)
    wanted = dict.fromkeys(jobs)
    unknown = (job for job in wanted if job not in known and job.isdigit())
    found: dict[str, int] = {}
    while some := [*islice(unknown, JOBS_AT_ONCE)]:
        answer = _sacct(some)
        if answer is None:
            break
        found |= dict(parse(answer))
    if found:
        known |= found
        write_atomically(kept, json.dumps({"format": FORMAT, "billing_units": known}, indent=1) + "\n")
    return {job: known[job] for job in wanted if job in known}


def _read(kept: Path) -> dict[str, int]:
    try:
        document = json.loads(kept.read_text(encoding="utf-8"))
        return {str(job): int(units) for job, units in document["billing_units"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # asked for again
        return {}


def _sacct(jobs: list[str]) -> str | None:
    command = ["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobIDRaw,AllocTRES"]
    try:
        done = subprocess.run(
            [*command, f"--jobs={','.join(jobs)}"], capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def parse(text: str) -> Iterator[tuple[str, int]]:
    """Jobs and their billing units, of lines `<job>|<AllocTRES>`; a job that was given nothing yet has none."""
    for line in text.splitlines():
        job, _, resources = line.partition("|")
        if found := BILLING.search(resources):
            yield job, int(found[1])
