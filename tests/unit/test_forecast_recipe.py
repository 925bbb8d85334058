"""Every technique of the study is one that the predictor knows, with its settings and its real number of weights."""

import dataclasses
import json
import math
import re
from types import SimpleNamespace
from typing import Any

import apollo_torch
import galore_torch
import peft
import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

from finetune_study import techniques
from finetune_study.errors import ConfigError, ModelError, StudyError
from finetune_study.forecast import hardware, memory, predict, recipe, time, trace
from finetune_study.forecast.build import Stack
from finetune_study.forecast.layout import Layout, canonical
from finetune_study.forecast.profile import SAVED, Profile
from finetune_study.techniques import muon
from finetune_study.techniques.peft_method import MIXED, PeftMethod

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
FALCON: dict[str, Any] = {
    "model_type": "falcon", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4, "vocab_size": 1024,
}  # fmt: skip
TRACES = predict.Traces()

BESIDE: dict[str, dict[str, Any]] = {
    "offload_optimizer": {"zero3": {}}, "offload_param": {"zero3": {}}, "zeropp": {"zero3": {}},
}  # fmt: skip
"""What a technique means nothing without."""


def answer(recipe: dict[str, Any], **changes: Any) -> dict[str, Any]:
    row = {"model_config": LLAMA, "hardware": "h100-80gb", "num_gpus": 2, "sequence_length": 64, "techniques": recipe}
    return predict.answer(row | changes, TRACES)


@pytest.mark.parametrize("name", techniques.ALL)
def test_every_technique_is_known_with_all_its_settings(name: str) -> None:
    """One that is added later needs its words in the predictor: a name, its settings, and an answer at its defaults."""
    assert name in recipe.KNOWN
    fields = techniques.ALL[name].model_fields
    assert set(fields) <= set(recipe.SETTINGS.get(name, ()))
    defaults = techniques.ALL[name]().model_dump(mode="json")
    found = answer(BESIDE.get(name, {}) | {name: defaults})
    assert found["predicted_peak_memory_allocated_gib"] > 0
    assert found["predicted_step_time_seconds"] > 0


@pytest.mark.parametrize("name", [name for name in techniques.ALL if name in recipe.PEFT])
def test_what_is_left_open_is_as_the_study_has_it(name: str) -> None:
    written_out = answer({name: techniques.ALL[name]().model_dump(mode="json")})
    left_open = answer({name: {}})
    assert written_out.pop("techniques") != left_open.pop("techniques") or name == "qlora"
    assert written_out == left_open


def trained_by_peft(names: list[str], settings: dict[str, Any]) -> int:
    """Of a real model, wrapped as a run does it."""
    parsed = techniques.parse({name: settings.get(name, {}) for name in names})
    run: Any = SimpleNamespace(parsed_techniques=parsed, num_steps=100, training=SimpleNamespace(seed=1))
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).to(torch.bfloat16)
    for technique in parsed.values():
        if isinstance(technique, PeftMethod):
            model = technique.wrap(model, run)
    assert isinstance(model, torch.nn.Module)
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("names", "settings"),
    [
        *(([name], {}) for name in techniques.ALL if name in recipe.PEFT and name != "qlora"),
        (["loha"], {"loha": {"r": 5}}),
        (["lokr"], {"lokr": {"r": 3, "target_modules": ["q_proj", "down_proj"]}}),
        (["oft"], {"oft": {"oft_block_size": 16}}),
        (["lora"], {"lora": {"r": 3, "use_dora": True, "modules_to_save": ["lm_head"]}}),
        (["adaption_prompt"], {"adaption_prompt": {"adapter_layers": 3}}),
        (["p_tuning"], {"p_tuning": {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 24}}),
        (["prefix_tuning"], {"prefix_tuning": {"prefix_projection": True, "encoder_hidden_size": 24}}),
        *((["lora", name], {"lora": {"r": 5}}) for name in sorted(MIXED - {"lora"})),
        (["loha", "lokr"], {}),
    ],
    ids=str,
)
def test_weights_are_counted_as_peft_makes_them(names: list[str], settings: dict[str, Any]) -> None:
    chosen = {name: settings.get(name, {}) for name in names}
    profile, resolved = profile_of(chosen)
    counted = sum(p.count(resolved.rank) for p in profile.parameters if p.trained)
    assert counted == trained_by_peft(names, settings)


