"""Summaries that a trained model writes of held-out dialogues, and how close they come to those of people."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from finetune_study.sequences import PROMPT_TAIL, prompt_and_summary

KINDS = ("rouge1", "rouge2", "rougeL")
"""Lin 2004 (W04-1013): single words, pairs of words, longest common subsequence."""

MAX_NEW_TOKENS = 128
"""Samsum's summaries have about 20 words, and hardly one has 100 tokens; a model that does not end by itself is cut."""


class Summary(NamedTuple):
    """What was written, and what a person wrote."""

    generated: str
    reference: str


def write(model: Any, tokenizer_folder: Path, rows: Iterable[Any], world_size: int) -> list[Summary]:
    """Summaries by greedy decoding, one after another; an example whose prompt was cut has none.

    Args:
        model: as the trainer wrapped it; all ranks must call it together.
        tokenizer_folder: the prepared model whose tokenizer made the sequences.
        rows: held-out sequences.
        world_size: ranks that write the same summaries.
    """
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
    tail = tokenizer(PROMPT_TAIL, add_special_tokens=False)["input_ids"]
    examples = [found for row in rows if (found := prompt_and_summary(row, tail)) is not None]
    was_training = model.training
    model.eval()
    written = []
    with torch.no_grad():
        for prompt, reference in examples:
            ids = torch.tensor([prompt], device=model.device)
            answer = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=MAX_NEW_TOKENS,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                synced_gpus=world_size > 1,  # with ZeRO-3 a rank that ended sooner would leave the others waiting
            )
            texts = (answer[0, len(prompt) :].tolist(), reference)
            written.append(Summary(*(tokenizer.decode(one, skip_special_tokens=True).strip() for one in texts)))
    model.train(was_training)
    return written


def rouge(summaries: Sequence[Summary]) -> dict[str, float]:
    """Mean F measures by kind, words stemmed, as the scores of Samsum are commonly given; empty without summaries."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(list(KINDS), use_stemmer=True)
    scores = [scorer.score(one.reference, one.generated) for one in summaries]
    return {kind: fmean(one[kind].fmeasure for one in scores) for kind in KINDS} if scores else {}
