"""Time of an optimizer step: counted work against rates. What takes longest is what the step waits for."""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from finetune_study.forecast.hardware import Device
from finetune_study.forecast.layout import BYTES, Dtype
from finetune_study.forecast.memory import Situation, gathered_bytes, weight_bytes
from finetune_study.forecast.profile import Profile
from finetune_study.forecast.recipe import OPTIMIZERS, Recipe

BOTTLENECKS = ("compute", "memory bandwidth", "interconnect", "PCIe", "CPU optimizer", "launch")

BEST_MATMUL = {"before Hopper": 0.87, "Hopper": 0.80}
"""Of the data sheet's rate, what the best shape reaches: 0.87 on an A100 SXM, 0.80 on an H100 SXM ("maximum achievable
matmul FLOPS", Bekman, Machine Learning Engineering Open Book, compute/accelerator)."""
SHAPES_OF_LAYERS = 0.9
"""Of what the best shape reaches, be it from a data sheet or measured, what a model's layers do. A round number."""
ATTENTION_EFFICIENCY = {"before Hopper": 0.55, "Hopper": 0.35}
"""The same for FlashAttention-2, forward and backward together (arXiv 2307.08691, figure 4; on an H100 its kernels
reach 0.35, arXiv 2407.08608, section 1)."""
FLASH_3_SPEEDUP = 1.6
"""Of FlashAttention-3's kernels over those of 2 on an H100, both passes together (arXiv 2407.08608, section 4.1:
forward 1.5 to 2.0, backward 1.5 to 1.75). Those of 4 are taken to be as fast: there is no source yet that says more."""
MEMORY_EFFICIENCY = 0.80
"""Of the data sheet's bandwidth, what copies reach (STREAM-like kernels). A round number, without a source; a
calibration measures it."""
LINK_EFFICIENCY = 0.70
"""Of a link's bandwidth, what NCCL's rings reach (nccl-tests, bus bandwidth of large messages). A round number,
without a source; a calibration measures it."""
LAUNCH_SECONDS = {"forward": 12e-6, "backward": 5.6e-6}
"""Host time of an operation of torch that starts a kernel: the model's Python, dispatch, autograd. Means over tiny
models of four kinds on one core of an Intel Xeon (benchmarks/launches.py); `calibrate` measures the same."""
COMPILED_KERNELS = 0.25
"""Of the operations, the kernels that are left when neighbours are fused. An assumption, without a source: that
three of four operations of a layer are element-wise, and join a neighbour."""
COMPILED_BYTES = 0.4
"""Of the element-wise traffic, what is left then: each value is read and written once for a chain of three or so. An
assumption, too; neither was fitted to a table or measured here."""
FUSED_ADAM_BYTES = 3 * 4 + 2 * 2 * 4
"""Bytes that Adam moves for an fp32 weight in one kernel: a gradient that is read, weight and two states both ways."""
STEP_BY_STEP_BYTES = 60
"""The same where each operation of Adam is a kernel (torch/optim/adamw.py), about twice as much. Adafactor, Muon,
GaLore and APOLLO, whose operations are others, are taken to move as much."""
NETWORK_GB_PER_S = {"before Hopper": 25.0, "Hopper": 50.0}
"""Of a GPU's own adapter, 200 or 400 Gb/s (DGX A100 and DGX H100), where nothing is said."""
HOST_GB_PER_S = 150.0
"""Memory bandwidth of a server's host, shared by its GPUs (eight channels of DDR4-3200 give 205 at best)."""


UNKNOWN_RATES = (
    "the hardware's rates are not known: no step time until, in a study, `snakemake --cores all calibrate` measures "
    "them, or `hardware` of a row gives tflops and memory_gb_per_s"
)


BEYOND_FLASH_2 = ("flash_attention_3", "flash_attention_4")
FORMATS: dict[str, Dtype] = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Rates:
    """What a device really reaches. A calibration replaces these."""

    matmul: Mapping[str, float]
    """Operations per second of matrix products, by number format."""
    attention: Mapping[str, float]
    """The same of fused attention."""
    memory: float
    """Bytes per second of the device's memory."""
    link: float | None
    """Bytes per second to another device of the run, one direction."""
    pcie: float | None
    """Bytes per second to the host, one direction."""
    host: float = HOST_GB_PER_S * 1e9
    """Bytes per second of the host's memory."""
    launch: Mapping[str, float] = field(default_factory=lambda: LAUNCH_SECONDS)
    """Seconds for an operation to be started, forward (recomputed, too) and backward."""
    cpu_optimizer: float | None = None
    """Weights that the host's optimizer updates in a second, for all of its devices; None: it is bound by memory."""


