"""A seeded generator of messenger dialogues with summaries, in the shape of Samsum; every sentence is our own.

The same seed gives the same dialogues everywhere: only `random.Random(seed).random()` is used, whose sequence Python
guarantees across versions; `choice`, `shuffle` and the like carry no such promise.
"""

import random
import re
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal, TypeVar

import yaml

from finetune_study.errors import DataError
from finetune_study.section import Section

MAX_PIECES = 108
"""Longest dialogue with its summary, as `_pieces` counts: with the prompt at most 125 tokens of SmolLM2 (seen in 60,000
draws), so that all fit in a context of 128."""

Writer = Literal["a", "b"]
Turn = dict[Writer, list[str]]
"""One message: who writes it, and in which wordings."""
OTHER: dict[Writer, Writer] = {"a": "b", "b": "a"}
PRONOUNS = {"she": ("she", "her", "her"), "he": ("he", "him", "his")}


class Ending(Section):
    """One way in which a scene goes on."""

    turns: list[Turn]
    summaries: list[str]


class Scene(Section):
    """What two people write about."""

    slots: dict[str, list[str]]
    turns: list[Turn]
    endings: list[Ending]


class Material(Section):
    """dialogues.yaml, which explains itself."""

    names: dict[Literal["she", "he"], list[str]]
    openings: list[str]
    replies: list[str]
    thanks: list[tuple[str, str]]
    goodbyes: list[tuple[str, str]]
    scenes: list[Scene]


Item = TypeVar("Item")


@cache
def _material() -> Material:
    return Material.model_validate(yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")))


def generate(num_dialogues: int, seed: int) -> list[dict[str, str]]:
    """Dialogues with summaries, no two equal; the first n are the same however many are asked for.

    Args:
        num_dialogues: how many.
        seed: another seed gives others.

    Returns:
        Rows with `id`, `dialogue` (lines "Name: text" joined by newlines) and `summary`.

    Raises:
        DataError: when so many different ones can't be made.
    """
    found: dict[tuple[str, str], None] = {}
    draws = _draw_for_ever(random.Random(seed), _material())
    while len(found) < num_dialogues:
        fresh = next((pair for pair in islice(draws, 1000) if pair not in found), None)
        if fresh is None:
            raise DataError(
                "The generator has run out of different dialogues",
                where="data.num_dialogues",
                given=num_dialogues,
                allowed=f"up to {len(found)}",
            )
        found[fresh] = None
    return [
        {"id": f"generated-{seed}-{number}", "dialogue": dialogue, "summary": summary}
        for number, (dialogue, summary) in enumerate(found)
    ]


def _draw_for_ever(source: random.Random, material: Material) -> Iterator[tuple[str, str]]:
    while True:
        dialogue, summary = _draw(source, material)
        if _pieces(dialogue) + _pieces(summary) <= MAX_PIECES:
            yield dialogue, summary


def _draw(source: random.Random, material: Material) -> tuple[str, str]:
    scene = _pick(source, material.scenes)
    ending = _pick(source, scene.endings)
    words = _words(source, scene, material)
    messages = [
        (writer, _pick(source, wordings)) for turn in (*scene.turns, *ending.turns) for writer, wordings in turn.items()
    ]
    messages = [*_opening(source, material, messages[0][0], words), *messages]
    messages += _closing(source, material, OTHER[messages[-1][0]])
    dialogue = "\n".join(f"{words[writer]}: {_sentence(text, words)}" for writer, text in messages)
    return dialogue, _sentence(_pick(source, ending.summaries), words)


def _opening(
    source: random.Random, material: Material, first: Writer, words: dict[str, str]
) -> list[tuple[Writer, str]]:
    if source.random() >= 0.7:
        return []
    names = {"first": words[first], "second": words[OTHER[first]]}
    opening, reply = _pick(source, material.openings), _pick(source, material.replies)
    return [(first, opening.format(**names)), (OTHER[first], reply.format(**names))]


def _closing(source: random.Random, material: Material, writer: Writer) -> list[tuple[Writer, str]]:
    if source.random() >= 0.5:
        return []
    pairs = [*material.thanks, *material.goodbyes] if writer == "a" else material.goodbyes
    closing, answer = _pick(source, pairs)
    return [(writer, closing), (OTHER[writer], answer)]


def _words(source: random.Random, scene: Scene, material: Material) -> dict[str, str]:
    """What stands for each word in braces."""
    people = [(name, pronoun) for pronoun, names in material.names.items() for name in names]
    words = {slot: _pick(source, choices) for slot, choices in scene.slots.items()}
    for role, (name, pronoun) in zip("ab", _pick_two(source, people), strict=True):
        subject, dative, possessive = PRONOUNS[pronoun]
        words |= {role: name, f"{role}_he": subject, f"{role}_him": dative, f"{role}_his": possessive}
    return words | {f"{slot}_": _capital(word) for slot, word in words.items()}


def _sentence(text: str, words: dict[str, str]) -> str:
    return _capital(text.format(**words))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _pick(source: random.Random, items: Sequence[Item]) -> Item:
    return items[int(source.random() * len(items))]


def _pick_two(source: random.Random, items: Sequence[Item]) -> tuple[Item, Item]:
    first = int(source.random() * len(items))
    second = int(source.random() * (len(items) - 1))
    return items[first], items[second + (second >= first)]


def _pieces(text: str) -> int:
    """Words, single digits and signs, two more a line: close to what a tokenizer of English makes of a text."""
    return len(re.findall(r"[A-Za-z]+|[0-9]|[^\w\s]", text)) + 2 * text.count("\n")
