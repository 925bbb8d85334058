"""Nothing is written to a home folder, which may be read-only."""

import os
import subprocess
from pathlib import Path

import pytest

from finetune_study.record import read_record
from tests.workflow.conftest import OF_CACHES
from tests.workflow.workplace import Workplace

pytestmark = pytest.mark.long


def test_study_leaves_nothing_in_the_home_folder(measured_once: Workplace, home: Path) -> None:
    assert list(home.iterdir()) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a read-only file system")
def test_study_passes_with_a_read_only_home(fresh: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OF_CACHES:
        monkeypatch.delenv(name, raising=False)
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir()
    raw = fresh.read()
    raw["recipes"]["zero2-lora"] = {"zero2": {}, "lora": {"r": 4}}
    raw["grid"][0] |= {"recipes": "zero2-lora", "num_gpus": 2}
    raw["places"] = {"cache": "$SCRATCH/cache", "temporary": "$SCRATCH/tmp"}
    fresh.write(raw)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(home)], check=True)
    try:
        answer = fresh.snakemake(HOME=str(home), SCRATCH=str(tmp_path))
    finally:
        subprocess.run(["umount", str(home)], check=True)
    assert answer.returncode == 0, answer.stdout
    written = read_record(fresh.record("zero2"))
    assert written.ending.status == "completed"
    assert written.environment["variables"]["CUDA_CACHE_PATH"] == str(tmp_path / "cache" / "cuda")
    assert list(temporary.iterdir()) == []
    assert not (fresh.results / "cache").exists()


def test_a_variable_that_is_not_set_is_one_message(fresh: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCRATCH", raising=False)
    raw = fresh.read()
    raw["places"] = {"cache": "$SCRATCH/cache"}
    fresh.write(raw)
    answer = fresh.snakemake()
    assert answer.returncode != 0
    assert "$SCRATCH of a folder in the config is not set" in answer.stdout
    assert "Traceback" not in answer.stdout
    assert not (fresh.results / "runs").exists()


def test_variables_of_a_hardware_entry_are_left_to_its_nodes(fresh: Workplace) -> None:
    raw = fresh.read()
    raw["places"] = {"temporary": "/scratch/of the study"}
    raw["hardware"]["cpu"]["places"] = {"cache": "$SCRATCH/cache"}
    fresh.write(raw)
    answer = fresh.snakemake("--dry-run", "--printshellcmds", "--quiet", "host")
    assert answer.returncode == 0, answer.stdout
    assert "'--cache=$SCRATCH/cache' '--temporary=/scratch/of the study'" in answer.stdout
