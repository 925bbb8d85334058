"""Traces, memory and time predicted without a GPU: properties that hold whatever the model."""

import dataclasses
import gc
import json
import logging
import re
import subprocess
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from finetune_study.errors import ConfigError, ModelError, StudyError
from finetune_study.forecast import CATEGORIES, hardware, memory, predict, recipe, time, trace
from finetune_study.forecast.build import (
    Stack,
    _defaults,
    build,
    find_stack,
    layer_kinds,
    layer_stack,
    make_config,
    overrides_of_layers,
    shorten,
    traced_model,
)
from finetune_study.forecast.layout import Layout, canonical
from finetune_study.forecast.profile import Profile
from finetune_study.forecast.quiet import quiet

TRACES = predict.Traces()

SMALL: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 1024,
}  # fmt: skip
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "falcon": {"model_type": "falcon", "hidden_size": 256, "num_hidden_layers": 8, "num_attention_heads": 4,
               "vocab_size": 1024, "multi_query": True, "new_decoder_architecture": False},
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
                 "num_attention_heads": 4, "vocab_size": 1024},
    "mistral": {**SMALL, "model_type": "mistral", "sliding_window": 512},
    "gemma2, whose layers alternate": {**SMALL, "model_type": "gemma2", "head_dim": 64, "sliding_window": 512},
    "gemma3, whose every sixth layer differs": {
        **SMALL, "model_type": "gemma3_text", "num_hidden_layers": 27, "head_dim": 64, "sliding_window": 512,
    },
    "phi": {"model_type": "phi", "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
            "num_attention_heads": 4, "vocab_size": 1024},
    "mixtral, a mixture of experts": {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "sliding_window": None},
}  # fmt: skip
RECIPES: list[dict[str, Any]] = [
    {},
    {"bf16_pure": {}},
    {"gradient_checkpointing": {}},
    {"lora": {"r": 8}},
    {"lora": {"r": 8}, "gradient_checkpointing": {"every": 2}},
    {"qlora": {"r": 8}, "gradient_checkpointing": {}},
    {"zero1": {}},
    {"zero2": {}, "lora": {"r": 8}},
    {"zero3": {}, "gradient_checkpointing": {}},
    {"fsdp": {}, "adamw_8bit": {}},
    {"zero1": {}, "offload_optimizer": {}},
    {"zero2": {}, "offload_optimizer": {}},
    {"fsdp": {}, "offload_param": {}},
    {"zero3": {}, "qlora": {"r": 8}},
    {"eager": {}, "adafactor": {}},
]


def row(**changes: Any) -> dict[str, Any]:
    return {"model_config": SMALL, "hardware": "a100-80gb", "sequence_length": 256, **changes}


def peak(**changes: Any) -> float:
    answer = predict.answer(row(**changes), TRACES)
    return float(answer["predicted_peak_memory_allocated_gib"])


@pytest.mark.parametrize("kernel", ["sdpa", "flash_attention_2"])
def test_fused_attention_draws_its_dropout_itself(kernel: str) -> None:
    """No scores are kept for it; on a CPU, where shapes are traced, torch would take `math`."""
    without, with_dropout = (
        peak(
            model_config={**SMALL, "attention_dropout": share},
            techniques={"bf16_pure": {}, kernel: {}},
            sequence_length=2048,
        )
        for share in (0.0, 0.1)
    )
    assert with_dropout == without
    scores = {"bf16_pure": {}, "sdpa": {"kernel": "math"}}
    assert (
        peak(model_config={**SMALL, "attention_dropout": 0.1}, techniques=scores, sequence_length=2048) > 1.5 * without
    )


def test_offloaded_activations_leave_autocasts_copies_of_the_weights() -> None:
    """They are in its cache until forward ends, whatever goes to the host; backward needs them no more."""
    deep = {**SMALL, "num_hidden_layers": 24}
    techniques: dict[str, Any] = {"bf16": {}, "activation_offload": {}}
    answer = predict.answer(row(model_config=deep, techniques=techniques, sequence_length=16), TRACES)
    found = answer["predicted_memory_gib"]
    workspace = memory.CUBLAS_HANDLES * memory.CUBLAS_WORKSPACE_BYTES["other"] / 2**30
    copies = found["by_phase"]["forward"] - found["by_phase"]["load"] - found["by_category"]["optimizer"] - workspace
    assert copies == pytest.approx(found["by_category"]["parameters"] / 2, rel=0.02), "two bytes beside each four"


