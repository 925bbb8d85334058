"""Nothing but its own deletion or `remeasure` runs a recorded run again: dry runs that count rules."""

import copy
import json
import os
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_study.record import read_record
from tests.workflow.workplace import REPOSITORY, Workplace

pytestmark = pytest.mark.long

REPORTING = {"extract_metrics": 1, "aggregate": 1, "report": 1}


def edit(place: Workplace, change: Callable[[dict[str, Any]], object]) -> None:
    raw = place.read()
    change(raw)
    place.write(raw)


def test_fresh_study_runs_every_stage(fresh: Workplace) -> None:
    assert fresh.planned() == {
        "plan": 1,
        "prepare_model": 1,
        "prepare_data": 1,
        "finetune": 2,
        **REPORTING,
    }


def test_prepare_does_all_that_needs_a_network_and_nothing_else(fresh: Workplace) -> None:
    """Afterwards nothing is left but to train, and to tell of it."""
    raw = fresh.read()
    raw["models"]["unused"] = raw["models"]["other"] = copy.deepcopy(raw["models"]["tiny"])
    raw["models"]["other"]["architecture"]["num_hidden_layers"] = 1
    raw["recipes"]["flash"] = ["flash_attention_2"]
    raw["grid"].append(raw["grid"][0] | {"targets": "other", "recipes": "flash"})
    fresh.write(raw)
    assert fresh.planned("prepare") == {"plan": 1, "prepare_model": 1, "prepare_data": 1}
    answer = fresh.snakemake("prepare")
    assert answer.returncode == 0, answer.stdout
    assert (fresh.results / "plan.json").exists()
    assert not list(fresh.results.glob("runs/*/launch.log"))
    assert not (fresh.results / "outcomes.parquet").exists()
    assert fresh.planned("prepare") == {}
    assert fresh.planned() == {"finetune": 2, **REPORTING}
    shutil.rmtree(fresh.results / "prepared")
    assert fresh.planned("prepare") == {"prepare_model": 1, "prepare_data": 1}


def test_prepare_of_a_measured_study_does_nothing(measured: Workplace) -> None:
    shutil.rmtree(measured.results / "prepared")
    assert measured.planned("prepare") == {}


def test_second_call_does_nothing(measured: Workplace) -> None:
    assert measured.planned() == {}


def test_comment_changes_nothing(measured: Workplace) -> None:
    measured.config.write_text("# a thought\n" + measured.config.read_text())
    assert measured.planned() == {}


def test_price_is_a_matter_of_the_tables(measured: Workplace) -> None:
    edit(measured, lambda raw: raw["hardware"]["cpu"].update(price_usd_per_gpu_hour=9.0))
    assert measured.planned() == REPORTING


def test_title_is_a_matter_of_the_page(measured: Workplace) -> None:
    edit(measured, lambda raw: raw.update(report={"title": "Another"}))
    assert measured.planned() == {"report": 1}


def test_baseline_is_a_matter_of_the_comparisons(measured: Workplace) -> None:
    edit(measured, lambda raw: raw.update(report={"baseline": "lora"}))
    assert measured.planned() == {"aggregate": 1, "report": 1}


