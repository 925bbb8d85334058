"""Techniques change memory and speed, not what is learned: variants of a run have its losses."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import pytest

from finetune_study import data, model
from finetune_study.sequences import IGNORED
from tests.training.lab import EFFECTIVE_BATCH, NUM_EVAL, STEPS, Ended, Lab, write_dialogues
from tests.training.pairs import Trained
from tests.training.pool import Answer

pytestmark = pytest.mark.training

FP32_TOLERANCE = 1e-4
"""Relative: the same sums in another order. In four steps the loss falls by a quarter."""
BF16_TOLERANCE = 2e-2
"""Relative: 8 bits of mantissa, and Adam's first steps go by the sign of tiny gradients too."""
FP16_TOLERANCE = 5e-3
"""Relative: 11 bits of mantissa."""

LORA = {"lora": {"r": 4, "lora_alpha": 16}}
LARGE_GRADIENTS = {"initializer_range": 0.5}
"""Of weights so large that their scaled gradients overflow float16 in the first steps."""


def assert_same_losses(variant: Answer, reference: Answer, tolerance: float) -> None:
    assert variant.error is None, variant.trace
    assert len(variant.losses) == len(reference.losses) == STEPS
    assert variant.losses[0] == pytest.approx(reference.losses[0], rel=min(tolerance, 1e-3))
    assert variant.losses == pytest.approx(reference.losses, rel=tolerance)
    assert variant.eval_losses == pytest.approx(reference.eval_losses, rel=tolerance)


def test_the_plain_run_learns(trained: Trained) -> None:
    plain = trained.run()
    assert plain.losses[0] == pytest.approx(math.log(384), rel=0.05)  # knows nothing yet
    assert plain.losses[-1] < 0.8 * plain.losses[0]
    assert plain.eval_losses[1] < 0.8 * plain.eval_losses[0]


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        pytest.param({}, {"micro_batch": 1}, id="accumulation of 4"),
        pytest.param({}, {"micro_batch": 4}, id="no accumulation"),
        pytest.param({"gradient_checkpointing": {}}, {}, id="gradient_checkpointing"),
        pytest.param({"eager": {}}, {}, id="eager"),
        pytest.param({}, {"num_gpus": 2}, id="ddp"),
        pytest.param({}, {"num_gpus": 2, "micro_batch": 1}, id="ddp, accumulation of 2"),
        pytest.param({"zero1": {}}, {"num_gpus": 2}, id="zero1"),
        pytest.param({"zero2": {}}, {"num_gpus": 2, "micro_batch": 1}, id="zero2, accumulation of 2"),
        pytest.param({"zero3": {}}, {"num_gpus": 2}, id="zero3"),
        pytest.param({"zero2": {}, "offload_optimizer": {}}, {"num_gpus": 2}, id="zero2 + offload_optimizer"),
    ],
)
def test_a_variant_of_full_fine_tuning_has_its_losses(
    trained: Trained, recipe: dict[str, Any], settings: dict[str, Any]
) -> None:
    variant = trained.run(recipe, **settings)
    assert_same_losses(variant, trained.run(), FP32_TOLERANCE)
    assert len(variant.ranks) == settings.get("num_gpus", 1)
    assert {rank["total_parameters"] for rank in variant.ranks} == {trained.run().ranks[0]["total_parameters"]}


@pytest.mark.parametrize(
    ("recipe", "num_gpus"),
    [
        pytest.param({"gradient_checkpointing": {}}, 1, id="gradient_checkpointing"),
        pytest.param({"zero2": {}}, 2, id="zero2"),
        pytest.param({"zero3": {}}, 2, id="zero3"),
    ],
)
def test_a_variant_of_lora_has_its_losses(trained: Trained, recipe: dict[str, Any], num_gpus: int) -> None:
    assert_same_losses(trained.run(recipe | LORA, num_gpus=num_gpus), trained.run(LORA), FP32_TOLERANCE)


def test_lora_begins_where_full_fine_tuning_does_and_goes_its_own_way(trained: Trained) -> None:
    lora, full = trained.run(LORA), trained.run()
    assert lora.losses[0] == pytest.approx(full.losses[0], rel=FP32_TOLERANCE)
    assert lora.eval_losses[0] == pytest.approx(full.eval_losses[0], rel=FP32_TOLERANCE)
    assert abs(lora.losses[-1] - full.losses[-1]) > 0.05
    assert lora.eval_losses[1] < lora.eval_losses[0]