@pytest.mark.parametrize(
    "chosen", [0, [1], [0, LLAMA["num_hidden_layers"] - 1], list(range(LLAMA["num_hidden_layers"]))]
)
def test_layers_that_are_chosen_are_counted_at_full_depth(chosen: int | list[int]) -> None:
    settings = {"r": 3, "target_modules": ["q_proj", "down_proj"], "layers_to_transform": chosen}
    profile, resolved = profile_of({"lora": settings})
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    adapted: Any = peft.get_peft_model(model, peft.LoraConfig(**settings, task_type="CAUSAL_LM"))
    counted = sum(p.count(resolved.rank) for p in profile.parameters if p.trained)
    assert counted == adapted.get_nb_trainable_parameters()[0]


def profile_of(chosen: dict[str, Any]) -> tuple[Profile, recipe.Recipe]:
    resolved = recipe.resolve(chosen, num_gpus=1)
    return TRACES.get(resolved.layout(LLAMA, 64)), resolved


def test_states_of_mixed_methods_are_those_of_fp32_as_of_one_alone() -> None:
    """peft makes the first method's weights in the format of the model's; techniques.peft_method turns them to fp32."""
    profile, resolved = profile_of({"lora": {}, "loha": {}})
    counts = [p.count(resolved.rank) for p in profile.parameters if p.trained]
    assert {p.dtype for p in profile.parameters if p.trained} == {"float32"}
    states = predict.answer(
        {"model_config": LLAMA, "hardware": "h100-80gb", "sequence_length": 64, "techniques": {"lora": {}, "loha": {}}},
        TRACES,
    )["predicted_memory_gib"]["by_category"]["optimizer"]
    assert states * 2**30 == 2 * 4 * sum(counts)


@pytest.mark.parametrize(
    ("techniques", "said"),
    [
        ({"lora": {"layers_to_transform": [0, 8]}}, r"techniques\.lora\.layers_to_transform.*\[8\].*0 to 7"),
        ({"lora": {"layers_to_transform": -1}}, r"techniques\.lora\.layers_to_transform.*\[-1\]"),
        ({"adaption_prompt": {"adapter_layers": 9}}, r"techniques\.adaption_prompt\.adapter_layers.*at most 8"),
    ],
)
def test_layers_that_the_model_lacks_are_refused(techniques: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError) as error:
        profile_of(techniques)
    assert re.search(said, str(error.value), re.DOTALL)


def test_methods_that_peft_does_not_mix_exclude_each_other() -> None:
    with pytest.raises(StudyError, match="exclude"):
        answer({"lora": {}, "ia3": {}})
    with pytest.raises(StudyError, match="exclude"):
        answer({"lora": {}, "loha": {}, "adalora": {}})


