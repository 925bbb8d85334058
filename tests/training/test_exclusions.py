"""What a module says against a technique is what happens: the exclusion is passed by, and its error seen."""

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import transformers

from finetune_study import model, techniques, variables
from finetune_study.ranks import free_port
from finetune_study.run import Run
from finetune_study.techniques.base import WHY_ONE, Kind
from finetune_study.techniques.optimizer_in_backward import in_backward, step_in_backward
from tests.training.lab import EFFECTIVE_BATCH, LIMIT_SECONDS, STEPS, Lab, in_spite_of_the_reason
from tests.training.pairs import SETTINGS, Trained

pytestmark = [pytest.mark.training, pytest.mark.long]

PROJECTED = SETTINGS["galore_adamw"]
SIBLING = pytest.mark.exhaustive
"""What differs from a case beside it in the stage of ZeRO, or in one setting, alone."""
HPZ_ALONE = {"zero_quantized_weights": False, "zero_quantized_gradients": False}
ONE_STEP = {"micro_batch": EFFECTIVE_BATCH, "training": {"max_grad_norm": 0.0}}


@pytest.mark.parametrize(
    ("recipe", "settings", "error"),
    [
        pytest.param(
            {"prefix_tuning": {}, "gradient_checkpointing": {}}, {}, "The size of tensor a .* must match",
            id="prefix_tuning+gradient_checkpointing",
        ),
        *(
            pytest.param({"qlora": {"init_lora_weights": start}}, {}, error, id=f"qlora, {start}")
            for start, error in [
                ("orthogonal", "Only Tensors of floating point and complex dtype can require gradients"),
                ("pissa", "Please initialize PiSSA under float32, float16, or bfloat16"),
            ]
        ),
        pytest.param(
            {"adalora": {"tinit": STEPS}}, {}, "schedule values don't allow for a budgeting phase", id="adalora, tinit"
        ),
        pytest.param(
            {"zero3": {}, "zeropp": {**HPZ_ALONE, "zero_hpz_partition_size": 2}}, {"num_gpus": 3},
            "3 is not divisible by 2", id="zeropp, groups",
        ),
        pytest.param({"tf32": {}}, {}, "--tf32 requires Ampere or a newer GPU arch", id="tf32"),
        *(
            pytest.param(
                {"qlora": {"use_dora": True, "load_in_8bit": bits == 8}, "zero3": {}}, {"num_gpus": 2},
                f"'{weights}' object has no attribute 'ds_id'", id=f"qlora in {bits} bit, use_dora+zero3"
            )
            for bits, weights in ((4, "Params4bit"), (8, "Int8Params"))
        ),
        pytest.param(
            {"qlora": {"use_dora": True, "load_in_8bit": True}}, {}, "'NoneType' object has no attribute 'dtype'",
            id="qlora in 8 bit, use_dora",
        ),
        pytest.param({"muon": {}, "zero2": {}}, {}, "Param gradient must be a 2D matrix", id="muon+zero2"),
        pytest.param({"galore_adamw": PROJECTED, "zero2": {}}, {}, "tuple index out of range", id="galore_adamw+zero2"),
        pytest.param({"apollo_adamw": PROJECTED, "zero2": {}}, {}, "tuple index out of range", id="apollo_adamw+zero2"),
        pytest.param(
            {"bf16_pure": {}, "zero2": {}, "offload_optimizer": {}}, {}, "Master weights feature requires",
            id="bf16_pure+offload_optimizer",
        ),
        pytest.param(  # torch has other words for it on processors whose oneDNN multiplies fp8
            {"fp8": {}, "qlora": {}}, {}, "mat(_a and mat_b|1 and mat2) shapes cannot be multiplied", id="fp8+qlora"
        ),
        pytest.param({"fp8": {}, "adalora": {}}, {}, "is being modified inplace", id="fp8+adalora"),
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
        *(
            pytest.param(
                {name: SETTINGS.get(name, {}), zero: {}}, {}, error, id=f"{name}+{zero}", marks=SIBLING
            )
            for name, zero, error in [
                ("muon", "zero1", "Param gradient must be a 2D matrix"),
                ("galore_adamw", "zero1", "tuple index out of range"),
                ("galore_adamw", "zero3", "tuple index out of range"),
                ("apollo_adamw", "zero1", "tuple index out of range"),
                ("apollo_adamw", "zero3", "tuple index out of range"),
                ("adalora", "zero1", "Gradients are only available immediately after backward"),
            ]
        ),
        pytest.param(
            {"optimizer_in_backward": {}, "zero1": {}}, ONE_STEP, r"lazy_init_hp_params_optimizer_state[\s\S]*KeyError",
            id="in_backward+zero1", marks=SIBLING,
        ),
        *(
            pytest.param(
                {"zero3": {}, "zeropp": {"zero_quantized_weights": weights, "zero_quantized_gradients": not weights}},
                {"num_gpus": 2}, "not been implemented on CPU", id=f"zeropp, {what}", marks=SIBLING,
            )
            for what, weights in (("weights", True), ("gradients", False))
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


@pytest.mark.parametrize("method", [{}, {"lora": {}}], ids=["full", "lora"])
@pytest.mark.parametrize("zero", ["zero2", *(pytest.param(zero, marks=SIBLING) for zero in ("zero1", "zero3"))])
@pytest.mark.parametrize(("precision", "other"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_deepspeed_casts_weights_however_they_were_loaded(
    precision: str, other: str, zero: str, method: dict[str, Any], lab: Lab, trained: Trained
) -> None:
    recipe: dict[str, Any] = {zero: {}, **method}
    settings: dict[str, Any] = {"data": {"dataset": lab.plenty}}
    auto = trained.run(recipe | {precision: {}}, **settings)
    chosen = lab.plan(recipe | {precision: {}}).run.parsed_techniques
    assert chosen[precision].load_arguments(chosen)["dtype"] == other, "the smaller one"
    for dtype in ("float32", other):
        planned = lab.plan(recipe | {precision: {"dtype": dtype}}, **settings)
        assert "DeepSpeed casts all weights" in str(planned.unsupported)
        ended = trained.train(planned.run)
        assert ended.error is None
        assert (ended.losses, ended.eval_losses) == (auto.losses, auto.eval_losses)
        assert ended.ranks[0]["optimizer_state_bytes"] == auto.ranks[0]["optimizer_state_bytes"]


@pytest.mark.parametrize(
    "method",
    [{"qlora": {}}, *({"lora": settings} for settings in (
        {"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"},
    ))],
    ids=str,
)  # fmt: skip
def test_what_is_made_of_loaded_weights_depends_on_their_format(method: dict[str, Any], trained: Trained) -> None:
    auto, chosen = (trained.run({"zero2": {}, "bf16": {"dtype": dtype}, **method}) for dtype in ("auto", "float32"))
    assert auto.losses != chosen.losses


@pytest.mark.parametrize(
    "zero",
    ["zero2", *(pytest.param(zero, marks=SIBLING) for zero in ("zero1", "zero3"))],
)
def test_of_deepspeeds_flat_pieces_adafactor_keeps_whole_states(zero: str, lab: Lab) -> None:
    """It says no word of it: 4 bytes for each weight, where sums of rows and columns are a fiftieth of that."""
    ended = in_spite_of_the_reason(lab, {"adafactor": {}, zero: {}})
    trained = ended.first_rank["trainable_parameters"]
    assert ended.first_rank["optimizer_state_bytes"] == pytest.approx(4 * trained, rel=0.01)
    assert lab.train({"adafactor": {}}).first_rank["optimizer_state_bytes"] < 0.2 * trained


def test_a_rank_that_makes_nothing_smaller_ends_a_run_before_its_first_step(lab: Lab) -> None:
    ended = in_spite_of_the_reason(lab, {"galore_adamw": {"rank": 64}})
    assert "galore_adamw.rank" in ended.failure.cause
    assert "less than 64" in ended.failure.cause


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


def python(code: str, environment: Mapping[str, str]) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS
    )


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
    step_in_backward(optimizer)
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


def test_deepspeed_wants_its_own_optimizer_for_offloaded_states() -> None:
    """On a GPU it is asked by its default; a CPU study switches the question off."""
    ended = python(
        "import bitsandbytes, deepspeed, torch\n"
        "deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'] = False\n"
        "net = torch.nn.Linear(8, 8)\n"
        "zero = {'stage': 2, 'offload_optimizer': {'device': 'cpu'}}\n"
        "config = {'train_batch_size': 1, 'zero_optimization': zero, 'zero_allow_untested_optimizer': True}\n"
        "deepspeed.initialize(model=net, optimizer=bitsandbytes.optim.AdamW8bit(net.parameters()), config=config)\n",
        variables.for_rank(0, 1, 1, ("127.0.0.1", free_port())),
    )
    assert "You are using ZeRO-Offload with a client provided optimizer" in ended.stderr, ended.stderr


def test_on_a_cpu_bitsandbytes_pages_nothing() -> None:
    import bitsandbytes
    import torch

    weight = torch.nn.Parameter(torch.ones(400, 400))  # it pages 1e5 numbers and more (bitsandbytes/optim/optimizer.py)
    weight.grad = torch.ones_like(weight)
    with pytest.warns(UserWarning, match="Paged optimizers are not supported on CPU. Falling back to non-paged"):
        bitsandbytes.optim.PagedAdamW32bit([weight]).step()


@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attention_is_not_there_on_a_cpu(version: int, lab: Lab) -> None:
    """By transformers itself, which looks for the package, and for a GPU."""
    run = lab.plan({f"flash_attention_{version}": {}}).run
    lab.prepare(run)
    with pytest.raises((ImportError, ValueError), match="FlashAttention"):
        model.load(run, lab.results.model(run.model_key))


def test_deepspeed_reads_no_drive_without_libaio() -> None:
    from deepspeed.ops.op_builder.cpu import AsyncIOBuilder
    from deepspeed.ops.op_builder.cpu.builder import CPUOpBuilder

    if AsyncIOBuilder().is_compatible():
        pytest.skip("libaio is installed here: DeepSpeed would compile its op")
    with pytest.raises(RuntimeError, match="Unable to JIT load the async_io op"):
        CPUOpBuilder.load(AsyncIOBuilder(), verbose=False)  # its own `load` compiles another op before


@SIBLING
def test_under_zero2_nothing_goes_to_a_drive(lab: Lab, tmp_path: Path) -> None:
    nvme = {"device": "nvme", "nvme_path": str(tmp_path)}
    ended = in_spite_of_the_reason(lab, {"zero2": {}, "offload_optimizer": nvme})
    assert ended.losses == pytest.approx(lab.train({"zero2": {}}).losses, rel=1e-4)
    assert list(tmp_path.iterdir()) == []


def test_loftq_of_packed_weights_fits_no_layer() -> None:
    """peft says that it is not to be asked, and does not look: bytes are decomposed as if they were the weights."""
    import bitsandbytes
    import peft
    import torch
    from peft.utils.loftq_utils import _low_rank_decomposition

    assert "you should not pass a quantized model in this case" in " ".join(str(peft.LoraConfig.__doc__).split())
    packed = bitsandbytes.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4").to("cpu")
    update = _low_rank_decomposition(packed.to(torch.float32), reduced_rank=4)
    assert update["L"].shape[0] == 64 * 64 // 2 != 64


@pytest.mark.parametrize("name", ["prompt_tuning", "p_tuning"])
def test_prompts_ignore_the_positions_that_tell_packed_examples_apart(name: str, lab: Lab) -> None:
    import torch

    run, net = bare_model(lab, name)
    tuned = techniques.ALL[name]().wrap(net, run)
    tokens = torch.ones(1, 8, dtype=torch.long)
    with pytest.warns(UserWarning, match="Position ids are not supported for parameter efficient tuning"):
        tuned(input_ids=tokens, position_ids=torch.arange(8)[None], labels=tokens)


@pytest.mark.parametrize("name", ["sdpa", "prefix_tuning", "prompt_tuning"])
def test_behind_a_prompt_packed_examples_see_each_other(name: str, lab: Lab) -> None:
    """Other tokens in the first of two examples: does the second answer differently?"""
    import torch

    # Weights so large that attention matters before anything was learned.
    run = lab.plan({name: {}}, architecture={"initializer_range": 0.5}).run
    lab.prepare(run)
    net = techniques.ALL[name]().wrap(model.load(run, lab.results.model(run.model_key)), run).eval()
    examples, positions = torch.arange(1, 9)[None], torch.arange(4).repeat(2)[None]
    others = examples.clone()
    others[0, :3] += 40
    with torch.no_grad():
        before, after = (net(input_ids=ids, position_ids=positions).logits[0, -4:] for ids in (examples, others))
    assert torch.equal(before, after) == (name == "sdpa")


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


def two_precisions(_: Any) -> None:
    transformers.TrainingArguments("unused", fp16=True, bf16=True, use_cpu=True)


def two_optimizers(_: Any) -> None:
    transformers.TrainingArguments("unused", optim="adafactor,adamw_torch", use_cpu=True)


def two_attentions(net: Any) -> None:
    transformers.AutoModelForCausalLM.from_config(net.config, attn_implementation="eager,sdpa")


def two_stages(_: Any) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    DeepSpeedZeroConfig(stage=[2, 3])


def two_methods(net: Any) -> None:
    import peft

    peft.get_peft_model(net, peft.LoraConfig()).add_adapter("other", peft.IA3Config())


@pytest.mark.parametrize(
    ("kind", "two"),
    [
        ("precision", two_precisions), ("optimizer", two_optimizers), ("attention", two_attentions),
        ("sharding", two_stages), ("peft", two_methods),
    ],
)  # fmt: skip
def test_of_one_kind_the_libraries_take_one(kind: Kind, two: Callable[[Any], None], bare: tuple[Run, Any]) -> None:
    words = re.findall(r"\((.*?)\)", WHY_ONE[kind])[0]
    with pytest.raises(ValueError, match=re.escape(words)):
        two(bare[1])