def test_the_attention_that_was_asked_for_is_used(trained: Trained) -> None:
    assert trained.run().ranks[0]["attention_implementation"] == "sdpa"
    assert trained.run({"eager": {}}).ranks[0]["attention_implementation"] == "eager"


def test_parameters_counted_by_hand(trained: Trained) -> None:
    attention = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64  # q, k and v of two heads, o
    full = 384 * 64 + 2 * (attention + 3 * 64 * 128 + 2 * 64) + 64
    lora = 2 * 4 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + 3 * (64 + 128))
    counts = ("trainable_parameters", "total_parameters")
    assert [trained.run().ranks[0][name] for name in counts] == [full, full]
    assert [trained.run(LORA).ranks[0][name] for name in counts] == [lora, full + lora]
    assert [trained.run(LORA | {"zero3": {}}, num_gpus=2).ranks[0][name] for name in counts] == [lora, full + lora]


def test_parameters_counted_by_peft(lab: Lab, trained: Trained) -> None:
    run = lab.run(LORA)
    found = trained.train(run).ranks[0]
    adapted = run.parsed_techniques["lora"].wrap(model.load(run, lab.results.model(run.model_key)), run)
    assert adapted.get_nb_trainable_parameters() == (found["trainable_parameters"], found["total_parameters"])