@pytest.mark.parametrize("config", [LLAMA, FALCON], ids=["llama", "falcon"])
@pytest.mark.parametrize("depth", [16, *(pytest.param(depth, marks=pytest.mark.long) for depth in (17, 32))])
def test_groups_of_layers_are_extended_exactly(
    config: dict[str, Any], depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = Layout(canonical({**config, "num_hidden_layers": depth}), weights="bfloat16", checkpoint_every="sqrt")
    short = trace.trace(layout)
    monkeypatch.setattr(trace, "find_stack", lambda kinds: Stack(len(kinds), 0, 0, 0))
    full = trace.trace(layout)
    for batch, context in ((1, 128), (4, 384)):
        ours, whole = (float(sum(one.curves(batch, context, 1).values()).max()) for one in (short, full))  # type: ignore[union-attr]
        assert ours == pytest.approx(whole, rel=0.005)
        assert short.amount(("recompute",), "matmul_bf16", batch, context, 1) == pytest.approx(
            full.amount(("recompute",), "matmul_bf16", batch, context, 1), rel=0.005
        )


def test_groups_keep_an_input_each_and_compute_every_layer_again() -> None:
    config = {**LLAMA, "num_hidden_layers": 25}
    every = Layout(canonical(config), weights="bfloat16", checkpoint_every=1)
    each, groups = TRACES.get(every), TRACES.get(dataclasses.replace(every, checkpoint_every="sqrt"))
    batch, context = 2, 4096
    residual = 2 * batch * context * LLAMA["hidden_size"]
    at_turn = [float(one.curves(batch, context, 1)[SAVED][one.turn].min()) / residual for one in (each, groups)]
    number = math.isqrt(25)
    # beside the inputs both hold the last hidden state, and what the final norm keeps
    assert at_turn[0] - at_turn[1] == pytest.approx(25 - number, abs=0.01)
    work = [one.amount(("recompute",), "matmul_bf16", batch, context, 1) for one in (each, groups)]
    # What a checkpoint computes last, its last layer's down projection, nothing saves, so torch stops before it.
    down_projection = 2 * batch * context * LLAMA["hidden_size"] * LLAMA["intermediate_size"]
    assert work[1] - work[0] == pytest.approx((25 - number) * down_projection)


def test_a_drive_leaves_the_time_open_and_the_device_as_offload_to_the_host_does() -> None:
    on_host = answer({"zero3": {}, "offload_optimizer": {}})
    on_drive = answer({"zero3": {}, "offload_optimizer": {"device": "nvme", "nvme_path": "/scratch"}})
    assert on_drive["predicted_memory_gib"] == on_host["predicted_memory_gib"]
    assert on_drive["predicted_step_time_seconds"] is None
    assert any("NVMe" in warning for warning in on_drive["warnings"])


def test_a_compiler_that_does_not_fuse_saves_nothing() -> None:
    sizes = {"per_device_train_batch_size": 64, "sequence_length": 4096}
    recipes: list[dict[str, Any]] = [{}, {"torch_compile": {}}, {"torch_compile": {"torch_compile_backend": "eager"}}]
    plain, fused, not_fused = (answer(chosen, **sizes) for chosen in recipes)
    key = "predicted_peak_memory_allocated_gib"
    assert not_fused[key] == plain[key] > fused[key]


def test_fp8_leaves_the_output_layer_as_it_is() -> None:
    """Twice the vocabulary costs fp8 what it costs bf16; the other layers take half the time (H100's data sheet)."""
    sizes = {"per_device_train_batch_size": 64, "sequence_length": 4096}
    wide = {**LLAMA, "vocab_size": 2 * LLAMA["vocab_size"]}
    fp8, bf16 = (
        [answer({name: {}}, model_config=config, **sizes)["predicted_step_time_seconds"] for config in (LLAMA, wide)]
        for name in ("fp8", "bf16")
    )
    assert fp8[1] - fp8[0] == pytest.approx(bf16[1] - bf16[0], rel=1e-6)
    assert fp8[0] < bf16[0]


def test_emulated_fp8_multiplies_in_fp32() -> None:
    sizes = {"per_device_train_batch_size": 64, "sequence_length": 4096}
    recipes: list[dict[str, Any]] = [{"fp8": {"emulate": True}}, {"fp8": {}}, {"bf16": {}}]
    emulated, real, bf16 = (answer(chosen, **sizes)["predicted_step_time_seconds"] for chosen in recipes)
    assert emulated > bf16 > real


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"muon": {"momentum": 2}}, "momentum"),
        ({"galore_adamw": {"rank": -3}}, "rank"),
        ({"galore_adamw": {"ranks": 8}}, "did you mean rank"),
        ({"packing": {"x": 1}}, "no settings"),
        ({"loha": {"r": True}}, "a whole number"),
        ({"loha": {"r": 10**9}}, "65536"),
        ({"lora": {"r": math.inf}}, "65536"),
        ({"lora": {"r": math.nan}}, "65536"),
        ({"loha": {"ranks": 8}}, "ranks"),
        ({"prompt_tuning": {"num_virtual_tokens": 10**12}}, "num_virtual_tokens"),
        ({"gradient_checkpointing": {"every": "cube"}}, "every"),
        ({"gradient_checkpointing": {"every": 0.5}}, "every"),
        ({"zero2": {"reduce_bucket_size": "big"}}, "reduce_bucket_size"),
        ({"zero2": {"reduce_bucket_size": -1}}, "reduce_bucket_size"),
        ({"zero3": {}, "offload_optimizer": {"device": "tape"}}, "device"),
        ({"fp8": {"recipe": "none"}}, "recipe"),
        ({"qlora": {"bnb_4bit_quant_type": "int4"}}, "bnb_4bit_quant_type"),
        ({"lora": {"target_modules": []}}, "target_modules"),
        ({"sdpa": {"kernel": "best"}}, "kernel"),
        ({"fsdp": {"sync_each_batch": "x"}}, "sync_each_batch"),
        ({"qlora": {"load_in_4bit": True, "load_in_8bit": True}}, "both true"),
        ({"qlora": {"load_in_4bit": False}}, "both false"),
        ({"lora": {"rank_pattern": {"q_proj": 10**9}}}, "rank_pattern.q_proj"),
        ({"lora": {"alpha_pattern": [8]}}, "alpha_pattern"),
        ({"lora": {"modules_to_save": 3}}, "modules_to_save"),
        *(
            ({name: {"layers_to_transform": layers}}, rf"techniques.{name}.layers_to_transform")
            for name in ("lora", "loha")
            for layers in ([1.5], [True], "x", {"a": 1}, 1.0)
        ),
        ({"qlora": {"llm_int8_skip_modules": 3}}, "llm_int8_skip_modules"),
        ({"chunked_cross_entropy": {"num_chunks": 0}}, "num_chunks"),
        ({"zero3": {"stage3_max_live_parameters": -1}}, "stage3_max_live_parameters"),
        ({"p_tuning": {"encoder_reparameterization_type": "GRU"}}, "encoder_reparameterization_type"),
    ],
)
def test_wrong_settings_are_told_by_name(given: dict[str, Any], says: str) -> None:
    with pytest.raises(StudyError, match=says):
        answer(given)


