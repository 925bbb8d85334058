"""What a module says against a technique on a GPU is what happens: the exclusion is passed by, and its error seen."""

import importlib.util
import re

import pytest

from finetune_study import techniques
from tests.training.lab import Lab, in_spite_of_the_reason, launch

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("version", [2, 3, 4])
@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_flash_attention_takes_16_bit_alone(precision: str, version: int, gpu_lab: Lab) -> None:
    name = f"flash_attention_{version}"
    alone = gpu_lab.plan({"bf16": {}, name: {}})
    if alone.unsupported:
        pytest.skip(alone.unsupported)
    for package in techniques.ALL[name].packages:
        if importlib.util.find_spec(package.partition(".")[0]) is None:
            pytest.skip(f"{name} needs the package {package}")
    ended = in_spite_of_the_reason(gpu_lab, {precision: {}, name: {}})
    log = ended.paths.log.read_text(encoding="utf-8")
    # csrc/flash_attn/flash_api.cpp, hopper/flash_api.cpp and flash_attn/cute/interface.py of flash-attention
    assert re.search(r"FlashAttention only supports? fp16|inputs must be float16 or bfloat16", log), log[-3000:]


def test_liger_refuses_models_that_it_has_no_kernels_for(gpu_lab: Lab) -> None:
    """liger-kernel itself would say so in its log alone, and train without."""
    if importlib.util.find_spec("liger_kernel") is None:
        pytest.skip("liger needs the package liger_kernel")
    ended = launch(gpu_lab.prepare(gpu_lab.run({"liger": {}}, architecture={"model_type": "olmo"})))
    assert "has no kernels for models of this type" in ended.failure.cause