def test_only_what_a_device_does_is_counted() -> None:
    """A fake tensor is asked where it lies some seventy times for a layer, which moves nothing."""
    profile = TRACES.get(
        Layout(canonical(predict.architectures()["meta-llama/Llama-2-7b-hf"]), weights="bfloat16", attention="flash")
    )
    tokens, width, layers = 2048, 4096, 32
    moved = profile.amount(("forward",), "bytes_pointwise", 1, tokens, 1) / (2 * tokens * width * layers)
    # Of a layer's vectors of the model's width in 16 bit: norms are computed in fp32 (some 28), residuals 6, rotary
    # embeddings 25, the gated product 5 of 2.7 widths; the logits of the model are worth 3 a layer.
    assert 60 < moved < 100
    assert profile.amount(("forward",), "kernels", 1, tokens, 1) / layers < 50


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "each layer": {"checkpoint_every": 1},
    "reentrant": {"checkpoint_every": 1, "use_reentrant": True},
    "every second layer": {"checkpoint_every": 2},
    "groups": {"checkpoint_every": "sqrt"},
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(pytest.param(name, {"weights": "bfloat16"}, id=name) for name in ARCHITECTURES),
        *(
            pytest.param(
                name,
                {"autocast": "bfloat16", **settings},
                id=f"{name}, autocast, checkpoints: {what}",
                marks=[] if (name, what) in (("llama", "each layer"), ("gpt_neox", "groups")) else pytest.mark.long,
            )
            for name in ("llama", "gpt_neox", *(name for name in ARCHITECTURES if name.startswith("gemma")))
            for what, settings in CHECKPOINTS.items()
        ),
    ],
)
def test_depth_is_extended_exactly(name: str, layout: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert_extended_exactly(Layout(canonical(ARCHITECTURES[name]), **layout), monkeypatch)


def assert_extended_exactly(asked: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace says what one of all layers says."""
    short = trace.trace(asked)
    monkeypatch.setattr(trace, "find_stack", lambda kinds: Stack(len(kinds), 0, 0, 0))
    full = trace.trace(asked)
    for batch, context in ((1, 128), (4, 384)):
        for phase in (False, True):
            extended, whole = (_peak_of(one, batch, context, phase) for one in (short, full))
            assert extended == pytest.approx(whole, rel=0.005)
    for kind in ("matmul_bf16", "bytes_pointwise", "kernels"):
        for phases in (("forward",), ("backward",), ("recompute",)):
            assert short.amount(phases, kind, 2, 128, 1) == pytest.approx(
                full.amount(phases, kind, 2, 128, 1), rel=0.005
            )
    for trained in (False, True):
        counts = [sum(p.count(1) for p in one.parameters if p.trained == trained) for one in (short, full)]
        assert counts[0] == counts[1]


GEMMA_4 = {
    **SMALL, "model_type": "gemma4_text", "num_hidden_layers": 18, "head_dim": 64, "global_head_dim": 128,
    "hidden_size_per_layer_input": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(GEMMA_4, id="gemma4, whose every sixth layer has settings of its own"),
        pytest.param(
            {**GEMMA_4, "hidden_size_per_layer_input": 32, "vocab_size_per_layer_input": 1024},
            id="gemma4, with embeddings of each layer in one weight",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {
                **GEMMA_4,
                "num_hidden_layers": 28,
                "layer_types": ["sliding_attention", "full_attention"] * 14,
                "hidden_size_per_layer_input": 32,
                "vocab_size_per_layer_input": 1024,
                "num_kv_shared_layers": 24,
            },
            id="gemma4, of which fewer layers can't be built",
            marks=pytest.mark.long,
        ),
        pytest.param(
            {**SMALL, "model_type": "smollm3", "num_hidden_layers": 16, "pad_token_id": 0},
            id="smollm3, whose every fourth layer has no rotary embedding",
        ),
        pytest.param(
            {**SMALL, "model_type": "mixtral", "num_local_experts": 4, "output_router_logits": True},
            id="mixtral, with a loss of all routers",
        ),
    ],
)
def test_layers_that_settings_tell_apart_are_extended_exactly(
    config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_extended_exactly(Layout(canonical(config), weights="bfloat16"), monkeypatch)


def test_settings_of_single_layers_go_with_their_layers() -> None:
    short = shorten(make_config(GEMMA_4), [0, 5, 6, 17])
    assert overrides_of_layers(short) == {1: {"head_dim": 128}, 3: {"head_dim": 128}}
    with torch.device("meta"):
        _, layers = layer_stack(build(short, torch.float32, "eager"))
    assert [layer.self_attn.q_norm.weight.numel() for layer in layers] == [64, 128, 64, 128]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": r".*layers\.\d\.self_attn\.q_proj"},
        pytest.param({"target_modules": r".*layers\..\.self_attn\.q_proj"}, marks=pytest.mark.long),
        pytest.param({"target_modules": r".*layers\.\d\d\.self_attn\.q_proj"}, marks=pytest.mark.long),
        pytest.param({"target_modules": r".*\.(?!4\.)\w+\.self_attn\.q_proj"}, marks=pytest.mark.long),
        pytest.param(
            {"target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*layers\.\d\d\..*"}, marks=pytest.mark.long
        ),
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {r"layers\.\d\.self_attn\.q_proj": 64}},
        {"target_modules": ["q_proj"], "layer_replication": [[0, 8], [4, 12]]},
    ],
    ids=str,
)
def test_modules_that_patterns_name_are_those_of_the_whole_model(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = canonical({**SMALL, "num_hidden_layers": 12})
    layout = Layout(config, weights="bfloat16", peft=canonical([{"method": "LORA", **settings}]))
    assert_extended_exactly(layout, monkeypatch)


def test_patterns_that_treat_all_layers_alike_are_traced_short() -> None:
    """A digit in a name says nothing about layers."""
    config = {"model_type": "falcon", "hidden_size": 256, "num_hidden_layers": 100, "num_attention_heads": 4}
    settings = {"method": "LORA", "target_modules": r".*\.dense_4h_to_h"}
    layout = Layout(canonical({**config, "vocab_size": 1024}), peft=canonical([settings]))
    with torch.device("meta"):
        kinds = layer_kinds(build(make_config(json.loads(layout.config)), torch.float32, "eager"), layout)
    assert len(find_stack(kinds).traced) == 3


def test_prefixes_of_all_layers_are_extended_exactly(monkeypatch: pytest.MonkeyPatch) -> None:
    peft = canonical([{"method": "PREFIX_TUNING", "num_virtual_tokens": 20}])
    layout = Layout(canonical(SMALL), weights="bfloat16", peft=peft, virtual_tokens=20)
    assert_extended_exactly(layout, monkeypatch)


def _peak_of(profile: Profile, batch: int, context: int, backward: bool) -> float:
    total = np.sum(list(profile.curves(batch, context, 1).values()), axis=0)
    return float(total[profile.backward == backward].max())


def test_one_trace_answers_for_every_batch_and_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trace at one pair of primes, evaluated elsewhere, is the trace made elsewhere."""
    layout = Layout(canonical(SMALL), weights="float32", autocast="bfloat16")
    usual = trace.trace(layout)
    others = {1009: (331, 337)}
    monkeypatch.setattr(trace, "primes_above", lambda start, avoid: iter(others.get(start, (347,))))
    other = trace.trace(layout)
    for point in ((1, 128), (7, 512)):
        for backward in (False, True):
            assert _peak_of(usual, *point, backward) == pytest.approx(_peak_of(other, *point, backward), rel=1e-9)


@pytest.mark.parametrize("techniques", RECIPES, ids=lambda r: "+".join(r) or "default")
def test_categories_add_up(techniques: dict[str, Any]) -> None:
    answer = predict.answer(row(techniques=techniques, num_gpus=4), TRACES)
    categories = answer["predicted_memory_gib"]["by_category"]
    phases = answer["predicted_memory_gib"]["by_phase"]
    assert tuple(categories) == CATEGORIES
    assert tuple(phases) == memory.PHASES
    allocated = answer["predicted_peak_memory_allocated_gib"]
    assert sum(categories.values()) - categories["context"] == pytest.approx(allocated)
    assert max(phases.values()) == pytest.approx(allocated)
    assert min(categories.values()) >= 0
    assert answer["predicted_peak_memory_reserved_gib"] >= allocated


@settings(max_examples=60, deadline=None)
@given(
    techniques=st.sampled_from(RECIPES),
    batch=st.integers(1, 64),
    context=st.integers(16, 4096),
    rank=st.integers(1, 256),
    gpus=st.sampled_from([1, 2, 4, 8, 64]),
    accumulation=st.integers(1, 8),
    more=st.integers(1, 1000),
)
def test_memory_never_falls_when_work_grows_or_sharding_shrinks(
    techniques: dict[str, Any], batch: int, context: int, rank: int, gpus: int, accumulation: int, more: int
) -> None:
    techniques = {name: {**given, "r": rank} if "lora" in name else given for name, given in techniques.items()}
    wider = {name: {**given, "r": rank + more} if "lora" in name else given for name, given in techniques.items()}
    sizes = {
        "per_device_train_batch_size": batch,
        "sequence_length": context,
        "num_gpus": gpus,
        "gradient_accumulation_steps": accumulation,
    }
    least = peak(techniques=techniques, **sizes)
    assert peak(techniques=techniques, **{**sizes, "per_device_train_batch_size": batch + more}) >= least
    assert peak(techniques=techniques, **{**sizes, "sequence_length": context + more}) >= least
    assert peak(techniques=wider, **sizes) >= least
    if any(name in techniques for name in ("zero1", "zero2", "zero3", "fsdp")) and gpus > 1:
        assert peak(techniques=techniques, **{**sizes, "num_gpus": gpus * 2}) <= least * (1 + 1e-9)


def test_more_sharding_takes_no_more_memory() -> None:
    shape = {
        **SMALL,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 64,
        "num_attention_heads": 16,
    }
    stages = [
        peak(model_config=shape, techniques={stage: {}}, num_gpus=8, per_device_train_batch_size=1)
        for stage in ("zero1", "zero2", "zero3")
    ]
    assert stages == sorted(stages, reverse=True)


@pytest.mark.parametrize(
    ("stage", "bytes_per_weight"),
    # Rajbhandari et al., arXiv 1910.02054, figure 1: 2 + 2 + 12 bytes, of which N devices share the last, two, all
    [("zero1", 2 + 2 + 12 / 8), ("zero2", 2 + (2 + 12) / 8), ("zero3", (2 + 2 + 12) / 8)],
)
def test_model_states_are_those_of_the_paper(stage: str, bytes_per_weight: float) -> None:
    answer = predict.answer(row(techniques={stage: {}}, num_gpus=8), TRACES)
    question = predict.read_question(row(techniques={stage: {}}, num_gpus=8))
    profile = TRACES.get(question.recipe.layout(question.config, 256))
    states = memory._States(profile, question.recipe, memory.Situation(1, 256, 8))
    weights = sum(p.count(1) for p in profile.parameters)
    found = states.parameters + states.held_gradients + states.optimizer_states
    assert found == pytest.approx(bytes_per_weight * weights)
    assert answer["predicted_memory_gib"]["by_phase"]["load"] == pytest.approx(states.parameters / memory.GIB)


def test_full_fp32_takes_sixteen_bytes_for_a_weight() -> None:
    question = predict.read_question(row(techniques={"fp32": {}}))
    profile = TRACES.get(question.recipe.layout(question.config, 256))
    states = memory._States(profile, question.recipe, memory.Situation(1, 256))
    weights = sum(p.count(1) for p in profile.parameters)
    assert states.parameters + states.held_gradients + states.optimizer_states == pytest.approx(16 * weights)


def test_activations_are_those_of_the_formula() -> None:
    """A layer of a transformer with GELU in 16 bit: 34 s b h + 5 a s² b (arXiv 2205.05198, equation 2).

    2 s b h and a s² b of it are masks of dropout, which is off here.
    """
    width, heads, context = 512, 8, 256
    shape = {"model_type": "gpt_neox", "hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": 12,
             "num_attention_heads": heads, "vocab_size": 64}  # fmt: skip
    profile = TRACES.get(Layout(canonical(shape), weights="bfloat16", attention="eager"))
    curves = profile.curves(1, context, 1)
    found = float((curves["saved"] + curves["pointwise"]).max()) / 12
    formula = 32 * context * width + 4 * heads * context**2
    assert found == pytest.approx(formula, rel=0.25)


def test_lora_of_llama_2_70b_trains_131_million_weights() -> None:
    """arXiv 2406.02290: rank 64 on queries and values."""
    config = dict(predict.architectures()["meta-llama/Llama-2-70b-hf"])
    settings = {"lora": {"r": 64, "target_modules": ["q_proj", "v_proj"]}}
    question = predict.read_question(row(model_config=config, techniques=settings))
    profile = TRACES.get(question.recipe.layout(config, 256))
    assert sum(p.count(64) for p in profile.parameters if p.trained) == pytest.approx(131e6, rel=0.01)


def test_flash_attention_is_linear_in_the_context_and_eager_quadratic() -> None:
    shape = {**SMALL, "vocab_size": 64}
    grown = {}
    for name in ("eager", "flash_attention_2"):
        one, two = (peak(model_config=shape, techniques={name: {}}, sequence_length=s) for s in (8192, 16384))
        grown[name] = two / one
    assert grown["flash_attention_2"] < 2.01
    assert grown["eager"] > 3.5


REAL: dict[str, tuple[dict[str, Any], bool]] = {
    **{name: (ARCHITECTURES[name], False) for name in ("llama", "gpt_neox", "falcon")},
    "falcon with groups": ({**ARCHITECTURES["falcon"], "new_decoder_architecture": True, "num_kv_heads": 2}, False),
    "gemma": ({**SMALL, "model_type": "gemma", "head_dim": 64}, False),
    "mistral within its window": ({**SMALL, "model_type": "mistral", "sliding_window": 512}, False),
    "mistral beyond its window": ({**SMALL, "model_type": "mistral", "sliding_window": 100}, True),
}


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("with_mask", [False, True], ids=["no mask", "mask of ones"])
def test_sdpa_saves_the_quadratic_tensors_of_a_real_step_and_no_other(name: str, with_mask: bool) -> None:
    """A step on real tensors: Llama, Gemma, GPT-NeoX, and Mistral within its window save none; Falcon has a mask."""
    config, windowed = REAL[name]
    config, batch, context = {**config, "num_hidden_layers": 3}, 2, 211
    profile = TRACES.get(Layout(canonical(config), weights="bfloat16", windowed=windowed))
    quadratic = (profile.monomials[:, 1] == 2) & np.isin(profile.kinds, ["saved", "pointwise"])
    traced = profile.alive[:, quadratic].sum(axis=1)[profile.turn].max() * batch * context**2

    model = build(make_config(config), torch.bfloat16, "sdpa")
    ids, saved = torch.zeros(batch, context, dtype=torch.long), {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.numel() % context**2 == 0:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids) if with_mask else None).loss
    assert loss.requires_grad
    assert traced == pytest.approx(sum(saved.values()), abs=batch * context**2)  # the mask itself, a byte a position
    if not windowed and "falcon" not in name:
        assert traced == 0


@pytest.mark.parametrize(
    "name", [name for name, (_, windowed) in REAL.items() if "falcon" not in name and not windowed]
)
def test_sdpa_of_whole_sequences_takes_what_flash_attention_takes(name: str) -> None:
    shape = {**REAL[name][0], "vocab_size": 64, "sliding_window": None, "max_position_embeddings": 1 << 20}
    found = {}
    for kernel in ("sdpa", "flash_attention_2"):
        answers = [
            predict.answer(row(model_config=shape, techniques={kernel: {}}, sequence_length=s), TRACES)
            for s in (8192, 16384)
        ]
        found[kernel] = [a["predicted_memory_gib"]["by_category"]["activations"] for a in answers]
    assert found["sdpa"] == pytest.approx(found["flash_attention_2"], rel=0.03)
    assert found["sdpa"][1] == pytest.approx(2 * found["sdpa"][0], rel=0.01)


@pytest.mark.parametrize("phase", ["forward", "recompute", "backward"])
@pytest.mark.parametrize(("model_type", "windowed_layers"), [("mistral", 8), ("gemma2", 4)])
def test_flash_attention_computes_the_pairs_within_a_window(model_type: str, windowed_layers: int, phase: str) -> None:
    """Against a count of all pairs of positions; gemma2's layers alternate."""
    window, context, batch, heads, width = 512, 4096, 2, 4, 64
    config = {**SMALL, "model_type": model_type, "head_dim": width, "sliding_window": window}
    layout = Layout(canonical(config), weights="bfloat16", attention="flash", checkpoint_every=1)
    counted = TRACES.get(layout).amount((phase,), "attention_bf16", batch, context, 1)
    within = sum(min(position + 1, window) for position in range(context))
    pairs = windowed_layers * within + (8 - windowed_layers) * context * (context + 1) / 2
    products = 5 if phase == "backward" else 2
    assert counted == pytest.approx(2 * products * batch * heads * width * pairs, rel=0.002)


def test_sdpa_with_a_mask_computes_what_it_hides() -> None:
    """torch's memory-efficient kernel takes a mask of a window as a bias; a causal one without it skips half."""
    config = {**SMALL, "model_type": "mistral", "sliding_window": 512}
    within, beyond = (
        TRACES.get(Layout(canonical(config), weights="bfloat16", windowed=windowed)) for windowed in (False, True)
    )
    for phase in ("forward", "backward"):
        whole, half = (one.amount((phase,), "attention_bf16", 1, 1024, 1) for one in (beyond, within))
        assert whole == pytest.approx(2 * half, rel=1e-6)


GEMMA = {
    **SMALL,
    "model_type": "gemma3_text",
    "head_dim": 64,
    "num_hidden_layers": 6,
    "sliding_window": 512,
    "vocab_size": 64,
}


@pytest.mark.parametrize("kernel", ["sdpa", pytest.param("eager", marks=pytest.mark.long), "flash_attention_2"])
@pytest.mark.parametrize(
    ("hidden", "explicit"),
    [
        ({"model_type": "gemma3", "text_config": GEMMA}, GEMMA),
        ({**SMALL, "model_type": "mistral"}, {**SMALL, "model_type": "mistral", "sliding_window": 4096}),
    ],
    ids=["in a part", "transformers' default"],
)
def test_a_window_counts_wherever_it_stands(hidden: dict[str, Any], explicit: dict[str, Any], kernel: str) -> None:
    """Gemma 3 of several parts has a vision tower as well, which takes what it takes at any context, and copies the
    embeddings once more."""
    one, two = (
        [
            predict.answer(row(model_config=config, techniques={kernel: {}}, sequence_length=s), TRACES)
            for s in (6000, 12000)
        ]
        for config in (hidden, explicit)
    )
    for column in ("predicted_peak_memory_allocated_gib", "predicted_step_time_seconds"):
        grown = [answers[1][column] - answers[0][column] for answers in (one, two)]
        assert grown[0] == pytest.approx(grown[1], rel=0.05)


@pytest.mark.parametrize("kernel", ["sdpa", "eager", "flash_attention_2"])
def test_prefixes_before_the_keys_leave_attention_quadratic(kernel: str) -> None:
    """As virtual tokens before the context do it; SDPA is given a mask for them, kept in 16 bit by each of 8 layers."""
    found: dict[str, list[Any]] = {}
    for method in ("prefix_tuning", "prompt_tuning"):
        found[method] = [
            predict.answer(row(techniques={method: {}, kernel: {}}, sequence_length=s), TRACES) for s in (4096, 16384)
        ]
    for prefix, prompt in zip(*found.values(), strict=True):
        column = "predicted_peak_memory_allocated_gib"
        mask = (1 + 8 * 2) * 1.02 * prefix["sequence_length"] ** 2 / 2**30 if kernel == "sdpa" else 0.0
        assert prompt[column] * 0.95 <= prefix[column] <= prompt[column] * 1.05 + mask
        slower = prefix["predicted_step_time_seconds"] / prompt["predicted_step_time_seconds"]
        assert 0.9 < slower < (2.0 if kernel == "sdpa" else 1.1), "a mask has SDPA compute both triangles"
        assert prefix["warnings"] == prompt["warnings"]


def test_a_short_window_of_a_kernel_of_its_own_is_no_short_trace() -> None:
    config = {**SMALL, "model_type": "mistral", "sliding_window": 8}
    found = predict.answer(row(model_config=config, techniques={"flash_attention_2": {}}, sequence_length=8192), TRACES)
    wide = predict.answer(
        row(model_config=config | {"sliding_window": 64}, techniques={"flash_attention_2": {}}, sequence_length=8192),
        TRACES,
    )
    assert found["predicted_step_time_seconds"] < wide["predicted_step_time_seconds"]
    assert not any("chunks" in one for one in found["warnings"])


def test_a_window_of_zero_is_none() -> None:
    config = {**SMALL, "model_type": "mistral"}
    times = [
        predict.answer(
            row(model_config=config | {"sliding_window": window}, techniques={"flash_attention_2": {}}), TRACES
        )["predicted_step_time_seconds"]
        for window in (0, None)
    ]
    assert times[0] == times[1]


@pytest.mark.parametrize(
    ("model_type", "kernel", "says"),
    [
        ("gemma2", "sdpa", "does not support sdpa"),
        ("bloom", "flash_attention_2", "does not support flash_attention_2"),
        ("gptj", "flash_attention_2", "predicted as eager"),
    ],
)
def test_a_kernel_that_a_model_has_not_is_warned_of(model_type: str, kernel: str, says: str) -> None:
    config = {"model_type": model_type, "vocab_size": 1024}
    small = {"gemma2": {**SMALL, "head_dim": 64}, "bloom": {"hidden_size": 256, "n_layer": 4, "n_head": 4}}
    config |= small.get(model_type, {"n_embd": 256, "n_layer": 4, "n_head": 4, "rotary_dim": 16}) | {
        "model_type": model_type
    }
    found = predict.answer(row(model_config=config, techniques={kernel: {}}), TRACES)
    assert any(says in one for one in found["warnings"])
    eager = predict.answer(row(model_config=config, techniques={"eager": {}}), TRACES)
    assert not any(says in one for one in eager["warnings"])


@pytest.mark.parametrize("settings", [{}, *CHECKPOINTS.values()], ids=["no checkpoints", *CHECKPOINTS])
def test_forward_under_autocast_takes_what_a_real_one_takes(settings: dict[str, Any], tmp_path: Path) -> None:
    """Sixteen layers, of which few are traced: 16-bit copies of all weights are there until the pass has ended."""
    config, batch, context = {**SMALL, "num_hidden_layers": 16}, 2, 128
    layout = Layout(canonical(config), autocast="bfloat16", **settings)
    predicted = _peak_of(TRACES.get(layout), batch, context, False)

    with torch.device("meta"):
        skeleton = build(make_config(config), torch.float32, "sdpa")
    model = traced_model(make_config(config), layout, 1, find_stack(layer_kinds(skeleton, layout)))
    ids = torch.zeros(batch, context, dtype=torch.long)
    gc.collect()  # nothing of another test is given back in between
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with profiler, torch.autocast("cpu", torch.bfloat16):
        loss = model(input_ids=ids, labels=ids).loss
    assert loss.requires_grad
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((one["ts"], one["args"]["Bytes"]) for one in events if one["name"] == "[memory]")
    taken = np.cumsum([size for _, size in changes]).max()
    assert predicted == pytest.approx(taken, rel=0.01)


def test_checkpointing_keeps_less_and_computes_more() -> None:
    plain = predict.answer(row(per_device_train_batch_size=32), TRACES)
    checkpointed = predict.answer(
        row(per_device_train_batch_size=32, techniques={"gradient_checkpointing": {}}), TRACES
    )
    assert checkpointed["predicted_peak_memory_allocated_gib"] < plain["predicted_peak_memory_allocated_gib"]
    slowdown = checkpointed["predicted_step_time_seconds"] / plain["predicted_step_time_seconds"]
    assert 1.1 < slowdown < 1.5


def test_step_time_follows_from_the_rates() -> None:
    question = predict.read_question(row(per_device_train_batch_size=64, sequence_length=2048))
    profile = TRACES.get(question.recipe.layout(question.config, 2048))
    at = memory.Situation(64, 2048)
    rates = time.rates_of(question.device, 1)
    assert rates is not None
    slower = dataclasses.replace(
        rates,
        memory=rates.memory / 2,
        matmul={k: v / 2 for k, v in rates.matmul.items()},
        attention={k: v / 2 for k, v in rates.attention.items()},
    )
    fast, slow = (time.predict(profile, question.recipe, at, r).seconds for r in (rates, slower))
    assert fast is not None
    assert slow == pytest.approx(2 * fast)


def test_unknown_rates_give_no_time() -> None:
    answer = predict.answer(row(hardware={"memory_gib": 20}), TRACES)
    assert answer["predicted_step_time_seconds"] is None
    assert answer["bottleneck"] is None
    assert any("calibrate` measures" in warning for warning in answer["warnings"])


@pytest.mark.parametrize(
    "name", [name for name in recipe.KNOWN if name not in ("offload_optimizer", "offload_param", "zeropp")]
)
def test_every_technique_is_answered(name: str) -> None:
    settings = {"adalora": {"total_step": 100}, "adaption_prompt": {"adapter_len": 4, "adapter_layers": None}}.get(
        name, {}
    )
    assert peak(techniques={name: settings}, num_gpus=2) > 0


def test_profile_survives_its_file(tmp_path: Any) -> None:
    layout = Layout(canonical(SMALL))
    made = trace.trace(layout)
    made.save(tmp_path / "trace.json")
    read = Profile.load(tmp_path / "trace.json")
    assert read.to_dict() == made.to_dict()


def test_trace_is_kept_and_read(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    first = predict.answer(row(), predict.Traces(tmp_path))
    monkeypatch.setattr(trace, "trace", lambda layout: pytest.fail("traced again"))
    assert predict.answer(row(), predict.Traces(tmp_path)) == first


def test_shipped_hardware_is_complete() -> None:
    names = ("v100-16gb", "v100-32gb", "t4", "a10g", "l4", "l40s", "rtx3090", "rtx4090", "a5000", "a6000", "a100-40gb",
             "a100-80gb", "a800-80gb", "h100-80gb", "h200", "b200")  # fmt: skip
    known = hardware.shipped()
    for name in names:
        assert known[name].gpu
        assert known[name].tflops["fp16"] > known[name].tflops["fp32"]
        assert known[name].memory_gib
        assert known[name].memory_gb_per_s
        assert known[name].compute_capability
        assert known[name].link_gb_per_s
        assert known[name].pcie_gb_per_s
        assert known[name].price_usd_per_gpu_hour
    text = resources.files("finetune_study.forecast").joinpath("hardware.yaml").read_text(encoding="utf-8")
    entries = [line for line in text.splitlines() if not line.startswith("#")]
    # The document that has the rates, by its name, and what torch sees
    assert all(re.search(r"# \[d\] NVIDIA .+\[o\]", line) for line in entries)
    priced = {name for name, device in known.items() if device.price_usd_per_gpu_hour is not None}
    for line in entries:
        assert (re.search(r"\[[ac]\]", line) is not None) == (line.split(":")[0] in priced)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sequence_length": 0}, "sequence_length"),
        ({"sequence_length": 10**12}, "sequence_length"),
        ({"num_gpus": "two"}, "num_gpus"),
        ({"sequence_length": "256"}, "must be a whole number, not text"),
        ({"per_device_train_batch_size": 1.5}, "must be a whole number, not a fraction"),
        ({"gradient_accumulation_steps": True}, "must be a whole number, not true or false"),
        ({"num_gpus": None}, "must be a whole number, not null"),
        ({"num_gpus": [2]}, "must be a whole number, not an array"),
        ({"hardware": "a100-90gb"}, "did you mean"),
        ({"model_config": {"model_type": "nonesuch"}}, "model_type"),
        ({"model_config": {**SMALL, "num_attention_heads": 7}}, "attention heads"),
        ({"model_config": {**SMALL, "num_hidden_layers": 10**9}}, "model_config.num_hidden_layers"),
        ({"model_config": {**SMALL, "num_hidden_layers": 1e9}}, "model_config.num_hidden_layers"),
        ({"model_config": {**SMALL, "model_type": "gemma2", "num_hidden_layers": 10**9}}, "num_hidden_layers"),
        ({"model_config": {"model_type": "gpt2", "n_layer": 10**9}}, "model_config.n_layer"),
        ({"model_config": {**SMALL, "num_labels": 10**9}}, "model_config.num_labels"),
        (
            {"model_config": {"model_type": "gemma3", "text_config": {"num_hidden_layers": 10**9}}},
            "model_config.text_config.num_hidden_layers",
        ),
        (
            {"model_config": {"model_type": "gemma3", "text_config": {"num_labels": 10**9}}},
            "model_config.text_config.num_labels",
        ),
        ({"techniques": {"lora": {"target_modules": "(([a-z_.0-9])*)*X"}}}, r"(?s)too long.*target_modules"),
        (
            {"techniques": {"lora": {"target_modules": ["q_proj"], "rank_pattern": {"(([a-z_.0-9])*)*X": 4}}}},
            r"(?s)too long.*rank_pattern",
        ),
        ({"techniques": {"lora": {"target_modules": "(("}}}, r"(?s)no regular expression.*target_modules"),
        ({"model_config": {**SMALL, "auto_map": {"AutoConfig": "code.Config"}}}, "not run unasked"),
        ({"model_config": {"model_type": "t5"}}, "causal"),
        ({"model_config": {**SMALL, "vocab_size": -1}}, "vocab_size"),
        ({"model_config": {**SMALL, "vocab_size": 0}}, "vocab_size"),
        ({"model_config": {**SMALL, "model_type": "mistral", "sliding_window": -3}}, "sliding_window"),
        ({"model_config": {**SMALL, "num_key_value_heads": 3}}, "divides 4"),
        ({"model_config": {**SMALL, "attention_dropout": 7}}, r"(?s)model_config.attention_dropout.*from 0 to 1"),
        ({"model_config": {**SMALL, "num_local_experts": 4, "num_experts_per_tok": 9}}, "9 of 4 experts"),
        (
            {"model_config": {**SMALL, "model_type": "mixtral", "num_experts_per_tok": 99}},
            r"(?s)num_experts_per_tok.*99 of 8 experts \(num_local_experts\).*allowed: a whole number from 1 to 8",
        ),
        ({"hardware": {"memory_gib": 80, "tflops": {"bf17": 1}}}, "hardware.tflops.bf17"),
        ({"techniques": {"lora": {"target_modules": [1]}}}, "names of layers"),
        ({"techniques": {"lora": {"use_dora": "yes"}}}, "use_dora"),
        ({"model_config": {**SMALL, "num_key_value_heads": 8}}, "divides 4"),
        ({"model_config": {**SMALL, "hidden_size": 10**9}}, "hidden_size"),
        ({"model_config": {**SMALL, "intermediate_size": 0}}, "intermediate_size"),
        ({"model_config": {**SMALL, "num_attention_heads": 0}}, "num_attention_heads"),
        ({"model_config": {**SMALL, "hidden_act": "nonesuch"}}, "activation is not known"),
        ({"model_config": {**SMALL, "rope_scaling": {"type": "nonesuch", "factor": 2}}}, "rotary embedding"),
        ({"model_config": {**SMALL, "rope_parameters": {"rope_type": "x", "rope_theta": 1e4}}}, "rotary embedding"),
        ({"model_config": {"model_type": "bert"}}, "encoder"),
        ({"model_config": {**SMALL, "x": json.loads("[" * 700 + "]" * 700)}}, "nested too deeply"),
        ({"model_config": {"model_type": "bart"}}, "encoder beside its decoder"),
        ({"techniques": {"lora": {"lora_dropout": 5}}}, "lora_dropout"),
        ({"techniques": {"qlora": {"lora_dropout": "some"}}}, "lora_dropout"),
        ({"techniques": {"gradient_checkpointing": {"every": 0}}}, "every"),
        ({"techniques": {"zero3": {}, "zeropp": {"zero_hpz_partition_size": 3}}, "num_gpus": 8}, "divides num_gpus"),
        ({"hardware": {"name": "a100-80gb", "gpus_per_node": 0}}, "gpus_per_node"),
        ({"hardware": {"memory_gib": -3}}, "memory_gib"),
        ({"sequence_length": float("nan")}, "sequence_length"),
        ({"techniques": {"qlora": {"quantized_from": "int3"}}}, "quantized_from"),
        ({"techniques": {"zeropp": {}}}, "zero3"),
        ({"techniques": {"loro": {}}}, "did you mean lora"),
        ({"techniques": {"lora": {"rank": 8}}}, "rank"),
        ({"techniques": {"lora": {"target_modules": ["nonesuch"]}}}, "nonesuch"),
        ({"techniques": {"zero2": {}, "zero3": {}}}, "exclude"),
        ({"techniques": {"zero3": {"stage": 2}}}, r"(?s)techniques.zero3.stage.*allowed: 3"),
        (
            {"techniques": {"offload_optimizer": {}}},
            r"(?s)`offload_optimizer` means nothing without one of zero1, zero2, zero3.*where: *techniques",
        ),
        (
            {"techniques": {"fsdp": {}, "offload_optimizer": {}}, "num_gpus": 2},
            r"(?s)`offload_optimizer` means nothing without one of zero1, zero2, zero3.*given: *fsdp, offload_opt",
        ),
        ({"seq_len": 4}, "seq_len"),
        ({"model": "meta-llama/Llama-2-7b-hf"}, "both"),
    ],
)
def test_bad_rows_are_told_what_is_wrong(changes: dict[str, Any], says: str) -> None:
    with pytest.raises((ConfigError, ModelError), match=says):
        predict.answer(row(**changes), TRACES)


