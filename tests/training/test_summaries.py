"""Summaries written by a model that was really trained, alone and sharded."""

from typing import Any

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer, set_seed

from finetune_study.measure import summaries
from tests.tiny_study import TINY_STUDY
from tests.training.lab import Lab

pytestmark = [pytest.mark.training, pytest.mark.long]

SEED = 1
"""Of weights that write something legible: bytes that are no text are left out of a summary."""


def test_every_way_of_sharding_writes_the_same_summaries(lab: Lab) -> None:
    set_seed(SEED)
    folder = lab.root / "pretrained"
    shape = dict(TINY_STUDY["models"]["tiny"]["architecture"])
    AutoModelForCausalLM.from_config(AutoConfig.for_model(shape.pop("model_type"), **shape)).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    settings: dict[str, Any] = {"models": {"tiny": {"name_or_path": str(folder)}}, "protocol": {"rouge_samples": 2}}
    alone = lab.train({}, **settings)
    sharded = lab.train({"zero3": {}}, num_gpus=2, micro_batch=1, **settings)
    for ended in (alone, sharded):
        assert ended.record.ending.status == "completed", ended.output
        told = [rank["summaries"] for rank in ended.record.ranks]
        assert all(one == told[0] for one in told), "ranks write together"
        assert next(one["reference"] for one in told[0]).startswith("Ann says ")
        assert any(one["generated"] for one in told[0])
        written = [summaries.Summary(**one) for one in told[0]]
        assert {name: ended.row[name] for name in summaries.KINDS} == summaries.rouge(written)
    assert alone.first_rank["summaries"] == sharded.first_rank["summaries"]
    without = lab.train({}, models=settings["models"])
    assert alone.losses == without.losses
    assert alone.record.run.run_id != without.record.run.run_id
