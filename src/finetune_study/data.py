"""Data of a run: prepared where there is a network, loaded where it trains."""

import hashlib
from pathlib import Path
from typing import Any

from finetune_study.errors import DataError
from finetune_study.examples import load_examples
from finetune_study.prepared import first_line, new_folder, read_manifest, say
from finetune_study.run import Run
from finetune_study.sequences import (
    IGNORED,
    PROMPT_FORMAT,
    Sequences,
    fit,
    lay_out,
    next_fit,
    silent_tokens,
    starts_with,
    steps_per_epoch,
    tokenise,
)


def prepare(run: Run, num_train_needed: int, model_dir: Path, out: Path) -> dict[str, Any]:
    """Makes the data folder of a run, unless it is there.

    Args:
        run: decides about data, context length, packing.
        num_train_needed: training sequences that the run takes.
        model_dir: the prepared model whose tokenizer is used.
        out: the folder; it appears whole or not at all.

    Returns:
        Its manifest: `num_train_available` and `num_eval` sequences, what they hold, where they come from, and
        `optimizer_steps_per_epoch` at the effective batch of the study that prepared them.

    Raises:
        DataError: when the data are missing, wrong, too long for the context or too few.
    """
    manifest = read_manifest(out)
    if manifest is None:
        with new_folder(out) as (folder, manifest):
            manifest |= _fill(run, num_train_needed, model_dir, folder)
        say(
            f"data: {manifest['num_train_available']} training and {manifest['num_eval']} evaluation sequences of "
            f"{manifest['sequence_length']} tokens in {out}"
        )
    _check_enough(run, manifest["num_train_available"], num_train_needed)
    return manifest


def _fill(run: Run, num_train_needed: int, model_dir: Path, folder: Path) -> dict[str, Any]:
    data, length = run.data, run.sequence_length
    tokenizer = _tokenizer(model_dir)
    examples = load_examples(data)
    say(f"data: {len(examples.rows)} examples from {data.dataset}, tokenising")
    fitting, num_overlong = fit(tokenise(examples.rows, tokenizer), examples.places, length, data.overlong)
    if any(len(one.ids) <= silent_tokens(one, data.mask_prompt) for one in fitting):
        raise DataError(
            "The prompt alone fills the context: nothing is left to learn",
            given=f"sequence_length = {length}",
            do="use a longer sequence_length, or data.overlong `drop`",
        )
    order = _shuffled(len(fitting), data.seed)
    fitting = [fitting[number] for number in order]
    packed = "packing" in run.techniques
    groups = next_fit((len(one.ids) for one in fitting), length) if packed else [[n] for n in range(len(fitting))]
    _check_enough(run, len(groups) - data.num_eval_samples, num_train_needed)
    sequences = lay_out(fitting, groups, length, _pad_token(tokenizer), data.mask_prompt)
    held_out, train = sequences[: data.num_eval_samples], sequences[data.num_eval_samples :]
    for name, part in (("train", train), ("eval", held_out)):
        if len(part):  # an empty folder could not be loaded
            _save(part, folder / name, packed)
    return {
        **examples.facts,
        "dataset": data.dataset,
        "seed": data.seed,
        "prompt_format": PROMPT_FORMAT,
        "mask_prompt": data.mask_prompt,
        "tokenizer": _describe(tokenizer, model_dir),
        "max_token_id": int(sequences.input_ids.max()),
        "sequence_length": length,
        "packed": packed,
        "overlong": data.overlong,
        "num_overlong": num_overlong,
        "num_train_available": len(train),
        "num_eval": len(held_out),
        "effective_batch_size": run.training.effective_batch_size,
        "optimizer_steps_per_epoch": steps_per_epoch(len(train), run.training.effective_batch_size),
        "train": _count(train),
        "eval": _count(held_out),
        "sha256": _sha256(train, held_out),
    }