def test_copies_of_fake_layers_read_no_memory() -> None:
    """peft copies a layer of `modules_to_save`; copied as a real one, a fake one ends the process sooner or later."""
    layout = recipe.resolve({"lora": {"modules_to_save": ["lm_head"]}}, num_gpus=1).layout(LLAMA, 64)
    for _ in range(8):
        found = trace.trace(layout)
    assert sum(p.count(8) for p in found.parameters if p.trained) > LLAMA["vocab_size"] * LLAMA["hidden_size"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"sequence_length": NaN}', "NaN"),
        ('{"sequence_length": 1e999}', "1e999"),
        ('{"sequence_length": ' + "9" * 5000 + "}", "not JSON"),
        ('{"model": "' + "~" * 10000 + '", "hardware": "t4", "sequence_length": 8}', "model is not known"),
        ('{"model": "a\\u0000", "hardware": "t4", "sequence_length": 8}', "model is not known"),
        ('{"lengths_vary": "yes", "model": "x", "hardware": "t4", "sequence_length": 8}', "true or false"),
    ],
    ids=range(6),
)
def test_lines_that_are_answered_with_an_error_are_json_again(line: str, says: str) -> None:
    (found,) = predict.answer_lines([line], TRACES)
    answered = json.loads(found, parse_constant=lambda constant: pytest.fail(constant))
    assert says in answered["error"]
    assert "bug" not in answered["error"]


def test_a_byte_order_mark_is_no_error() -> None:
    row = {"model_config": LLAMA, "hardware": "t4", "sequence_length": 64}
    assert "error" not in json.loads(next(predict.answer_lines(["\ufeff" + json.dumps(row)], TRACES)))


def test_a_sub_group_of_stage_3_is_as_large_as_it_is_asked_for() -> None:
    def step(**settings: Any) -> float:
        found = answer({"zero3": settings, "bf16": {}}, model_config=LLAMA | {"hidden_size": 2048, "vocab_size": 256})
        return float(found["predicted_memory_gib"]["by_phase"]["optimizer_step"])

    assert step(sub_group_size=10**9) == step()
    assert step(sub_group_size=2_000_000) < step()
    assert step(sub_group_size=0) > 0.9 * step(sub_group_size=500_000), "a weight is never divided"


def test_weights_that_stage_3_keeps_whole_are_warned_of() -> None:
    def warned(value: Any) -> bool:
        found = answer({"zero3": {"stage3_param_persistence_threshold": value}})
        return any("stage3_param_persistence_threshold is not counted" in one for one in found["warnings"])

    assert [warned(value) for value in (10**6, "auto", None)] == [True, False, False]


def test_layers_are_chosen_beside_the_default_targets() -> None:
    def trained(**settings: Any) -> float:
        layout = recipe.resolve({"lora": settings}, num_gpus=1).layout(LLAMA, 64)
        return sum(p.count(8) for p in TRACES.get(layout).parameters if p.trained)

    assert trained(layers_to_transform=[0, 1]) == trained() * 2 / 8


EIGHT: dict[str, Any] = {
    "model_config": predict.architectures()["meta-llama/Llama-2-7b-hf"], "hardware": "a100-80gb", "num_gpus": 8,
    "sequence_length": 2048,
}  # fmt: skip
"""Llama 2 7B on a node."""


def traced(chosen: dict[str, Any]) -> tuple[Profile, recipe.Recipe]:
    question = predict.read_question({**EIGHT, "techniques": chosen})
    return TRACES.get(question.recipe.layout(question.config, 2048)), question.recipe


def timed(chosen: dict[str, Any], steps: int = 1, **rates: Any) -> time.StepTime:
    """Step time on eight A100 of which some rates are others."""
    found = time.rates_of(hardware.find("a100-80gb"), 8)
    assert found is not None
    at = memory.Situation(1, 2048, 8, steps)
    return time.predict(*traced(chosen), at, dataclasses.replace(found, **rates))


