"""Models load that no process could hold: each rank's peak resident memory against the model's size."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

from tests.tiny_study import TINY_STUDY
from tests.training.lab import Ended, Lab

pytestmark = [pytest.mark.training, pytest.mark.long]

LLAMA2_70B = {
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 32000,
    "hidden_size": 512, "intermediate_size": 1792, "tie_word_embeddings": False,
}  # fmt: skip
"""Llama 2 70B in depth, heads and vocabulary, with a sixteenth of its width: 0.3 billion weights, 1.1 GiB."""

FALCON_180B = {
    "model_type": "falcon", "num_hidden_layers": 80, "num_attention_heads": 72, "num_kv_heads": 8, "vocab_size": 2500,
    "hidden_size": 576, "new_decoder_architecture": True, "multi_query": True, "parallel_attn": True, "bias": False,
    "alibi": False,
}  # fmt: skip
"""Falcon 180B in depth and groups of heads, with a 26th of its width and vocabulary: 0.3 billion weights."""

RECIPE: dict[str, Any] = {"zero3": {}, "lora": {"r": 1, "target_modules": ["q_proj"]}}
ONE_STEP: dict[str, Any] = {
    "micro_batch": 1,
    "sequence_length": 64,
    # What is freed goes back at once: resident memory is then what is held, and not what the C library keeps in holes.
    "hardware": {
        "cpu": {"device": "cpu", "memory_gib": 8, "max_gpus": 2, "environment": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
    },
    "training": {"effective_batch_size": 2},
    "protocol": {"num_untimed_steps": 0, "num_timed_steps": 1},
}

CHUNK = 2**28 / (4 * 300_319_232)
"""What rank 0 reads at once, as a share of this model; of the real one it is a five-hundredth."""


def shares_of_the_model(lab: Lab, ended: Ended, recipe: dict[str, Any] = RECIPE) -> list[float]:
    """How much of the model each rank had in memory while it was loaded, beside what libraries take for any model."""
    tiny = lab.train(recipe, num_gpus=2, data={"num_eval_samples": 0}, **ONE_STEP)
    for one in (tiny, ended):
        assert one.record.ending.status == "completed", one.output
    libraries = min(rank["load_peak_rss_growth_bytes"] for rank in tiny.record.ranks)
    size = 4 * ended.first_rank["total_parameters"]  # fp32
    assert size > 2**30
    return [(rank["load_peak_rss_growth_bytes"] - libraries) / size for rank in ended.record.ranks]


def test_random_weights_are_sharded_as_they_are_drawn(lab: Lab) -> None:
    ended = lab.train(RECIPE, architecture=LLAMA2_70B, num_gpus=2, data={"num_eval_samples": 0}, **ONE_STEP)
    assert max(shares_of_the_model(lab, ended)) < 0.75
    plain = lab.train({"lora": RECIPE["lora"]}, architecture=LLAMA2_70B, data={"num_eval_samples": 0}, **ONE_STEP)
    assert min(shares_of_the_model(lab, plain)) > 0.9, "the measure sees a whole model where there is one"


def test_random_weights_of_another_architecture_are_sharded_too(lab: Lab) -> None:
    recipe: dict[str, Any] = {"zero3": {}, "lora": {"r": 1, "target_modules": ["query_key_value"]}}
    falcon = {"models": {"tiny": {"weights": "random", "architecture": FALCON_180B}}, "data": {"num_eval_samples": 0}}
    assert max(shares_of_the_model(lab, lab.train(recipe, num_gpus=2, **falcon, **ONE_STEP))) < 0.75


def test_random_weights_are_quantised_as_they_are_drawn(lab: Lab) -> None:
    """4 bits for each weight of the layers, an eighth of fp32; embeddings and output layer, a ninth of all, stay."""
    quantised = {"zero3": {}, "qlora": RECIPE["lora"]}
    ended = lab.train(quantised, architecture=LLAMA2_70B, num_gpus=2, data={"num_eval_samples": 0}, **ONE_STEP)
    assert max(shares_of_the_model(lab, ended, quantised)) < 0.4


def test_pretrained_weights_are_sharded_as_they_are_read(lab: Lab) -> None:
    folder = lab.root / "large"
    config = AutoConfig.for_model(**TINY_STUDY["models"]["tiny"]["architecture"] | LLAMA2_70B)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder, max_shard_size="400MB")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    assert len([*folder.glob("*.safetensors")]) > 2
    del model
    settings: dict[str, Any] = {"models": {"tiny": {"name_or_path": str(folder)}}, "data": {"num_eval_samples": 1}}
    ended = lab.train(RECIPE, num_gpus=2, **settings, **ONE_STEP)
    first, second = shares_of_the_model(lab, ended)
    assert second < 0.75
    assert first < 0.75 + CHUNK
    plain = lab.train({"lora": RECIPE["lora"]}, **settings, **ONE_STEP)
    assert ended.eval_losses[0] == pytest.approx(plain.eval_losses[0], abs=1e-4), "and they are the same weights"