@pytest.mark.parametrize(
    "model", ["/data/nosuch/Llama-2-7b-hf", "./Llama-2-7b-hf", "Llama-2-7b-hf", "a/b/Llama-2-7b-hf"]
)
def test_a_path_that_is_not_there_is_no_known_shape(model: str) -> None:
    with pytest.raises(ModelError, match=r"(?s)not known.*given: .*did you mean meta-llama/Llama-2-7b-hf.*llama2-7b"):
        predict.model_config({"model": model})


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("meta-llama/Llama-2-7b-hf", []),
        ("llama2-7b", []),
        ("somebody/llama-2-7b-HF", ["somebody/llama-2-7b-HF is not here, and is taken to have the shape of meta-"]),
    ],
)
def test_targets_and_copies_of_known_shapes_are_known(model: str, says: list[str]) -> None:
    given = {"model": model, "hardware": "a100-80gb", "sequence_length": 256}
    question = predict.read_question(given)
    assert question.config == predict.architectures()["meta-llama/Llama-2-7b-hf"]
    assert len(question.warnings) == len(says)
    assert all(one.startswith(start) for one, start in zip(question.warnings, says, strict=True))


def test_targets_have_the_shapes_that_the_shipped_configurations_give_them() -> None:
    folder = Path(__file__).parents[2] / "config"
    shapes: dict[str, Any] = {}
    for file in [folder / "config.yaml", *(folder / "studies").glob("*.yaml")]:
        shapes |= yaml.safe_load(file.read_text(encoding="utf-8"))["models"]
    for target, name in predict.TARGETS.items():
        written = shapes[target].get("architecture")
        assert (name == shapes[target]["name_or_path"]) if written is None else written == predict.architectures()[name]