@pytest.mark.parametrize(
    ("settings", "steps", "bytes_per_weight"),
    # torch's _fsdp_param_group.py, post_backward: without `reduce_grads` gradients stay as they were computed, in bf16
    [({}, 1, 0), ({}, 4, 2), ({"sync_each_batch": True}, 4, 0)],
)
def test_fsdp_with_offload_leaves_whole_gradients_alone_on_the_device(
    settings: dict[str, Any], steps: int, bytes_per_weight: int
) -> None:
    """Weights, gradients and states are on the host (torch.distributed.fsdp.CPUOffloadPolicy), which updates them."""
    chosen: dict[str, Any] = {"fsdp": settings, "offload_param": {}, "gradient_checkpointing": {}}
    found = answer(chosen, **EIGHT, gradient_accumulation_steps=steps)
    held = found["predicted_memory_gib"]["by_category"]
    weights = sum(p.count(0) for p in traced(chosen)[0].parameters)
    assert held["parameters"] == held["optimizer"] == 0
    assert held["gradients"] == pytest.approx(bytes_per_weight * weights / memory.GIB, abs=0.1)
    assert found["predicted_memory_gib"]["by_phase"]["optimizer_step"] < 0.1
    assert found["bottleneck"] == "CPU optimizer"


@pytest.mark.parametrize("steps", [1, 4])
def test_stage_1_has_whole_gradients_on_the_device_until_the_last_micro_batch_even_with_offload(steps: int) -> None:
    """DeepSpeed's runtime/engine.py, allreduce_gradients: stage 2 and 3 reduce and offload in every backward pass."""

    def held(stage: str) -> tuple[float, float]:
        chosen: dict[str, Any] = {stage: {}, "offload_optimizer": {}, "gradient_checkpointing": {}}
        found = answer(chosen, **EIGHT, gradient_accumulation_steps=steps)["predicted_memory_gib"]
        return found["by_category"]["gradients"], found["by_phase"]["optimizer_step"]

    weights = sum(p.count(0) for p in traced({"zero1": {}})[0].parameters)
    whole, in_step = held("zero1")
    assert whole == pytest.approx(2 * weights / memory.GIB, rel=0.01)
    assert in_step == pytest.approx(2 * weights / memory.GIB, rel=0.01), "weights; gradients are on the host by then"
    assert held("zero2")[0] < 0.1
    assert held("zero3")[0] < 0.1


@pytest.mark.parametrize("stage", ["zero1", "zero2"])
def test_offload_takes_a_buffer_for_one_tensors_gradient(stage: str) -> None:
    """DeepSpeed's stage_1_and_2.py, temp_grad_buffer_for_gpu_offload: here the embedding's, 32,000 × 4,096 in bf16."""
    chosen: dict[str, Any] = {stage: {"reduce_bucket_size": 1}, "offload_optimizer": {}, "gradient_checkpointing": {}}
    found = answer(chosen, **EIGHT)["predicted_memory_gib"]["by_category"]
    assert found["communication"] == pytest.approx(2 * (32_000 * 4_096 + 1) / memory.GIB)


@pytest.mark.parametrize("sharding", ["zero3", "fsdp"])
@pytest.mark.parametrize(("in_8bit", "stored"), [(False, 0.5), (True, 1.0)])
def test_quantised_weights_are_gathered_as_they_are_stored(sharding: str, in_8bit: bool, stored: float) -> None:
    """All of them at once here; the rest, adapters too, in bf16."""
    keeps = {
        "zero3": {"stage3_max_live_parameters": 10**12, "reduce_bucket_size": 1},
        "fsdp": {"reshard_after_forward": False},
    }
    method = {"load_in_8bit": in_8bit}
    chosen: dict[str, Any] = {sharding: keeps[sharding], "qlora": method, "gradient_checkpointing": {}}
    profile, resolved = traced(chosen)
    count = {
        kind: sum(p.count(resolved.rank) for p in profile.parameters if p.quantized == kind) for kind in (True, False)
    }
    adapters = sum(p.count(resolved.rank) for p in profile.parameters if p.trained)
    gathered = count[True] * stored + count[False] * 2
    held = answer(chosen, **EIGHT)["predicted_memory_gib"]
    assert held["by_category"]["communication"] == pytest.approx(gathered / memory.GIB, rel=0.01)
    scales = 0 if in_8bit else count[True] * (1 / 64 + 4 / (64 * 256))
    assert held["by_phase"]["load"] == pytest.approx((scales + gathered / 8) / memory.GIB), "scales are not sharded"
    passes = 1 if sharding == "fsdp" else 2
    sent = (passes * gathered + 2 * adapters) * 7 / 8
    assert timed(chosen, link=1e9).parts["interconnect"] == pytest.approx(sent / 1e9)


