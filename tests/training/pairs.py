"""Every pair of techniques on a CPU: how it would be run there, or why it is not."""

import itertools
from dataclasses import dataclass
from typing import Any

from finetune_study import techniques
from finetune_study.errors import ConfigError
from finetune_study.run import Run
from tests.training.lab import EFFECTIVE_BATCH, Lab

SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"emulate": True},  # there are no fp8 units
    "lora": {"r": 4, "lora_alpha": 16},
    "zeropp": {"zero_quantized_weights": False, "zero_quantized_gradients": False, "zero_hpz_partition_size": 2},
    "galore_adamw": {"rank": 8},  # the tiny model's matrices are 64 wide
    "apollo_adamw": {"rank": 8},
    "torch_compile": {"torch_compile_backend": "aot_eager"},  # all of it but g++
}
"""What a CPU and a tiny model need; everything else is at its defaults."""

PARTNERS = {"zeropp": "zero3", "offload_param": "zero3", "offload_optimizer": "zero2"}
"""What a technique that means nothing alone is run with."""

EXACT = frozenset({
    "fp32", "eager", "sdpa", "gradient_checkpointing", "activation_offload",
    "ddp", "zero1", "zero2", "zero3", "zeropp", "offload_optimizer", "offload_param",
    "adamw_torch", "adamw_torch_fused", "paged_adamw_32bit", "torch_compile",
})  # fmt: skip
"""They promise to change no loss."""

ROUNDING = frozenset({"bf16", "bf16_pure", "fp16", "fp8"})
"""They round, and beside them an exact technique changes what is rounded."""


@dataclass(frozen=True)
class Case:
    """One recipe of one or two techniques, and of what these need."""

    names: tuple[str, ...]

    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        names = list(self.names)
        for name in self.names:
            if (needs := techniques.ALL[name].needs) and not needs & set(names):
                names.append(PARTNERS[name])
        return {name: SETTINGS.get(name, {}) for name in names}

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
        return "+".join(self.names) or "plain"


def singles() -> list[Case]:
    """Each technique."""
    return [Case((name,)) for name in techniques.ALL]


def pairs() -> list[Case]:
    """Each pair of techniques, whatever their kind."""
    return [Case(names) for names in itertools.combinations(techniques.ALL, 2)]
