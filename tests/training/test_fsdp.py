"""FSDP2 beside every technique, on two ranks of a CPU: accelerate is told that they had GPUs (fsdp_on_cpu.py).

A shard is half of each weight, and losses are those of DDP.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest

from finetune_study import techniques
from finetune_study.config import Hardware
from finetune_study.errors import ConfigError
from tests.training.lab import EFFECTIVE_BATCH, Lab
from tests.training.pairs import ROUNDING, SETTINGS, Case, Trained
from tests.training.pool import Answer
from tests.training.test_pairs import FP32_TOLERANCE, ROUNDED_TOLERANCE

Raw = dict[str, Any]

pytestmark = pytest.mark.training

NEEDS_A_GPU = frozenset({
    "tf32", "fp16", "flash_attention_2", "flash_attention_3", "flash_attention_4", "liger",
    "offload_param",  # weights are fetched from page-locked memory
})  # fmt: skip

WHY_NOT = {
    "adalora": "The size of tensor a .* must match",
    "adamw_8bit": "does not have a sharding strategy registered",
    "paged_adamw_32bit": "does not have a sharding strategy registered",
    "paged_adamw_8bit": "does not have a sharding strategy registered",
    "adafactor": "got mixed torch.Tensor and DTensor",
    "apollo_adamw": "KeyError: 'seed'",
}
"""What the library says of those that are excluded."""


def beside_fsdp() -> Iterator[str]:
    """Techniques that a recipe can hold together with fsdp, and that a CPU can show."""
    for name in techniques.ALL.keys() - NEEDS_A_GPU - {"fsdp"}:
        try:
            techniques.parse({name: {}, "fsdp": {}})
        except ConfigError:
            continue
        yield name


def train(lab: Lab, trained: Trained, recipe: Raw, **settings: Any) -> Answer:
    return trained.train(lab.plan(recipe, num_gpus=2, **settings).run)


def settings_of(name: str, lab: Lab) -> Raw:
    settings = Case((name,)).settings(lab)
    del settings["num_gpus"]
    return settings | ({"micro_batch": EFFECTIVE_BATCH // 2} if name == "optimizer_in_backward" else {})


def check(lab: Lab, trained: Trained, recipe: Raw, reference: Raw, tolerance: float, **settings: Any) -> None:
    sharded = train(lab, trained, recipe | {"fsdp": {}}, **settings)
    assert sharded.error is None, sharded.trace
    whole = train(lab, trained, reference | {"ddp": {}}, **settings)
    assert sharded.losses == pytest.approx(whole.losses, rel=tolerance)
    assert sharded.eval_losses == pytest.approx(whole.eval_losses, rel=tolerance)
    of_ranks = [[rank["optimizer_state_bytes"] for rank in answer.ranks] for answer in (sharded, whole)]
    assert sum(of_ranks[0]) < sum(of_ranks[1]), "states are shards"


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("fp32", "optimizer_in_backward") else pytest.param(name, marks=pytest.mark.exhaustive)
        for name in sorted(set(beside_fsdp()) - WHY_NOT.keys())
    ],
)
def test_losses_are_those_of_ddp(name: str, lab: Lab, trained: Trained) -> None:
    recipe = {name: SETTINGS.get(name, {})}
    # Under DDP steps in the backward pass come too early; FSDP2 calls them when gradients were summed.
    reference = {} if name == "optimizer_in_backward" else recipe
    # Muon's Newton-Schulz iterations round to bf16.
    tolerance = ROUNDED_TOLERANCE if name in ROUNDING | {"muon"} else FP32_TOLERANCE
    check(lab, trained, recipe, reference, tolerance, **settings_of(name, lab))


@pytest.mark.exhaustive
def test_several_together(lab: Lab, trained: Trained) -> None:
    mixed = {"bf16": {}, "lora": SETTINGS["lora"], "gradient_checkpointing": {"every": 2}, "muon": {}, "packing": {}}
    check(lab, trained, mixed, mixed, ROUNDED_TOLERANCE, data={"dataset": lab.plenty})


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", WHY_NOT)
def test_the_library_refuses_as_well(name: str, lab: Lab, trained: Trained) -> None:
    gpu = Hardware(memory_gib=80, compute_capability=9.0)
    recipe: Raw = {name: SETTINGS.get(name, {}), "fsdp": {}}
    assert techniques.why_not(techniques.parse(recipe), gpu) is not None
    error = train(lab, trained, recipe).error
    assert error is not None
    assert re.search(WHY_NOT[name], error), error


@pytest.mark.exhaustive
def test_groups_of_layers_do_not_find_their_weights(lab: Lab, trained: Trained) -> None:
    four = {"num_hidden_layers": 4}  # in groups of two
    error = train(lab, trained, {"fsdp": {}, "gradient_checkpointing": {"every": "sqrt"}}, architecture=four).error
    assert "got mixed torch.Tensor and DTensor" in str(error)


@pytest.mark.exhaustive
def test_weights_of_8_bit_are_replaced(lab: Lab, trained: Trained) -> None:
    error = train(lab, trained, {"fsdp": {}, "qlora": {"load_in_8bit": True}}).error
    assert "'Parameter' object has no attribute 'CB'" in str(error)


@pytest.mark.exhaustive
def test_weights_of_4_bit_survive_mixed_precision(lab: Lab, trained: Trained) -> None:
    mixed: Raw = {"bf16": {"dtype": "float32"}, "qlora": {}}
    check(lab, trained, mixed, mixed, ROUNDED_TOLERANCE)


def test_one_device_shards_nothing(lab: Lab, trained: Trained) -> None:
    answer = trained.train(lab.plan({"fsdp": {}}).run)
    assert "Using fsdp only works in distributed training" in str(answer.error)