@pytest.mark.parametrize(
    ("stage", "steps", "bytes_per_weight"),
    # Updated weights come back in bf16, and the sum of gradients goes in fp32; before, it goes and comes in bf16
    [("zero1", 1, 2 + 4), ("zero1", 4, 2 + 4), ("zero2", 1, 2 + 4), ("zero2", 4, 2 + 4 + 2 * (4 + 3)),
     ("zero3", 1, 2 + 4 + 2 * 2), ("zero3", 4, 2 + 4 + 2 * (4 + 4))],
)  # fmt: skip
def test_deepspeed_moves_offloaded_gradients_in_every_micro_batch(
    stage: str, steps: int, bytes_per_weight: int
) -> None:
    chosen: dict[str, Any] = {stage: {}, "offload_optimizer": {}}
    weights = sum(p.count(0) for p in traced(chosen)[0].parameters)
    found = timed(chosen, steps, pcie=1e9)
    assert found.parts["PCIe"] == pytest.approx(bytes_per_weight * weights / 8 / 1e9)
    free = timed(chosen, steps, pcie=1e30).seconds
    assert found.seconds is not None
    assert free is not None
    if stage == "zero3":  # its gradients travel beside the pass
        assert found.seconds - free < found.parts["PCIe"]
    else:
        assert found.seconds - free == pytest.approx(found.parts["PCIe"])


@pytest.mark.parametrize(
    ("settings", "steps", "bytes_per_weight"),
    # fp32 weights in every pass that gathers them; fp32 gradients where they are scattered
    [({}, 1, 4 * 2 + 4), ({}, 4, 4 * 2 * 4 + 4), ({"sync_each_batch": True}, 4, 4 * 2 * 4 + 4 * 4),
     ({"reshard_after_forward": False}, 1, 4 + 4)],
)  # fmt: skip
def test_fsdp_with_offload_moves_fp32_weights_and_gradients(
    settings: dict[str, Any], steps: int, bytes_per_weight: int
) -> None:
    chosen: dict[str, Any] = {"fsdp": settings, "offload_param": {}}
    weights = sum(p.count(0) for p in traced(chosen)[0].parameters)
    assert timed(chosen, steps, pcie=1e9).parts["PCIe"] == pytest.approx(bytes_per_weight * weights / 8 / 1e9)


def test_the_host_updates_weights_of_fsdp_by_torchs_optimizer() -> None:
    """Step by step it moves 60 bytes for a weight, fused 28, as DeepSpeed's own does."""
    recipes: list[dict[str, Any]] = [
        {"fsdp": {}, "offload_param": {}},
        {"fsdp": {}, "offload_param": {}, "adamw_torch_fused": {}},
        {"zero3": {}, "offload_optimizer": {}},
    ]
    plain, fused, deepspeed = (timed(chosen).parts["CPU optimizer"] for chosen in recipes)
    assert fused == pytest.approx(deepspeed)
    assert plain == pytest.approx(fused * 60 / 28)


SQUARE: dict[str, Any] = {**LLAMA, "num_key_value_heads": 4}
"""No matrix of its layers is narrower than the model."""


def stepped(optimizer: torch.optim.Optimizer, weights: list[torch.nn.Parameter]) -> int:
    """Operations of the matrix products of a real step, the second: in its first GaLore makes its projections."""
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    optimizer.step()
    with FlopCounterMode(display=False) as counted:
        optimizer.step()
    return int(counted.get_total_flops())


def products(shape: dict[str, Any], chosen: dict[str, Any], **rates: Any) -> float:
    """Predicted operations of the matrix products of an optimizer's step, where the device makes one a second."""

    def seconds(chosen: dict[str, Any]) -> float:
        asked = {"model_config": shape, "hardware": "a100-80gb", "sequence_length": 64, "techniques": chosen}
        question = predict.read_question(asked)
        profile = TRACES.get(question.recipe.layout(question.config, 64))
        found = time.rates_of(question.device, 1)
        assert found is not None
        alone = dataclasses.replace(found, **{"matmul": dict.fromkeys(("fp32", "bf16"), 1.0), **rates})
        return time.predict(profile, question.recipe, memory.Situation(1, 64, 1, 1), alone).parts["compute"]

    without = {name: settings for name, settings in chosen.items() if name not in recipe.OPTIMIZERS}
    return seconds(chosen) - seconds(without)


@pytest.mark.parametrize("steps", [1, pytest.param(5, marks=pytest.mark.long)])
@pytest.mark.parametrize("method", [{}, {"lora": {"r": 8}}], ids=["full", "lora"])
def test_muons_products_are_those_of_a_real_step(method: dict[str, Any], steps: int) -> None:
    model: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SQUARE))
    if method:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    optimizer = muon.muon_with_adamw(model, lr=0.1, weight_decay=0.0, ns_steps=steps)
    real = stepped(optimizer, [weight for weight in model.parameters() if weight.requires_grad])
    assert products(SQUARE, {"muon": {"ns_steps": steps}, **method}) == pytest.approx(real, rel=1e-3)


