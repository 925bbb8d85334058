"""How long predictions take and how much memory the predictor needs; prints one JSON object.

    python benchmarks/predictor_speed.py

Imports are apart: they are those of torch, transformers and peft. A process of its own, since peak memory never falls.
Seconds are the processor's, so that others at work on the machine do not count; one thread does all the work.
"""

import itertools
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

from finetune_study.forecast import predict

GEMMA_3_27B = {
    "model_type": "gemma3_text", "hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
    "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128, "vocab_size": 262208, "sliding_window": 1024,
}  # fmt: skip
"""config.json of google/gemma-3-27b-pt: every sixth layer differs, so that eight are traced."""
MODELS: dict[str, dict[str, Any]] = {
    **{name: {"model": name} for name in ("meta-llama/Llama-2-7b-hf", "tiiuae/falcon-180B",
                                          "mistralai/Mixtral-8x7B-v0.1", "google/gemma-2-9b")},
    "google/gemma-3-27b": {"model_config": GEMMA_3_27B},
}  # fmt: skip
SLOW: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gemma4_text": ({"model_config": {"model_type": "gemma4_text"}}, {}),
    "gemma3n_text": ({"model_config": {"model_type": "gemma3n_text"}}, {}),
    "qwen3_next": ({"model_config": {"model_type": "qwen3_next"}}, {}),
    "zamba2": ({"model_config": {"model_type": "zamba2"}}, {}),
    "meta-llama/Llama-2-70b-hf prefix_tuning": ({"model": "meta-llama/Llama-2-70b-hf"}, {"prefix_tuning": {}}),
}
"""Models in transformers' own sizes, and recipes, known to take longer: many layers, or loops over the context, are
traced."""
RECIPES: list[dict[str, Any]] = [
    {"bf16": {}},
    {"bf16": {}, "lora": {"r": 64}, "zero3": {}, "gradient_checkpointing": {}},
    {"bf16": {}, "qlora": {"r": 64}},
]
BATCH = 10_000


def row(model: str, *shape: Any) -> dict[str, Any]:
    return row_of(MODELS[model], *shape)


def row_of(model: dict[str, Any], techniques: Any, context: int = 512, batch: int = 1, gpus: int = 8) -> dict[str, Any]:
    return {
        **model, "hardware": "a100-80gb", "num_gpus": gpus, "sequence_length": context,
        "per_device_train_batch_size": batch, "techniques": techniques,
    }  # fmt: skip


def timed(rows: list[dict[str, Any]], traces: predict.Traces) -> float:
    lines = [json.dumps(one) for one in rows]
    start = time.process_time()
    answers = [json.loads(answer) for answer in predict.answer_lines(lines, traces)]
    taken = time.process_time() - start
    assert not any("error" in answer for answer in answers), answers[0]
    return taken


def main() -> None:
    start = time.process_time()
    import finetune_study.forecast.trace  # noqa: F401

    imports = time.process_time() - start
    cold: dict[str, float] = {}
    from_memory: list[float] = []
    from_disk: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        traces = predict.Traces(Path(folder))
        for model, recipe in itertools.product(MODELS, RECIPES):
            one = row(model, recipe)
            cold[f"{model} {'+'.join(recipe)}"] = timed([one], traces)
            from_memory.append(timed([one], traces))
            from_disk.append(timed([one], predict.Traces(Path(folder))))
        shapes = itertools.cycle(itertools.product(RECIPES, (128, 512, 4096), (1, 2, 8), (1, 2, 8)))
        rows = [row(next(iter(MODELS)), *shape) for shape in itertools.islice(shapes, BATCH)]
        batch = timed(rows, predict.Traces(Path(folder)))
    slow = {
        name: timed([row_of(model, {"bf16": {}, **recipe})], predict.Traces()) for name, (model, recipe) in SLOW.items()
    }
    found = {
        "import_seconds": imports,
        "cold_seconds": cold,
        "cold_seconds_worst": max(cold.values()),
        "cold_seconds_slow": slow,
        "cached_seconds_worst": max(from_memory),
        "cached_on_disk_seconds_worst": max(from_disk),
        "batch_rows": BATCH,
        "batch_seconds": batch,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
