"""A study from its configuration to its report, and what a user meets on the way."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from snakemake.profiles import ProfileConfigFileParser

from finetune_study.outcome import COLUMNS
from tests.workflow.workplace import REPOSITORY, Workplace


def test_measured_study_has_its_files(measured_once: Workplace) -> None:
    results = measured_once.results
    outcomes = pl.read_parquet(results / "outcomes.parquet")
    assert outcomes.columns == list(COLUMNS)
    assert outcomes["status"].to_list() == ["completed", "completed"]
    assert outcomes["step_time_seconds_median"].min() > 0  # type: ignore[operator]
    assert pl.read_csv(results / "outcomes.csv")["run_id"].to_list() == outcomes["run_id"].to_list()
    assert pl.read_parquet(results / "comparisons.parquet").height == 2
    assert json.loads((results / "recommendations.json").read_text())
    page = (results / "report" / "index.html").read_text()
    assert all(run_id in page for run_id in outcomes["run_id"])


def test_run_ends_with_record_or_failure_never_both(measured_once: Workplace) -> None:
    for folder in measured_once.run_folders():
        assert (folder / "record.json").exists()
        assert not (folder / "failure.json").exists()
        assert not (folder / "ranks").exists()


def test_unsupported_run_is_a_row_without_training(measured: Workplace) -> None:
    raw = measured.read()
    raw["recipes"]["flash"] = ["flash_attention_2"]
    raw["grid"][0]["recipes"] = ["full", "lora", "flash"]
    measured.write(raw)
    assert "finetune" not in measured.planned()
    assert measured.snakemake().returncode == 0
    outcomes = pl.read_csv(measured.results / "outcomes.csv")
    row = outcomes.filter(pl.col("status") == "unsupported")
    assert "CUDA kernels alone" in row["reason"][0]
    assert measured.planned() == {}


def test_failed_run_is_reported_and_alone_runs_again(measured: Workplace) -> None:
    untouched = measured.record("_full_").read_bytes()
    raw = measured.read()
    raw["recipes"]["broken"] = {"lora": {"target_modules": ["no_such_layer"]}}
    raw["grid"][0]["recipes"] = ["full", "lora", "broken"]
    measured.write(raw)
    answer = measured.snakemake()
    assert answer.returncode != 0
    (folder,) = (folder for folder in measured.run_folders() if "broken" in folder.name)
    assert "no_such_layer" in answer.stdout
    assert str(Path("results") / "runs" / folder.name / "launch.log") in answer.stdout
    assert not (folder / "record.json").exists()
    page = (measured.results / "report" / "index.html").read_text()
    assert folder.name in page
    assert "no_such_layer" in page
    assert measured.record("_full_").read_bytes() == untouched
    assert measured.planned() == {"finetune": 1, "extract_metrics": 1, "aggregate": 1, "report": 1}
    # Taken out of the study again, it is gone from the tables and the page, too.
    raw["grid"][0]["recipes"] = ["full", "lora"]
    measured.write(raw)
    assert measured.snakemake().returncode == 0
    assert folder.name not in (measured.results / "report" / "index.html").read_text()


def test_remeasured_run_keeps_its_old_record(measured: Workplace) -> None:
    record = measured.record("_lora_")
    before, other = record.read_text(), measured.record("_full_").read_bytes()
    for number in (1, 2):
        answer = measured.snakemake("remeasure", "--config", "remeasure=*_lora_*")
        assert answer.returncode == 0, answer.stdout
        assert len(list((record.parent / "superseded").iterdir())) == number
    assert record.read_text() != before
    assert (record.parent / "superseded" / "record-1.json").read_text() == before
    assert measured.record("_full_").read_bytes() == other
    assert measured.planned() == {}


def test_truncated_record_stops_everything_and_changes_nothing(measured: Workplace) -> None:
    record = measured.record("_lora_")
    record.write_text(record.read_text()[:100])
    os.utime(record)
    answer = measured.snakemake()
    assert answer.returncode != 0
    assert "1 record(s) are cut off; nothing was changed" in answer.stdout
    assert "restore the file from a backup, or delete it" in answer.stdout
    assert "Traceback" not in answer.stdout
    assert len(record.read_text()) == 100


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda raw: raw["protocol"].update(num_timd_steps=3), "unknown key (did you mean `num_timed_steps`"),
        (lambda raw: raw["recipes"].update(x=["zero2", "zero3"]), "contradict each other"),
        (lambda raw: raw["recipes"].update(x=["lorra"]), "unknown technique `lorra` (did you mean lora"),
        (lambda raw: raw["training"].update(learning_rate=-1), "greater than 0; given: -1"),
        (
            lambda raw: raw["models"].update(tiny={"name_or_path": "./no/such/model"}),
            "A model's folder is missing or holds no config.json",
        ),
        (lambda raw: raw["data"].update(dataset="no/such/file.jsonl"), "The data file is missing"),
    ],
    ids=["key", "contradiction", "technique", "negative", "model", "data"],
)
def test_bad_configuration_is_one_message_before_anything_runs(fresh: Workplace, change: object, words: str) -> None:
    raw = fresh.read()
    change(raw)  # type: ignore[operator]
    fresh.write(raw)
    answer = fresh.snakemake()
    assert answer.returncode != 0
    assert words in answer.stdout
    assert "Traceback" not in answer.stdout
    assert not fresh.results.exists()


def test_a_python_that_is_not_there_stops_the_start_of_runs_alone(fresh: Workplace) -> None:
    raw = fresh.read()
    raw["hardware"]["cpu"]["software"] = {"python": "no/such/python"}
    fresh.write(raw)
    warning = "warning, no run can start there yet: There is no such interpreter"
    plan = str(fresh.results.relative_to(fresh.folder) / "plan.json")
    for does_without, warnings in ((("--dry-run",), 1), (("--dry-run", "forecast"), 0), ((plan,), 0)):
        answer = fresh.snakemake(*does_without)
        assert answer.returncode == 0, answer.stdout
        assert answer.stdout.count(warning) == warnings, does_without
    answer = fresh.snakemake()
    assert answer.returncode != 0
    assert "hardware.cpu.software.python" in answer.stdout
    assert not (fresh.results / "prepared").exists(), "seen before anything is fetched"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        pytest.param("", "empty", marks=pytest.mark.long),
        pytest.param('{"dialogue": "A: hi"}\n', "summary", marks=pytest.mark.long),
        ('{"dialogue": "A: hi", "summary": "x"}\n{broken\n', "Line 2 of the data file is not JSON"),
    ],
    ids=["empty", "column missing", "not JSON"],
)
def test_bad_data_file_is_one_message_before_any_training(fresh: Workplace, content: str, words: str) -> None:
    raw = fresh.read()
    raw["data"]["dataset"] = "data.jsonl"
    (fresh.folder / "data.jsonl").write_text(content)
    fresh.write(raw)
    answer = fresh.snakemake()
    assert answer.returncode != 0
    assert words in answer.stdout
    assert "Traceback" not in answer.stdout
    assert not list((fresh.results / "runs").glob("*/launch.log"))


@pytest.mark.long
def test_dialogue_longer_than_the_context_is_named(fresh: Workplace) -> None:
    raw = fresh.read()
    raw["data"]["overlong"] = "error"
    fresh.write(raw)
    answer = fresh.snakemake()
    assert answer.returncode != 0
    for word in ("64", "overlong", "truncate"):
        assert word in answer.stdout
    assert not list((fresh.results / "runs").glob("*/launch.log"))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only file system")
def test_read_only_results_folder_is_one_message(fresh: Workplace) -> None:
    fresh.results.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(fresh.results)], check=True)
    try:
        answer = fresh.snakemake()
    finally:
        subprocess.run(["umount", str(fresh.results)], check=True)
    assert answer.returncode != 0
    assert "The results folder can't be written to" in answer.stdout
    assert "Traceback" not in answer.stdout


def rules_of(answer: str, rule: str) -> list[str]:
    """What a dry run prints of each job of a rule."""
    return [part for part in answer.split("rule ") if part.startswith(f"{rule}:")]


@pytest.mark.parametrize("executor", ["submitit", "slurm"])
def test_every_run_asks_for_what_its_hardware_entry_says(fresh: Workplace, executor: str) -> None:
    raw = fresh.read()
    asked = {"partition": "a100", "account": "lab", "gpu_model": "a100", "cpus_per_gpu": 3, "stand_in": True}
    raw["hardware"]["cpu"]["slurm"] = asked | {
        "mem_gib_per_gpu": 1.5, "startup_minutes": 2.5, "max_job_minutes": 60,
    }  # fmt: skip
    raw["hardware"]["plain"] = {"device": "cpu", "memory_gib": 2}
    raw["hardware"]["cpu"]["software"] = {"modules": ["cuda/12.6"], "python": "/bin/sh"}
    raw["grid"][0] |= {"recipes": "full", "num_gpus": 2}
    raw["grid"].append(raw["grid"][0] | {"hardware": "plain", "num_gpus": 1})
    fresh.write(raw)
    arguments = ("--dry-run", "--printshellcmds", "--workflow-profile", "none", "--executor", executor, "--jobs", "2")
    answer = fresh.snakemake(*arguments, cores=None)
    assert answer.returncode == 0, answer.stdout
    on_gpus, plain = sorted(rules_of(answer.stdout, "finetune"), key=lambda text: "gres" not in text)
    for resource in (
        "job_name=tiny_cpux2_s64_b1_full_r1-", "slurm_partition=a100", "slurm_account=lab", "nodes=1",
        "gres=gpu:a100:2", "cpus_per_task=6", "mem_mb=3072", "runtime=13",
        "max_job_minutes=60", "submit_kind=cpu-", "unfit_node_status=69",
    ):  # fmt: skip
        assert resource in on_gpus
    for unset in ("qos", "constraint", "slurm_extra", "None"):
        assert unset not in on_gpus
    assert "load_modules.sh cuda/12.6 && /bin/sh -m finetune_study.launch" in on_gpus
    assert """--allocation '{"nodes":1,"gpu_model":"a100","stand_in":true}'""" in on_gpus
    assert "cpus_per_task=8" in plain
    assert "submit_kind=plain-" in plain
    for unset in ("slurm_partition", "gres", "mem", "max_job_minutes"):
        assert f" {unset}=" not in plain
    assert sys.executable in plain


def test_names_may_be_of_any_script(fresh: Workplace, raw: dict[str, Any]) -> None:
    """Also where the locale knows ASCII alone; a job's name for SLURM is in ASCII."""
    names = {"models": "模型-ü", "hardware": "prozeß", "recipes": "полный"}
    for part, name in names.items():
        raw[part] = {name: next(iter(raw[part].values()))}
    raw["grid"] = [{"targets": "模型-ü", "hardware": "prozeß", "sequence_length": 64, "recipes": "полный"}]
    fresh.write(raw)
    options = ("--dry-run", "--printshellcmds", "--workflow-profile", "none", "--executor", "slurm", "--jobs", "1")
    answer = fresh.snakemake(*options, cores=None, LC_ALL="C", PYTHONIOENCODING="utf-8")
    assert answer.returncode == 0, answer.stdout
    assert "results/runs/模型-ü_prozeßx1_s64_b1_полный_r1-" in answer.stdout
    assert "job_name=__-__proze_x1_s64_b1________r1-" in answer.stdout


def test_profile_for_slurm_says_who_is_asked_before_a_job_and_after_a_kill(fresh: Workplace) -> None:
    """The hooks are called with the Python that runs Snakemake, whatever is in the PATH."""
    with (REPOSITORY / "slurm" / "config.yaml").open(encoding="utf-8") as stream:
        parsed = ProfileConfigFileParser().parse(stream)
    for hook in ("after-kill", "before-submit"):
        assert parsed[f"submitit-{hook}"] == f"{shlex.quote(sys.executable)} -m finetune_study.cli {hook}"
    assert (parsed["executor"], parsed["retries"], parsed["keep-going"]) == ("submitit", "0", "True")
    answer = fresh.snakemake("--dry-run", "--profile", str(REPOSITORY / "slurm"), cores=None)
    assert answer.returncode == 0, answer.stdout
