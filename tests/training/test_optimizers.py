"""Optimizers keep what they promise: states by hand, number formats, and the update of the one that they stand for."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from finetune_study import model, train
from finetune_study.errors import RunFailedError
from tests.training.lab import EFFECTIVE_BATCH, Ended, Lab
from tests.training.pairs import SETTINGS, Trained
from tests.training.pool import Answer

pytestmark = pytest.mark.training

EMBEDDING = 384 * 64
NORMS = 2 * 2 * 64 + 64
TRAINED = 98_624
"""Weights of the tiny model; tests/training/test_techniques.py counts them."""
MATRICES = TRAINED - EMBEDDING - NORMS

EIGHT_BIT_BLOCK, MIN_EIGHT_BIT = 256, 4096
"""bitsandbytes: elements that share a maximum, and the smallest tensor whose states are in 8 bit."""


def states(ended: Answer | Ended) -> tuple[list[str], int]:
    first = ended.ranks[0] if isinstance(ended, Answer) else ended.first_rank
    return first["optimizer_state_dtypes"], first["optimizer_state_bytes"]


def test_adamw_keeps_two_states_of_the_weights_format(trained: Trained) -> None:
    assert states(trained.run()) == (["float32"], 8 * TRAINED)
    assert states(trained.run({"bf16": {}})) == (["float32"], 8 * TRAINED)
    assert states(trained.run({"bf16_pure": {}})) == (["bfloat16"], 4 * TRAINED)
    assert states(trained.run({"adamw_torch_fused": {}})) == (["float32"], 8 * TRAINED)
    assert trained.run({"adamw_torch_fused": {}}).ranks[0]["optimizer_class"] == "torch.optim.adamw.AdamW(fused)"
    assert trained.run({"adamw_torch_fused": {}}).losses == pytest.approx(trained.run().losses, rel=1e-5)


def test_zero_shards_the_states(trained: Trained) -> None:
    for stage in ("zero1", "zero2", "zero3"):
        ended = trained.run({stage: {}}, num_gpus=2)
        kept = [rank["optimizer_state_bytes"] for rank in ended.ranks]
        assert sum(kept) == pytest.approx(8 * TRAINED, rel=0.01)
        assert max(kept) == pytest.approx(4 * TRAINED, rel=0.02)


def test_eight_bit_adamw_keeps_a_byte_for_a_state(trained: Trained) -> None:
    """But for the embedding, which Trainer keeps in 32 bit, and tensors too small for blocks."""
    ended = trained.run({"adamw_8bit": {}})
    small = NORMS + 2 * 2 * 64 * 32  # norms, and keys and values: 64 × 32 each
    large = TRAINED - EMBEDDING - small
    dtypes, size = states(ended)
    tables = 2 * 256 * 4  # of the two codes, in each of the large tensors
    assert dtypes == ["float32", "uint8"]
    assert 2 * large < size - 8 * (EMBEDDING + small) < 2 * large + 14 * tables + 8 * large / EIGHT_BIT_BLOCK + 4096
    assert ended.ranks[0]["optimizer_class"] == "bitsandbytes.optim.adamw.AdamW"
    assert ended.losses == pytest.approx(trained.run().losses, rel=1e-3)


@pytest.mark.parametrize("zero", ["zero1", pytest.param("zero2", marks=pytest.mark.long), "zero3"])
def test_under_zero_states_of_embeddings_are_in_eight_bit_too(zero: str, trained: Trained) -> None:
    """The flat tensors that DeepSpeed steps in the place of weights are none that Trainer names."""
    dtypes, size = states(trained.run({"adamw_8bit": {}, zero: {}}))
    assert "uint8" in dtypes
    assert 2 * TRAINED < size < 2.2 * TRAINED


@pytest.mark.long
@pytest.mark.parametrize(("name", "bits", "tolerance"), [("adamw_torch_8bit", 8, 1e-3), ("adamw_torch_4bit", 4, 3e-2)])
def test_torchao_keeps_its_states_in_few_bits(name: str, bits: int, tolerance: float, lab: Lab) -> None:
    """Compiled, as it comes; needs g++."""
    ended = lab.train({name: {}}, protocol={"time_limit_minutes": 5})
    dtypes, size = states(ended)
    assert dtypes == ["float32", "uint8"]
    assert 2 * bits / 8 * TRAINED < size < 0.5 * 8 * TRAINED
    assert ended.losses == pytest.approx(lab.train().losses, rel=tolerance)


def test_adafactor_keeps_sums_of_rows_and_columns(trained: Trained) -> None:
    attention = 4 * (64 + 64) - 2 * 32  # q, k, v, o: keys and values have 32 rows
    layer = attention + 3 * (64 + 128)
    assert states(trained.run({"adafactor": {}})) == (["float32"], 4 * (384 + 64 + 2 * layer + NORMS))


def test_muon_keeps_one_state_for_matrices_and_two_for_the_rest(trained: Trained) -> None:
    ended = trained.run({"muon": {}})
    assert states(ended) == (["float32"], 4 * MATRICES + 8 * (EMBEDDING + NORMS))
    assert ended.ranks[0]["optimizer_class"] == "torch.optim.Muon + torch.optim.adamw.AdamW"
    assert ended.losses[-1] < 0.8 * ended.losses[0]


def test_learning_rate_of_muon_follows_the_schedule(trained: Trained) -> None:
    """A warm-up from zero leaves the first update out, in both of its parts."""
    warm = trained.run({"muon": {}}, training={"warmup_steps": 2})
    plain = trained.run({"muon": {}})
    assert warm.losses[1] == pytest.approx(plain.losses[0], rel=0.01)
    assert plain.losses[1] < 0.95 * plain.losses[0]


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_projected_states_are_smaller(name: str, trained: Trained) -> None:
    _, size = states(trained.run({name: SETTINGS[name]}))
    assert size < 0.65 * 8 * TRAINED
    assert size > 8 * (EMBEDDING + NORMS)


def test_optimizer_in_backward_is_the_same_optimizer(trained: Trained) -> None:
    settings: dict[str, Any] = {"micro_batch": EFFECTIVE_BATCH, "training": {"max_grad_norm": 0.0}}
    fused, plain = trained.run({"optimizer_in_backward": {}}, **settings), trained.run({}, **settings)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)
    assert fused.eval_losses == pytest.approx(plain.eval_losses, rel=1e-4)
    assert states(fused) == states(plain)
    assert fused.ranks[0]["optimizer_class"] == plain.ranks[0]["optimizer_class"] == "torch.optim.adamw.AdamW"


def test_optimizer_in_backward_keeps_states_of_embeddings_in_32_bit(trained: Trained) -> None:
    settings: dict[str, Any] = {"micro_batch": EFFECTIVE_BATCH, "training": {"max_grad_norm": 0.0}}
    fused = trained.run({"optimizer_in_backward": {}, "adamw_8bit": {}}, **settings)
    plain = trained.run({"adamw_8bit": {}}, **settings)
    assert states(fused) == states(plain)
    assert fused.losses == pytest.approx(plain.losses, rel=1e-4)


@pytest.mark.parametrize(
    "method",
    [
        "loha",
        *(
            pytest.param(method, marks=pytest.mark.long)
            for method in ("lokr", "oft", "ia3", "adalora", "prompt_tuning", "prefix_tuning")
        ),
    ],
)
@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_without_linear_layers_nothing_is_projected(name: str, method: str, lab: Lab, trained: Trained) -> None:
    """What the exclusion says: they would be AdamW under another name."""
    recipe: dict[str, Any] = {method: {}, name: {"rank": 1}}
    planned = lab.plan(recipe)
    assert "silently" in str(planned.unsupported)
    assert states(trained.train(planned.run)) == states(trained.run({method: {}}))


@pytest.mark.parametrize(("method", "largest"), [({}, 64), ({"lora": {"r": 8}}, 8)], ids=["full", "lora"])
@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_only_a_rank_below_the_matrices_makes_states_smaller(
    name: str, method: dict[str, Any], largest: int, lab: Lab, tmp_path: Path
) -> None:
    """By the libraries alone, and of the last rank that is too large the plan and the rank that would train say so."""
    whole = 0
    for rank in (largest, largest - 1, largest // 4):
        planned = lab.plan(method | {name: {"rank": rank}})
        run = planned.run
        lab.prepare(run)
        net = model.load(run, lab.results.model(run.model_key))
        for technique in run.parsed_techniques.values():
            net = technique.wrap(net, run)
        trainer = Trainer(net, train.training_arguments(run, str(tmp_path)))
        optimizer = trainer.create_optimizer()
        tokens = torch.arange(16)[None] % 7
        net(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        moments = [state[moment] for state in optimizer.state.values() for moment in ("exp_avg", "exp_avg_sq")]
        kept = sum(moment.numel() for moment in moments)
        (callback,) = run.parsed_techniques[name].callbacks(net)
        if rank == largest:
            whole = kept
            assert kept >= 2 * sum(weight.numel() for weight in net.parameters() if weight.requires_grad)
            assert "nothing would become smaller, silently" in str(planned.unsupported)
            with pytest.raises(RunFailedError, match=f"{name}.rank(?s:.*)less than {largest}, the shorter side"):
                callback.on_train_begin(optimizer=optimizer)
        else:
            assert kept < whole
            assert planned.unsupported is None
            callback.on_train_begin(optimizer=optimizer)


@pytest.mark.parametrize("name", ["galore_adamw", "apollo_adamw"])
def test_weight_decay_does_not_reach_projecting_optimizers(name: str, lab: Lab, trained: Trained) -> None:
    recipe = {name: SETTINGS[name]}
    planned = lab.plan(recipe, training={"weight_decay": 5.0})
    assert "weight decay" in str(planned.unsupported)
    assert trained.train(planned.run).losses == trained.run(recipe).losses
