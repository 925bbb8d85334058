"""What a CPU can't show: every technique on a GPU, with the number formats and kernels that it promises.

DeepSpeed on a GPU can ask for a compiler at its first start; a machine without one shows that as a failure here.
"""

import importlib.util
import math
from typing import Any

import pytest

from finetune_study import techniques
from finetune_study.run import Run
from tests.training.lab import STEPS, Lab
from tests.training.pairs import Case, Trained
from tests.training.pool import Answer

pytestmark = pytest.mark.gpu

FIRST_LOSS_TOLERANCE = 2e-2
"""Relative, of the first step against fp32: nothing was learned yet, so only rounding differs."""

CHANGE_THE_START = frozenset({"adalora", "prompt_tuning", "p_tuning", "prefix_tuning", "packing"})
"""Their first loss is another one: a penalty, virtual tokens, other sequences."""

REAL_SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4, "lora_alpha": 16},
    "galore_adamw": {"rank": 8},
    "apollo_adamw": {"rank": 8},
}
"""On a GPU nothing is emulated."""


class GpuCase(Case):
    @property
    def recipe(self) -> dict[str, dict[str, Any]]:
        return {name: REAL_SETTINGS.get(name, {}) for name in super().recipe}


def run_on_gpu(names: tuple[str, ...], gpu_lab: Lab, trained: Trained) -> Answer:
    """Trains a recipe on one GPU, or skips where that is impossible: the reason is told."""
    case = GpuCase(names)
    for name in case.recipe:
        for package in techniques.ALL[name]().packages_needed():
            if importlib.util.find_spec(package.partition(".")[0]) is None:
                pytest.skip(f"{name} needs the package {package}")
    planned = gpu_lab.plan(case.recipe, **(case.settings(gpu_lab) | {"num_gpus": 1}))
    if planned.unsupported:
        pytest.skip(planned.unsupported)
    assert isinstance(planned.run, Run)
    answer = trained(case, 1)
    trained.tell(case, answer, 1)
    assert answer.error is None, answer.trace
    return answer


@pytest.mark.parametrize("name", techniques.ALL)
def test_a_technique_trains(name: str, gpu_lab: Lab, trained: Trained) -> None:
    answer = run_on_gpu((name,), gpu_lab, trained)
    stepped = [step["loss"] for step in answer.ranks[0]["steps"] if step["stepped"]]
    assert len(stepped) == STEPS
    assert all(math.isfinite(loss) for loss in stepped)
    if name not in CHANGE_THE_START:
        plain = run_on_gpu(("fp32",), gpu_lab, trained)
        assert answer.losses[0] == pytest.approx(plain.losses[0], rel=FIRST_LOSS_TOLERANCE)


@pytest.mark.parametrize(
    ("names", "fact", "expected"),
    [
        (("fp32",), "compute_dtype", "float32"),
        (("bf16",), "compute_dtype", "bfloat16"),
        (("bf16_pure",), "compute_dtype", "bfloat16"),
        (("fp16",), "compute_dtype", "float16"),
        (("bf16",), "optimizer_state_dtypes", ["float32"]),
        (("bf16_pure",), "optimizer_state_dtypes", ["bfloat16"]),
        (("adamw_torch_fused",), "optimizer_class", "torch.optim.adamw.AdamW(fused)"),
        (("adamw_8bit",), "optimizer_class", "bitsandbytes.optim.adamw.AdamW"),
        (("paged_adamw_8bit",), "optimizer_class", "bitsandbytes.optim.adamw.AdamW(paged)"),
        (("adamw_8bit",), "optimizer_state_dtypes", ["float32", "uint8"]),
        (("paged_adamw_8bit",), "optimizer_state_dtypes", ["float32", "uint8"]),
        (("flash_attention_2", "bf16"), "attention_implementation", "flash_attention_2"),
        (("flash_attention_3", "bf16"), "attention_implementation", "flash_attention_3"),
    ],
    ids=str,
)
def test_what_really_ran(names: tuple[str, ...], fact: str, expected: Any, gpu_lab: Lab, trained: Trained) -> None:
    assert run_on_gpu(names, gpu_lab, trained).ranks[0][fact] == expected


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_sdpa_says_which_kernel_torch_chose(precision: str, gpu_lab: Lab, trained: Trained) -> None:
    """In fp32 the flash kernel does not exist."""
    kernel = run_on_gpu((precision, "sdpa"), gpu_lab, trained).ranks[0]["attention_kernel"]
    fused = {"efficient_attention", "cudnn_attention"} | ({"flash_attention"} if precision == "bf16" else set())
    assert kernel in fused | {"math"}


@pytest.mark.parametrize("name", ["eager", "gradient_checkpointing", "activation_offload", "liger", "tf32"])
def test_losses_are_those_of_the_plain_run(name: str, gpu_lab: Lab, trained: Trained) -> None:
    names = (name,) if techniques.ALL[name].kind == "precision" else ("fp32", name)
    answer = run_on_gpu(names, gpu_lab, trained)
    plain = run_on_gpu(("fp32",), gpu_lab, trained)
    assert answer.losses == pytest.approx(plain.losses, rel=FIRST_LOSS_TOLERANCE)