def test_mpt_is_traced_within_its_own_positions() -> None:
    mpt = {"model_type": "mpt", "d_model": 256, "n_heads": 4, "n_layers": 4, "vocab_size": 512, "max_seq_len": 512}
    assert "error" not in predict.answer(row(model_config=mpt), TRACES)
    assert any("above the model's 512 positions" in one for one in
               predict.answer(row(model_config=mpt, sequence_length=513), TRACES)["warnings"])  # fmt: skip


@pytest.mark.parametrize(
    "most", [pytest.param(most, marks=pytest.mark.long if most % 8 else []) for most in range(20, 60)]
)
def test_a_trace_that_is_given_up_ends_in_an_error_wherever_it_is(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raised inside some operations, such as a view's detach, the same error would end the process."""
    monkeypatch.setattr("finetune_study.forecast.tape.MOST_OPERATIONS", most)
    with pytest.raises(ModelError, match="operations"):
        trace.trace(Layout(canonical({**SMALL, "num_hidden_layers": 1})))
    assert torch.is_grad_enabled()


def test_many_layers_that_differ_are_traced_in_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """A target that names one layer has all of them traced, of which each takes its share of what is allowed."""
    monkeypatch.setattr("finetune_study.forecast.tape.MOST_OPERATIONS", 9_000)
    names = ["layers.60.self_attn.q_proj"]
    layout = Layout(
        canonical({**SMALL, "num_hidden_layers": 100}), peft=canonical([{"method": "LORA", "target_modules": names}])
    )
    assert sum(p.count(1) for p in trace.trace(layout).parameters if p.trained) == 2 * SMALL["hidden_size"]


def test_lines_that_are_nested_too_deeply_are_told_so() -> None:
    deep = "[" * 100_000 + "]" * 100_000
    lines = [deep, f'{{"techniques": {deep}}}', f'{{"model_config": {deep}}}', json.dumps(row())]
    *bad, good = (json.loads(line) for line in predict.answer_lines(lines, TRACES))
    assert all("nested too deeply" in answer["error"] for answer in bad)
    assert "error" not in good


@pytest.mark.parametrize(
    ("gpu", "techniques", "says"),
    [
        ("v100-16gb", {"flash_attention_2": {}}, "compute capability 8.0"),
        ("v100-16gb", {"bf16": {}}, "bf16 needs compute capability"),
        ("a100-80gb", {"flash_attention_3": {}}, "compute capability 9.0"),
        ("a100-80gb", {"fp8": {}}, "fp8 needs compute capability"),
        ("a100-80gb", {"flash_attention_2": {}, "fp32": {}}, "fp16 and bf16 alone, not fp32"),
        ("h100-80gb", {"flash_attention_3": {}}, None),
        ("h100-80gb", {"fp8": {}}, "casts to fp8"),
        ("h100-80gb", {"liger": {}}, "its loss alone"),
        ("h100-80gb", {"torch_compile": {"torch_compile_backend": "aot_eager"}}, "aot_eager"),
        ("v100-16gb", {"eager": {}}, None),
        ("v100-16gb", {}, "no fused kernel may take"),
        ("a100-80gb", {}, None),
        ("a100-80gb", {"lora": {"r": 300}}, "rank 300"),
    ],
)
def test_what_a_gpu_can_not_run_is_warned_of(gpu: str, techniques: dict[str, Any], says: str | None) -> None:
    warnings = predict.answer(row(hardware=gpu, techniques=techniques), TRACES)["warnings"]
    assert any(says in warning for warning in warnings) if says else not warnings


OWN_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM


class Config(LlamaConfig):
    model_type = "of_their_own"


class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.mark.parametrize(
    ("changes", "warned"),
    [
        ({"hardware": "v100-32gb"}, True),
        ({"hardware": "t4", "techniques": {"lora": {}}}, True),
        ({"techniques": {"fp32": {}}}, True),
        ({"techniques": {"tf32": {}}}, True),
        ({}, False),
        ({"hardware": "v100-32gb", "techniques": {"sdpa": {"kernel": "math"}}}, False),
        ({"hardware": "v100-32gb", "techniques": {"eager": {}}}, False),
        ({"hardware": "v100-32gb", "model_config": {**SMALL, "num_key_value_heads": 4}}, False),
        ({"hardware": {"device": "cpu", "memory_gib": 8}}, False),
    ],
)
def test_grouped_heads_without_a_fused_kernel_are_warned_of(changes: dict[str, Any], warned: bool) -> None:
    warnings = predict.answer(row(**changes), TRACES)["warnings"]
    assert any("may then run as `math`" in one for one in warnings) == warned


def test_a_models_own_code_is_run_where_it_is_allowed_by_name(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "code.py").write_text(OWN_CODE)
    of_code = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    settings = {**SMALL, "model_type": "of_their_own", "auto_map": of_code}
    (folder / "config.json").write_text(json.dumps(settings))
    asked = {k: v for k, v in row(model=str(folder)).items() if k != "model_config"}
    with pytest.raises(ModelError, match="--allow-code"):
        predict.answer(asked, TRACES)
    with pytest.raises(ModelError, match="--allow-code"):
        predict.answer(asked, TRACES, ["another"])
    with pytest.raises(ModelError, match="not run unasked"):
        predict.answer(row(model_config={**SMALL, "_code": [str(folder), ""]}), TRACES, [str(folder)])
    allowed = predict.answer(asked, TRACES, [str(folder)])["predicted_memory_gib"]
    assert allowed == predict.answer(row(), TRACES)["predicted_memory_gib"]


@pytest.mark.parametrize("techniques", [{"liger": {}}, {"chunked_cross_entropy": {}}])
@pytest.mark.parametrize("method", [{}, {"lora": {"r": 8}}])
def test_output_layer_takes_time_where_the_loss_is_in_chunks(techniques: Any, method: Any) -> None:
    """Most of the work of this model is in it; only traffic of whole logits is saved."""
    asked = row(per_device_train_batch_size=8, sequence_length=1024)
    asked["model_config"] = {**SMALL, "hidden_size": 1024, "vocab_size": 262_144, "tie_word_embeddings": False}
    whole, chunked = (
        predict.answer({**asked, "techniques": recipe}, TRACES)["predicted_step_time_seconds"]
        for recipe in (method, {**method, **techniques})
    )
    products = (4 if method else 6) * 8 * 1024 * 262_144 * 1024  # forward, and one or two in backward
    assert products / 312e12 < chunked < whole


def test_on_a_cpu_the_heap_holds_room_for_activations_twice_unless_tensors_are_mapped() -> None:
    cpu = {"device": "cpu", "memory_gib": 8}
    heap, mapped = (
        predict.answer(row(hardware={**cpu, "maps_tensors": flag}, techniques={"fp32": {}}), TRACES)
        for flag in (False, True)
    )
    one = mapped["predicted_memory_gib"]
    assert heap["predicted_peak_memory_allocated_gib"] > mapped["predicted_peak_memory_allocated_gib"]
    categories = heap["predicted_memory_gib"]["by_category"]
    assert sum(categories.values()) == pytest.approx(heap["predicted_peak_memory_allocated_gib"])
    assert sum(one["by_category"].values()) == pytest.approx(mapped["predicted_peak_memory_allocated_gib"])
    assert hardware.maps_tensors({"MALLOC_MMAP_THRESHOLD_": "131072"})
    assert not hardware.maps_tensors({"MALLOC_MMAP_THRESHOLD_": "1048576"})
    assert not hardware.maps_tensors({})


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4}, "above the model's 1024 positions"),
        ({**SMALL, "max_position_embeddings": 128}, "above the model's 128 positions"),
        ({**SMALL, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantization_config (gptq)"),
        ({**SMALL, "quantization_config": 4}, "quantization_config (not understood)"),
        (SMALL, "none of these"),
    ],
    ids=["class default", "its own", "quantised", "nonsense", "none"],
)
def test_what_a_configuration_leaves_out_is_warned_of(config: dict[str, Any], says: str) -> None:
    warnings = predict.answer(row(model_config=config, sequence_length=2048), TRACES)["warnings"]
    told = [warning for warning in warnings if "positions" in warning or "quantization_config" in warning]
    assert told == [warning for warning in warnings if says in warning]
    assert bool(told) == (config != SMALL)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (SMALL, None),
        ({"model_type": "gpt2", "n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512}, None),
        ({k: v for k, v in SMALL.items() if k != "vocab_size"}, "vocab_size 32000"),
        ({"model_type": "gpt2", "vocab_size": 512, "n_embd": 96}, "num_hidden_layers 12, num_attention_heads 12"),
    ],
)
def test_sizes_that_are_not_given_are_said(config: dict[str, Any], says: str | None) -> None:
    warnings = predict.answer(row(model_config=config), TRACES)["warnings"]
    told = [warning for warning in warnings if "not given" in warning]
    assert told == ([f"not given, so as transformers has it: {says}"] if says else [])


