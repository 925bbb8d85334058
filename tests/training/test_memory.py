"""Techniques that promise less memory take less, on ranks whose memory is measured."""

from typing import Any

import pytest

from finetune_study.forecast import predict
from finetune_study.forecast.memory import CPU_RUNTIME_BYTES
from tests.training.lab import EFFECTIVE_BATCH, STEPS, WIDE, Ended, Lab

pytestmark = [pytest.mark.training, pytest.mark.long]

EMBEDDING = 384 * WIDE["hidden_size"]
DEEP: dict[str, Any] = {"architecture": {"num_hidden_layers": 9}, "sequence_length": 512, "micro_batch": 4}
SCORES = 4 * 4 * 512 * 512 * 4
"""Bytes of one layer's attention scores: sequences, heads, positions squared, fp32."""

MAPPED = {"environment": {"MALLOC_MMAP_THRESHOLD_": "131072"}}
"""Every tensor is given back when it is freed; else the C library's heap would hide what a technique saves."""


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tmp_path_factory.mktemp("mapped"), MAPPED)


def wide(lab: Lab, recipe: dict[str, Any], **settings: Any) -> Ended:
    """States of a wide model dwarf everything else."""
    return lab.train(recipe, architecture=WIDE, micro_batch=1, sequence_length=64, **settings)


def trained(ended: Ended) -> int:
    return int(ended.first_rank["trainable_parameters"])


def test_libraries_take_what_is_predicted(lab: Lab) -> None:
    """The tiny model's own tensors are few: most of the peak is what torch and its libraries take for any model."""
    ended = lab.train({})
    run = ended.record.run
    answer = predict.answer(
        {
            "model_config": run.model.architecture,
            "hardware": {"name": "cpu", "device": "cpu", "memory_gib": 4, "maps_tensors": True},
            "num_gpus": 1,
            "sequence_length": run.sequence_length,
            "per_device_train_batch_size": run.micro_batch,
            "gradient_accumulation_steps": run.gradient_accumulation_steps,
            "techniques": run.techniques,
        },
        predict.Traces(),
    )
    predicted = answer["predicted_peak_memory_allocated_gib"] * 2**30
    assert 0.5 * predicted < CPU_RUNTIME_BYTES
    assert ended.peak() == pytest.approx(predicted, abs=16 * 2**20)


def test_pure_bf16_halves_weights_gradients_and_states(lab: Lab) -> None:
    plain, pure = wide(lab, {}), wide(lab, {"bf16_pure": {}})
    assert plain.peak() - pure.peak() == pytest.approx(8 * trained(plain), rel=0.3)


def test_eight_bit_states_take_a_quarter(lab: Lab) -> None:
    plain, small = wide(lab, {}), wide(lab, {"adamw_8bit": {}})
    assert plain.peak() - small.peak() == pytest.approx(6 * (trained(plain) - EMBEDDING), rel=0.3)


def test_adafactor_has_hardly_any_states(lab: Lab) -> None:
    plain, small = wide(lab, {}), wide(lab, {"adafactor": {}})
    assert plain.peak() - small.peak() > 5 * trained(plain)


def test_optimizer_in_backward_gives_gradients_back(lab: Lab) -> None:
    settings: dict[str, Any] = {"architecture": WIDE, "micro_batch": EFFECTIVE_BATCH, "sequence_length": 32}
    settings["training"] = {"max_grad_norm": 0.0}
    fused, plain = lab.train({"optimizer_in_backward": {}}, **settings), lab.train({}, **settings)
    assert plain.peak() - fused.peak() > 0.5 * 4 * trained(plain)
    assert len(fused.losses) == STEPS


def test_zero3_takes_less_than_ddp(lab: Lab) -> None:
    """Half of weights, gradients and states; what is left has a buffer of its own under each."""
    ddp, zero3 = wide(lab, {}, num_gpus=2), wide(lab, {"zero3": {}}, num_gpus=2)
    assert ddp.peak() - zero3.peak() > 4 * trained(ddp)


def test_quantised_weights_take_a_few_bits(lab: Lab) -> None:
    lora, qlora = (wide(lab, {name: {"r": 4}}) for name in ("lora", "qlora"))
    frozen = lora.first_rank["total_parameters"] - trained(lora) - EMBEDDING
    held = [ended.first_rank["memory"]["peak_device_used_bytes_by_phase"]["forward"] for ended in (lora, qlora)]
    assert held[0] - held[1] == pytest.approx((4 - 0.5) * frozen, rel=0.3)


def test_checkpointing_of_some_layers_is_between_none_and_all(lab: Lab) -> None:
    none = lab.train({"eager": {}}, **DEEP)
    all_layers, third, groups = (
        lab.train({"eager": {}, "gradient_checkpointing": {"every": every}}, **DEEP) for every in (1, 3, "sqrt")
    )
    for some in (all_layers, third, groups):
        assert some.losses == pytest.approx(none.losses, rel=1e-4)
    # Of nine layers one, six and three hold their scores at a time; a layer holds them about twice.
    assert all_layers.peak() + 2 * SCORES < groups.peak() < none.peak() - 6 * SCORES
    assert all_layers.peak() + 4 * SCORES < third.peak() < none.peak() - 3 * SCORES