def test_new_metric_is_derived_from_the_records(measured: Workplace, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import finetune_study.outcome as o; o.METRICS_VERSION += 1")
    assert measured.planned(PYTHONPATH=str(tmp_path)) == REPORTING


def test_new_code_of_the_workflow_and_the_library_runs_nothing_again(measured: Workplace, tmp_path: Path) -> None:
    shutil.copytree(REPOSITORY / "workflow", tmp_path / "workflow")
    shutil.copytree(REPOSITORY / "profiles", tmp_path / "profiles")
    shutil.copy(REPOSITORY / "Snakefile", tmp_path)
    for script in (tmp_path / "workflow" / "scripts").iterdir():
        script.write_text(script.read_text() + "\n# a newer version\n")
    rule = tmp_path / "workflow" / "rules" / "finetune.smk"
    rule.write_text(rule.read_text().replace("-m finetune_study.launch", "-X dev -m finetune_study.launch"))
    assert "finetune" not in measured.planned(snakefile=tmp_path / "Snakefile")


def test_new_versions_of_the_software_run_nothing_again(measured: Workplace, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.metadata as m; old = m.version; m.version = lambda name: '99.0' if name in"
        " ('torch', 'transformers', 'deepspeed', 'finetune-study') else old(name)"
    )
    edit(measured, lambda raw: raw["hardware"]["cpu"].update(software={"python": sys.executable}))
    assert measured.planned(PYTHONPATH=str(tmp_path)) == {}


@pytest.mark.parametrize("what", ["prepared/models", "prepared/data", "prepared"])
def test_purged_model_and_data_are_not_missed(measured: Workplace, what: str) -> None:
    shutil.rmtree(measured.results / what)
    assert measured.planned() == {}


def test_new_run_makes_its_own_model_and_data_again_and_no_other(measured: Workplace) -> None:
    for name in ("prepared", "cache"):
        shutil.rmtree(measured.results / name)
    assert measured.planned() == {}
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in map(measured.record, ("_full_", "_lora_"))}
    raw = measured.read()
    raw["models"]["wider"] = copy.deepcopy(raw["models"]["tiny"])
    raw["models"]["wider"]["architecture"]["hidden_size"] = 96
    raw["grid"].append(raw["grid"][0] | {"targets": "wider", "recipes": "full"})
    measured.write(raw)
    answer = measured.snakemake()
    assert answer.returncode == 0, answer.stdout
    (new,) = {folder / "record.json" for folder in measured.run_folders()} - set(before)
    run = read_record(new).run
    assert [path.name for path in (measured.results / "prepared" / "models").iterdir()] == [run.model_key]
    assert [path.name for path in (measured.results / "prepared" / "data").iterdir()] == [run.data_key]
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before


def test_model_that_was_purged_in_part_is_made_again_when_a_run_needs_it(measured: Workplace) -> None:
    """A purge by age takes file by file, and weights may be links into a cache that is purged."""
    (folder,) = (measured.results / "prepared" / "models").iterdir()
    (folder / "tokenizer_config.json").unlink()
    assert measured.planned() == {}
    edit(measured, lambda raw: raw["grid"][0].update(recipes=["full", "lora", "new"]))
    edit(measured, lambda raw: raw["recipes"].update(new={"lora": {"r": 2}}))
    # The data follow, since they were made with the model's tokenizer.
    assert measured.planned() == {"plan": 1, "prepare_model": 1, "prepare_data": 1, "finetune": 1, **REPORTING}


def test_purged_run_yaml_is_not_missed(measured: Workplace) -> None:
    for folder in measured.run_folders():
        (folder / "run.yaml").unlink()
    assert measured.planned() == {}


def test_purged_run_yaml_of_a_run_to_come_is_written_anew(measured: Workplace) -> None:
    record = measured.record("_lora_")
    record.unlink()
    (record.parent / "run.yaml").unlink()
    assert measured.planned() == {"plan": 1, "finetune": 1, **REPORTING}


@pytest.mark.parametrize("age_seconds", [0, -(10**6)], ids=["all new", "records far older"])
def test_lost_modification_times_measure_nothing(measured: Workplace, age_seconds: int) -> None:
    now = time.time()
    for path in sorted(measured.results.rglob("*")):
        os.utime(path, (now, now))
    for folder in measured.run_folders():
        os.utime(folder / "record.json", (now + age_seconds,) * 2)
        os.utime(folder / "run.yaml", (now + 10, now + 10))
    assert "finetune" not in measured.planned()


def test_lost_notes_of_snakemake_measure_nothing(measured: Workplace) -> None:
    shutil.rmtree(measured.folder / ".snakemake")
    assert "finetune" not in measured.planned()


def test_run_added_beside_them_runs_alone_even_without_its_model(measured: Workplace) -> None:
    shutil.rmtree(measured.results / "prepared")
    edit(measured, lambda raw: raw["grid"][0].update(sequence_length=[64, 96], recipes="lora"))
    raw = measured.read()
    raw["grid"].append(raw["grid"][0] | {"sequence_length": 64, "recipes": "full"})
    measured.write(raw)
    assert measured.planned() == {
        "plan": 1,
        "prepare_model": 1,
        "prepare_data": 1,
        "finetune": 1,
        **REPORTING,
    }


