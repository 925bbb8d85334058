"""The benchmark of predictions: what it counts, and what it asks others."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from finetune_study.forecast import predict

TINY: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 256,
}  # fmt: skip
QUESTION = {"model_config": TINY, "hardware": "a100-80gb", "sequence_length": 128}


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))  # a script: it imports its neighbours
    return importlib.import_module("predictor")


def asked(benchmark: Any, measured_gib: float) -> Any:
    case = benchmark.Case("theirs", "a row", "full", QUESTION, measured_gib=measured_gib, fits=True, known=True)
    return benchmark.ask(case, predict.Traces(), with_peers=False)


def test_rows_that_contradict_their_conditions_are_counted_and_shown_apart(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = asked(benchmark, 1.0).answer["predicted_memory_gib"]["by_category"]
    least = held["parameters"] + held["optimizer"]
    fine, odd = asked(benchmark, least * 1.01), asked(benchmark, least * 0.99)
    assert (fine.contradicts, odd.contradicts) == (False, True)
    assert not odd.case.unused
    monkeypatch.setattr(benchmark, "speed", dict)
    document = benchmark.document_of([fine, odd], 0.0, Path())
    assert (document["rows"], document["used"], document["contradicting"]) == (2, 1, 1)
    memory = document["memory"]
    assert [memory[name]["rows"] for name in ("all", "all, with the rows that contradict their conditions")] == [
        1,
        2,
    ]
    assert memory["conditions known, allocated, with the rows that contradict them"]["rows"] == 2
    assert [sample["contradicts"] for sample in document["samples"]] == [False, True]
    assert any(f"{100 * odd.error:+.1f}" in text for text in benchmark._contradictions(document))


@pytest.mark.parametrize(("precision", "bytes_per_weight"), [("fp32", 16), ("bf16_pure", 8), ("bf16", 8)])
def test_accelerate_is_asked_by_its_own_code(benchmark: Any, precision: str, bytes_per_weight: int) -> None:
    question = predict.read_question({**QUESTION, "techniques": {precision: {}}})
    norms_and_products = 4 * 64 * 64 + 3 * 64 * 128 + 2 * 64
    without_output_layer = 256 * 64 + 2 * norms_and_products + 64
    rotary_buffers = 2 * 8  # half of a head's width, and a copy
    assert benchmark.of_accelerate(question) == bytes_per_weight * (without_output_layer + rotary_buffers)


def test_galores_rows_are_used_where_the_predictor_knows_their_settings(benchmark: Any) -> None:
    row = {"table": "tuners", "model": "qwen-7b-chat", "method": "full", "seq_len_max": 2048, "peak_memory_gb": 50.5,
           "num_gpus": 1, "attention": "flash-attn", "gradient_checkpointing": True, "micro_batch": 1, "grad_accum": 16,
           "tuner_params": "galore_rank=32/galore_per_parameter=false/galore_with_embedding=false"}  # fmt: skip
    used = benchmark.ms_swift({**row, "exp_name": "full+galore32"}, {})
    assert used.question["techniques"]["galore_adamw"] == {"rank": 32}
    assert "embeddings" in benchmark.ms_swift({**row, "exp_name": "full+galore_emb"}, {}).unused


def test_the_page_is_what_the_generator_makes_of_the_last_results(benchmark: Any) -> None:
    root = Path(__file__).parents[2]
    last = sorted((root / "benchmarks" / "results").glob("predictor-*.json"))[-1]
    page = benchmark.markdown(json.loads(last.read_text(encoding="utf-8")))
    assert page == (root / "docs" / "accuracy.md").read_text(encoding="utf-8")
    assert page == last.with_suffix(".md").read_text(encoding="utf-8")


def test_aims_stand_beside_results_with_the_rows_that_contradict_them(benchmark: Any) -> None:
    def of(error: float) -> dict[str, Any]:
        return {"mape_percent": error}

    known, alone = "conditions known, allocated", "with the rows that contradict"
    document = {
        "memory": {known: of(4.96), f"{known}, {alone} them": of(5.2), "all": of(10),
                   f"all, {alone} their conditions": of(11)},
        "step time, blind": {"all": of(31)},
        "step time, one row of each source calibrates": {},
        "verdicts": {"fits": {"right": 1, "of": 2, "recall": 0.5},
                     "out of memory": {"right": 0, "of": 0, "recall": None}},
        "study": [{"predicted_gib": 1.05, "measured_gib": 1.0}, {"predicted_gib": 1.5, "measured_gib": 1.0}],
    }  # fmt: skip
    ends = [line.rsplit("% | ", 1)[-1] for line in benchmark._aims(document).splitlines()[2:5]]
    assert ends == ["met |", "missed |", "met |"]
    assert "recall | at least 90 % | 50 % of 2 | missed |" in benchmark._aims(document)
    assert "within 10 % | all | 50 % of 2 | missed |" in benchmark._aims(document)
