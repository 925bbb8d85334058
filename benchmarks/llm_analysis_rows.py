"""Asks llm-analysis about rows: JSON lines in, GiB or null a line out. Runs in an environment of its own.

It knows full fine-tuning with Adam, ZeRO and recomputation; it has nothing for PEFT, quantised weights or offload.
"""

import json
import logging
import sys

from llm_analysis.analysis import ActivationRecomputation, DSZeRO, LLMAnalysis  # type: ignore[import-not-found]
from llm_analysis.config import (  # type: ignore[import-not-found]
    DtypeConfig,
    GPUConfig,
    ModelConfig,
    ParallelismConfig,
)

logging.disable(logging.CRITICAL)
ROOMY_GB = 100_000  # it refuses what does not fit; how much is needed is the question here


def ask(row: dict) -> float:  # type: ignore[type-arg]
    analysis = LLMAnalysis(
        ModelConfig("model", **row["shape"]),
        GPUConfig("gpu", ROOMY_GB, 1000, 100, 1e-6, 100),
        DtypeConfig("dtype", row["bits"], row["bits"], row["bits"]),
        ParallelismConfig(dp_size=row["num_gpus"]),
    )
    answer = analysis.training(
        batch_size_per_gpu=row["batch"],
        gradient_accumulation_steps=row["accumulation"],
        seq_len=row["context"],
        activation_recomputation=ActivationRecomputation.FULL if row["recompute"] else ActivationRecomputation.NONE,
        ds_zero=DSZeRO(row["zero"]),
        flash_attn=row["flash"],
        mlp_gated_linear_units=row["gated"],
        other_op_bytes=row["state_bytes"],
        master_weights_dtype_bytes=row["master_bytes"],
    )
    return float(answer["(weight+op_state+grad+act)_memory_per_gpu"]) / 2**30


for line in sys.stdin:
    try:
        print(json.dumps(ask(json.loads(line))))
    except (AssertionError, ValueError, TypeError, ZeroDivisionError):
        print("null")