@pytest.mark.parametrize("model", predict.architectures())
def test_shapes_that_are_known_by_their_name_leave_no_size_open(model: str) -> None:
    config = predict.architectures()[model]
    assert _defaults(make_config(config), Layout(canonical(config))) == []


def test_of_a_model_of_several_parts_the_text_is_taken() -> None:
    """As AutoModelForCausalLM takes it, whose class is that of the text's configuration alone."""
    text = {**SMALL, "head_dim": 16, "layer_types": ["full_attention"] * SMALL["num_hidden_layers"]}
    asked = [text | {"model_type": "qwen3_5_text"}, {"model_type": "qwen3_5", "text_config": text}]
    alone, whole = (predict.answer(row(model_config=config), TRACES) for config in asked)
    assert whole["predicted_memory_gib"] == alone["predicted_memory_gib"]
    assert whole["warnings"] == alone["warnings"]


@pytest.mark.parametrize("name", ["mistralai/Mixtral-8x7B-v0.1", "tiiuae/falcon-7b", "openai-community/gpt2"])
def test_weights_that_transformers_does_not_quantise_are_counted_whole_and_warned_of(name: str) -> None:
    """peft holds what is not quantised in fp32; of GPT-2, whose layers are Conv1D, 85 of 124 million weights are."""
    lora, qlora = (
        predict.answer(
            {"model": name, "hardware": "a100-80gb", "sequence_length": 128, "techniques": {"bf16": {}, one: {}}},
            TRACES,
        )
        for one in ("lora", "qlora")
    )
    weights = [answer["predicted_memory_gib"]["by_category"]["parameters"] for answer in (lora, qlora)]
    told = [warning for warning in qlora["warnings"] if "are quantised" in warning]
    assert not [warning for warning in lora["warnings"] if "are quantised" in warning]
    if "gpt2" in name:
        assert told == []
        assert weights[1] < 0.85 * weights[0]
    else:
        assert weights[1] > 1.9 * weights[0]
        share, left = ("2.9%", "MixtralExperts (97.1%)") if "Mixtral" in name else ("0.0%", "FalconLinear (100.0%)")
        assert len(told) == 1
        assert told[0].startswith(
            f"only {share} of the weights of the layers are quantised; not {left}, which peft holds in fp32: transf"
        )


