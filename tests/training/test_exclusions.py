"""What a module says against a technique is what happens: the exclusion is passed by, and its error seen."""

import re
from typing import Any

import pytest

from finetune_study import model, techniques
from finetune_study.run import Run
from tests.training.lab import EFFECTIVE_BATCH, Ended, Lab, launch
from tests.training.pairs import SETTINGS

pytestmark = [pytest.mark.training, pytest.mark.long]

PROJECTED = SETTINGS["galore_adamw"]
ONE_STEP = {"micro_batch": EFFECTIVE_BATCH, "training": {"max_grad_norm": 0.0}}


def in_spite_of_the_reason(lab: Lab, recipe: dict[str, Any], **settings: Any) -> Ended:
    """How a run ends that the plan would not train."""
    planned = lab.plan(recipe, **settings)
    assert planned.unsupported
    return launch(lab.prepare(planned.run))


@pytest.mark.parametrize(
    ("recipe", "settings", "error"),
    [
        pytest.param(
            {"prefix_tuning": {}, "gradient_checkpointing": {}}, {}, "The size of tensor a .* must match",
            id="prefix_tuning+gradient_checkpointing",
        ),
        pytest.param({"tf32": {}}, {}, "--tf32 requires Ampere or a newer GPU arch", id="tf32"),
        pytest.param({"liger": {}}, {}, "needs the package `liger_kernel`|No module named 'triton'", id="liger"),
        pytest.param({"flash_attention_2": {}}, {}, "needs the package `flash_attn`", id="flash_attention_2"),
        pytest.param({"muon": {}, "zero2": {}}, {}, "Param gradient must be a 2D matrix", id="muon+zero2"),
        pytest.param({"galore_adamw": PROJECTED, "zero2": {}}, {}, "tuple index out of range", id="galore_adamw+zero2"),
        pytest.param({"apollo_adamw": PROJECTED, "zero2": {}}, {}, "tuple index out of range", id="apollo_adamw+zero2"),
        pytest.param(
            {"bf16_pure": {}, "zero2": {}, "offload_optimizer": {}}, {}, "Master weights feature requires",
            id="bf16_pure+offload_optimizer",
        ),
        pytest.param(
            {"fp8": SETTINGS["fp8"], "qlora": {}}, {}, "mat1 and mat2 shapes cannot be multiplied", id="fp8+qlora"
        ),
        pytest.param({"fp8": SETTINGS["fp8"], "adalora": {}}, {}, "is being modified inplace", id="fp8+adalora"),
        pytest.param({"zero3": {}, "zeropp": {}}, {"num_gpus": 2}, "not been implemented on CPU", id="zeropp"),
        pytest.param({"optimizer_in_backward": {}, "zero2": {}}, ONE_STEP, "list index out", id="in_backward+zero2"),
    ],
)  # fmt: skip
def test_the_library_refuses_as_well(lab: Lab, recipe: dict[str, Any], settings: dict[str, Any], error: str) -> None:
    ended = in_spite_of_the_reason(lab, recipe, **settings)
    log = ended.paths.log.read_text(encoding="utf-8")
    assert not ended.paths.record.exists()
    assert re.search(error, log), log[-3000:]


def test_fp16_on_a_cpu_computes_in_float32(lab: Lab) -> None:
    ended = in_spite_of_the_reason(lab, {"fp16": {}}, data={"dataset": lab.plenty})
    assert ended.first_rank["compute_dtype"] == "float32"


def test_fsdp_on_a_cpu_shards_nothing(lab: Lab) -> None:
    """accelerate says no word of it: each rank holds all of the optimizer's states, as under DDP."""
    ended = in_spite_of_the_reason(lab, {"fsdp": {}}, num_gpus=2)
    assert ended.losses == pytest.approx(lab.train(num_gpus=2).losses, rel=1e-6)
    plain = lab.train(num_gpus=2).first_rank["optimizer_state_bytes"]
    assert [rank["optimizer_state_bytes"] for rank in ended.record.ranks] == [plain, plain]


def test_steps_in_the_backward_pass_come_before_ddp_sums_gradients(lab: Lab) -> None:
    one = lab.train({"optimizer_in_backward": {}}, **ONE_STEP)
    ended = in_spite_of_the_reason(
        lab,
        {"optimizer_in_backward": {}},
        num_gpus=2,
        micro_batch=EFFECTIVE_BATCH // 2,
        training={"max_grad_norm": 0.0},
    )
    assert ended.losses[0] == pytest.approx(one.losses[0], rel=1e-3)
    assert abs(ended.losses[-1] - one.losses[-1]) > 1e-3


def test_non_reentrant_checkpoints_hide_their_input() -> None:
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.GELU())
    seen: dict[bool, int] = {}
    for use_reentrant in (True, False):
        packed: list[Any] = []

        def pack(tensor: Any, packed: list[Any] = packed) -> Any:
            packed.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            checkpoint(layer, torch.ones(2, 4, requires_grad=True), use_reentrant=use_reentrant).sum().backward()
        seen[use_reentrant] = sum(tensor.shape == (2, 4) for tensor in packed)
    assert seen[True] > seen[False] == 0


@pytest.fixture
def bare(lab: Lab) -> tuple[Run, Any]:
    run = lab.run()
    lab.prepare(run)
    return run, model.load(run, lab.results.model(run.model_key))


def test_prefixes_and_checkpoints_by_peft_itself(bare: tuple[Run, Any]) -> None:
    run, net = bare
    net.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        techniques.ALL["prefix_tuning"]().wrap(net, run)


def test_loftq_quantises_on_a_gpu_alone() -> None:
    import torch
    from peft.utils.loftq_utils import loftq_init

    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        loftq_init(torch.ones(64, 64), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_prompts_ignore_the_positions_that_tell_packed_examples_apart(name: str, bare: tuple[Run, Any]) -> None:
    import torch

    run, net = bare
    tuned = techniques.ALL[name]().wrap(net, run)
    tokens = torch.ones(1, 8, dtype=torch.long)
    with pytest.warns(UserWarning, match="Position ids are not supported for parameter efficient tuning"):
        tuned(input_ids=tokens, position_ids=torch.arange(8)[None], labels=tokens)


@pytest.mark.parametrize("name", ["prefix_tuning", "prompt_tuning", "p_tuning", "ia3", "adaption_prompt"])
def test_peft_does_not_mix_other_methods_with_lora(name: str, bare: tuple[Run, Any]) -> None:
    import peft

    run, net = bare
    mixed = peft.get_peft_model(net, peft.LoraConfig(target_modules="all-linear"), mixed=True)
    other = techniques.ALL[name]()
    config = (
        peft.AdaptionPromptConfig(task_type="CAUSAL_LM") if name == "adaption_prompt" else other.peft_config(run)  # type: ignore[attr-defined]
    )
    with pytest.raises(ValueError, match="is not compatible with the `PeftMixedModel`"):
        mixed.add_adapter("other", config)
