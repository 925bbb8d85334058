"""Data: reading, checking, sequences, preparing. Sequences are checked by hand with a tokenizer of bytes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from finetune_study import data, examples, sequences
from finetune_study import run as run_module
from finetune_study.config import Data, Model, Training
from finetune_study.errors import DataError, StudyError
from finetune_study.paths import MANIFEST
from finetune_study.run import Run, RunHardware, RunProtocol
from finetune_study.sequences import IGNORED, Parts, Tokens

MODEL = Model(weights="random", architecture={"model_type": "llama"})
EOS = 1
"""End of a text in the tokenizer of bytes; byte n is token n + 3."""


@pytest.fixture(scope="session")
def byte_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ByT5Tokenizer

    folder = tmp_path_factory.mktemp("bytes")
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    return folder


def make_run(sequence_length: int = 512, packing: bool = False, **settings: Any) -> Run:
    return run_module.make(
        target="tiny",
        recipe="full",
        repeat=1,
        model=MODEL,
        tokenizer=MODEL,
        hardware=RunHardware(
            name="cpu",
            device="cpu",
            gpu=None,
            memory_budget_gib=1.0,
            threads_per_gpu=None,
            environment={},
        ),
        num_gpus=1,
        sequence_length=sequence_length,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=1,
        techniques={"packing": {}} if packing else {},
        data=Data(**settings),
        training=Training(),
        protocol=RunProtocol(num_untimed_steps=1, num_timed_steps=2),
    )


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(count: int) -> list[dict[str, str]]:
    return [{"dialogue": f"A: {number}", "summary": f"It is {number}."} for number in range(count)]


# --- reading ---------------------------------------------------------------------------------------------------------


def test_generated() -> None:
    found = examples.load_examples(Data(num_dialogues=12, seed=4))
    assert len(found.rows) == 12
    assert found.facts["source"] == "generated"


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
def test_every_kind_of_file(tmp_path: Path, suffix: str) -> None:
    import polars as pl

    table = pl.DataFrame(
        {"id": [1, 2], "dialogue": ['A: "Hi", said B\r\nB: é', "C: 2"], "summary": ["They, say hi.", "Two."]}
    )
    path = tmp_path / f"data{suffix}"
    write: dict[str, Callable[[Path], Any]] = {
        ".jsonl": table.write_ndjson,
        ".json": table.write_json,
        ".csv": table.write_csv,
        ".parquet": table.write_parquet,
    }
    write[suffix](path)
    found = examples.load_examples(Data(dataset=str(path)))
    assert found.rows == [('A: "Hi", said B\nB: é', "They, say hi."), ("C: 2", "Two.")]
    assert len(found.facts["sha256_file"]) == 64


def test_repeated_examples_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", [*rows_of(3), *rows_of(2)])
    found = examples.load_examples(Data(dataset=str(path)))
    assert len(found.rows) == 3
    assert found.facts["num_duplicates_left_out"] == 2


GOOD = '{"dialogue": "A: hi", "summary": "Hi."}'


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "", "is empty"),
        ("a.jsonl", "\n\n", "is empty"),
        ("a.json", "", "is empty"),
        ("a.json", "[]", "is empty"),
        ("a.csv", "", "is empty"),
        ("a.csv", "dialogue,summary\n", "is empty"),
        ("a.jsonl", GOOD + "\n\n{broken\n", "Line 3 of the data file is not JSON"),
        ("a.jsonl", GOOD + "\n[1, 2]\n", r"Line 2 has no `dialogue` and no `summary`[\s\S]*\[1, 2\]"),
        ("a.jsonl", '{"text": "x", "summary": "y"}', r"Line 1 has no `dialogue`\n[\s\S]*columns text, summary"),
        (
            "a.jsonl",
            GOOD + '\n{"dialogue": "x", "summary": 7}',
            r"Line 2 has a `summary` that is not text[\s\S]*7 \(int\)",
        ),
        ("a.jsonl", '{"dialogue": null, "summary": "y"}', r"`dialogue` that is not text[\s\S]*None"),
        ("a.jsonl", GOOD + '\n{"dialogue": " ", "summary": "y"}', "Line 2 has an empty `dialogue`"),
        ("a.json", "{", "is not JSON"),
        ("a.json", '{"data": []}', r"not a list of dialogues[\s\S]*a JSON object"),
        ("a.json", f"[{GOOD}, {{}}]", "Row 2 has no `dialogue` and no `summary`"),
        ("a.csv", "dialog,summary\nA: hi,Hi.\n", r"Line 2 has no `dialogue`[\s\S]*columns dialog, summary"),
        ("a.csv", "dialogue,summary\nA: hi\n", "Line 2 has a `summary` that is not text"),
        ("a.csv", 'dialogue,summary\n"A: hi,Hi.\n', "is not CSV"),
        ("a.parquet", "no parquet", "is not Parquet"),
        ("a.txt", "A: hi", r"none that can be read[\s\S]*\.jsonl"),
    ],
)
def test_wrong_data_are_answered(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    with pytest.raises(DataError, match=message) as caught:
        examples.load_examples(Data(dataset=str(path)))
    assert str(path) in str(caught.value)


def test_parquet_without_the_columns_names_those_that_are_there(tmp_path: Path) -> None:
    import polars as pl

    pl.DataFrame({"text": ["x"], "label": [1]}).write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"Row 1 has no `dialogue` and no `summary`[\s\S]*columns text, label"):
        examples.load_examples(Data(dataset=str(tmp_path / "a.parquet")))


def test_missing_file() -> None:
    with pytest.raises(DataError, match=r"data file is missing[\s\S]*nowhere/x\.jsonl"):
        examples.load_examples(Data(dataset="nowhere/x.jsonl"))


def test_binary_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        examples.load_examples(Data(dataset=str(tmp_path / "a.jsonl")))


def test_name_that_no_hub_can_have() -> None:
    with pytest.raises(DataError, match="none that can be read"):
        examples.load_examples(Data(dataset="what is this?"))


def test_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise OSError("no route")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", unreachable)
    with pytest.raises(
        DataError, match=r"can't be loaded from the hub[\s\S]*someone/data, revision newest: OSError: no route"
    ):
        examples.load_examples(Data(dataset="someone/data"))


def test_hub_names_commit_and_licence(monkeypatch: pytest.MonkeyPatch) -> None:
    from types import SimpleNamespace

    asked: list[Any] = []

    def load_dataset(name: str, revision: str) -> dict[str, Any]:
        asked.append((name, revision))
        return {"train": rows_of(4), "test": rows_of(9)}

    info = SimpleNamespace(sha="c0ffee", card_data=SimpleNamespace(license="cc-by-nc-nd-4.0"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: info)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    found = examples.load_examples(Data(dataset="knkarthick/samsum"))
    assert asked == [("knkarthick/samsum", "c0ffee")]
    assert len(found.rows) == 4
    assert found.facts["revision"] == "c0ffee"
    assert found.facts["licence"] == "cc-by-nc-nd-4.0"


# --- sequences -------------------------------------------------------------------------------------------------------


def test_next_fit_by_hand() -> None:
    # 4 + 3 fill 7 of 10; 4 opens the next; 6 fills it; 1 opens a third although the first has room; 10 fills a fourth.
    assert sequences.next_fit([4, 3, 4, 6, 1, 10], 10) == [[0, 1], [2, 3], [4], [5]]
    assert sequences.next_fit([], 10) == []


def test_layout_by_hand() -> None:
    one, two = Tokens([11, 12, 13], prompt_length=2), Tokens([21, 22], prompt_length=1)
    made = sequences.lay_out([one, two], [[0, 1], [1]], length=7, pad=9, mask=False)
    assert made.input_ids.tolist() == [[11, 12, 13, 21, 22, 9, 9], [21, 22, 9, 9, 9, 9, 9]]
    assert made.attention_mask.tolist() == [[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]]
    assert made.labels.tolist() == [[-100, 12, 13, -100, 22, -100, -100], [-100, 22, -100, -100, -100, -100, -100]]
    assert made.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]


def test_masked_prompt_carries_no_loss() -> None:
    made = sequences.lay_out([Tokens([11, 12, 13, 14], prompt_length=2)], [[0]], length=5, pad=9, mask=True)
    assert made.labels.tolist() == [[-100, -100, 13, 14, -100]]
    assert made.input_ids.tolist() == [[11, 12, 13, 14, 9]]


def parts(head: int, tail: int = 2, summary: int = 3) -> Parts:
    return Parts([1] * head, [2] * tail, [3] * summary)


def test_overlong_error_names_the_first() -> None:
    with pytest.raises(DataError) as caught:
        sequences.fit([parts(3), parts(6), parts(9)], ["line 1", "line 4", "line 5"], 10, "error")
    text = str(caught.value)
    assert "2 of 3 examples are longer than the context" in text
    assert "line 4 is the first" in text
    assert "11 tokens" in text
    assert "sequence_length = 10" in text
    assert "`truncate` or `drop`" in text


def test_overlong_drop() -> None:
    fitting, num_overlong = sequences.fit([parts(3), parts(6), parts(5)], ["1", "2", "3"], 10, "drop")
    assert [len(one.ids) for one in fitting] == [8, 10]
    assert num_overlong == 1


def test_overlong_truncate_keeps_the_summary() -> None:
    fitting, num_overlong = sequences.fit([parts(9)], ["1"], 10, "truncate")
    assert fitting == [Tokens([1, 1, 1, 1, 1, 2, 2, 3, 3, 3], prompt_length=7)]
    assert num_overlong == 1


def test_truncate_cuts_a_summary_that_is_too_long_itself() -> None:
    fitting, _ = sequences.fit([parts(9, summary=30)], ["1"], 10, "truncate")
    assert fitting == [Tokens([1, 2, 2, 3, 3, 3, 3, 3, 3, 3], prompt_length=3)]


def test_tokens_are_the_prompt_format(byte_tokenizer: Path) -> None:
    tokenizer = data._tokenizer(byte_tokenizer)
    (one,) = sequences.tokenise([("A: {x}", "Ok.")], tokenizer)
    text = sequences.PROMPT_FORMAT.format(dialogue="A: {x}", summary="Ok.")
    assert one.whole().ids == [byte + 3 for byte in text.encode()] + [EOS]
    assert one.whole().prompt_length == len(text) - len("Ok.")


def test_a_first_token_is_set_where_the_tokenizer_sets_one() -> None:
    class Llamas:
        bos_token_id = 5
        eos_token_id = None

        def __call__(self, text: str | list[str], add_special_tokens: bool = True) -> dict[str, Any]:
            if isinstance(text, list):
                return {"input_ids": [[7] * len(one) for one in text]}
            return {"input_ids": [5, 7] if add_special_tokens else [7] * len(text)}

    (one,) = sequences.tokenise([("A", "B")], Llamas())
    assert one.head[:2] == [5, 7]
    assert one.summary == [7]


# --- preparing -------------------------------------------------------------------------------------------------------


def test_prepare_and_load(tmp_path: Path, byte_tokenizer: Path) -> None:
    run = make_run(num_dialogues=20, num_eval_samples=3)
    out = tmp_path / "data" / "key"
    manifest = data.prepare(run, 17, byte_tokenizer, out)
    train, held_out = data.load(out)
    assert (len(train), len(held_out)) == (17, 3)
    assert manifest["num_train_available"] == 17
    assert manifest["num_eval"] == 3
    assert (manifest["effective_batch_size"], manifest["optimizer_steps_per_epoch"]) == (8, 3)  # the last one of one
    assert manifest == json.loads((out / MANIFEST).read_text())
    assert train.column_names == ["input_ids", "attention_mask", "labels"]
    row = train[0]
    assert {name: tensor.shape for name, tensor in row.items()} == dict.fromkeys(row, (512,))
    assert {str(tensor.dtype) for tensor in row.values()} == {"torch.int64"}
    padding = row["attention_mask"] == 0
    assert (row["labels"][padding] == IGNORED).all()
    assert (row["input_ids"][padding] == 0).all()
    assert (row["labels"][~padding][1:] == row["input_ids"][~padding][1:]).all()
    assert manifest["train"]["positions"] == 17 * 512
    assert manifest["train"]["real_tokens"] == sum(int(one["attention_mask"].sum()) for one in train)
    assert manifest["train"]["loss_tokens"] == manifest["train"]["real_tokens"] - 17
    assert [path.name for path in out.parent.iterdir()] == ["key"]  # nothing temporary is left


def texts(table: Any) -> set[str]:
    return {bytes(token - 3 for token in row["input_ids"].tolist() if token > 2).decode() for row in table}


def test_held_out_and_training_share_nothing(tmp_path: Path, byte_tokenizer: Path) -> None:
    data.prepare(make_run(num_dialogues=40, num_eval_samples=10), 1, byte_tokenizer, tmp_path / "data")
    train, held_out = (texts(table) for table in data.load(tmp_path / "data"))
    assert (len(train), len(held_out)) == (30, 10)
    assert not train & held_out


def test_nothing_held_out(tmp_path: Path, byte_tokenizer: Path) -> None:
    data.prepare(make_run(num_dialogues=5, num_eval_samples=0), 5, byte_tokenizer, tmp_path / "data")
    train, held_out = data.load(tmp_path / "data")
    assert len(train) == 5
    assert held_out is None


def test_packed(tmp_path: Path, byte_tokenizer: Path) -> None:
    alone = data.prepare(make_run(1024, num_dialogues=30, num_eval_samples=0), 1, byte_tokenizer, tmp_path / "alone")
    run = make_run(1024, packing=True, num_dialogues=30, num_eval_samples=0)
    packed = data.prepare(run, 1, byte_tokenizer, tmp_path / "packed")
    assert packed["num_train_available"] < 30
    for what in ("real_tokens", "loss_tokens"):  # packing adds and loses none
        assert packed["train"][what] == alone["train"][what]
    train, _ = data.load(tmp_path / "packed")
    assert train.column_names == ["input_ids", "attention_mask", "labels", "position_ids"]
    for row in train:
        starts = (row["position_ids"] == 0) & (row["attention_mask"] == 1)
        assert (row["labels"][starts] == IGNORED).all()
        ends = (row["input_ids"] == EOS).sum()
        assert starts.sum() == ends  # every example is whole


def test_masked_prompts_leave_the_summary(tmp_path: Path, byte_tokenizer: Path) -> None:
    manifest = data.prepare(
        make_run(num_dialogues=5, num_eval_samples=0, mask_prompt=True), 5, byte_tokenizer, tmp_path / "data"
    )
    summaries = [summary for _, summary in examples.load_examples(Data(num_dialogues=5)).rows]
    assert manifest["train"]["loss_tokens"] == sum(len(summary) + 1 for summary in summaries)


def test_too_few_sequences(tmp_path: Path, byte_tokenizer: Path) -> None:
    run, out = make_run(num_dialogues=20, num_eval_samples=8), tmp_path / "data"
    with pytest.raises(DataError) as caught:
        data.prepare(run, 13, byte_tokenizer, out)
    text = str(caught.value)
    assert "20 sequences, of which 8 are held out: 12 to train on" in text
    assert "at least 13" in text
    assert "data.num_dialogues" in text
    assert not out.exists()
    data.prepare(run, 12, byte_tokenizer, out)
    with pytest.raises(DataError, match="at least 13"):  # also where the data are there already
        data.prepare(run, 13, byte_tokenizer, out)


def test_more_held_out_than_there_are(tmp_path: Path, byte_tokenizer: Path) -> None:
    with pytest.raises(DataError, match="0 to train on"):
        data.prepare(make_run(num_dialogues=5, num_eval_samples=8), 1, byte_tokenizer, tmp_path / "data")


def test_all_dropped(tmp_path: Path, byte_tokenizer: Path) -> None:
    run = make_run(16, num_dialogues=5, num_eval_samples=0, overlong="drop")
    with pytest.raises(DataError, match="0 to train on"):
        data.prepare(run, 1, byte_tokenizer, tmp_path / "data")


def test_context_that_holds_nothing_but_the_prompt(tmp_path: Path, byte_tokenizer: Path) -> None:
    run = make_run(8, num_dialogues=5, num_eval_samples=0, overlong="truncate", mask_prompt=True)
    with pytest.raises(DataError, match="nothing is left to learn"):
        data.prepare(run, 1, byte_tokenizer, tmp_path / "data")


def test_a_second_time_does_nothing(tmp_path: Path, byte_tokenizer: Path) -> None:
    run = make_run(num_dialogues=10, num_eval_samples=2)
    first = data.prepare(run, 1, byte_tokenizer, tmp_path / "data")
    written = (tmp_path / "data" / MANIFEST).stat().st_mtime_ns
    assert data.prepare(run, 1, tmp_path / "no tokenizer is needed", tmp_path / "data") == first
    assert (tmp_path / "data" / MANIFEST).stat().st_mtime_ns == written


def test_a_half_written_folder_is_made_anew(tmp_path: Path, byte_tokenizer: Path) -> None:
    run, out = make_run(num_dialogues=10, num_eval_samples=2), tmp_path / "data"
    first = data.prepare(run, 1, byte_tokenizer, out)
    next((out / "train").glob("*.arrow")).unlink()
    (tmp_path / ".data.partial").mkdir()  # what a killed process leaves
    assert data.prepare(run, 1, byte_tokenizer, out) == first
    assert len(data.load(out)[0]) == 8


def test_order_depends_on_the_seed_alone() -> None:
    order = data._shuffled(10, 0)
    assert sorted(order) == list(range(10))
    assert order == [7, 4, 9, 3, 8, 2, 6, 0, 5, 1]
    assert order != data._shuffled(10, 1)


def test_no_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenizer can't be loaded"):
        data.prepare(make_run(), 1, tmp_path, tmp_path / "data")


def test_a_place_that_can_not_be_written(tmp_path: Path, byte_tokenizer: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StudyError, match="Nothing can be prepared here"):
        data.prepare(make_run(), 1, byte_tokenizer, tmp_path / "file" / "data")


def test_vocabulary_must_hold_the_tokens() -> None:
    made = {"max_token_id": 300, "tokenizer": {"size": 301}}
    data.check_vocabulary(made, {"vocab_size": 301})
    with pytest.raises(DataError, match=r"token 300[\s\S]*vocab_size = 300"):
        data.check_vocabulary(made, {"vocab_size": 300})
