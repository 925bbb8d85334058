"""Rates that a hardware entry really reaches: matrix products, memory, links, PCIe, host, launches.

    python -m finetune_study.calibrate --device cuda --num-gpus 8 results/calibration/a100-80gb.json

A short job on the devices of a run; forecasts then count with these rates instead of the data sheet's. Each rate is the
best of some repeats, since whatever disturbs a measurement makes it slower.
"""

import argparse
import json
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune_study.forecast.tape import is_kernel
from finetune_study.record import write_atomically

REPEATS = 5
SIDE = {"cuda": 8192, "cpu": 1024}
"""Rows and columns of the matrices: large enough to fill the device."""
BYTES = {"cuda": 2**30, "cpu": 2**28}
"""Size of what is copied and gathered."""
TINY: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2},
    "gpt2": {"n_embd": 16, "n_layer": 8, "n_head": 2, "n_positions": 16},
    "falcon": {"hidden_size": 16, "num_hidden_layers": 8, "num_attention_heads": 2},
    "gpt_neox": {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 8, "num_attention_heads": 2},
}
"""Models whose kernels take no time, so that a step waits for the host; their 8 layers make hundreds of them."""
CPU_WEIGHTS = 2**24
"""Their states are far larger than any cache."""
PASSES = 10
FORMATS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def best_seconds(work: Callable[[], object], device: str) -> float:
    """Shortest of some tries, after one that is not counted."""
    shortest = float("inf")
    for attempt in range(REPEATS + 1):
        _wait(device)
        start = time.perf_counter()
        work()
        _wait(device)
        if attempt:
            shortest = min(shortest, time.perf_counter() - start)
    return shortest


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def rates(device: str) -> dict[str, float]:
    """Rates of one device: operations, bytes or weights per second; those of launches in seconds."""
    found: dict[str, float] = {}
    for name, dtype in FORMATS.items():
        if device == "cuda" or name != "fp16":  # transformers does not train in fp16 on a CPU
            found[f"matmul_{name}"] = _matmul_rate(device, dtype)
            found[f"attention_{name}"] = _attention_rate(device, dtype)
    data = torch.zeros(BYTES[device] // 4, device=device)
    found["memory"] = 2 * BYTES[device] / best_seconds(lambda: data.add_(1), device)
    found |= _launches(device)
    on_host = torch.zeros(BYTES["cpu"] // 4, pin_memory=device == "cuda")
    found["host"] = 2 * BYTES["cpu"] / best_seconds(lambda: on_host.add_(1), "cpu")
    found["cpu_optimizer"] = _cpu_optimizer_rate()
    if device == "cuda":
        there = torch.empty_like(on_host, device=device)
        down = best_seconds(lambda: there.copy_(on_host, non_blocking=True), device)
        up = best_seconds(lambda: on_host.copy_(there, non_blocking=True), device)
        found["pcie"] = BYTES["cpu"] / max(down, up)
    return found


def _matmul_rate(device: str, dtype: torch.dtype) -> float:
    side = SIDE[device]
    matrix = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / best_seconds(lambda: matrix @ matrix, device)


class _Kernels(TorchDispatchMode):
    """Counts what is started."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += is_kernel(func)
        return func(*args, **(kwargs or {}))


def _launches(device: str) -> dict[str, float]:
    """Seconds in which the host starts an operation, in a forward pass and in backward: means over models."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a kernel on a CPU shall not wait for other threads
    found = [launches_of(model_type, device) for model_type in TINY]
    torch.set_num_threads(threads)
    return {f"launch_{way}": statistics.fmean(one[way] for one in found) for way in found[0]}


def launches_of(model_type: str, device: str) -> dict[str, float]:
    """Seconds in which the host starts an operation of a model of this type, forward and backward."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, vocab_size=32, **TINY[model_type])
    model = AutoModelForCausalLM.from_config(config).to(device)
    tokens = torch.zeros(1, 4, dtype=torch.long, device=device)
    losses: list[torch.Tensor] = []

    def forward() -> None:
        losses[:] = [model(input_ids=tokens, labels=tokens).loss]

    def backward() -> None:
        losses[0].backward(retain_graph=True)

    return {work.__name__: _seconds_of_kernel(work, device) for work in (forward, backward)}


def _seconds_of_kernel(work: Callable[[], None], device: str) -> float:
    def repeated() -> None:
        for _ in range(PASSES):
            work()

    work()
    kernels = _Kernels()
    with kernels:
        work()
    return best_seconds(repeated, device) / PASSES / kernels.number


def _cpu_optimizer_rate() -> float:
    """Weights that AdamW updates on the host in a second, on all its cores: what offloaded optimizers wait for."""
    weights = torch.zeros(CPU_WEIGHTS, requires_grad=True)
    weights.grad = torch.zeros_like(weights)
    optimizer = torch.optim.AdamW([weights], fused=True)
    return CPU_WEIGHTS / best_seconds(optimizer.step, "cpu")


def _attention_rate(device: str, dtype: torch.dtype) -> float:
    """Of both products of a forward pass; causal, so half of the square."""
    heads, context, width = 16, SIDE[device] // 4, 64
    query = torch.randn(1, heads, context, width, device=device, dtype=dtype)
    attend = torch.nn.functional.scaled_dot_product_attention
    return (
        4 * heads * context**2 * width / 2 / best_seconds(lambda: attend(query, query, query, is_causal=True), device)
    )


def _gather(rank: int, world_size: int, device: str, port: int, path: str) -> None:
    """One rank of the measurement of the link; the first one writes bytes per second."""
    from torch import distributed

    if device == "cuda":
        torch.cuda.set_device(rank)
    backend = "nccl" if device == "cuda" else "gloo"
    distributed.init_process_group(backend, f"tcp://127.0.0.1:{port}", rank=rank, world_size=world_size)
    part = torch.zeros(BYTES[device] // 4 // world_size, device=device)
    parts = [torch.empty_like(part) for _ in range(world_size)]
    took = best_seconds(lambda: distributed.all_gather(parts, part), device)
    if rank == 0:
        received = part.numel() * 4 * (world_size - 1)
        Path(path).write_text(str(received / took), encoding="utf-8")
    distributed.destroy_process_group()


def link(device: str, num_gpus: int) -> float:
    """Bytes per second that a device receives while all gather from each other."""
    with socket.socket() as free, tempfile.NamedTemporaryFile("r") as answer:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        torch.multiprocessing.spawn(_gather, (num_gpus, device, port, answer.name), nprocs=num_gpus)
        return float(answer.read())


def calibrate(device: str, num_gpus: int) -> dict[str, Any]:
    """Measures everything."""
    found = rates(device)
    if num_gpus > 1:
        found["link"] = link(device, num_gpus)
    name = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"device": name, "num_gpus": num_gpus, "torch": torch.__version__, "rates": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), required=True)
    parser.add_argument("--num-gpus", type=int, default=1, help="devices of this node that gather from each other")
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    found = calibrate(arguments.device, arguments.num_gpus)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, json.dumps(found, indent=1) + "\n")
    print(json.dumps(found["rates"]))


if __name__ == "__main__":
    main()
