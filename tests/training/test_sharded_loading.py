"""ZeRO-3 loads models that no process could hold: each rank's peak resident memory against the model's size."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from tests.tiny_study import TINY_STUDY
from tests.training.lab import Ended, Lab

pytestmark = pytest.mark.training

WIDE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 5, "num_attention_heads": 16}
"""0.3 billion weights, 1.2 GiB of them, in few large layers."""
LLAMA2_70B = {
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "hidden_size": 512, "intermediate_size": 1792, "tie_word_embeddings": False,
}  # fmt: skip
"""Llama 2 70B in depth, heads and vocabulary, with a sixteenth of its width: 1.1 GiB."""

SHARDED: dict[str, Any] = {"num_gpus": 2, "micro_batch": 1, "sequence_length": 64, "budget_gib": 3.0}
RECIPE = {"zero3": {}, "lora": {"r": 1, "target_modules": ["q_proj"]}}
SHORT = {"num_untimed_steps": 0, "num_timed_steps": 1}


def share_of_the_model(ended: Ended) -> list[float]:
    """How much of the model each rank had in memory while it was loaded."""
    assert ended.record.ending.status == "completed", ended.output
    size = 4 * ended.first_rank["total_parameters"]  # fp32
    assert size > 2**30
    return [float(rank["load_peak_rss_growth_bytes"]) / size for rank in ended.record.ranks]


@pytest.mark.parametrize("shape", [WIDE, LLAMA2_70B], ids=["wide", "llama2-70b"])
def test_random_weights_are_sharded_as_they_are_drawn(lab: Lab, shape: dict[str, Any]) -> None:
    ended = lab.train(RECIPE, architecture=shape, protocol=SHORT, **SHARDED)
    assert max(share_of_the_model(ended)) < 0.75


def test_pretrained_weights_are_sharded_as_they_are_read(lab: Lab) -> None:
    folder = lab.root / "large"
    shape = TINY_STUDY["models"]["tiny"]["architecture"] | WIDE
    config = AutoConfig.for_model(**shape)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="400MB")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 2
    del model
    models = {"tiny": {"name_or_path": str(folder)}}
    ended = lab.train(RECIPE, models=models, protocol=SHORT, **SHARDED)
    assert max(share_of_the_model(ended)) < 0.75
    plain = lab.train({"lora": RECIPE["lora"]}, models=models, protocol=SHORT, **(SHARDED | {"budget_gib": 6.0}))
    assert min(share_of_the_model(plain)) > 0.9, "the measure sees a whole model where there is one"
    assert ended.eval_losses[0] == pytest.approx(plain.eval_losses[0], abs=1e-4), "and they are the same weights"
