from pathlib import Path
from typing import Any

import pytest
from transformers import ByT5Tokenizer

from finetune_study import config
from finetune_study.errors import ConfigError
from finetune_study.measure import summaries
from finetune_study.measure.summaries import Summary
from finetune_study.sequences import PROMPT_TAIL, fit, lay_out, prompt_and_summary, tokenise

ROWS = [("Ann: hi\nBob: ho", "They greet."), ("Ann: ---\nSummary:\nBob: ?", "Ann writes a summary."), ("A: x", "B.")]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return ByT5Tokenizer(extra_ids=0)


def rows(tokenizer: Any, groups: list[list[int]], length: int, packed: bool, overlong: str = "error") -> list[Any]:
    tokens, _ = fit(tokenise(ROWS, tokenizer), "abc", length, overlong)
    made = lay_out(tokens, groups, length, 0, mask=False)
    names = ("input_ids", "attention_mask", *(("position_ids",) if packed else ()))
    return [{name: getattr(made, name)[n] for name in names} for n in range(len(groups))]


@pytest.mark.parametrize("packed", [False, True])
def test_sequences_come_apart_where_their_summary_begins(tokenizer: Any, packed: bool) -> None:
    tail = tokenizer(PROMPT_TAIL, add_special_tokens=False)["input_ids"]
    groups = [[0, 2], [1]] if packed else [[0], [1]]
    for number, row in enumerate(rows(tokenizer, groups, 256, packed)):
        found = prompt_and_summary(row, tail)
        assert found is not None
        prompt, summary = (tokenizer.decode(part, skip_special_tokens=True) for part in found)
        assert summary == ROWS[number][1], "of packed examples the first, and nothing of the next or of the padding"
        assert prompt == f"Summarize this dialogue:\n{ROWS[number][0]}{PROMPT_TAIL}"


def test_a_prompt_that_was_cut_has_no_summary(tokenizer: Any) -> None:
    tail = tokenizer(PROMPT_TAIL, add_special_tokens=False)["input_ids"]
    (row,) = rows(tokenizer, [[0]], 12, False, "truncate")
    assert prompt_and_summary(row, tail) is None


def test_rouge() -> None:
    """By hand: 3 of 3 words in 6; 2 of 2 pairs in 5; a sequence of 3."""
    one = summaries.rouge([Summary("the cat sat", "the cat sat on a mat")])
    assert one == pytest.approx({"rouge1": 2 / 3, "rouge2": 4 / 7, "rougeL": 2 / 3})
    same = Summary("Ann is late.", "Ann is late.")
    both = summaries.rouge([same, Summary("nothing alike", "Ann is late.")])
    assert both == {"rouge1": 0.5, "rouge2": 0.5, "rougeL": 0.5}
    assert summaries.rouge([]) == {}


def test_quality_is_measured_where_there_is_any(raw: dict[str, Any], tmp_path: Path) -> None:
    raw["protocol"]["rouge_samples"] = 2
    with pytest.raises(ConfigError, match="no target of the grid has pretrained weights"):
        config.parse(raw)
    raw["models"]["tiny"] = {"name_or_path": str(tmp_path)}
    config.parse(raw)
    raw["protocol"]["rouge_samples"] = 5
    with pytest.raises(ConfigError, match=r"5 summaries of data\.num_eval_samples = 4"):
        config.parse(raw)
    raw["data"]["num_eval_samples"] = 0
    with pytest.raises(ConfigError, match="tiny would be trained without an evaluation loss"):
        config.parse(raw)
