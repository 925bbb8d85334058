"""Every pair of techniques on a CPU: how it would be run there, or why it is not."""

import datetime
import itertools
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_study import techniques
from finetune_study.errors import ConfigError
from finetune_study.run import Run
from finetune_study.techniques.precision import is_deepspeed
from tests.gpu.hardware import versions
from tests.training.lab import EFFECTIVE_BATCH, Lab
from tests.training.pool import Answer, Pool

SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "zeropp": {"zero_quantized_weights": False, "zero_quantized_gradients": False, "zero_hpz_partition_size": 2},
    "galore_adamw": {"rank": 8},  # the tiny model's matrices are 64 wide
    "apollo_adamw": {"rank": 8},
    "torch_compile": {"torch_compile_backend": "aot_eager"},  # all of it but g++, which takes a minute
}
"""What a CPU and a tiny model need; everything else is at its defaults."""

LARGE_LORA = {"r": 64, "lora_alpha": 64}
"""Matrices of 4096 weights: bitsandbytes and torchao keep the states of smaller ones in 32 bit."""

AT_DEFAULTS = ("lora", "torch_compile")
"""Of these, what runs on a CPU and a tiny model at its defaults, too."""

PARTNERS = {"zeropp": "zero3", "offload_param": "zero3", "offload_optimizer": "zero2"}
"""What a technique that means nothing alone is run with."""

EXACT = frozenset({
    "fp32", "eager", "sdpa", "gradient_checkpointing", "activation_offload",
    "ddp", "zero1", "zero2", "zero3", "zeropp", "offload_optimizer", "offload_param",
    "adamw_torch", "adamw_torch_fused", "torch_compile",
})  # fmt: skip
"""They promise to change no loss."""

LOW_BIT = frozenset({"adamw_torch_8bit", "adamw_torch_4bit", "adamw_8bit"})
"""Their states are quantised."""

ROUNDING = frozenset({"bf16", "bf16_pure", "fp16", "fp8"}) | LOW_BIT
"""They round, and beside them an exact technique changes what is rounded."""


@dataclass(frozen=True)
class Case:
    """One recipe of one or two techniques, and of what these need."""

    names: tuple[str, ...]
    at_defaults: bool = False
    """Whether `SETTINGS` are left out."""

    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        names = list(self.names)
        for name in self.names:
            if (needs := techniques.ALL[name].needs) and not needs & set(names):
                names.append(PARTNERS[name])
        chosen = {} if self.at_defaults else SETTINGS
        if "lora" in names and LOW_BIT & set(names):
            chosen = chosen | {"lora": LARGE_LORA}
        return {name: chosen.get(name, {}) for name in names}

    @property
    def num_gpus(self) -> int:
        """Ranks: two, but for what several devices exclude."""
        return 1 if "optimizer_in_backward" in self.names else 2

    def settings(self, lab: Lab) -> dict[str, Any]:
        """Arguments of `Lab.plan` beside the recipe."""
        settings: dict[str, Any] = {"num_gpus": self.num_gpus}
        if "packing" in self.names or "fp16" in self.names:
            settings["data"] = {"dataset": lab.plenty}
        if "optimizer_in_backward" in self.names:
            settings |= {"micro_batch": EFFECTIVE_BATCH, "training": {"max_grad_norm": 0.0}}
        return settings

    def plan(self, lab: Lab) -> Run | str:
        """The run, or why there is none."""
        try:
            planned = lab.plan(self.recipe, **self.settings(lab))
        except ConfigError as error:
            return str(error)
        return planned.unsupported or planned.run

    @property
    def reference(self) -> "Case | None":
        """The case whose losses this one has to have; None where nothing is promised."""
        rest = tuple(name for name in self.names if name not in EXACT)
        return None if rest == self.names else Case(rest)

    def __str__(self) -> str:
        return ("+".join(self.names) or "plain") + (" at its defaults" if self.at_defaults else "")


def singles() -> list[Case]:
    """Each technique."""
    return [Case((name,)) for name in techniques.ALL]


def at_defaults() -> list[Case]:
    """Techniques at their defaults that have settings of ours elsewhere."""
    return [Case((name,), at_defaults=True) for name in AT_DEFAULTS]


def pairs() -> list[Case]:
    """Each pair of techniques, whatever their kind."""
    return [Case(names) for names in itertools.combinations(techniques.ALL, 2)]


class Trained:
    """Answers of the pools, each run trained once."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self.lab, self._folder = lab, folder
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._answers: dict[str, Answer] = {}
        self._ran: dict[Case, dict[str, object]] = {}

    def __call__(self, case: Case, num_gpus: int) -> Answer:
        """How a case ended."""
        settings = case.settings(self.lab) | {"num_gpus": num_gpus}
        return self.run(case.recipe, is_compiled="torch_compile" in case.names, **settings)

    def run(self, recipe: Mapping[str, Any] | None = None, *, is_compiled: bool = False, **settings: Any) -> Answer:
        """How a run of these settings (of `Lab.plan`) ended; it is trained by the first test that asks."""
        return self.train(self.lab.run(recipe or {}, **settings), is_compiled=is_compiled)

    def train(self, run: Run, *, is_compiled: bool = False) -> Answer:
        """How a run ended, whatever the plan says of it; it is trained by the first test that asks."""
        if run.run_id not in self._answers:
            paths = self.lab.prepare(run)
            self._answers[run.run_id] = self._pool(run).train(run, paths, self.lab.results, is_compiled)
        return self._answers[run.run_id]

    def _pool(self, run: Run) -> Pool:
        key = (run.num_gpus, run.num_gpus > 1 or is_deepspeed(run.parsed_techniques))
        if key not in self._pools:
            log = self._folder / f"{key[0]}-{key[1]}.log"
            self._pools[key] = Pool(*key, self.lab.run(num_gpus=run.num_gpus), log)
        return self._pools[key]

    def stop(self) -> None:
        for pool in self._pools.values():
            pool.stop()

    def tell(self, case: Case, answer: Answer, num_gpus: int) -> None:
        """Notes how a case ended, for `write`."""
        facts = answer.ranks[0]
        self._ran[case] = {
            "techniques": list(case.recipe),
            "settings": techniques.chosen_settings(techniques.parse(case.recipe)),
            "num_gpus": num_gpus,
            "ended": "completed" if answer.error is None else answer.error,
            "losses": [step["loss"] for step in facts.get("steps", [])],
            **{name: facts.get(name) for name in ("optimizer_class", "attention_kernel", "compute_dtype")},
        }

    def numbers_of_devices(self) -> list[int]:
        """On how many devices runs were that are noted for `write`."""
        return sorted({int(str(one["num_gpus"])) for one in self._ran.values()})

    def write(self, path: Path, **about: str) -> None:
        """What ran here, in the form of benchmarks/README.md."""
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        ).stdout.strip()
        whole = about | {
            "date": datetime.date.today().isoformat(),
            "commit": commit,
            "machine": {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()},
            "versions": versions(),
            "shows": "that these run, and their losses; no times, no memory",
            "technique_runs": list(self._ran.values()),
        }
        path.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
