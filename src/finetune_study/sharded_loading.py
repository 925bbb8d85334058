"""Pretrained weights for ZeRO-3, of which no process ever holds more than its own shards and a chunk.

transformers lets rank 0 map all files at once and read them to the end, so that the whole model stays in its resident
memory, and counts against a budget. Here its own loader, which gathers a module, fills it on rank 0 and shards it
again, is called for one chunk of the weights after the other, read from the files by key.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

CHUNK_BYTES = 2**28
"""Of weights that rank 0 reads at once; a single larger tensor is a chunk of its own."""


@contextmanager
def in_chunks(folder: Path) -> Iterator[None]:
    """In here `from_pretrained` of this folder takes the weights chunk by chunk, where ZeRO-3 shards them."""
    from transformers import modeling_utils
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        yield
        return
    load, read = modeling_utils._load_state_dict_into_zero3_model, modeling_utils.load_state_dict
    files = _files(folder)

    def read_shapes(file: str, **keywords: Any) -> Any:
        return read(file, **{**keywords, "map_location": "meta"})

    def load_in_chunks(model: Any, shapes: dict[str, Any], load_config: Any = None) -> Any:
        # Where weights of the model are made of several of the files', as of experts, they are needed at once.
        parts = [list(shapes)] if _merges_weights(load_config) else chunks(shapes)
        errors: list[str] = []
        missing = set(model.state_dict())
        for keys in parts:
            values = {key: _read(files[key], key) if _is_first() else shapes[key] for key in keys}
            found, left = load(model, values, load_config)
            errors += found
            missing &= left
        return errors, missing

    with (
        mock.patch.object(modeling_utils, "load_state_dict", read_shapes),
        mock.patch.object(modeling_utils, "_load_state_dict_into_zero3_model", load_in_chunks),
    ):
        yield


def _is_first() -> bool:
    import torch

    return bool(torch.distributed.get_rank() == 0)


def _merges_weights(load_config: Any) -> bool:
    """Whether some weights of the model are made of several of the files', as of experts."""
    from transformers.core_model_loading import WeightConverter

    mapping = getattr(load_config, "weight_mapping", None) or []
    return any(isinstance(one, WeightConverter) for one in mapping)


def chunks(shapes: Mapping[str, Any]) -> Iterator[list[str]]:
    """Names of the weights in their order, as many at a time as fit into a chunk."""
    keys: list[str] = []
    held = 0
    for key, shape in shapes.items():
        size = shape.numel() * shape.element_size()
        if keys and held + size > CHUNK_BYTES:
            yield keys
            keys, held = [], 0
        keys.append(key)
        held += size
    if keys:
        yield keys


def _files(folder: Path) -> dict[str, Path]:
    """Where each weight lies."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), file)
    return found


def _read(file: Path, key: str) -> Any:
    """One weight, in memory of its own: a mapped file would stay resident as far as it was read."""
    from safetensors import safe_open

    with safe_open(file, framework="pt", backend="pread") as opened:
        return opened.get_tensor(key)