def rates_of(device: Device, num_gpus: int, calibration: Mapping[str, float] | None = None) -> Rates | None:
    """Rates of a device: the data sheet's, times what is usually reached, or what was measured.

    Returns:
        None where the device's rates are not known.
    """
    measured = calibration or {}
    age = "Hopper" if (device.compute_capability or 0) >= 9 else "before Hopper"
    matmul: dict[str, float] = {kind: rate * 1e12 * BEST_MATMUL[age] for kind, rate in device.tflops.items()}
    attention: dict[str, float] = {
        kind: rate * 1e12 * ATTENTION_EFFICIENCY[age] for kind, rate in device.tflops.items()
    }
    attention |= {
        key.removeprefix("attention_"): value for key, value in measured.items() if key.startswith("attention_")
    }
    matmul |= {key.removeprefix("matmul_"): value for key, value in measured.items() if key.startswith("matmul_")}
    matmul = {kind: rate * SHAPES_OF_LAYERS for kind, rate in matmul.items()}
    memory = measured.get("memory") or (device.memory_gb_per_s or 0) * 1e9 * MEMORY_EFFICIENCY
    if not matmul or not memory:
        return None
    link = device.link_between(min(num_gpus, device.gpus_per_node))
    if num_gpus > device.gpus_per_node:
        network = device.network_gb_per_s or NETWORK_GB_PER_S[age]
        link = min(link or network, network)
    return Rates(
        matmul,
        attention,
        memory,
        (measured.get("link") if num_gpus <= device.gpus_per_node else None)
        or (link * 1e9 * LINK_EFFICIENCY if link else None),
        measured.get("pcie") or (device.pcie_gb_per_s * 1e9 * LINK_EFFICIENCY if device.pcie_gb_per_s else None),
        measured.get("host") or HOST_GB_PER_S * 1e9,
        {way: measured.get(f"launch_{way}") or seconds for way, seconds in LAUNCH_SECONDS.items()},
        measured.get("cpu_optimizer"),
    )


def learn(pairs: Iterable[tuple[float, float]]) -> float:
    """The factor between predicted and measured step times of one kind of hardware: the median, which one slow run does
    not move.

    Args:
        pairs: predicted and measured seconds of a step.
    """
    return statistics.median(measured / predicted for predicted, measured in pairs)