def test_unknown_memory_leaves_open_what_fits() -> None:
    answer = predict.answer(row(hardware={"memory_gb_per_s": 900, "tflops": {"bf16": 100}}), TRACES)
    assert answer["fits"] is answer["fits_word"] is answer["margin_gib"] is None
    assert answer["predicted_peak_memory_allocated_gib"] > 0
    assert any("memory is not known" in warning for warning in answer["warnings"])


def test_fsdp_keeps_whole_gradients_between_micro_batches_unless_told() -> None:
    def gradients(fsdp: Any, accumulation: int) -> float:
        asked = row(techniques={"fsdp": fsdp}, num_gpus=8, gradient_accumulation_steps=accumulation)
        categories = predict.answer({**asked, "per_device_train_batch_size": 64}, TRACES)["predicted_memory_gib"]
        return float(categories["by_category"]["gradients"])

    assert gradients({}, 2) > 3 * gradients({"sync_each_batch": True}, 2)
    assert gradients({}, 1) == pytest.approx(gradients({"sync_each_batch": True}, 1))


def test_fsdp_scatters_gradients_that_it_accumulates_once_a_step() -> None:
    def seconds(steps: int, **settings: Any) -> float:
        slow = {"name": "a100-80gb", "link_gb_per_s": 0.01}
        asked = row(hardware=slow, num_gpus=8, techniques={"fsdp": settings}, gradient_accumulation_steps=steps)
        return float(predict.answer(asked, TRACES)["predicted_step_time_seconds"])

    assert seconds(1) == seconds(1, sync_each_batch=True)
    assert seconds(4, sync_each_batch=True) == pytest.approx(4 * seconds(1), rel=0.05)
    # Of three passes of the weights a micro-batch, two gather and one scatters: 4 × 2, and once the gradients
    assert seconds(4) == pytest.approx(seconds(4, sync_each_batch=True) * 9 / 12, rel=0.05)


