"""What the predictor and the plan say of quantised weights is what transformers and bitsandbytes do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from finetune_study import config, plan
from finetune_study.errors import StudyError
from finetune_study.forecast import build
from finetune_study.forecast.layout import Layout, canonical
from finetune_study.techniques import quantised

SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
TINY: dict[str, dict[str, Any]] = {
    "llama": {**SIZES, "intermediate_size": 128},
    "tied": {**SIZES, "intermediate_size": 128, "model_type": "llama", "tie_word_embeddings": True},
    "falcon": SIZES,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 128},
    "mixtral": {**SIZES, "intermediate_size": 128, "num_local_experts": 4, "num_key_value_heads": 2},
    "gpt_neox": {**SIZES, "intermediate_size": 128},
    "phi": {**SIZES, "intermediate_size": 128},
}
SHARES = {"falcon": 0.0, "mixtral": 0.12}
"""Of the layers' weights, at most; of the others at least nine tenths are quantised."""


def settings(name: str) -> dict[str, Any]:
    return {"model_type": name, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **TINY[name]}


def stood_in_for(name: str, **layout: Any) -> torch.nn.Module:
    """A model as the predictor has it."""
    asked = settings(name)
    with torch.device("meta"):
        model: torch.nn.Module = build.build(build.make_config(asked), torch.float32, "eager")
        build.quantize(model, Layout(canonical(asked), **layout))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Folder of a tiny model."""

    def save(name: str) -> Path:
        folder = tmp_path_factory.getbasetemp() / f"saved-{name}"
        if not folder.exists():
            AutoModelForCausalLM.from_config(AutoConfig.for_model(**settings(name))).save_pretrained(folder)
        return folder

    return save


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", TINY)
def test_the_predictor_quantises_what_transformers_does(name: str, bits: int, saved: Any) -> None:
    import bitsandbytes

    asked = BitsAndBytesConfig(**{f"load_in_{bits}bit": True})
    real = AutoModelForCausalLM.from_pretrained(saved(name), quantization_config=asked, device_map="cpu")
    kinds = (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt)
    expected = {path: (m.in_features, m.out_features) for path, m in real.named_modules() if isinstance(m, kinds)}
    model = stood_in_for(name, quantized="nf4" if bits == 4 else "int8")
    layers = [(path, m) for path, m in model.named_modules() if isinstance(m, build.QuantizedLinear)]
    assert {path: (m.in_features, m.out_features) for path, m in layers} == expected
    assert {path: tuple(m.weight.shape) for path, m in layers} == {
        path: sizes[::-1] for path, sizes in expected.items()
    }
    assert bool(expected) == (name != "falcon")
    found, counted = quantised.by_bitsandbytes(real), quantised.measure(model, (build.QuantizedLinear,))
    assert counted == found
    assert found.share <= SHARES[name] if name in SHARES else found.share > 0.9


def test_the_output_layer_is_quantised_where_nothing_is_to_be_skipped(saved: Any) -> None:
    import bitsandbytes

    asked = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=[])
    real = AutoModelForCausalLM.from_pretrained(saved("llama"), quantization_config=asked, device_map="cpu")
    model = stood_in_for("llama", quantized="nf4", quantized_head=True)
    found = {path for path, m in model.named_modules() if isinstance(m, build.QuantizedLinear)}
    assert found == {path for path, m in real.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert "lm_head" in found


def test_warnings_say_what_is_left_and_what_other_versions_did() -> None:
    def warning(name: str) -> str:
        return quantised.measure(stood_in_for(name, quantized="nf4"), (build.QuantizedLinear,)).warning(", as is") or ""

    assert warning("falcon").startswith("only 0.0% of the weights of the layers are quantised; not FalconLinear (9")
    assert "), as is: transformers 5." in warning("falcon")
    assert "subclasses of torch.nn.Linear" in warning("falcon")
    assert "each expert" not in warning("falcon")
    assert "not MixtralExperts (88.6%)" in warning("mixtral")
    assert "each expert" in warning("mixtral")
    assert "subclasses" not in warning("mixtral")
    assert [name for name in TINY if warning(name)] == ["falcon", "mixtral"]


@pytest.mark.parametrize(
    ("name", "technique", "is_refused"),
    [("falcon", "qlora", True), ("falcon", "lora", False), ("mixtral", "qlora", False), ("gpt2", "qlora", False)],
)
def test_the_plan_refuses_what_would_not_be_quantised_at_all(
    name: str, technique: str, is_refused: bool, raw: dict[str, Any]
) -> None:
    raw["models"] = {"tiny": {"weights": "random", "architecture": settings(name)}}
    raw["recipes"] = {"it": {technique: {}}}
    raw["grid"][0]["recipes"] = "it"
    (planned,) = plan.plan(config.parse(raw))
    if is_refused:
        assert str(planned.unsupported).startswith("transformers has bitsandbytes quantise")
        assert "no layer of a falcon is: use lora, or another model" in str(planned.unsupported)
    else:
        assert planned.unsupported is None


@pytest.mark.long
def test_model_types_that_are_not_quantised_are_those_of_transformers() -> None:
    """Two layers of every causal language model whose configuration has defaults for all that it needs."""
    none: set[str] = set()
    some: set[str] = set()
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            whole = build.make_config({"model_type": kind})
            short = build.shorten(whole, list(range(min(2, whole.get_text_config().num_hidden_layers))))
            with torch.device("meta"):
                model = build.build(short, torch.float32, "eager")
        except (StudyError, StrictDataclassError, AttributeError, ValueError):
            continue  # it needs settings of its own
        with torch.device("meta"):
            build.quantize(model, Layout(canonical({"model_type": kind}), quantized="nf4"))
        share = quantised.measure(model, (build.QuantizedLinear,)).share
        (some if share else none).add(kind)
    assert none == quantised.NOT_QUANTISED
    assert len(some) > 100
