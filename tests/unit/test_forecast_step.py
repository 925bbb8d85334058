"""Predicted peaks of each phase against a real step on the CPU, whose allocations torch's profiler sees to the byte."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from finetune_study.forecast import predict
from finetune_study.forecast.build import build, make_config
from finetune_study.forecast.memory import CUBLAS_HANDLES, CUBLAS_WORKSPACE_BYTES

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 6,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 4000, "max_position_embeddings": 512,
}  # fmt: skip
TIED = {**LLAMA, "vocab_size": 32000, "tie_word_embeddings": True, "num_hidden_layers": 3}
LORA: dict[str, Any] = {"lora": {"r": 16, "target_modules": "all-linear"}}
CHECKPOINTS: dict[str, Any] = {"gradient_checkpointing": {}}
BATCH, CONTEXT = 2, 256
TRACES = predict.Traces()
TOLERANCE = 0.005
"""The allocator rounds."""

Phases = dict[str, float]


def real(shape: dict[str, Any], techniques: dict[str, Any], accumulation: int) -> Phases:
    """Largest sum of bytes that are allocated in each phase of the last micro-batch of a step."""
    torch.manual_seed(0)
    mixed, trained_in_16_bit = "bf16" in techniques, "bf16_pure" in techniques
    dtype = torch.bfloat16 if trained_in_16_bit or "lora" in techniques else torch.float32
    model = build(make_config(dict(shape)), dtype, "sdpa").train()
    model.init_weights()
    if "gradient_checkpointing" in techniques:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if "lora" in techniques:
        model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **techniques["lora"]))
        if "gradient_checkpointing" in techniques:
            model.enable_input_require_grads()
    weights = [p for p in model.parameters() if p.requires_grad]
    ids = torch.zeros(BATCH, CONTEXT, dtype=torch.long)
    optimizer = torch.optim.AdamW(weights, lr=1e-5, foreach=True)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            losses.append(model(input_ids=ids, labels=ids, use_cache=False).loss)

    def backward() -> None:
        losses.pop().backward()

    def zero() -> None:
        optimizer.zero_grad(set_to_none=True)

    for work in (forward, backward, optimizer.step, zero, *(forward, backward) * (accumulation - 1)):
        work()
    held = [*model.parameters(), *(state for of_one in optimizer.state.values() for state in of_one.values())]
    held += [weight.grad for weight in weights if weight.grad is not None]
    before = sum(tensor.numel() * tensor.element_size() for tensor in held)
    peaks = allocated({"forward": forward, "backward": backward, "optimizer_step": optimizer.step})
    return {name: before + peak for name, peak in peaks.items()}


def allocated(phases: dict[str, Callable[[], Any]]) -> Phases:
    """Largest sum of the bytes allocated since the first of them began."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        for name, work in phases.items():
            with record_function(f"phase {name}"):
                work()
    events = seen.profiler.kineto_results.events()
    spans = {e.name().removeprefix("phase "): e for e in events if e.name().startswith("phase ")}
    now, peaks = 0, dict.fromkeys(phases, 0)
    for at, size in sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"):
        now += size
        for name, span in spans.items():
            if span.start_ns() <= at <= span.start_ns() + span.duration_ns():
                peaks[name] = max(peaks[name], now)
    return dict(peaks)


@pytest.mark.parametrize("accumulation", [2, pytest.param(1, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("shape", "techniques"),
    [
        pytest.param(LLAMA, {"fp32": {}}, id="fp32"),
        pytest.param(LLAMA, {"bf16": {}}, id="bf16"),
        pytest.param(LLAMA, {"bf16": {}, **CHECKPOINTS}, id="bf16, checkpoints", marks=pytest.mark.long),
        pytest.param(LLAMA, {"bf16_pure": {}}, id="bf16_pure", marks=pytest.mark.long),
        pytest.param(LLAMA, {"bf16": {}, **LORA}, id="lora", marks=pytest.mark.long),
        pytest.param(LLAMA, {"bf16": {}, **LORA, **CHECKPOINTS}, id="lora, checkpoints"),
        pytest.param(TIED, {"fp32": {}, **CHECKPOINTS}, id="tied, fp32", marks=pytest.mark.long),
        pytest.param(TIED, {"bf16": {}, **CHECKPOINTS}, id="tied, bf16"),
        pytest.param(TIED, {"bf16_pure": {}, **CHECKPOINTS}, id="tied, bf16_pure", marks=pytest.mark.long),
    ],
)
def test_a_real_step_takes_what_was_predicted(
    shape: dict[str, Any], techniques: dict[str, Any], accumulation: int
) -> None:
    row = {
        "model_config": shape, "hardware": {"memory_gib": 80, "compute_capability": 8.0}, "sequence_length": CONTEXT,
        "per_device_train_batch_size": BATCH, "gradient_accumulation_steps": accumulation, "techniques": techniques,
    }  # fmt: skip
    by_phase = predict.answer(row, TRACES)["predicted_memory_gib"]["by_phase"]
    for phase, taken in real(shape, techniques, accumulation).items():
        predicted = by_phase[phase] * 2**30 - CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES["other"]
        assert predicted == pytest.approx(taken, rel=TOLERANCE), phase