@pytest.mark.long
def test_muons_products_with_shared_keys_are_estimated_near_those_of_a_real_step() -> None:
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    real = stepped(muon.muon_with_adamw(model, lr=0.1, weight_decay=0.0), list(model.parameters()))
    assert real <= products(LLAMA, {"muon": {}}) < 1.35 * real


@pytest.mark.parametrize(
    ("name", "kind"), [("galore_adamw", galore_torch.GaLoreAdamW), ("apollo_adamw", apollo_torch.APOLLOAdamW)]
)
@pytest.mark.parametrize("rank", [16, pytest.param(1024, marks=pytest.mark.long)])
def test_projections_and_their_states_are_those_of_a_real_step(name: str, kind: Any, rank: int) -> None:
    """The rank of a projection is at most the shorter side of what it projects."""
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**SQUARE))
    matrices = [w for n, w in model.named_parameters() if "layers" in n and w.ndim == 2]
    settings = {"rank": rank, "update_proj_gap": 200, "scale": 1.0, "proj_type": "std"}
    if name == "apollo_adamw":
        settings |= {"scale_type": "channel", "proj": "random"}
    optimizer = kind([{"params": matrices, **settings}], lr=0.1)
    real = stepped(optimizer, matrices)
    if rank < SQUARE["hidden_size"]:
        assert products(SQUARE, {"fp32": {}, name: {"rank": rank}}) == pytest.approx(real, rel=1e-3)
    elif name == "galore_adamw":
        held = sum(
            state.numel() * 4
            for one in optimizer.state.values()
            for state in (one["exp_avg"], one["exp_avg_sq"], one["projector"].ortho_matrix)
        )
        found = answer({"fp32": {}, name: {"rank": rank}}, model_config=SQUARE, num_gpus=1)
        ends = sum(w.numel() for w in model.parameters()) - sum(w.numel() for w in matrices)
        predicted = found["predicted_memory_gib"]["by_category"]["optimizer"] * memory.GIB - 8 * ends
        assert predicted == pytest.approx(held, rel=0.1)


