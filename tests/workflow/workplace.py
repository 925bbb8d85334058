"""Snakemake as a user calls it."""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class Workplace:
    """A folder with a configuration, in which Snakemake runs."""

    folder: Path

    @property
    def config(self) -> Path:
        return self.folder / "config" / "config.yaml"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def write(self, raw: dict[str, Any]) -> None:
        self.config.parent.mkdir(parents=True, exist_ok=True)
        self.config.write_text(yaml.safe_dump(raw), encoding="utf-8")

    def read(self) -> dict[str, Any]:
        raw: dict[str, Any] = yaml.safe_load(self.config.read_text(encoding="utf-8"))
        return raw

    def run_folders(self) -> list[Path]:
        return sorted((self.results / "runs").iterdir())

    def record(self, word: str) -> Path:
        """The record of the one run whose name holds a word."""
        (folder,) = (folder for folder in self.run_folders() if word in folder.name)
        return folder / "record.json"

    def snakemake(
        self,
        *arguments: str,
        snakefile: Path = REPOSITORY / "Snakefile",
        cores: int | None = 2,
        **environment: str,
    ) -> "subprocess.CompletedProcess[str]":
        """Runs Snakemake; stdout and stderr together are in `stdout`."""
        options = ["--snakefile", str(snakefile), *(["--cores", str(cores)] if cores else [])]
        return subprocess.run(
            [sys.executable, "-m", "snakemake", *options, *arguments],
            cwd=self.folder,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )

    def planned(self, *arguments: str, **more: Any) -> dict[str, int]:
        """How often each rule would run."""
        answer = self.snakemake("--dry-run", *arguments, **more)
        assert answer.returncode == 0, answer.stdout
        if "Nothing to be done" in answer.stdout:
            return {}
        stats = answer.stdout.split("Job stats:")[1].split("total")[0]
        counts = {rule: int(number) for rule, number in re.findall(r"^(\w+) +(\d+)$", stats, re.MULTILINE)}
        for target in ("all", "prepare", "remeasure"):
            counts.pop(target, None)
        return counts

    def copy(self, folder: Path) -> "Workplace":
        """The same, with all modification times and Snakemake's own notes."""
        shutil.copytree(self.folder, folder, symlinks=True)
        return Workplace(folder)