@dataclass(frozen=True)
class StepTime:
    """Predicted time of an optimizer step."""

    seconds: float | None
    bottleneck: str | None
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds of each cause, as if nothing else took time."""
    warnings: tuple[str, ...] = ()


def predict(profile: Profile, recipe: Recipe, at: Situation, rates: Rates | None) -> StepTime:
    """Time of an optimizer step, with all its micro-batches.

    Passes overlap with their communication where the library does so (`Recipe.overlaps`); what is started slower than
    it is computed waits for the host.
    """
    if rates is None:
        return StepTime(None, None, warnings=(UNKNOWN_RATES,))
    if recipe.swaps_to_nvme:
        return StepTime(None, None, warnings=("how fast the NVMe drive is is not known: no step time",))
    if unknown := _unknown_links(recipe, at, rates):
        return StepTime(None, None, warnings=unknown)
    parts = dict.fromkeys(BOTTLENECKS, 0.0)
    total = 0.0
    for phases in (("forward",), ("recompute", "backward")):
        compute = _matmul_seconds(profile, recipe, at, rates, phases)
        if compute is None:
            given = f"no rate is known for {recipe.precision} on this hardware: no step time"
            return StepTime(None, None, warnings=(given,))
        memory = _memory_seconds(profile, recipe, at, rates, phases)
        launch = _launch_seconds(profile, recipe, at, rates, phases)
        link = _shard_seconds(profile, recipe, at, rates, "backward" in phases)
        pcie = _offload_seconds(profile, recipe, at, rates, "backward" in phases)
        busy = max(compute + memory, launch, pcie)
        moved = once = 0.0
        if "backward" in phases:
            # Gradients are reduced and offloaded in one stream (stage_1_and_2.py, reduce_ipg_grads; stage3.py,
            # __reduce_and_partition_ipg_grads; torch's _fsdp_collectives.py, foreach_reduce).
            moved, moved_once = _gradient_offload_seconds(profile, recipe, at, rates)
            link_once = _once_seconds(profile, recipe, at, rates)
            once = link_once + moved_once
            parts["interconnect"] += link_once
            parts["PCIe"] += moved_once
        beside = link + moved
        together = max(busy, beside) if recipe.overlaps else busy + beside
        last = max(busy, beside + once) if recipe.overlaps else together + once
        total += (at.gradient_accumulation_steps - 1) * together + last
        for name, seconds in zip(BOTTLENECKS, (compute, memory, link, pcie + moved, 0.0, launch), strict=True):
            parts[name] += at.gradient_accumulation_steps * seconds
    products = _products_of_update(profile, recipe, at, rates)
    if products is None:
        return StepTime(
            None, None, warnings=(f"no rate is known for the products of {recipe.optimizer}: no step time",)
        )
    parts["compute"] += products
    total += products + _update(profile, recipe, at, rates, parts)
    return StepTime(total, max(parts, key=lambda name: parts[name]), parts)


def _unknown_links(recipe: Recipe, at: Situation, rates: Rates) -> tuple[str, ...]:
    """A warning for each bandwidth that a step needs and nobody knows. On a CPU the host is the device itself, and what
    is offloaded passes through no bus."""
    offloads = at.device != "cpu" and bool(recipe.offloaded or recipe.has("activation_offload"))
    needed = {
        ("link between the GPUs", "link_gb_per_s"): at.num_gpus > 1 and rates.link is None,
        ("bus to the host that offload needs", "pcie_gb_per_s"): offloads and rates.pcie is None,
    }
    return tuple(
        f"the bandwidth of the {what} is not known: no step time until `hardware` of a row gives {key}, or, in a "
        "study, `snakemake --cores all calibrate` measures it"
        for (what, key), is_missing in needed.items()
        if is_missing
    )


def _counted(profile: Profile, recipe: Recipe, at: Situation, phases: tuple[str, ...], kind: str) -> float:
    """Work of a micro-batch."""
    return profile.amount(phases, kind, at.batch, recipe.positions(at.context), max(recipe.rank, 1))


def _matmul_seconds(
    profile: Profile, recipe: Recipe, at: Situation, rates: Rates, phases: tuple[str, ...]
) -> float | None:
    seconds = 0.0
    for what, rates_of_kind in (("matmul", rates.matmul), ("attention", rates.attention)):
        for kind, dtype in FORMATS.items():
            work = _counted(profile, recipe, at, phases, f"{what}_{kind}")
            head = _head_work(profile, recipe, at, phases) if (what, dtype) == ("matmul", recipe.compute) else 0.0
            work += head if recipe.chunks_loss else 0.0
            if not work:
                continue
            faster = FLASH_3_SPEEDUP if what == "attention" and recipe.attention in BEYOND_FLASH_2 else 1.0
            rate, own = (
                rates_of_kind.get(unit) or rates_of_kind.get(kind) or _instead_of(kind, rates_of_kind)
                for unit in (_unit(recipe, kind) if what == "matmul" else kind, kind)
            )
            if rate is None or own is None:
                return None
            slow = head if recipe.precision == "fp8" else 0.0
            seconds += ((work - slow) / rate + slow / own) / faster
    return seconds


def _instead_of(kind: str, rates: Mapping[str, float]) -> float | None:
    """Without units of its own bf16 is computed in fp32."""
    return rates.get("fp32") if kind == "bf16" else None


def _head_work(profile: Profile, recipe: Recipe, at: Situation, phases: tuple[str, ...]) -> float:
    """Products of the output layer: logits; in backward the gradients of its input and, where it is trained, of its
    weights. They are not in the trace where the loss is computed in chunks; liger computes those of backward in
    forward, which changes nothing in sum. fp8 leaves the layer as it is."""
    positions = at.batch * (recipe.positions(at.context))
    product = 2.0 * positions * profile.vocabulary * profile.hidden_size
    return product * ("forward" in phases) + product * (1 if recipe.peft else 2) * ("backward" in phases)


def _unit(recipe: Recipe, kind: str) -> str:
    if recipe.precision == "fp8" and kind == "bf16":
        return "fp32" if recipe.emulates_fp8 else "fp8"
    return "tf32" if recipe.precision == "tf32" and kind == "fp32" else kind


def _memory_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates, phases: tuple[str, ...]) -> float:
    """Element-wise traffic; products stream their operands while they compute."""
    traffic = _counted(profile, recipe, at, phases, "bytes_pointwise")
    return traffic * (COMPILED_BYTES if recipe.fuses else 1.0) / rates.memory


def _launch_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates, phases: tuple[str, ...]) -> float:
    fused = COMPILED_KERNELS if recipe.fuses else 1.0
    return fused * sum(
        _counted(profile, recipe, at, (phase,), "kernels")
        * rates.launch["backward" if phase == "backward" else "forward"]
        for phase in phases
    )


def _trained(profile: Profile, recipe: Recipe) -> float:
    return sum(p.count(recipe.rank) for p in profile.parameters if p.trained)


def _shards(recipe: Recipe, at: Situation) -> int:
    """Devices that share the optimizer's states."""
    return at.num_gpus if recipe.sharding in ("zero1", "zero2", "zero3", "fsdp") else 1


