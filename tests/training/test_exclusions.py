"""What a module says against a technique is what happens: the exclusion is passed by, and its error seen."""

import json
import re
import subprocess
import sys
from typing import Any

import pytest

from finetune_study import model, techniques
from finetune_study.run import Run
from finetune_study.techniques.optimizer_in_backward import in_backward
from tests.training.lab import EFFECTIVE_BATCH, LIMIT_SECONDS, Ended, Lab, launch
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
        pytest.param(
            {"adalora": {}, "zero3": {}}, {"num_gpus": 2}, r"The size of tensor a \(0\) must match", id="adalora+zero3"
        ),
        pytest.param(
            {"adalora": {}, "zero2": {}}, {}, "Gradients are only available immediately after backward",
            id="adalora+zero2",
        ),
        pytest.param(
            {"adalora": {}, "optimizer_in_backward": {}}, ONE_STEP, "'Parameter' and 'NoneType'",
            id="adalora+optimizer_in_backward",
        ),
        pytest.param({"loha": {}, "zero3": {}}, {"num_gpus": 2}, "tuple index out of range", id="loha+zero3"),
        pytest.param({"zero3": {}, "zeropp": {}}, {"num_gpus": 2}, "not been implemented on CPU", id="zeropp"),
        pytest.param(
            {"optimizer_in_backward": {}, "zero2": {}}, ONE_STEP, r"lazy_init_hp_params_optimizer_state[\s\S]*KeyError",
            id="in_backward+zero2",
        ),
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


def test_of_deepspeeds_flat_pieces_adafactor_keeps_whole_states(lab: Lab) -> None:
    """It says no word of it: 4 bytes for each weight, where sums of rows and columns are a fiftieth of that."""
    ended = in_spite_of_the_reason(lab, {"adafactor": {}, "zero2": {}})
    trained = ended.first_rank["trainable_parameters"]
    assert ended.first_rank["optimizer_state_bytes"] == pytest.approx(4 * trained, rel=0.01)
    assert lab.train({"adafactor": {}}).first_rank["optimizer_state_bytes"] < 0.2 * trained


def test_under_zero3_muon_finds_no_matrix(lab: Lab) -> None:
    """Weights are empty until their layer's turn: all would be AdamW's, and nobody would be told."""
    ended = in_spite_of_the_reason(lab, {"muon": {}, "zero3": {}})
    adamw = lab.train({"zero3": {}})
    assert ended.losses == pytest.approx(adamw.losses, rel=1e-6)
    assert ended.first_rank["optimizer_state_bytes"] == adamw.first_rank["optimizer_state_bytes"]


def test_under_zero3_steps_in_the_backward_pass_see_no_gradient(lab: Lab) -> None:
    """No step is made, and nothing is learned."""
    ended = in_spite_of_the_reason(lab, {"optimizer_in_backward": {}, "zero3": {}}, **ONE_STEP)
    assert ended.first_rank["optimizer_state_bytes"] == 0
    assert ended.eval_losses[0] == pytest.approx(ended.eval_losses[1], rel=1e-6)


def fsdp2(what: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "tests.training.fsdp2", what]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS)


def test_groups_of_layers_do_not_find_their_weights_under_fsdp2() -> None:
    assert "got mixed torch.Tensor and DTensor" in fsdp2("sqrt").stderr


def test_muon_takes_fsdps_shards() -> None:
    """No exclusion: torch gathers a matrix where its update needs it whole."""
    ended = fsdp2("muon")
    assert ended.returncode == 0, ended.stderr
    plain, sharded = json.loads(ended.stdout)
    assert sharded == pytest.approx(plain, rel=1e-3)


def bare_model(lab: Lab, *names: str) -> tuple[Run, Any]:
    run = lab.plan({name: {} for name in names}).run
    lab.prepare(run)
    return run, model.load(run, lab.results.model(run.model_key))


@pytest.fixture
def bare(lab: Lab) -> tuple[Run, Any]:
    return bare_model(lab)


def test_loss_scaling_finds_no_gradient_after_steps_in_the_backward_pass(bare: tuple[Run, Any]) -> None:
    import torch

    _, net = bare
    scaler = torch.amp.GradScaler("cpu")
    optimizer = in_backward(net, torch.optim.AdamW, {"lr": 1e-3}, 0.0)
    tokens = torch.ones(1, 8, dtype=torch.long)
    scaler.scale(net(input_ids=tokens, labels=tokens).loss).backward()
    with pytest.raises(AssertionError, match="No inf checks were recorded for this optimizer"):
        scaler.step(optimizer)


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_projecting_optimizers_are_made_for_a_whole_model(name: str) -> None:
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments("out", optim=name, optim_target_modules="all-linear", use_cpu=True)
    with pytest.raises(ValueError, match=f"You need to pass a model to initialize .*{name.upper()}"):
        Trainer.get_optimizer_cls_and_kwargs(arguments)


def test_muon_takes_no_weight_that_is_not_a_matrix() -> None:
    import torch

    with pytest.raises(ValueError, match="Muon only supports 2D parameters"):
        torch.optim.Muon([torch.nn.Parameter(torch.ones(8))])


def test_prefixes_and_checkpoints_by_peft_itself(lab: Lab) -> None:
    run, net = bare_model(lab, "prefix_tuning")
    net.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="PREFIX_TUNING does not work with gradient checkpointing"):
        techniques.ALL["prefix_tuning"]().wrap(net, run)


def test_loftq_quantises_on_a_gpu_alone() -> None:
    import torch
    from peft.utils.loftq_utils import loftq_init

    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        loftq_init(torch.ones(64, 64), num_bits=4, reduced_rank=4)


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_prompts_ignore_the_positions_that_tell_packed_examples_apart(name: str, lab: Lab) -> None:
    import torch

    run, net = bare_model(lab, name)
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
