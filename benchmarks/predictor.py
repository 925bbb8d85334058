"""How far predictions are from tables that others measured, and how far other estimators are from the same rows.

    python benchmarks/predictor.py [--measured ../shared/measured] [--peers] [--write benchmarks/results]

Each source of measured rows has an adapter below: it says which rows are used, which not and why, and turns a used one
into the question that `finetune-study predict` answers. Nothing is fitted: an adapter states conditions, never numbers.

Reported for memory: mean absolute percentage error by source and technique against the kind of memory that the source
measured (`allocated`, `reserved` or the driver's), share of rows within 10 %, and right and wrong verdicts on whether a row
fits the GPU it ran on or ran out of memory of. A verdict that is not given counts as wrong.
"""

import argparse
import collections
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from finetune_study.forecast import memory as memory_module
from finetune_study.forecast import predict

ROOT = Path(__file__).resolve().parents[1]
MEASURED = Path(os.environ.get("MEASURED", ROOT.parent / "shared" / "measured"))
GIB, GB = 2**30, 1e9


@dataclass
class Case:
    """A measured row."""

    source: str
    label: str
    """What it is, for the list of rows."""
    technique: str
    question: dict[str, Any] | None = None
    unused: str = ""
    """Why the row is not used."""
    kind: str = "allocated"
    measured_gib: float | None = None
    fits: bool | None = None
    """Whether it ran; None: the GPU is not known."""
    known: bool = False
    """Conditions are known: fixed length, nothing guessed."""
    seconds: float | None = None
    """Time of an optimizer step."""
    tokens_per_second: float | None = None


Adapter = Callable[[dict[str, Any], dict[str, Any]], Case]
ADAPTERS: dict[str, Adapter] = {}


def adapter(file: str) -> Callable[[Adapter], Adapter]:
    def register(function: Adapter) -> Adapter:
        ADAPTERS[file] = function
        return function

    return register


def _gib(row: dict[str, Any]) -> float | None:
    gib, gb = row.get("peak_memory_gib"), row.get("peak_memory_gb")
    if isinstance(gib, int | float):
        return float(gib)
    return gb * GB / GIB if isinstance(gb, int | float) else None


LITGPT_MODELS = {
    "falcon-7b": "tiiuae/falcon-7b", "Gemma-2b": "google/gemma-2b", "Gemma-7b": "google/gemma-7b",
    "Gemma-2-2b": "google/gemma-2-2b", "Gemma-2-9b": "google/gemma-2-9b", "Llama-2-7b-hf": "meta-llama/Llama-2-7b-hf",
    "Llama-3-8B": "meta-llama/Meta-Llama-3-8B", "Llama-3.1-8B": "meta-llama/Llama-3.1-8B",
    "Llama-3.2-1B": "meta-llama/Llama-3.2-1B", "Llama-3.2-3B": "meta-llama/Llama-3.2-3B",
    "Mistral-7B-v0.1": "mistralai/Mistral-7B-v0.1", "Mistral-7B-v0.2": "mistralai/Mistral-7B-v0.3",
    "phi-2": "microsoft/phi-2", "Phi-3-mini-4k-instruct": "microsoft/Phi-3-mini-4k-instruct",
    "tiny-llama-1.1b": "TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T",
    "stablelm-base-alpha-3b": "stabilityai/stablelm-base-alpha-3b", "Llama-3.1-70B": "meta-llama/Llama-3.1-70B",
    "Llama-3.1-405B": "meta-llama/Llama-3.1-405B",
}  # fmt: skip

PROJECTIONS = {
    "llama": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "o_proj",
              "mlp": ["gate_proj", "up_proj", "down_proj"], "head": "lm_head"},
    "falcon": {"query": "query_key_value", "key": "query_key_value", "value": "query_key_value", "projection": "dense",
               "mlp": ["dense_h_to_4h", "dense_4h_to_h"], "head": "lm_head"},
    "phi": {"query": "q_proj", "key": "k_proj", "value": "v_proj", "projection": "dense", "mlp": ["fc1", "fc2"],
            "head": "lm_head"},
    "phi3": {"query": "qkv_proj", "key": "qkv_proj", "value": "qkv_proj", "projection": "o_proj",
             "mlp": ["gate_up_proj", "down_proj"], "head": "lm_head"},
    "gpt_neox": {"query": "query_key_value", "key": "query_key_value", "value": "query_key_value", "projection": "dense",
                 "mlp": ["dense_h_to_4h", "dense_4h_to_h"], "head": "embed_out"},
}  # fmt: skip
SHORT = {"q": "query", "k": "key", "v": "value", "o": "projection", "output": "head"}