def _ring(at: Situation) -> float:
    """Share of the data that passes through a device's link in a gather or a scatter."""
    return (at.num_gpus - 1) / at.num_gpus


def _shard_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates, backward: bool) -> float:
    """What travels in every pass: weights that are gathered, in every backward pass gradients that are scattered."""
    if rates.link is None or at.num_gpus == 1:
        return 0.0
    moved = 0.0
    if recipe.sharding in ("zero3", "fsdp") and not (backward and recipe.keeps_gathered):
        moved += sum(
            p.count(recipe.rank) * gathered_bytes(p, recipe) * (1.0 if p.quantized else recipe.gathered_share)
            for p in profile.parameters
        )
    once = recipe.accumulates_whole and at.gradient_accumulation_steps > 1
    if backward and recipe.sharding in ("zero2", "zero3", "fsdp") and not once:
        moved += _trained(profile, recipe) * BYTES[recipe.compute] * recipe.scattered_share
    return moved * _ring(at) / rates.link


def _once_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates) -> float:
    """Gradients that travel once a step, in its last backward pass.

    DDP sums them everywhere, a scatter and a gather; ZeRO-1 scatters them (DeepSpeed, stage_1_and_2.py: at the boundary
    of accumulation alone where gradients are not partitioned), and so does FSDP what it accumulated whole."""
    if rates.link is None or at.num_gpus == 1:
        return 0.0
    if recipe.accumulates_whole and at.gradient_accumulation_steps > 1:
        return _trained(profile, recipe) * BYTES[recipe.compute] * _ring(at) / rates.link
    passes = {"ddp": 2, "zero1": 1}.get(str(recipe.sharding), 0)
    return passes * _trained_bytes(profile, recipe) * _ring(at) / rates.link


def _trained_bytes(profile: Profile, recipe: Recipe) -> float:
    return _trained(profile, recipe) * BYTES[recipe.adapters if recipe.peft else recipe.weights]


def _offload_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates, backward: bool) -> float:
    """Offloaded weights and activations pass through PCIe in every pass; weights as they are held, a device's own shard
    (FSDP casts it on the device: torch's _fsdp_param.py, all_gather_inputs)."""
    if rates.pcie is None:
        return 0.0
    moved = 0.0
    if "weights" in recipe.offloaded and not (backward and recipe.keeps_gathered):
        moved += sum(p.count(recipe.rank) * weight_bytes(p, recipe) for p in profile.parameters) / at.num_gpus
    if recipe.has("activation_offload"):
        curves = profile.curves(at.batch, recipe.positions(at.context), max(recipe.rank, 1))
        moved += float((curves["saved"] + curves["pointwise"]).max())
    return moved / rates.pcie