def test_weights_quantised_from_another_format_are_copied_once_more() -> None:
    wide = {**SMALL, "intermediate_size": 1 << 16}
    plain = peak(model_config=wide, techniques={"qlora": {"r": 8}}, sequence_length=16)
    copied = peak(model_config=wide, techniques={"qlora": {"r": 8, "quantized_from": "float16"}}, sequence_length=16)
    assert copied - plain == pytest.approx(2 * 256 * (1 << 16) / 2**30, rel=0.1)  # the largest layer's weight


def test_inputs_that_old_quantised_layers_keep_are_there_twice_where_the_loop_holds_its_loss() -> None:
    def activations(**qlora: Any) -> float:
        asked = row(techniques={"qlora": {"r": 8, **qlora}}, per_device_train_batch_size=16)
        return float(predict.answer(asked, TRACES)["predicted_memory_gib"]["by_phase"]["forward"])

    plain, kept = activations(), activations(bitsandbytes_before_0_44=True)
    held = activations(bitsandbytes_before_0_44=True, loop_holds_loss=True)
    assert activations(loop_holds_loss=True) == pytest.approx(plain, rel=0.01)  # the graph alone holds no tensors
    # Norms in fp32 give each of the seven products a 16-bit input of its own, the last one twice as wide
    inputs = SMALL["num_hidden_layers"] * 16 * 256 * 2 * (6 * SMALL["hidden_size"] + 512) / 2**30
    assert held - kept == pytest.approx(inputs, rel=0.1)


def test_fsdp_that_does_not_reshard_keeps_all_weights_and_gathers_once() -> None:
    def ask(fsdp: Any) -> dict[str, Any]:
        far = {"name": "a100-80gb", "link_gb_per_s": 0.01}
        return predict.answer(row(hardware=far, techniques={"fsdp": fsdp}, num_gpus=8), TRACES)

    sharded, whole = ask({}), ask({"reshard_after_forward": False})
    assert whole["predicted_peak_memory_allocated_gib"] > sharded["predicted_peak_memory_allocated_gib"]
    assert whole["predicted_step_time_seconds"] < 0.8 * sharded["predicted_step_time_seconds"]


def test_low_rank_states_are_between_none_and_full_ones() -> None:
    def states(optimizer: str, **settings: Any) -> float:
        answer = predict.answer(row(techniques={"bf16_pure": {}, optimizer: settings}), TRACES)
        return float(answer["predicted_memory_gib"]["by_category"]["optimizer"])

    galore, apollo = (states(name, rank=16) for name in ("galore_adamw", "apollo_adamw"))
    assert states("sgd") < apollo < galore < states("galore_adamw", rank=64) < states("adamw_torch")


def test_states_of_embeddings_are_in_32_bit_unless_deepspeed_lays_weights_out_flat() -> None:
    def states(sharding: str, optimizer: str) -> float:
        asked = row(model_config=SMALL, techniques={sharding: {}, optimizer: {}}, num_gpus=2)
        return float(predict.answer(asked, TRACES)["predicted_memory_gib"]["by_category"]["optimizer"])

    whole = {name: states(name, "adamw_torch") - states(name, "sgd") for name in ("ddp", "zero2")}
    small = {name: states(name, "adamw_8bit") - states(name, "sgd") for name in ("ddp", "zero2")}
    assert small["zero2"] == pytest.approx(whole["zero2"] * (1 + 4 / 256) / 4)
    assert small["ddp"] > 1.05 * whole["ddp"] * (1 + 4 / 256) / 4