def _shuffled(count: int, seed: int) -> list[int]:
    """Numbers below `count` in an order that depends on the seed alone, whatever Python and NumPy."""
    return sorted(range(count), key=lambda number: hashlib.sha256(f"{seed}:{number}".encode()).digest())


def _tokenizer(model_dir: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    except (OSError, ValueError) as error:
        raise DataError(
            "The prepared tokenizer can't be loaded", where=str(model_dir), given=first_line(error)
        ) from None


def _pad_token(tokenizer: Any) -> int:
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _describe(tokenizer: Any, model_dir: Path) -> dict[str, Any]:
    return {
        "model_key": model_dir.name,
        "class": type(tokenizer).__name__,
        "size": len(tokenizer),
        "starts_with": starts_with(tokenizer),
        "ends_with": tokenizer.eos_token_id,
        "pad": _pad_token(tokenizer),
    }


def _check_enough(run: Run, available: int, needed: int) -> None:
    if available >= needed and available > 0:
        return
    held_out = run.data.num_eval_samples
    raise DataError(
        "The data set gives too few sequences",
        where=f"data.dataset: {run.data.dataset} at sequence_length {run.sequence_length}",
        given=f"{max(0, available + held_out)} sequences, of which {held_out} are held out: "
        f"{max(0, available)} to train on",
        allowed=f"at least {max(1, needed)} to train on, so that none is seen twice",
        do=("set data.num_dialogues higher, or " if run.data.dataset == "generated" else "use more data, or set ")
        + "protocol.num_timed_steps, training.effective_batch_size or data.num_eval_samples lower",
    )


def _save(sequences: Sequences, folder: Path, packed: bool) -> None:
    import datasets

    datasets.disable_progress_bars()
    length = sequences.input_ids.shape[1]
    columns = {
        "input_ids": (sequences.input_ids, "int32"),
        "attention_mask": (sequences.attention_mask, "int8"),
        "labels": (sequences.labels, "int32"),
    }
    if packed:
        columns["position_ids"] = (sequences.position_ids, "int32")
    table = datasets.Dataset.from_dict(
        {name: array for name, (array, _) in columns.items()},
        features=datasets.Features(
            {name: datasets.Sequence(datasets.Value(kind), length=length) for name, (_, kind) in columns.items()}
        ),
    )
    table.save_to_disk(folder)


def _count(sequences: Sequences) -> dict[str, int]:
    """Positions, those that hold a token, and those that carry loss."""
    return {
        "positions": int(sequences.input_ids.size),
        "real_tokens": int(sequences.attention_mask.sum(dtype="int64")),
        "loss_tokens": int((sequences.labels != IGNORED).sum()),
    }


def _sha256(*parts: Sequences) -> str:
    digest = hashlib.sha256()
    for part in parts:
        for array in (part.input_ids, part.labels, part.position_ids):
            digest.update(array.astype("<i4").tobytes())
    return digest.hexdigest()


def check_vocabulary(data_manifest: dict[str, Any], model_manifest: dict[str, Any]) -> None:
    """A model must have an embedding for every token of the data, which may come from another model's tokenizer.

    Raises:
        DataError: when it has not.
    """
    largest, size = data_manifest["max_token_id"], model_manifest["vocab_size"]
    if largest >= size:
        raise DataError(
            "The data hold tokens that the model does not know",
            given=f"token {largest}, of a tokenizer of {data_manifest['tokenizer']['size']} tokens",
            allowed=f"below the model's vocab_size = {size}",
            do="set `tokenizer` of the model to a target with a smaller vocabulary, or raise architecture.vocab_size",
        )


def load(folder: Path) -> tuple[Any, Any]:
    """Training and evaluation sequences, as tensors of int64; the latter is None where none are held out.

    Columns: `input_ids`, `attention_mask`, `labels`, and in packed data `position_ids`; each of sequence_length.
    """
    import datasets

    parts = [folder / name for name in ("train", "eval")]
    train, held_out = (datasets.load_from_disk(p).with_format("torch") if p.exists() else None for p in parts)
    return train, held_out