def modules(model: str, targets: list[str]) -> list[str]:
    """Names of linear layers in transformers' code."""
    kind = predict.architectures()[model]["model_type"]
    table = PROJECTIONS.get(kind, PROJECTIONS["llama"])
    names: list[str] = []
    for target in targets:
        found = table[SHORT.get(target, target)]
        names += found if isinstance(found, list) else [found]
    return sorted(set(names))


@adapter("litgpt_config_hub_a10g.json")
def litgpt(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """LitGPT: bf16 weights, fused attention, cross entropy in chunks on 16-bit logits; the first sample is the longest."""
    case = Case("litgpt", f"{row['config']} {row['machine']}", row["method"], known=True)
    case.measured_gib, case.fits = _gib(row), row["peak_memory_gb"] != "OOM"
    model = LITGPT_MODELS[row["model"]]
    # Its checkpoints hold the output layer apart, also where a model ties it to the embedding.
    shape = predict.architectures()[model] | {"tie_word_embeddings": False}
    if shape["model_type"] == "phi":
        shape["hidden_act"] = "gelu_pytorch_tanh"  # one kernel; transformers' `gelu_new` is eight operations
    techniques: dict[str, Any] = {"bf16_pure": {}, "flash_attention_2": {}}
    if row["method"] == "full":
        techniques["chunked_cross_entropy"] = {"num_chunks": 1, "upcast": False}
    else:
        techniques["chunked_cross_entropy"] = {"num_chunks": max(1, row["seq_len_max"] // 128), "upcast": False}
        name = "qlora" if row["quantization"] else "lora"
        techniques[name] = {
            "r": row["lora_rank"], "lora_dropout": row["lora_dropout"], "target_modules": modules(model, row["lora_targets"])
        }  # fmt: skip
        if row["quantization"]:
            techniques[name]["bnb_4bit_use_double_quant"] = row["quantization"].endswith("dq")
            techniques[name]["prepare_model_for_kbit_training"] = False
            techniques["paged_adamw"] = {}
    if row["sharding"]:
        techniques["fsdp"] = {}
    if row["gradient_checkpointing"]:
        techniques["gradient_checkpointing"] = {}
    accumulation = max(1, row["global_batch"] // row["micro_batch"] // row["num_gpus"])
    case.question = _question(
        shape, "a10g", row["num_gpus"], row["seq_len_max"], row["micro_batch"], accumulation, techniques
    )
    return case


def _question(
    model: str | dict[str, Any], hardware: Any, gpus: int, context: int, batch: int, accumulation: int, techniques: Any
) -> dict[str, Any]:
    return {
        **({"model": model} if isinstance(model, str) else {"model_config": model}),
        "hardware": hardware,
        "num_gpus": gpus,
        "sequence_length": context,
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "techniques": techniques,
    }


SWIFT_MODELS = {
    # Qwen's first version has the shapes of Qwen1.5; its own code is not in transformers.
    "qwen-1_8b-chat": "Qwen/Qwen1.5-1.8B", "qwen-7b-chat": "Qwen/Qwen1.5-7B", "qwen-14b-chat": "Qwen/Qwen1.5-14B",
    "yi-6b-chat": "01-ai/Yi-6B", "yi-34b-chat": "01-ai/Yi-34B", "openbuddy-zephyr-7b-chat": "mistralai/Mistral-7B-v0.1",
    "llama3-8b-instruct": "meta-llama/Meta-Llama-3-8B",
}  # fmt: skip
SWIFT_CONFIGS = {
    # baichuan-inc/Baichuan2-7B-Chat, config.json: Llama's shape with a vocabulary of its own
    "baichuan2-7b-chat": {"model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                          "num_attention_heads": 32, "vocab_size": 125696, "max_position_embeddings": 4096},
}  # fmt: skip
SWIFT_TECHNIQUES = {"lora", "lora+", "rslora", "full", "dora", "lora+neftune", "lora+no_mix", "full+no_mix", "adalora"}


@adapter("ms_swift_benchmark.json")
def ms_swift(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """ms-swift: weights in bf16 under autocast, FlashAttention-2, lengths that vary up to the limit."""
    experiment = row.get("exp_name")
    label = f"{row['table']}: {row['model']} {experiment or row['method']} {row['seq_len_max']}"
    case = Case("ms-swift", label, row["method"], kind="reserved")
    case.measured_gib, case.fits = _gib(row), row["peak_memory_gb"] != "OOM"
    model: Any = SWIFT_MODELS.get(row["model"]) or SWIFT_CONFIGS.get(row["model"])
    if row["num_gpus"] > 1:
        case.unused = "layers on two GPUs (device_map), which is no technique of ours"
    elif model is None:
        case.unused = "the model is code of its own"
    elif "gptq" in (row.get("quantization") or ""):
        case.unused = "GPTQ weights"
    elif experiment and experiment not in SWIFT_TECHNIQUES:
        case.unused = f"{experiment} is no technique of ours"
    if case.unused:
        return case
    techniques: dict[str, Any] = {"bf16": {"dtype": "bfloat16"}}
    techniques["eager" if row["attention"].startswith("eager") else "flash_attention_2"] = {}
    if row["gradient_checkpointing"]:
        techniques["gradient_checkpointing"] = {}
    if row["method"] in ("lora", "adalora"):
        fused = row["model"].startswith("qwen") or row["model"].startswith("baichuan")
        targets: Any = ["q_proj", "k_proj", "v_proj"] if fused else ["q_proj", "k_proj", "v_proj"]
        if "ALL" in str(row.get("lora_targets") or row.get("tuner_params")):
            targets = "all-linear"
        settings = {"r": row.get("lora_rank") or 8, "lora_dropout": 0.05, "target_modules": targets}
        if experiment == "dora":
            settings["use_dora"] = True
        if row["method"] == "adalora":
            settings = {"init_r": 12, "total_step": 1000, "target_modules": targets}
        name = "qlora" if "bnb" in (row.get("quantization") or "") else row["method"]
        case.technique = name
        techniques[name] = settings
    question = _question(model, "a100-80gb", 1, row["seq_len_max"], row["micro_batch"], row["grad_accum"], techniques)
    case.question = question | {"lengths_vary": True}
    return case


@adapter("peft_metamathqa_l40s.json")
def peft(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """peft's method comparison: bf16 weights without autocast, fp32 adapters, lengths that vary up to the limit."""
    names = {
        "LORA": "lora",
        "ADALORA": "adalora",
        "IA3": "ia3",
        "PREFIX_TUNING": "prefix_tuning",
        "PROMPT_TUNING": "prompt_tuning",
    }
    case = Case("peft", row["experiment"], names.get(row["method"], row["method"].lower()), kind="reserved")
    case.measured_gib, case.fits = _gib(row), True
    if row["method"] not in names:
        case.unused = f"{row['method']} is no technique of ours"
    elif row["optimizer"] != "AdamW":
        case.unused = f"the optimizer {row['optimizer']}"
    if case.unused:
        return case
    settings = {k: v for k, v in row["peft_config"].items() if k != "init_lora_weights"}
    if row["method"] == "ADALORA":
        settings = {"init_r": 32, "total_step": 5000, "target_modules": settings["target_modules"]}
    techniques = {"bf16_pure": {}, "sdpa": {}, names[row["method"]]: settings}
    if row["method"] in ("LORA",):
        techniques["lora"]["autocast_adapter_dtype"] = True
    question = _question("meta-llama/Llama-3.2-3B", "l40s", 1, row["seq_len_max"], row["micro_batch"], 1, techniques)
    case.question = question  # the cache is emptied every ten steps: varying lengths leave no blocks behind
    return case


@adapter("torchtune.json")
def torchtune(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """torchtune: bf16 weights, packed to a fixed length unless said otherwise."""
    case = Case("torchtune", f"{row['model']} {row['method']} {row.get('step', '')} {row['gpu']}", row["method"])
    case.measured_gib, case.known = _gib(row), True
    cards = {
        "RTX 4090": "rtx4090",
        "A6000": "a6000",
        "A100-80GB": "a100-80gb",
        "A100-80GB (README says A100)": "a100-80gb",
    }
    card = cards.get(row["gpu"])
    if row.get("seq_len") is None or row.get("seq_len_is_max_only"):
        case.unused = "natural lengths, not stated"
    elif row.get("conditions_unsure"):
        case.unused = "conditions are unsure, says the table"
    elif card is None:
        case.unused = "the GPU is not stated"
    elif card == "a6000":
        case.unused = "more operations per second than an A6000 has: it was another card"
    if case.unused or card is None:
        return case
    case.fits = True
    case.tokens_per_second = row.get("tokens_per_s")
    techniques: dict[str, Any] = {"bf16_pure": {}, "flash_attention_2": {}}
    model = LITGPT_MODELS[row["model"]]
    if row["gradient_checkpointing"]:
        techniques["gradient_checkpointing"] = {}
    for key, name in (("compile", "torch_compile"), ("activation_offload", "activation_offload")):
        if row.get(key):
            techniques[name] = {}
    if row.get("chunked_ce") or row.get("loss"):
        techniques["chunked_cross_entropy"] = {"num_chunks": 8}
    if row.get("optimizer_in_bwd") or "optimizer_in_bwd=True" in (row.get("optimizer") or ""):
        techniques["optimizer_in_backward"] = {}
    optimizer = row.get("optimizer") or ""
    for word, name in (("PagedAdamW8bit", "paged_adamw_8bit"), ("8-bit", "adamw_8bit"), ("", "adamw_torch_fused")):
        if word in optimizer:
            techniques[name] = {}
            break
    if row["method"] in ("lora", "qlora"):
        techniques[row["method"]] = {
            "r": row["lora_rank"], "lora_dropout": row.get("lora_dropout", 0.0),
            "target_modules": modules(model, row["lora_targets"]),
        }  # fmt: skip
    if row["method"] == "qlora":
        techniques["qlora"]["prepare_model_for_kbit_training"] = False
    if row.get("sharding"):
        techniques["fsdp"] = {}
    if row.get("cpu_offload"):
        techniques |= {"offload_param": {}, "offload_optimizer": {}}
    case.question = _question(
        model, card, row["num_gpus"], row["seq_len"], row["micro_batch"], row.get("grad_accum", 1), techniques
    )
    return case


@adapter("torchtitan.json")
def torchtitan(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """torchtitan: FSDP2 with fp32 weights, SDPA, selective checkpointing."""
    case = Case(
        "torchtitan", f"{row['technique']} {row['num_gpus']}x{row['gpu']} {row['seq_len']}", "fsdp", kind="reserved"
    )
    case.measured_gib, case.fits, case.tokens_per_second = _gib(row), True, row.get("tokens_per_s")
    if "CP" in row["technique"] and "CP 1" not in row["technique"]:
        case.unused = "context parallel"
    elif not row.get("full_ac"):
        case.unused = "checkpointing of single operations (every second matrix product is kept)"
    if case.unused:
        return case
    card = "h200" if row["gpu"] == "H200" else {"name": "h100-80gb", "memory_gib": 94.5}
    techniques: dict[str, Any] = {"fp8" if "Float8" in row["technique"] else "bf16": {}, "sdpa": {}, "fsdp": {}}
    techniques["adamw_torch_fused"] = {}
    if "compile" in row["technique"]:
        techniques["torch_compile"] = {}
    techniques["gradient_checkpointing"] = {}
    case.question = _question(
        "meta-llama/Llama-3.1-8B", card, row["num_gpus"], row["seq_len"], row["micro_batch"], 1, techniques
    )
    return case


@adapter("kempnerforge_h200.json")
def kempner(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """KempnerForge: FSDP2 with fp32 weights, full checkpointing, compiled."""
    case = Case("kempnerforge", f"{row['model']} tp{row['tp']} fsdp{row['fsdp']}", "fsdp", known=True)
    case.measured_gib, case.fits = _gib(row), True
    case.seconds, case.tokens_per_second = row["step_time_s"], row["tokens_per_s"]
    if row["tp"] > 1:
        case.unused = "tensor parallel"
        return case
    inner = 14336 if row["n_embd"] == 4096 else int(-(-(row["n_embd"] * 8 / 3 * 1.3) // 256) * 256)
    shape = {
        "model_type": "llama", "hidden_size": row["n_embd"], "intermediate_size": inner, "num_hidden_layers": row["n_layer"],
        "num_attention_heads": row["n_head"], "num_key_value_heads": row["n_kv"], "vocab_size": row["vocab"],
    }  # fmt: skip
    techniques: dict[str, Any] = {"bf16": {}, "sdpa": {}, "gradient_checkpointing": {}, "adamw_torch_fused": {}}
    techniques["fsdp"] = {}
    if row["compile"]:
        techniques["torch_compile"] = {}
    case.question = _question(
        shape, "h200", row["num_gpus"], row["seq_len"], row["micro_batch"], row["grad_accum"], techniques
    )
    return case


@adapter("deepspeed_zero_bf16_muon.json")
def deepspeed(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """DeepSpeed's own examples."""
    case = Case(
        "deepspeed", f"{row['model'][:20]} {row['precision'][:20]} {row['optimizer'][:6]}", f"zero{row['zero_stage']}"
    )
    case.measured_gib = _gib(row)
    if row.get("missing"):
        case.unused = f"not stated: {row['missing']}"
        return case
    if "master_weights" in row["precision"]:
        case.unused = "DeepSpeed's bf16 master weights are no technique of ours"
        return case
    case.known, case.fits, case.seconds = True, True, row["step_time_s"]
    shape = {"model_type": "gpt2", "n_embd": 4096, "n_layer": 32, "n_head": 32, "vocab_size": 50257, "n_positions": 512,
             "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "tie_word_embeddings": False}  # fmt: skip
    techniques = {"bf16": {}, "sdpa": {}, "gradient_checkpointing": {}, "adamw_torch_fused": {},
                  "zero3": {"reduce_bucket_size": 50_000_000, "stage3_prefetch_bucket_size": 50_000_000}}  # fmt: skip
    case.question = _question(shape, "h100-80gb", row["num_gpus"], row["seq_len"], row["micro_batch"], 1, techniques)
    return case


@adapter("hf_perf_guide_bert_v100.json")
def bert(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """transformers' guide: BERT, which is no causal language model; its encoder is traced as a decoder would be."""
    case = Case("hf-guide", row["case"], "full", kind="reserved", known=True)
    case.measured_gib, case.fits, case.seconds = row["minus_context_gb"] * GB / GIB, True, row["step_time_s"]
    # BertLMHeadModel has the same layers; its logits are left out, a classifier has two.
    shape = {"model_type": "bert", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
             "num_attention_heads": 16, "vocab_size": 30522, "max_position_embeddings": 512, "is_decoder": True}  # fmt: skip
    precision = "fp16" if "fp16" in row["precision"] else "fp32"
    optimizer = {"adamw_hf": "adamw_hf", "adafactor": "adafactor", "bnb Adam8bit": "adamw_8bit"}[row["optimizer"]]
    techniques: dict[str, Any] = {precision: {}, "eager": {}, optimizer: {}, "liger": {}}
    if row["gradient_checkpointing"]:
        techniques["gradient_checkpointing"] = {}
    # torch before 2.0 zeroed gradients between steps and kept them, as accumulation does.
    accumulation = max(2, row["grad_accum"])
    case.question = _question(shape, "v100-16gb", 1, row["seq_len"], row["micro_batch"], accumulation, techniques)
    return case


@adapter("mosaicml_llm_foundry_throughput.json")
def mosaic(row: dict[str, Any], document: dict[str, Any]) -> Case:
    """MosaicML: every row ran; MPT's layers are those of GPT-2 without biases, with a plain GELU."""
    label = f"{row['model']} {row['gpu']}x{row['num_gpus']} {row['seq_len']} b{row['micro_batch']}"
    case = Case("mosaicml", label, "fsdp", kind="none", fits=True)
    case.seconds, case.tokens_per_second = row["step_time_s"], row["tokens_per_s"]
    shapes = {"MPT-125m": (768, 12, 12), "MPT-350m": (1024, 24, 16), "MPT-760m": (1536, 24, 12), "MPT-1b": (2048, 24, 16),
              "MPT-3b": (2560, 32, 20), "MPT-7b": (4096, 32, 32), "MPT-13b": (5120, 40, 40), "MPT-30b": (7168, 48, 56),
              "MPT-70b": (8192, 80, 64)}  # fmt: skip
    if "fp8" in row["precision"]:
        case.unused = "FP8 by TransformerEngine"
        return case
    width, depth, heads = shapes[row["model"]]
    shape = {"model_type": "gpt2", "n_embd": width, "n_layer": depth, "n_head": heads, "vocab_size": 50368,
             "n_positions": row["seq_len"], "activation_function": "gelu", "resid_pdrop": 0.0, "embd_pdrop": 0.0,
             "attn_pdrop": 0.0}  # fmt: skip
    # Its loss is flash-attn's fused cross entropy, on 16-bit logits.
    precision = "bf16" if row["precision"] == "amp_bf16" else "bf16_pure"
    loss = {"num_chunks": 1, "upcast": False}
    techniques: dict[str, Any] = {precision: {}, "flash_attention_2": {}, "fsdp": {}, "chunked_cross_entropy": loss}
    if row["gradient_checkpointing"]:
        techniques["gradient_checkpointing"] = {}
    card = row["gpu"].replace("_", "-")
    case.question = _question(
        shape, card, row["num_gpus"], row["seq_len"], row["micro_batch"], row["grad_accum"], techniques
    )
    return case


def cases(folder: Path) -> Iterator[Case]:
    """Every row of every file that has an adapter."""
    for file, adapt in ADAPTERS.items():
        path = folder / file
        if path.exists():
            document = json.loads(path.read_text(encoding="utf-8"))
            for row in document["rows"]:
                yield adapt(row, document)


@dataclass
class Result:
    """A case with its prediction."""

    case: Case
    predicted_gib: float | None = None
    predicted: dict[str, Any] = field(default_factory=dict)

    @property
    def error(self) -> float | None:
        """Relative error of memory."""
        measured = self.case.measured_gib
        return None if measured is None or self.predicted_gib is None else self.predicted_gib / measured - 1


def ask(case: Case, traces: predict.Traces) -> Result:
    assert case.question is not None
    answer = json.loads(next(predict.answer_lines([json.dumps(case.question)], traces)))
    key = "predicted_peak_memory_reserved_gib" if case.kind == "reserved" else "predicted_peak_memory_allocated_gib"
    return Result(case, answer.get(key), answer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measured", type=Path, default=MEASURED)
    parser.add_argument("--source", help="only this source, row by row")
    arguments = parser.parse_args()
    traces = predict.Traces(predict.default_cache())
    started = time.perf_counter()
    results = [ask(c, traces) if not c.unused else Result(c) for c in cases(arguments.measured)]
    by = collections.defaultdict(list)
    for r in results:
        if r.predicted.get("error"):
            print("ERROR", r.case.source, r.case.label, r.predicted["error"])
        if arguments.source in (r.case.source, "all") and not r.case.unused:
            p = r.predicted
            c = {k[:5]: round(v, 2) for k, v in p.get("predicted_memory_gib", {}).get("by_category", {}).items()}
            print(
                f"{r.case.label[:55]:55} {r.case.technique:6} {r.case.measured_gib or 0:7.2f} {r.predicted_gib or 0:7.2f} "
                f"{100 * (r.error or 0):+6.1f}% fits {r.case.fits}/{p.get('fits')} {p.get('margin_gib', 0):.1f} {c}"
            )
        if r.error is not None:
            by[r.case.source, r.case.technique].append(r.error)
    for key, errors in by.items():
        print(
            key,
            len(errors),
            f"MAPE {100 * statistics.mean(map(abs, errors)):.1f} bias {100 * statistics.mean(errors):+.1f} "
            f"within10 {sum(abs(e) < 0.1 for e in errors)}/{len(errors)}",
        )
    for source in dict.fromkeys(r.case.source for r in results):
        times = [
            (r.predicted["predicted_tokens_per_second"] / r.case.tokens_per_second - 1, r)
            for r in results
            if r.case.source == source and r.case.tokens_per_second and r.predicted.get("predicted_tokens_per_second")
        ]
        if times:
            e = [t for t, _ in times]
            print(
                "TIME",
                source,
                len(e),
                f"MAPE {100 * statistics.mean(map(abs, e)):.1f} bias {100 * statistics.mean(e):+.1f}",
            )
            for t, r in times:
                print(
                    "  T",
                    f"{r.case.label[:60]:60} {r.case.tokens_per_second:9.0f} {r.predicted['predicted_tokens_per_second']:9.0f} {100 * t:+.0f}% {r.predicted['bottleneck']}",
                )
    verdicts = collections.Counter(
        (r.case.fits, r.predicted.get("fits")) for r in results if not r.case.unused and r.case.fits is not None
    )
    print(verdicts, f"{time.perf_counter() - started:.1f} s", memory_module.FRAGMENTATION)


if __name__ == "__main__":
    main()
