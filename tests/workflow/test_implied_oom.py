"""Runs that an easier one shows to run out of memory, through the workflow."""

from typing import Any

import polars as pl
import pytest

from finetune_study import record, run
from finetune_study.paths import RunPaths
from finetune_study.record import Ending, Record
from tests.workflow.workplace import Workplace

pytestmark = pytest.mark.long

REPORTING = {"extract_metrics": 1, "aggregate": 1, "report": 1}


def change(place: Workplace, **changes: Any) -> None:
    """Other contexts, or another protocol."""
    raw = place.read()
    raw["grid"][0]["sequence_length"] = changes.pop("sequence_length", raw["grid"][0]["sequence_length"])
    raw["protocol"] |= changes
    place.write(raw)


def ending(place: Workplace, word: str) -> Ending:
    return record.read_record(place.record(word)).ending


def test_longer_context_is_not_trained_after_a_shorter_one_ran_out(fresh: Workplace) -> None:
    """Switched off it is, and what was concluded is kept aside."""
    raw = fresh.read()
    raw["hardware"]["cpu"]["memory_gib"] = 0.003  # less than model, gradients and optimizer states
    raw["data"]["num_eval_samples"] = 0  # memory that runs out in evaluation proves nothing
    raw["grid"][0]["recipes"] = "full"
    fresh.write(raw)
    answer = fresh.snakemake()
    assert answer.returncode == 0, answer.stdout
    witness = fresh.record("_s64_").parent.name
    assert ending(fresh, "_s64_").status == "device_oom"
    measured = fresh.record("_s64_").read_bytes()

    change(fresh, sequence_length=[64, 96])
    assert fresh.planned() == {"plan": 1, **REPORTING}
    answer = fresh.snakemake()
    assert answer.returncode == 0, answer.stdout
    assert "1 implied out of memory" in answer.stdout
    assert (ending(fresh, "_s96_").status, ending(fresh, "_s96_").witness) == ("implied_oom", witness)
    assert not (fresh.record("_s96_").parent / "launch.log").exists()
    row = pl.read_parquet(fresh.results / "outcomes.parquet").filter(pl.col("status") == "implied_oom")
    assert witness in row["reason"][0]
    assert "implied out of memory" in (fresh.results / "report" / "index.html").read_text()
    assert fresh.planned() == {}

    change(fresh, infer_oom=False)
    assert fresh.planned() == {"plan": 1, "prepare_data": 1, "finetune": 1, **REPORTING}
    answer = fresh.snakemake()
    assert answer.returncode == 0, answer.stdout
    assert ending(fresh, "_s96_").status == "device_oom"
    aside = fresh.record("_s96_").parent / "superseded" / "record-1.json"
    assert record.read_record(aside).ending.status == "implied_oom"
    assert fresh.record("_s64_").read_bytes() == measured
    assert fresh.planned() == {}

    # Measured by now, it stays.
    change(fresh, infer_oom=True)
    assert "finetune" not in fresh.planned()


@pytest.fixture
def ran_out(fresh: Workplace) -> Workplace:
    """Contexts 64 and 96 are planned and prepared; the shorter one has a record as if it had run out of memory."""
    raw = fresh.read()
    raw["grid"][0] |= {"recipes": "full", "sequence_length": [64, 96]}
    fresh.write(raw)
    assert fresh.snakemake("prepare").returncode == 0
    path = fresh.record("_s64_")
    out = Ending(status="device_oom", phase="forward")
    record.write_record(RunPaths(path.parent), Record(run=run.load(path.with_name("run.yaml")), ending=out, ranks=[{}]))
    return fresh


def test_implied_runs_are_trained_when_somebody_asks_or_their_witness_is_gone(ran_out: Workplace) -> None:
    assert ran_out.planned() == {"plan": 1, **REPORTING}
    assert ran_out.snakemake("plan").returncode == 0
    assert ending(ran_out, "_s96_").status == "implied_oom"

    asked = ("remeasure", "--config", "remeasure=*_s96_*")
    assert ran_out.planned(*asked) == {"request_remeasure": 1, "finetune": 1, **REPORTING}
    said = ran_out.snakemake("--dry-run", "--printshellcmds", "--workflow-profile", "none", *asked).stdout
    assert "--if-needed" in said
    assert "--infer-oom" not in said

    ran_out.record("_s64_").unlink()
    assert ran_out.planned() == {"plan": 1, "finetune": 2, **REPORTING}
    assert ran_out.snakemake("plan").returncode == 0
    assert not ran_out.record("_s96_").exists()
    assert (ran_out.record("_s96_").parent / "superseded" / "record-1.json").exists()
    assert ran_out.planned() == {"finetune": 2, **REPORTING}


def test_snakemake_that_starts_anew_in_a_job_finds_its_run_decided_in_the_meantime(ran_out: Workplace) -> None:
    """As executors start it that need Snakemake on the node: the plan is not allowed to run there."""
    short, long = (ran_out.record(word).parent for word in ("_s64_", "_s96_"))
    in_job = ("--target-jobs", f"finetune:run_id={long.name}", "--allowed-rules", "finetune", "--mode", "remote")
    answer = ran_out.snakemake(*in_job, "--force", "--nolock")
    assert answer.returncode == 0, answer.stdout
    assert f"{long.name}: implied_oom by {short.name}" in answer.stdout
    assert ending(ran_out, "_s96_").witness == short.name
