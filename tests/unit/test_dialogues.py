"""The generator of dialogues."""

import hashlib
import json
import re
from string import Formatter

import pytest

from finetune_study import dialogues
from finetune_study.errors import DataError


def test_the_same_everywhere() -> None:
    """A new digest means that every study of generated data is measured on other data than before."""
    text = json.dumps(dialogues.generate(480, 0))
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a03b38f59df03a4f56673832cacd0e95d09a74bc3edde6c1726444acfffc4eb1"
    )


def test_first_ones_do_not_depend_on_how_many() -> None:
    assert dialogues.generate(7, 3) == dialogues.generate(40, 3)[:7]


def test_seeds_differ() -> None:
    assert dialogues.generate(20, 1) != dialogues.generate(20, 2)


def test_shape() -> None:
    for row in dialogues.generate(500, 5):
        assert set(row) == {"id", "dialogue", "summary"}
        lines = row["dialogue"].split("\n")
        assert len(lines) >= 3
        assert all(re.fullmatch(r"[A-Z][a-z]+: [A-Z0-9].*\S", line) for line in lines), row
        assert len({line.split(":")[0] for line in lines}) == 2
        assert re.fullmatch(r"[A-Z].*\.", row["summary"]), row
        assert not re.search(r"[{}|]|  ", row["dialogue"] + row["summary"]), row


def test_distinct() -> None:
    rows = dialogues.generate(5000, 0)
    assert len({(row["dialogue"], row["summary"]) for row in rows}) == len(rows)
    assert len({row["id"] for row in rows}) == len(rows)


def test_summary_follows_from_the_dialogue() -> None:
    """Its words are the dialogue's, names above all, but for those that tell."""
    for row in dialogues.generate(500, 9):
        speakers = {line.split(":")[0] for line in row["dialogue"].split("\n")}
        assert (
            any(name in row["summary"] for name in speakers)
            or "sold out" in row["summary"]
            or "table" in row["summary"]
        )
        numbers = set(re.findall(r"\d+", row["summary"]))
        assert numbers <= set(re.findall(r"\d+", row["dialogue"])), row


def test_every_word_in_braces_is_known() -> None:
    material = dialogues._material()
    for scene in material.scenes:
        known = {"a", "b"} | {f"{role}_{form}" for role in "ab" for form in ("he", "him", "his")} | set(scene.slots)
        known |= {f"{name}_" for name in known}
        texts = [text for turn in scene.turns for wordings in turn.values() for text in wordings]
        for ending in scene.endings:
            texts += [text for turn in ending.turns for wordings in turn.values() for text in wordings]
            texts += ending.summaries
        used = {name for text in texts for _, name, _, _ in Formatter().parse(text) if name}
        assert used <= known
        assert all(len(turn) == 1 for turn in scene.turns)


def test_length_bound() -> None:
    for row in dialogues.generate(2000, 4):
        assert dialogues._pieces(row["dialogue"]) + dialogues._pieces(row["summary"]) <= dialogues.MAX_PIECES


def test_running_out_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dialogues, "_draw", lambda source, material: ("Anna: Hi", "Anna says hi."))
    with pytest.raises(DataError, match=r"run out of different dialogues\n.*\n.*given:   2\n.*up to 1"):
        dialogues.generate(2, 0)
