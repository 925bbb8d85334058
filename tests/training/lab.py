"""Where real runs are made: each configuration is trained once, however many tests look at it."""

import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_study import config, data, facts, model_source, outcome, plan, record
from finetune_study import run as run_module
from finetune_study.paths import Results, RunPaths
from finetune_study.plan import PlannedRun
from finetune_study.record import Failure, Record
from finetune_study.run import Run
from tests.tiny_study import TINY_STUDY

LIMIT_SECONDS = 150.0
"""Nothing here takes so long; an event that does not come fails its test."""

STEPS = 4
EFFECTIVE_BATCH = 4
NUM_EVAL = 4

WIDE = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4}
"""17 million weights, so that weights, gradients and states dwarf what libraries take."""


def write_dialogues(path: Path, count: int) -> str:
    """Distinct dialogues of 24 to 96 letters with short summaries: sequences differ in length."""
    rows = (
        {"dialogue": f"Ann: {number:03} " + "so it goes " * (1 + number * 5 % 8), "summary": f"Ann says {number}."}
        for number in range(count)
    )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    """What the condition gives, as soon as it is true; files and other people's children can't be waited for else."""
    until = time.monotonic() + LIMIT_SECONDS
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain until {what}"
        time.sleep(0.02)
    return found


@dataclass(frozen=True)
class Ended:
    """A try of a run that is over."""

    paths: RunPaths
    status: int
    output: str
    """What the supervisor printed."""
    seconds: float

    @cached_property
    def record(self) -> Record:
        assert self.paths.record.exists(), self.output + self.paths.log.read_text(encoding="utf-8")[-3000:]
        assert not self.paths.failure.exists()
        return record.read_record(self.paths.record)

    @cached_property
    def failure(self) -> Failure:
        assert self.paths.failure.exists(), self.output
        assert not self.paths.record.exists()
        return record.read_failure(self.paths.failure)

    @property
    def first_rank(self) -> dict[str, Any]:
        return self.record.ranks[0]

    @property
    def losses(self) -> list[float]:
        return [step["loss"] for step in self.first_rank["steps"]]

    @property
    def eval_losses(self) -> list[float]:
        return [self.first_rank["evaluations"][when] for when in ("before", "after")]

    @property
    def row(self) -> dict[str, Any]:
        return outcome.row(self.record)

    def peak(self) -> int:
        """Most device memory of a rank, bytes."""
        return max(int(rank["memory"]["peak_device_used_bytes"]) for rank in self.record.ranks)


class Lab:
    """A results folder, and a tiny study of which every call plans one run."""

    def __init__(self, root: Path, hardware: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            root: where everything is kept.
            hardware: fields of the hardware entry that differ from the tiny study's CPU.
        """
        self.root, self._hardware = root, dict(hardware or {})
        self.results = Results(root / "results")
        self._ended: dict[str, Ended] = {}
        # Exactly as many examples as the runs take: every one is seen, none twice.
        self.exact = write_dialogues(root / "exact.jsonl", STEPS * EFFECTIVE_BATCH + NUM_EVAL)
        self.plenty = write_dialogues(root / "plenty.jsonl", 400)

    def plan(
        self,
        recipe: Mapping[str, Any] | None = None,
        *,
        num_gpus: int = 1,
        nodes: int = 1,
        micro_batch: int | str = 2,
        sequence_length: int = 256,
        architecture: Mapping[str, Any] | None = None,
        budget_gib: float = 4.0,
        **sections: Mapping[str, Any],
    ) -> PlannedRun:
        """A run of the tiny Llama; what is not named is as in the plain run."""
        raw = copy.deepcopy(TINY_STUDY)
        raw["models"]["tiny"]["architecture"] |= architecture or {}
        raw["hardware"]["cpu"] |= {"memory_gib": budget_gib, **self._hardware}
        raw["recipes"] = {"recipe": dict(recipe or {})}
        raw["grid"] = [
            {
                "targets": "tiny",
                "hardware": "cpu",
                "recipes": "recipe",
                "num_gpus": num_gpus,
                "nodes": nodes,
                "sequence_length": sequence_length,
                "per_device_train_batch_size": micro_batch,
            }
        ]
        raw["data"] = {"dataset": self.exact, "num_eval_samples": NUM_EVAL, "overlong": "truncate"}
        raw["training"] = {"effective_batch_size": EFFECTIVE_BATCH, "learning_rate": 1e-2}
        raw["protocol"] = {"num_untimed_steps": 1, "num_timed_steps": STEPS - 1}
        for name, changes in sections.items():
            raw[name] |= changes
        (planned,) = plan.plan(config.parse(raw))
        return planned

    def run(self, *recipe: Mapping[str, Any], **settings: Any) -> Run:
        """The same, which must be able to run here."""
        planned = self.plan(*recipe, **settings)
        assert planned.unsupported is None
        return planned.run

    def write(self, run: Run) -> RunPaths:
        """The run's run.yaml, and nothing else."""
        paths = self.results.run(run.run_id)
        record.write_atomically(paths.run_yaml, run_module.dump(run))
        return paths

    def prepare(self, run: Run) -> RunPaths:
        """Everything that a run needs before it trains."""
        model_source.prepare(run.model, self.results.model(run.model_key))
        data.prepare(run, run.num_train_samples, self.results.model(run.tokenizer_key), self.results.data(run.data_key))
        return self.write(run)

    def train(self, *recipe: Mapping[str, Any], **settings: Any) -> Ended:
        """How the run of these settings ended; it is trained by the first test that asks."""
        run = self.run(*recipe, **settings)
        if run.run_id not in self._ended:
            self._ended[run.run_id] = launch(self.prepare(run))
        return self._ended[run.run_id]


def start(paths: RunPaths, *arguments: str, variables: Mapping[str, str] | None = None, **more: Any) -> Any:
    """A supervisor of a run, at work."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_study.launch", str(paths.run_yaml), *arguments],
        env={**os.environ, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **more,
    )


def launch(paths: RunPaths, *arguments: str, **more: Any) -> Ended:
    """One try of a run, to its end."""
    started = time.monotonic()
    supervisor = start(paths, *arguments, **more)
    try:
        output, _ = supervisor.communicate(timeout=LIMIT_SECONDS)
    finally:
        supervisor.terminate()
    return Ended(paths, supervisor.returncode, output, time.monotonic() - started)


def in_spite_of_the_reason(lab: Lab, recipe: Mapping[str, Any], **settings: Any) -> Ended:
    """How a run ends that the plan would not train."""
    planned = lab.plan(recipe, **settings)
    assert planned.unsupported
    return launch(lab.prepare(planned.run))


def rank_facts(paths: RunPaths, rank: int = 0) -> dict[str, Any]:
    """What a rank has told so far."""
    return facts.read(paths.rank_facts(rank))


def rank_pids(supervisor: int) -> list[int]:
    """Processes of the ranks, in their order."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text(encoding="ascii").split()
    return [int(pid) for pid in children]


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that is over and not yet fetched by its parent does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
