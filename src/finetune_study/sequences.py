"""Sequences of exactly the context length, made of tokenised examples."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finetune_study.errors import DataError
from finetune_study.prepared import say

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

PROMPT_HEAD = "Summarize this dialogue:\n{dialogue}"
PROMPT_TAIL = "\n---\nSummary:\n"
PROMPT_FORMAT = PROMPT_HEAD + PROMPT_TAIL + "{summary}"
"""An example as text; the tokenizer's first token stands before it where it has one, its last token behind it."""

IGNORED = -100
"""Label of positions that carry no loss."""


@dataclass(frozen=True)
class Tokens:
    """One example as token ids."""

    ids: list[int]
    prompt_length: int
    """How many of them stand before the summary."""


@dataclass(frozen=True)
class Sequences:
    """Sequences of exactly the context length; every array is sequences x positions."""

    input_ids: "NDArray[np.int32]"
    attention_mask: "NDArray[np.int8]"
    """1 on tokens, 0 on padding."""
    labels: "NDArray[np.int32]"
    """Token ids, or IGNORED on padding, on each example's first token (nothing predicts it) and on masked prompts."""
    position_ids: "NDArray[np.int32]"
    """Anew from 0 with every example, and with the padding."""

    def __getitem__(self, which: slice) -> "Sequences":
        return Sequences(
            self.input_ids[which], self.attention_mask[which], self.labels[which], self.position_ids[which]
        )

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Parts:
    """One example in pieces, as token ids: head with the dialogue, tail of the prompt, summary."""

    head: list[int]
    tail: list[int]
    summary: list[int]

    def __len__(self) -> int:
        return len(self.head) + len(self.tail) + len(self.summary)

    def whole(self) -> Tokens:
        prompt = [*self.head, *self.tail]
        return Tokens([*prompt, *self.summary], len(prompt))

    def cut(self, length: int) -> Tokens:
        """The dialogue loses its end, so that the summary is still learned; what then is too long is cut as well."""
        head = self.head[: max(1, length - len(self.tail) - len(self.summary))]
        prompt = [*head, *self.tail]
        return Tokens([*prompt, *self.summary][:length], len(prompt))


def tokenise(rows: Sequence[tuple[str, str]], tokenizer: Any) -> Iterator[Parts]:
    """Head (with the dialogue), tail and summary are tokenised apart: a cut or a mask then falls between tokens."""
    starts = starts_with(tokenizer)
    tail = tokenizer(PROMPT_TAIL, add_special_tokens=False)["input_ids"]
    ends = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    size = 1000
    for begin in range(0, len(rows), size):
        block = rows[begin : begin + size]
        heads = [PROMPT_HEAD.format(dialogue=dialogue) for dialogue, _ in block]
        for head, summary in zip(
            tokenizer(heads, add_special_tokens=False)["input_ids"],
            tokenizer([summary for _, summary in block], add_special_tokens=False)["input_ids"],
            strict=True,
        ):
            yield Parts([*starts, *head], tail, [*summary, *ends])
        if len(rows) > size:
            say(f"data: {begin + len(block)} of {len(rows)} examples tokenised")


def starts_with(tokenizer: Any) -> list[int]:
    """The token that the tokenizer itself puts before a text, if it does."""
    first = tokenizer("a")["input_ids"][:1]
    return first if first == [tokenizer.bos_token_id] else []


def fit(parts: Iterable[Parts], places: Iterable[str], sequence_length: int, overlong: str) -> tuple[list[Tokens], int]:
    """The examples, none longer than the context, and how many were too long.

    Raises:
        DataError: under the policy `error`, when any is longer.
    """
    fitting: list[Tokens] = []
    too_long: list[tuple[str, int]] = []
    for one, place in zip(parts, places, strict=True):
        if len(one) <= sequence_length:
            fitting.append(one.whole())
            continue
        too_long.append((place, len(one)))
        if overlong == "truncate":
            fitting.append(one.cut(sequence_length))
    if too_long and overlong == "error":
        place, tokens = too_long[0]
        longest = max(tokens for _, tokens in too_long)
        raise DataError(
            f"{len(too_long)} of {len(fitting) + len(too_long)} examples are longer than the context",
            where=f"{place} is the first",
            given=f"{tokens} tokens with its prompt (the longest of all has {longest})",
            allowed=f"up to sequence_length = {sequence_length} tokens",
            do="set data.overlong to `truncate` or `drop`, or use a longer sequence_length",
        )
    return fitting, len(too_long)


def steps_per_epoch(num_sequences: int, effective_batch_size: int) -> int:
    """Optimizer steps of one pass over the data; as with transformers' Trainer the last may hold fewer sequences."""
    return -(-num_sequences // effective_batch_size)


def silent_tokens(one: Tokens, mask: bool) -> int:
    """Tokens at an example's start that carry no loss: nothing predicts the first; a masked prompt carries none."""
    return max(1, one.prompt_length if mask else 1)


def prompt_and_summary(row: Mapping[str, Any], tail: Sequence[int]) -> tuple[list[int], list[int]] | None:
    """The first example of a sequence as token ids, up to its summary and from there on.

    Args:
        row: a sequence: `input_ids`, `attention_mask`, and `position_ids` where examples are packed.
        tail: the prompt's end, tokenised as `tokenise` does it.

    Returns:
        None where the prompt was cut before its end.
    """
    ids = [int(token) for token, real in zip(row["input_ids"], row["attention_mask"], strict=True) if real]
    positions = [int(position) for position in row.get("position_ids", range(len(ids)))][: len(ids)]
    ids = ids[: next((n for n, position in enumerate(positions) if n and position == 0), len(ids))]
    ends = (n for n in range(len(ids), len(tail) - 1, -1) if ids[n - len(tail) : n] == list(tail))
    begin = next(ends, None)
    return None if begin is None else (ids[:begin], ids[begin:])


def next_fit(lengths: Iterable[int], sequence_length: int) -> list[list[int]]:
    """Which examples share a sequence: each goes into the open one, or opens the next; none is split."""
    groups: list[list[int]] = []
    room = 0
    for number, length in enumerate(lengths):
        if length > room:
            groups.append([])
            room = sequence_length
        groups[-1].append(number)
        room -= length
    return groups


def lay_out(
    examples: Sequence[Tokens], groups: Sequence[Sequence[int]], length: int, pad: int, mask: bool
) -> Sequences:
    """Sequences of exactly `length` positions, padded at the end.

    Args:
        examples: all examples.
        groups: for each sequence the numbers of its examples, in order.
        length: positions of a sequence.
        pad: token id of padding.
        mask: no loss on prompts.
    """
    import numpy as np

    shape = (len(groups), length)
    made = Sequences(
        input_ids=np.full(shape, pad, dtype=np.int32),
        attention_mask=np.zeros(shape, dtype=np.int8),
        labels=np.full(shape, IGNORED, dtype=np.int32),
        position_ids=np.zeros(shape, dtype=np.int32),
    )
    for row, group in enumerate(groups):
        at = 0
        for number in group:
            one = examples[number]
            end = at + len(one.ids)
            made.input_ids[row, at:end] = one.ids
            made.attention_mask[row, at:end] = 1
            made.position_ids[row, at:end] = np.arange(len(one.ids))
            silent = silent_tokens(one, mask)
            made.labels[row, at + silent : end] = one.ids[silent:]
            at = end
        made.position_ids[row, at:] = np.arange(length - at)
    return made