def test_new_model_runs_its_own_runs(measured: Workplace) -> None:
    raw = measured.read()
    raw["models"]["other"] = {**raw["models"]["tiny"]}
    raw["models"]["other"]["architecture"] = raw["models"]["tiny"]["architecture"] | {"num_hidden_layers": 1}
    raw["grid"][0]["targets"] = ["tiny", "other"]
    measured.write(raw)
    counts = measured.planned()
    assert counts["finetune"] == 2
    assert counts["prepare_model"] == 1


def test_changed_technique_setting_runs_what_it_touches(measured: Workplace) -> None:
    edit(measured, lambda raw: raw["recipes"]["lora"]["lora"].update(r=8))
    assert measured.planned() == {"plan": 1, "finetune": 1, **REPORTING}


def test_run_taken_away_leaves_the_tables(measured: Workplace) -> None:
    edit(measured, lambda raw: raw["grid"][0].update(recipes="full"))
    assert measured.planned() == {"plan": 1, **REPORTING}


def test_deleted_record_of_an_unsupported_run_is_written_anew(fresh: Workplace) -> None:
    edit(fresh, lambda raw: raw["recipes"].update(full=["flash_attention_2"]))
    edit(fresh, lambda raw: raw["grid"][0].update(recipes="full"))
    assert fresh.snakemake().returncode == 0
    assert fresh.planned() == {}
    fresh.record("_full_").unlink()
    assert fresh.planned() == {"plan": 1, **REPORTING}
    assert fresh.snakemake().returncode == 0
    assert fresh.planned() == {}


def test_run_that_can_run_by_now_is_run(fresh: Workplace) -> None:
    edit(fresh, lambda raw: raw["hardware"]["cpu"].update(max_gpus=1))
    edit(fresh, lambda raw: raw["grid"][0].update(recipes="full", num_gpus=2))
    assert fresh.snakemake().returncode == 0
    assert "has 1 for a run" in fresh.record("_full_").read_text()
    edit(fresh, lambda raw: raw["hardware"]["cpu"].update(max_gpus=2))
    assert fresh.planned() == {
        "plan": 1,
        "prepare_model": 1,
        "prepare_data": 1,
        "finetune": 1,
        **REPORTING,
    }
    assert fresh.snakemake("plan").returncode == 0
    assert not fresh.record("_full_").exists()
    assert fresh.planned()["finetune"] == 1


def test_deleted_record_is_measured_again(measured: Workplace) -> None:
    measured.record("_lora_").unlink()
    assert measured.planned() == {"finetune": 1, **REPORTING}


def test_higher_time_limit_runs_nothing_again(measured: Workplace) -> None:
    edit(measured, lambda raw: raw["protocol"].update(time_limit_minutes=50))
    assert measured.planned() == {}


def test_remeasure_takes_what_it_is_told(measured: Workplace) -> None:
    counts = measured.planned("remeasure", "--config", "remeasure=*_lora_*")
    assert counts == {"request_remeasure": 1, "finetune": 1, **REPORTING}


def test_remeasure_without_a_pattern_says_how(measured: Workplace) -> None:
    answer = measured.snakemake("remeasure")
    assert answer.returncode != 0
    assert "remeasure='<run_id or pattern>'" in answer.stdout


def test_remeasure_of_an_unknown_run_says_what_is_allowed(measured: Workplace) -> None:
    answer = measured.snakemake("--dry-run", "remeasure", "--config", "remeasure=nothing*")
    assert answer.returncode != 0
    assert "No run of the study fits" in answer.stdout
    assert "tiny_cpux1_s64_b1_full" in answer.stdout


def test_run_that_failed_too_often_is_left_alone(measured: Workplace) -> None:
    record = measured.record("_lora_")
    record.unlink()
    failure = {"run_id": record.parent.name, "attempt": 3, "cause": "a bug", "log": "x"}
    (record.parent / "failure.json").write_text(json.dumps(failure))
    assert "finetune" not in measured.planned()
    (record.parent / "failure.json").write_text(json.dumps(failure | {"attempt": 2}))
    assert measured.planned()["finetune"] == 1