def test_zeropp_sends_less_and_its_second_copy_takes_memory() -> None:
    def ask(zeropp: Any) -> dict[str, Any]:
        far = {"name": "a100-80gb", "link_gb_per_s": 0.01}
        asked = row(model_config=SMALL, hardware=far, techniques={"zero3": {}, **zeropp}, num_gpus=8)
        return predict.answer(asked, TRACES)

    plain, quantised, copied = ask({}), ask({"zeropp": {}}), ask({"zeropp": {"zero_hpz_partition_size": 2}})
    assert quantised["predicted_step_time_seconds"] < 0.6 * plain["predicted_step_time_seconds"]
    assert quantised["predicted_peak_memory_allocated_gib"] == plain["predicted_peak_memory_allocated_gib"]
    weights = plain["predicted_memory_gib"]["by_category"]["parameters"] * 8
    grown = copied["predicted_peak_memory_allocated_gib"] - plain["predicted_peak_memory_allocated_gib"]
    assert grown == pytest.approx(weights / 2, rel=0.01)


def test_communication_runs_beside_the_passes_where_deepspeed_lets_it() -> None:
    """`overlap_comm` is stage 3's default alone; set for all alike, less sharding is not slower in its passes."""

    def seconds(stage: str, accumulation: int = 1, **settings: Any) -> float:
        asked = row(model_config=predict.architectures()["meta-llama/Llama-2-7b-hf"], techniques={stage: settings},
                    num_gpus=8, sequence_length=2048, gradient_accumulation_steps=accumulation)  # fmt: skip
        return float(predict.answer(asked, TRACES)["predicted_step_time_seconds"])

    # A scatter and a gather travel either way: each moves 7/8 of 6.74 billion 16-bit weights at 0.7 × 300 GB/s
    transfer = 7 / 8 * 6.738e9 * 2 / (0.7 * 300e9)
    assert seconds("zero1") == pytest.approx(seconds("zero2"))
    assert seconds("zero1") - seconds("zero1", overlap_comm=True) == pytest.approx(transfer, rel=0.01)
    assert seconds("zero3", overlap_comm=False) - seconds("zero3") == pytest.approx(3 * transfer, rel=0.01)
    for overlap in (True, False):
        one, two, three = (seconds(stage, overlap_comm=overlap) for stage in ("zero1", "zero2", "zero3"))
        assert one <= two * 1.001
        assert one - transfer <= three * 1.001, "stages 1 and 2 gather after the step, beside nothing"
    assert seconds("zero1", 4) < seconds("zero2", 4), "stage 2 scatters after every micro-batch"


def test_many_traces_are_made_in_processes_of_their_own(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predict, "TRACES_WORTH_A_PROCESS", 1)
    monkeypatch.setattr(predict, "_processes_in_memory", lambda: 2)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1})
    # Mistral has a window by transformers' default, which the first trace tells of
    shape = {**SMALL, "model_type": "mistral"}
    asked = [predict.read_question(row(model_config=shape, techniques=t, sequence_length=8192)) for t in RECIPES[:2]]
    layouts = [one.recipe.layout(one.config, one.context) for one in asked]
    broken = dataclasses.replace(asked[0], config={"model_type": "nonesuch"})
    traces = predict.Traces(tmp_path)
    traces.prepare([*asked, broken])
    layouts += [dataclasses.replace(one, windowed=True) for one in layouts]
    assert sorted(path.stem for path in tmp_path.glob("*.json")) == sorted(layout.key for layout in layouts)


def test_a_bad_line_does_not_stop_the_others() -> None:
    lines = ["not json", json.dumps([1]), json.dumps(row(hardware="x")), "", json.dumps(row(id="good"))]
    answers = [json.loads(line) for line in predict.answer_lines(lines, TRACES)]
    assert [("error" in answer) for answer in answers] == [True, True, True, False]
    assert answers[-1]["id"] == "good"
    assert set(row()) <= set(answers[-1])


def test_predict_says_nothing_but_its_answers(tmp_path: Any) -> None:
    """A row with an adapter imports whatever of a GPU's kernels torch, transformers and peft have here."""
    rows, cache = tmp_path / "rows.jsonl", str(tmp_path / "traces")
    rows.write_text(json.dumps(row(techniques={"lora": {}, "gradient_checkpointing": {}})) + "\n")
    command = [sys.executable, "-m", "finetune_study.cli", "predict", str(rows), "--cache", cache]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert json.loads(done.stdout)["fits"] is True


def test_what_others_log_while_it_is_quiet_is_still_seen(caplog: pytest.LogCaptureFixture) -> None:
    with quiet():
        logging.getLogger("torchao").warning("no kernel")
        logging.getLogger("finetune_study").warning("ours")
    logging.getLogger("torchao").warning("afterwards")
    assert [record.message for record in caplog.records] == ["ours", "afterwards"]


@pytest.mark.parametrize(
    ("settings", "unmatched"),
    [
        ({"target_modules": ["q_proj", "query_key_value"]}, ["target_modules: query_key_value"]),
        ({"modules_to_save": ["lm_head", "score"]}, ["modules_to_save: score"]),
        ({"rank_pattern": {"q_proj": 16, "wq": 8}}, ["rank_pattern: wq"]),
        ({"target_modules": ["model.layers.0.self_attn.q_proj"]}, []),
        ({"target_modules": "all-linear"}, []),
    ],
)
def test_names_that_no_module_has_are_warned_of(settings: dict[str, Any], unmatched: list[str]) -> None:
    """peft takes them without a word, and trains less than was meant."""
    found = predict.answer(row(techniques={"lora": settings}), TRACES)
    named = [warning for warning in found["warnings"] if "no such modules" in warning]
    expected = f"the model has no such modules, and peft leaves them out: {', '.join(unmatched)}"
    assert named == ([expected] if unmatched else [])


def test_modules_of_single_layers_are_counted_as_often_as_they_are_named() -> None:
    config = {**SMALL, "num_hidden_layers": 12}

    def trained(names: Any) -> float:
        layout = Layout(canonical(config), peft=canonical([{"method": "LORA", "target_modules": names}]))
        return sum(p.count(8) for p in trace.trace(layout).parameters if p.trained)

    one = trained(["layers.11.self_attn.q_proj"])
    assert one > 0
    assert trained([f"layers.{n}.self_attn.q_proj" for n in (1, 5, 7)]) == 3 * one
    assert trained(r".*layers\.[0-5]\.self_attn\.q_proj") == 6 * one
    assert trained(["q_proj"]) == 12 * one


def test_what_failed_once_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    traces, calls = predict.Traces(), []

    def fail(layout: Layout) -> Profile:
        calls.append(layout)
        raise ModelError("no")

    monkeypatch.setattr(trace, "trace", fail)
    for _ in range(2):
        with pytest.raises(StudyError):
            predict.answer(row(), traces)
    assert len(calls) == 1


def test_lines_of_a_file_are_read_one_by_one_as_bytes(tmp_path: Any) -> None:
    good = json.dumps(row(id="a\u2028b"), ensure_ascii=False).encode()
    file = tmp_path / "rows.jsonl"
    file.write_bytes(good + b'\n{"id": "\xff"}\n\r\n' + good)
    command = [sys.executable, "-m", "finetune_study.cli", "predict", str(file), "--cache", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, check=True)
    first, bad, last = map(json.loads, found.stdout.splitlines())
    assert first == last
    assert first["id"] == "a\u2028b"
    assert (bad["line"], bad["error"]) == (2, "The line is not UTF-8: invalid start byte at byte 9")
    piped = f"cat {file} {file} {file} | {sys.executable} -m finetune_study.cli predict - --cache {tmp_path} | head -1"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", piped], capture_output=True, check=True)
    assert (json.loads(ended.stdout)["id"], ended.stderr) == ("a\u2028b", b"")
    with pytest.raises(subprocess.CalledProcessError) as raised:
        subprocess.run([*command[:4], str(tmp_path), *command[5:]], capture_output=True, check=True)
    assert b"can't be read" in raised.value.stderr