def test_inputs_of_checkpointed_layers_are_offloaded(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is left to offload beside checkpoints, and what they compute again is not offloaded once more."""
    import torch

    moved: list[torch.Size] = []

    class Seen(torch.autograd.graph.save_on_cpu):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            pack: Any = vars(self)["pack_hook"]

            def seen(tensor: torch.Tensor) -> Any:
                moved.append(tensor.shape)
                return pack(tensor)

            self.pack_hook = seen

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Seen)
    numbers = {}
    for name in ("gradient_checkpointing", "sdpa"):
        run = lab.run({"activation_offload": {}, name: {}})
        lab.prepare(run)
        net = model.load(run, lab.results.model(run.model_key)).train()
        for technique in run.parsed_techniques.values():
            net = technique.wrap(net, run)
        if name == "gradient_checkpointing":
            net.gradient_checkpointing_enable(run.techniques[name])
        tokens = torch.ones(1, 8, dtype=torch.long)
        net(input_ids=tokens, labels=tokens).loss.backward()
        numbers[name] = moved.count(torch.Size([1, 8, 64]))
        moved.clear()
    layers = 2
    assert layers <= numbers["gradient_checkpointing"] < numbers["sdpa"] - 4 * layers


# --- precision -------------------------------------------------------------------------------------------------------


def test_fp32_computes_in_float32(trained: Trained) -> None:
    assert trained.run().ranks[0]["compute_dtype"] == "float32"


@pytest.mark.parametrize(
    ("recipe", "num_gpus"), [pytest.param({}, 1, id="alone"), pytest.param({"zero2": {}}, 2, id="zero2")]
)
def test_bf16_computes_in_bfloat16(trained: Trained, recipe: dict[str, Any], num_gpus: int) -> None:
    half = trained.run(recipe | {"bf16": {}}, num_gpus=num_gpus)
    assert half.ranks[0]["compute_dtype"] == "bfloat16"
    assert half.ranks[0]["optimizer_state_dtypes"] == ["float32"]
    assert half.losses != trained.run().losses
    assert_same_losses(half, trained.run(), BF16_TOLERANCE)


def test_bf16_adds_to_frozen_weights_in_bfloat16(trained: Trained) -> None:
    half = trained.run(LORA | {"bf16": {}})
    assert half.ranks[0]["compute_dtype"] == "bfloat16"
    assert_same_losses(half, trained.run(LORA), BF16_TOLERANCE)


def test_fp8_multiplies_on_a_cpu_as_its_emulation_does(trained: Trained) -> None:
    """torch has the product without units for it."""
    own, emulated = trained.run({"fp8": {}}), trained.run({"fp8": {"emulate": True}})
    assert own.losses == pytest.approx(emulated.losses, rel=1e-2)
    assert own.losses != trained.run({"bf16": {}}).losses


def test_fp16_without_deepspeed_is_unsupported_on_a_cpu(lab: Lab) -> None:
    reason = lab.plan({"fp16": {}}).unsupported
    assert reason is not None
    assert "activations stay in fp32" in reason


@pytest.mark.parametrize(
    ("recipe", "num_gpus"), [pytest.param({"zero2": {}}, 1, id="zero2"), pytest.param({"zero3": {}}, 2, id="zero3")]
)
def test_fp16_under_deepspeed_computes_in_float16(
    lab: Lab, trained: Trained, recipe: dict[str, Any], num_gpus: int
) -> None:
    """The twin in fp32 reads the same data, of which fp16 needs more than it: for steps that may be skipped."""
    half = trained.run(recipe | {"fp16": {}}, num_gpus=num_gpus, data={"dataset": lab.plenty})
    assert half.ranks[0]["compute_dtype"] == "float16"
    assert half.ranks[0]["optimizer_state_dtypes"] == ["float32"]
    assert all(step["stepped"] for step in half.ranks[0]["steps"])
    whole = trained.run(data={"dataset": lab.plenty})
    assert half.losses != whole.losses
    assert_same_losses(half, whole, FP16_TOLERANCE)


def test_steps_that_loss_scaling_skips_are_counted_and_not_timed(lab: Lab) -> None:
    half = lab.train({"fp16": {}, "zero2": {}}, architecture=LARGE_GRADIENTS, data={"dataset": lab.plenty})
    steps = half.first_rank["steps"]
    skipped = [step for step in steps if not step["stepped"]]
    assert skipped == steps[: len(skipped)] != []
    assert not any(step["timed"] for step in skipped)
    assert sum(step["stepped"] for step in steps) == STEPS
    row = half.row
    assert row["num_skipped_steps"] == len(skipped)
    assert row["num_timed_steps"] == len(row["step_time_seconds_samples"]) == STEPS - 1
    assert len(row["untimed_step_time_seconds_samples"]) == 1
    said = re.findall(rf"^step (\d) of {STEPS}: .* s \((\w+)", half.paths.log.read_text(encoding="utf-8"), re.MULTILINE)
    timed = [(str(number), "timed") for number in range(2, STEPS + 1)]
    assert said == [("1", "skipped")] * len(skipped) + [("1", "untimed"), *timed]


# --- packing ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def packed(lab: Lab) -> Ended:
    """In a process of its own: times are read from its record, too."""
    return lab.train({"packing": {}}, data={"dataset": lab.plenty})


def test_packing_fills_the_context(lab: Lab, trained: Trained, packed: Ended) -> None:
    padded = trained.run(data={"dataset": lab.plenty})
    tokens = [sum(s["real_tokens"] for s in first["steps"]) for first in (padded.ranks[0], packed.first_rank)]
    assert tokens[1] > 1.5 * tokens[0]
    assert tokens[1] <= STEPS * EFFECTIVE_BATCH * 256
    assert packed.losses[0] == pytest.approx(padded.losses[0], rel=0.02)
    assert packed.losses[-1] < 0.8 * packed.losses[0]


def test_real_tokens_per_second_are_those_of_the_timed_steps(packed: Ended) -> None:
    timed = packed.first_rank["steps"][1:]
    expected = sum(s["real_tokens"] for s in timed) / sum(s["seconds"] for s in timed)
    assert packed.row["real_tokens_per_second"] == pytest.approx(expected)


def test_packed_examples_do_not_see_each_other(lab: Lab, trained: Trained, tmp_path: Path) -> None:
    """Held-out loss of packed sequences equals that of their examples, each alone in a sequence of its own."""
    import torch

    many = write_dialogues(tmp_path / "many.jsonl", 100)
    # Weights so large that attention matters before anything was learned.
    run = lab.run({"packing": {}}, architecture=LARGE_GRADIENTS, data={"dataset": many})
    packed = trained.train(run)
    net = model.load(run, lab.results.model(run.model_key)).eval()
    rows = data.load(lab.results.data(run.data_key))[1]
    alone, together, count, examples = 0.0, 0.0, 0, 0

    def loss(**inputs: Any) -> float:
        predicted = int((inputs["labels"] != IGNORED).sum())
        return float(net(**{k: v[None] for k, v in inputs.items()}).loss) * predicted if predicted else 0.0

    with torch.no_grad():
        for row in rows:
            count += int((row["labels"] != IGNORED).sum())
            together += loss(input_ids=row["input_ids"], labels=row["labels"])
            starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), len(row["position_ids"])]
            for begin, end in itertools.pairwise(starts):
                examples += 1
                alone += loss(input_ids=row["input_ids"][begin:end], labels=row["labels"][begin:end])
    assert examples > 2 * NUM_EVAL
    assert packed.eval_losses[0] == pytest.approx(alone / count, rel=FP32_TOLERANCE)
    assert abs(together - alone) / alone > 10 * FP32_TOLERANCE