def test_a_host_that_multiplies_for_muon_leaves_the_time_open() -> None:
    found = answer({"fsdp": {}, "offload_param": {}, "muon": {}})
    assert found["predicted_step_time_seconds"] is None
    assert any("the products of muon" in warning for warning in found["warnings"])


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
@pytest.mark.parametrize(
    ("method", "side"), [({}, LLAMA["hidden_size"]), ({"lora": {"r": 8}}, 8)], ids=["full", "lora"]
)
def test_a_projection_that_saves_nothing_is_warned_of(name: str, method: dict[str, Any], side: int) -> None:
    def ask(rank: int) -> dict[str, Any]:
        return answer({**method, "bf16_pure": {}, name: {"rank": rank}}, num_gpus=1)

    def warns(found: dict[str, Any]) -> bool:
        return any("is not below the shorter side" in warning for warning in found["warnings"])

    assert not warns(ask(side // 2))
    assert warns(ask(side))
    states = [ask(rank)["predicted_memory_gib"]["by_category"]["optimizer"] for rank in (side, 65536)]
    assert states[0] == pytest.approx(states[1])


GIVEN: dict[str, Any] = {
    "memory_gib": 80, "compute_capability": 8.0, "tflops": {"bf16": 312, "fp32": 19.5}, "memory_gb_per_s": 2039,
}  # fmt: skip


@pytest.mark.parametrize(
    ("chosen", "num_gpus", "key"),
    [
        ({"activation_offload": {}}, 1, "pcie_gb_per_s"),
        ({"zero3": {}, "offload_param": {}}, 1, "pcie_gb_per_s"),
        ({"zero2": {}, "offload_optimizer": {}}, 1, "pcie_gb_per_s"),
        ({"fsdp": {}, "offload_param": {}}, 1, "pcie_gb_per_s"),
        ({}, 2, "link_gb_per_s"),
        ({"zero3": {}, "lora": {}}, 2, "link_gb_per_s"),
    ],
)
def test_a_step_over_an_unknown_link_has_no_time(chosen: dict[str, Any], num_gpus: int, key: str) -> None:
    found = answer(chosen, hardware=GIVEN, num_gpus=num_gpus)
    assert found["predicted_step_time_seconds"] is None
    assert found["predicted_tokens_per_second"] is None
    assert found["bottleneck"] is None
    assert [key in warning for warning in found["warnings"] if "no step time" in warning] == [True]
    known = answer(chosen, hardware={**GIVEN, key: 25}, num_gpus=num_gpus)
    assert known["predicted_step_time_seconds"] > 0
    assert not any("no step time" in warning for warning in known["warnings"])


def test_a_step_that_uses_no_link_needs_none() -> None:
    assert answer({"zero3": {}}, hardware=GIVEN, num_gpus=1)["predicted_step_time_seconds"] > 0


def test_accumulation_with_the_optimizer_in_backward_is_warned_of() -> None:
    def warned(steps: int) -> bool:
        found = answer({"optimizer_in_backward": {}}, num_gpus=1, gradient_accumulation_steps=steps)
        return any(f"can't accumulate {steps} of them" in warning for warning in found["warnings"])

    assert [warned(1), warned(4)] == [False, True]


def test_stacked_experts_are_no_matrices_to_muon() -> None:
    """Its step takes two dimensions alone; the rest is AdamW's (techniques/muon.py), with a state more."""
    experts = {
        "model_type": "mixtral", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024, "num_local_experts": 4,
    }  # fmt: skip
    profile = TRACES.get(Layout(canonical(experts)))
    stacked = 8 * 4 * 3 * 256 * 512
    apart = sum(part.count(1) for part in profile.parameters if part.role == "layers" and not part.matrix)
    assert apart == pytest.approx(stacked, rel=0.01), "and norms"


STEP_OF = {"sequence_length": 512, "techniques": {"bf16": {}}}


@pytest.mark.parametrize(
    ("optimizer", "bytes_per_weight"),
    [
        ("adamw_torch", 60),
        ("adamw_8bit", 4 * (1 + 2) + 2 * 2 * (1 + 4 / 256)),
        ("lion_8bit", 4 * (1 + 2) + 2 * (1 + 4 / 256)),
        ("sgd", 4 * (1 + 2)),
    ],
)
def test_an_update_moves_the_states_that_the_optimizer_has(optimizer: str, bytes_per_weight: float) -> None:
    """The gradient once, the weight and its states both ways, in fp32; beside fused AdamW, whose states are two."""
    shape = {**LLAMA, "num_hidden_layers": 4}
    question = {"model_config": shape, "hardware": "h100-80gb", **STEP_OF}
    times = {
        name: predict.answer(question | {"techniques": {"bf16": {}, name: {}}}, TRACES)["predicted_step_time_seconds"]
        for name in (optimizer, "adamw_torch_fused")
    }
    weights = sum(p.count(1) for p in TRACES.of(predict.read_question(question)).parameters if p.trained)
    apart = (bytes_per_weight - 4 * (1 + 2 + 2 * 2)) * weights / (3350e9 * 0.8)
    assert times[optimizer] - times["adamw_torch_fused"] == pytest.approx(apart, rel=1e-3, abs=1e-9)


@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_flash_attention_3_is_faster_where_attention_takes_long(precision: str) -> None:
    question = {"model_config": {**LLAMA, "num_hidden_layers": 4}, "hardware": "h100-80gb", "sequence_length": 32768}
    two, three = (
        predict.answer(question | {"techniques": {precision: {}, name: {}}}, TRACES)["predicted_step_time_seconds"]
        for name in ("flash_attention_2", "flash_attention_3")
    )
    assert two / 1.6 < three < 0.9 * two


def test_a_bridge_joins_two_gpus_and_more_talk_over_pcie() -> None:
    question = {
        "model_config": {**LLAMA, "num_hidden_layers": 4},
        "hardware": "rtx3090",
        **STEP_OF,
        "techniques": {"zero1": {}},
    }
    found = {
        (num_gpus, name): predict.answer(
            question | {"num_gpus": num_gpus, "hardware": {"name": "rtx3090", **changes}}, TRACES
        )["predicted_step_time_seconds"]
        for num_gpus in (2, 4)
        for name, changes in (("bridge", {}), ("pcie", {"link_gb_per_s": 32}))
    }
    assert found[2, "bridge"] < found[2, "pcie"]
    assert found[4, "bridge"] == found[4, "pcie"]


def test_bridges_join_the_gpus_of_each_node() -> None:
    device = hardware.find({"name": "rtx3090", "gpus_per_node": 2, "network_gb_per_s": 100})
    wide = hardware.find({"name": "rtx3090", "gpus_per_node": 4, "network_gb_per_s": 100})
    links = [vars(time.rates_of(one, 4))["link"] for one in (device, wide)]
    assert links == pytest.approx([56e9 * time.LINK_EFFICIENCY, 32e9 * time.LINK_EFFICIENCY])
    with pytest.raises(ConfigError, match="linked_gpus needs pcie_gb_per_s"):
        hardware.find({"memory_gib": 24, "link_gb_per_s": 56, "linked_gpus": 2})


def test_a_family_of_gpus_is_answered_with_its_members() -> None:
    with pytest.raises(ConfigError, match="did you mean a100-40gb or a100-40gb-pcie or a100-80gb"):
        predict.answer({"model_config": LLAMA, "hardware": "A100", **STEP_OF}, TRACES)