def _gradient_offload_seconds(profile: Profile, recipe: Recipe, at: Situation, rates: Rates) -> tuple[float, float]:
    """Offloaded gradients of a device's share pass through PCIe: mean of all backward passes, and more in the last.

    DeepSpeed sums them on the device, and keeps the sum on the host in between. Stage 2 copies it there in every pass,
    and back in each but the first (stage_1_and_2.py, copy_grads_in_partition, async_accumulate_grad_in_cpu_via_gpu;
    neither with one micro-batch); stage 3 does both in every pass (stage3.py, partition_grads). In the last pass, where
    stage 1 begins, the sum goes as fp32 (async_inplace_copy_grad_to_fp32_buffer_from_gpu; stage3.py,
    _offload_grad_partition_at_boundary). FSDP copies what it has scattered, and sums on the host (torch's
    _fsdp_collectives.py, foreach_reduce).
    """
    if rates.pcie is None or "gradients" not in recipe.offloaded:
        return 0.0, 0.0
    steps = at.gradient_accumulation_steps
    seconds = _trained(profile, recipe) / _shards(recipe, at) / rates.pcie
    of_sum = seconds * recipe.state_bytes
    if recipe.sharding == "fsdp":
        return (0.0, of_sum) if recipe.accumulates_whole and steps > 1 else (of_sum, 0.0)
    copies = {"zero2": (2 * steps - 1) / steps if steps > 1 else 0.0, "zero3": 2.0}.get(str(recipe.sharding), 0.0)
    return seconds * BYTES[recipe.weights] * copies, of_sum


def _products_of_update(profile: Profile, recipe: Recipe, at: Situation, rates: Rates) -> float | None:
    """Matrix products of the optimizer's step: Muon's iterations, in bf16 always (torch/optim/_muon.py), and
    projections of GaLore and APOLLO in the gradients' format. GaLore's SVD is not counted.

    Returns:
        None where no rate is known for them: on the host, or in this format.
    """
    kind, rank, width = OPTIMIZERS[recipe.optimizer], recipe.rank, profile.hidden_size
    matrices = [part for part in profile.parameters if part.trained and part.matrix]
    if kind.muon:
        unit, faster = "bf16", None
        steps = recipe.setting(recipe.optimizer, "ns_steps", 5)
        work = steps * sum(part.newton_schulz(rank, width) for part in matrices)
    elif kind.projections:
        held = "float32" if recipe.state_bytes == BYTES["float32"] else recipe.weights
        unit = next(unit for unit, dtype in FORMATS.items() if dtype == held)
        faster = "tf32" if recipe.precision == "tf32" else None
        work = (
            2
            * kind.projections
            * sum(part.count(rank) * min(recipe.projection_rank, part.narrow(rank, width)) for part in matrices)
        )
    else:
        return 0.0
    rate = rates.matmul.get(faster or unit) or rates.matmul.get(unit) or _instead_of(unit, rates.matmul)
    if not work:
        return 0.0
    return None if rate is None or "optimizer states" in recipe.offloaded else work / _shards(recipe, at) / rate


def _bytes_of_update(recipe: Recipe) -> float:
    """Bytes that the optimizer's step moves for a trained weight."""
    kind, width = OPTIMIZERS[recipe.optimizer], recipe.state_bytes
    if kind.fused:
        return 3 * width + 2 * (kind.states * width + kind.bytes_per_weight)
    return STEP_BY_STEP_BYTES * width / 4


def _update(profile: Profile, recipe: Recipe, at: Situation, rates: Rates, parts: dict[str, float]) -> float:
    """The optimizer's step, with what is communicated once for it."""
    local = _trained(profile, recipe) / _shards(recipe, at)
    width = _bytes_of_update(recipe)
    traffic = width * local
    seconds = 0.0
    if "optimizer states" in recipe.offloaded:
        gpus_of_host = min(at.num_gpus, 8)
        # DeepSpeed has a fused AdamW of its own for the host (ops/adam/cpu_adam.py), and such a one is measured; under
        # FSDP it is torch's own, whose steps move as many bytes there.
        of_host = rates.cpu_optimizer or rates.host / FUSED_ADAM_BYTES
        of_host *= 1.0 if recipe.deepspeed else FUSED_ADAM_BYTES / width
        host = local * gpus_of_host / of_host
        # Updated weights come back, unless they wait on the host, too
        back = 0.0 if "weights" in recipe.offloaded else local * BYTES[recipe.weights]
        pcie = back / rates.pcie if rates.pcie else 0.0
        parts["CPU optimizer"] += host
        parts["PCIe"] += pcie
        seconds += host + pcie
    else:
        parts["memory bandwidth"] += traffic / rates.memory
        seconds += traffic / rates.memory
    if rates.link is not None and recipe.sharding in ("zero1", "zero2"):
        # Each device updates its share and gathers the others' (stage_1_and_2.py, step: all_gather_dp_groups)
        link = _trained_bytes(profile, recipe) * _ring(at) / rates.link
        parts["interconnect"] += link
        seconds += link
    return seconds
