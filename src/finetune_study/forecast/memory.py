"""Peak memory of one device, by category and phase, from the trace of a step and models of everything around it.

What the trace can't see is a model of a library's code, each with its source beside it: model states under sharding and
offload, buckets and gathered weights, optimizers' transients, quantised storage, what the allocator adds.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune_study.forecast import CATEGORIES
from finetune_study.forecast.layout import BYTES
from finetune_study.forecast.profile import (
    GRADIENT,
    LOGITS,
    NEW_GRADIENT,
    POINTWISE,
    SAVED,
    TEMPORARY,
    Parameters,
    Profile,
    value,
)
from finetune_study.forecast.recipe import OPTIMIZERS, Recipe

GIB = 2**30

PHASES = ("load", "forward", "backward", "optimizer_step")

QUANTIZED_BYTES = {"nf4": 0.5, "int8": 1.0}
"""Of a quantised weight (Dettmers et al., arXiv 2305.14314 and 2208.07339), as it is stored, sharded and gathered: a
tensor of bytes, or of `bnb_4bit_quant_storage`, which holds as many."""

SCALE_BYTES = {
    # arXiv 2305.14314: one fp32 maximum for each block of 64
    "nf4": 4 / 64,
    # the maxima in 8 bits, and one fp32 for each 256 of them (section 3, "Double Quantization")
    "nf4_double": 1 / 64 + 4 / (64 * 256),
    # a scale for each row
    "int8": 0.0,
}
"""The same of its scales. They are no parameter, so that nothing shards or offloads them: each device has all of them
(bitsandbytes/nn/modules.py, fix_4bit_weight_quant_state_from_module: `quant_state`)."""

# torch/cuda/CUDABlas: default workspace of cuBLAS, KiB, by compute capability (aten/src/ATen/cuda/CublasHandlePool.cpp)
CUBLAS_WORKSPACE_BYTES = {"hopper": 32 * 2**20, "other": 8519680}
CUBLAS_HANDLES = 2
"""One for the thread that runs forward, one for autograd's."""

CONTEXT_BYTES = 0.45 * GIB
"""CUDA context with torch's kernels, loaded lazily (CUDA 11.7 and later); outside torch's allocator. 0.3 to 0.6 GiB are
commonly seen in nvidia-smi for an empty torch process; the middle, not measured here."""
NCCL_BYTES = 0.3 * GIB
"""NCCL's channels: up to 32 with a send and a receive buffer of 4 MiB each (NCCL_BUFFSIZE), and their kernels; outside
torch's allocator."""

CPU_RUNTIME_BYTES = 0.05 * GIB
"""On a CPU: what libraries take when a model is first loaded and run (threads' stacks and buffers, heaps); the
allocator is the C library's, and not seen apart. Measured with torch 2.13.0 and glibc 2.36 on a Llama of one layer of
width 16, whose weights are 3 MiB: 47 to 50 MiB beyond its tensors when it was loaded, and 50 MiB at its peak, alone and
as one of two ranks, with ZeRO and without; tests/training/test_memory.py measures it again."""

CPU_HEAP_BLOCK_BYTES = 32 * 2**20
"""glibc takes smaller blocks from its heap (malloc/malloc.c, DEFAULT_MMAP_THRESHOLD_MAX), which stays as large as it
ever was; larger ones are mapped, and given back when they are freed."""
CPU_HEAP_COPIES = 2
"""Before glibc 2.38 an aligned block, as torch asks for, does not fit a freed block of its own size (sourceware bug
14581), so that a pass takes its activations' room once more."""

STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000
"""DeepSpeed gathers so many weights ahead, a prefetch bucket with every module (runtime/zero/config.py;
partitioned_param_coordinator.py, fetch_sub_module)."""
STAGE3_SUB_GROUP_SIZE = 1_000_000_000
"""Elements whose gradients are turned to fp32 at once in a step of stage 3; `sub_group_size` is another number
(runtime/zero/config.py)."""
DDP_COPIES_OF_GRADIENTS = 1
"""DDP's buckets hold every gradient a second time (gradient_as_bucket_view=False, torch's and Trainer's default)."""

FRAGMENTATION = 0.10
"""Share of what comes and goes in a step that the caching allocator holds beyond the peak; between 0 and 0.24 is seen
at fixed lengths (torch.cuda.memory_reserved against memory_allocated)."""
FRAGMENTATION_OF_VARYING_LENGTHS = 1.0
"""The same where lengths vary: a block that a shorter sequence left can't hold a longer one's tensor, so that most
sizes are there twice."""
ALLOCATOR_GRAIN_BYTES = 20 * 2**20
"""The caching allocator's segment for tensors of 1 to 10 MiB (c10/cuda/CUDACachingAllocator.cpp, kLargeBuffer)."""


@dataclass(frozen=True)
class Situation:
    """A run as far as memory is concerned."""

    batch: int
    context: int
    num_gpus: int = 1
    gradient_accumulation_steps: int = 1
    device: str = "cuda"
    lengths_vary: bool = False
    """Sequences are padded to the longest of their batch alone, not to the context."""
    maps_tensors: bool = False
    """On a CPU: the C library's heap holds nothing back."""
    hopper: bool = False
    """Compute capability 9: a larger cuBLAS workspace."""


@dataclass(frozen=True)
class Memory:
    """Predicted memory of one device in bytes."""

    categories: dict[str, float]
    """At the moment of the peak; they add up to the whole, context included."""
    phases: dict[str, float]
    """Peak of each phase, without context."""
    allocated: float
    """Peak of memory in tensors."""
    reserved: float
    """What the allocator may hold at most."""
    context: float
    """Held outside the allocator: the driver's context, NCCL, paged optimizer states are not in it."""
    paged: float = 0.0
    """Optimizer states in unified memory, that move to the host under pressure."""

    @property
    def needed(self) -> float:
        """What the device must have: the middle between what is in tensors and what the allocator may hold."""
        return (self.allocated + self.reserved) / 2 + self.context


def weight_bytes(part: Parameters, recipe: Recipe) -> float:
    """Bytes that one weight takes on a device that holds it, its scales apart."""
    if part.quantized:
        return QUANTIZED_BYTES[recipe.quantized or "nf4"]
    in_fp32 = recipe.sharding == "fsdp" and recipe.precision not in ("bf16_pure",) and not recipe.quantized
    if in_fp32 and (part.trained or not recipe.peft):
        # FSDP shards the fp32 weights and gathers 16-bit ones (MixedPrecisionPolicy), unless there are such of 4 bit
        # (accelerate/utils/fsdp_utils.py, fsdp2_prepare_model)
        return 4
    return BYTES[part.dtype]


def _scale_bytes(part: Parameters, recipe: Recipe) -> float:
    """Bytes of one weight's share in the scales of its block."""
    if not part.quantized:
        return 0.0
    kind = recipe.quantized or "nf4"
    double = recipe.techniques["qlora"].get("bnb_4bit_use_double_quant", True)
    return SCALE_BYTES["nf4_double" if kind == "nf4" and double else kind]


def gathered_bytes(part: Parameters, recipe: Recipe) -> float:
    """Bytes of one weight that is gathered from the devices that share it.

    A quantised one is gathered as it is stored, and dequantised for its product alone; the rest comes in the format of
    products, to which FSDP casts its shard before (torch's _fsdp_param.py, all_gather_inputs).
    """
    return QUANTIZED_BYTES[recipe.quantized or "nf4"] if part.quantized else BYTES[recipe.compute]


class _States:
    """Parameters, gradients, optimizer states and buffers of one device."""

    def __init__(self, profile: Profile, recipe: Recipe, at: Situation) -> None:
        self.profile, self.recipe, self.at = profile, recipe, at
        rank = recipe.rank
        self.all = sum(p.count(rank) for p in profile.parameters)
        self.trained = sum(p.count(rank) for p in profile.parameters if p.trained)
        self.gradient_bytes_full = sum(p.count(rank) * BYTES[p.dtype] for p in profile.parameters if p.trained)
        self.whole_bytes = sum(p.count(rank) * weight_bytes(p, recipe) for p in profile.parameters)
        self.scale_bytes = sum(p.count(rank) * _scale_bytes(p, recipe) for p in profile.parameters)
        self.all_gathered_bytes = sum(p.count(rank) * gathered_bytes(p, recipe) for p in profile.parameters)
        sharding = recipe.sharding
        self.shards = at.num_gpus if sharding in ("zero1", "zero2", "zero3", "fsdp") else 1
        self.optimizer = OPTIMIZERS[recipe.optimizer]

    @property
    def parameters(self) -> float:
        if self.recipe.sharding not in ("zero3", "fsdp"):
            return self.whole_bytes + self.scale_bytes
        second = 0.0
        if self.recipe.secondary_shards > 1:  # weights shared by a node (arXiv 2306.10209, section 3.2, hpZ)
            second = self.all_gathered_bytes / min(self.recipe.secondary_shards, self.at.num_gpus)
        own = 0.0 if "weights" in self.recipe.offloaded else self.whole_bytes / self.shards
        return second + own + self.scale_bytes

    @property
    def accumulated_gradients(self) -> float:
        """Complete gradients between micro-batches."""
        if self.recipe.accumulates_whole and self.at.gradient_accumulation_steps > 1 and self.shards > 1:
            return self.trained * BYTES[self.recipe.adapters if self.recipe.peft else self.recipe.compute]
        return self.gradient_share * self.gradient_bytes_full

    @property
    def held_gradients(self) -> float:
        """Complete gradients, as they wait for the step."""
        if "gradients" in self.recipe.offloaded or self.recipe.has("optimizer_in_backward"):
            return 0.0
        return self.gradient_share * self.gradient_bytes_full

    @property
    def gradient_share(self) -> float:
        """Of a gradient as the trace computes it, what stays on the device while micro-batches pass.

        ZeRO-1 reduces gradients after the last of them, and offloads them then (DeepSpeed: runtime/engine.py,
        allreduce_gradients; zero/stage_1_and_2.py, reduce_gradients); the other stages and FSDP do so in every backward
        pass (copy_grads_in_partition; stage3.py, partition_grads; torch's _fsdp_collectives.py, foreach_reduce).
        """
        sharding = self.recipe.sharding
        if sharding == "zero1":
            return 1.0
        if "gradients" in self.recipe.offloaded:
            return 0.0
        if sharding in ("zero2", "zero3"):
            return 1 / self.shards
        if sharding == "fsdp":
            return (
                self.recipe.state_bytes
                / BYTES[self.recipe.adapters if self.recipe.peft else self.recipe.weights]
                / self.shards
            )
        return 1.0

    @property
    def optimizer_states(self) -> float:
        """States, and the fp32 copy of 16-bit weights (DeepSpeed: runtime/zero/stage_1_and_2.py, stage3.py)."""
        if "optimizer states" in self.recipe.offloaded:
            return 0.0
        return self._states(paged=False) / self.shards

    @property
    def paged_states(self) -> float:
        return self._states(paged=True) / self.shards

    def _states(self, paged: bool) -> float:
        kind, rank = self.optimizer, self.recipe.rank
        total = 4 * self.trained if self.recipe.master and not paged else 0.0
        if kind.paged != paged:
            return total
        for part in self.profile.parameters:
            if not part.trained:
                continue
            number = part.count(rank)
            if kind.factored:
                total += 4 * sum(c * rank ** m[2] for m, c in part.rows.items())
            elif kind.low_rank and part.matrix:
                projected = min(self.recipe.projection_rank, part.narrow(rank, self.profile.hidden_size))
                total += kind.low_rank * projected * value(part.rows, 1, 1, rank) * self._state_bytes(part)
            elif kind.full_embedding and part.role == "embedding" and not self.recipe.deepspeed:
                total += 8 * number
            else:
                states = 1 if kind.muon and part.matrix else kind.states
                total += number * (states * self._state_bytes(part) + kind.bytes_per_weight)
        return total

    def _state_bytes(self, part: Parameters) -> int:
        """Of a state of a weight; methods of peft that are mixed differ in the format of their weights."""
        return BYTES[part.dtype] if self.recipe.mixed and not self.recipe.master else self.recipe.state_bytes

    @property
    def step_gradients(self) -> float:
        """Gradients that wait while the optimizer steps; ZeRO-1 gives back those of others' weights before."""
        return self.held_gradients / (self.shards if self.recipe.sharding == "zero1" else 1)

    @property
    def step_transient(self) -> float:
        """What the optimizer's step takes for a moment."""
        if "optimizer states" in self.recipe.offloaded:
            return 0.0
        local = self.trained / self.shards
        if not self.recipe.master:
            return self._update_transient(local)
        # 16-bit gradients of the shard, or of a sub-group of it, are laid out flat and turned to fp32 ones; then they
        # are given back (stage_1_and_2.py, step; stage3.py, _prepare_fp32_grad_for_sub_group)
        at_once = min(local, self._sub_group) if self.recipe.sharding == "zero3" else local
        width = self.gradient_bytes_full / self.trained
        converting = width + (4 if width != 4 else 0)
        return max(converting * at_once, (4 - width) * at_once + self._update_transient(at_once))

    @property
    def _sub_group(self) -> float:
        """Stage 3: weights of a sub-group, one device's part of the largest at least (stage3.py,
        _create_fp16_sub_groups)."""
        asked = self.recipe.setting("zero3", "sub_group_size", STAGE3_SUB_GROUP_SIZE)
        return max(asked, value(self.profile.largest_trained, 1, 1, self.recipe.rank) / self.shards)

    def _update_transient(self, local: float) -> float:
        """What the optimizer itself takes to update so many weights."""
        kind, width = self.optimizer, self.recipe.state_bytes
        largest = value(self.profile.largest_trained, 1, 1, self.recipe.rank)
        if self.shards > 1 or self.recipe.master:
            largest = min(largest, local) if self.recipe.sharding == "fsdp" else local
        transient = kind.transient
        if self.at.device == "cpu" and transient == "copy":
            transient = "tensor"  # foreach kernels are for GPUs (torch/optim/optimizer.py)
        if self.recipe.has("optimizer_in_backward"):
            transient = "tensor" if transient == "copy" else transient
        if kind.factored:
            return 3 * 4 * largest  # fp32 gradient, its square, the update (transformers' Adafactor)
        if kind.muon:
            return 3 * 2 * largest  # X, X·Xᵀ and their product in bf16 (Newton–Schulz)
        return {"copy": width * local, "tensor": width * largest, "none": 0.0}[transient]

    @property
    def buckets(self) -> float:
        """Buffers for gradients under way."""
        recipe, sharding = self.recipe, self.recipe.sharding
        if sharding == "ddp":
            return DDP_COPIES_OF_GRADIENTS * self.gradient_bytes_full
        if recipe.deepspeed:
            name = str(sharding)
            elements = float(recipe.setting(name, "reduce_bucket_size", self.profile.hidden_size**2))
            # runtime/zero/stage_1_and_2.py and stage3.py: allocated whole, however few weights are trained; a second
            # one is filled while the first is reduced
            buffers = 2 if recipe.techniques[name].get("overlap_comm") and sharding != "zero3" else 1
            elements *= buffers
            if sharding != "zero3" and "gradients" in recipe.offloaded:
                # One tensor's gradient of earlier micro-batches, back from the host (temp_grad_buffer_for_gpu_offload)
                elements += value(self.profile.largest_trained, 1, 1, recipe.rank)
            return elements * BYTES[recipe.weights]
        return 0.0

    @property
    def gathered(self) -> float:
        """Weights of other devices' shards that are there for a while."""
        recipe, profile = self.recipe, self.profile
        if self.shards == 1 and "weights" not in recipe.offloaded:
            return 0.0
        if recipe.sharding == "zero3":
            most = recipe.setting("zero3", "stage3_max_live_parameters", STAGE3_MAX_LIVE_PARAMETERS)
            prefetched = recipe.setting("zero3", "stage3_prefetch_bucket_size", int(0.9 * profile.hidden_size**2))
            # Elements are those of the tensors: two weights of 4 bit are one
            elements = sum(p.count(recipe.rank) * min(1.0, gathered_bytes(p, recipe)) for p in profile.parameters)
            width = self.all_gathered_bytes / elements
            return float(min(elements * width, max(most * width, self._largest_layer) + prefetched * width))
        if recipe.sharding == "fsdp":
            if recipe.keeps_gathered:
                return self.all_gathered_bytes
            outside = sum(
                p.count(recipe.rank) * gathered_bytes(p, recipe) for p in profile.parameters if p.role != "layers"
            )
            return 2 * self._largest_layer + outside  # one computes, the next is under way
        return 0.0

    @property
    def _largest_layer(self) -> float:
        """Bytes of the largest layer's gathered weights, each in the mean width of the layers' weights."""
        layers = [p for p in self.profile.parameters if p.role == "layers"]
        count = sum(p.count(self.recipe.rank) for p in layers)
        width = sum(p.count(self.recipe.rank) * gathered_bytes(p, self.recipe) for p in layers) / count
        return self.profile.largest_layer * width

    @property
    def reducing(self) -> float:
        """FSDP: a layer's gradients on their way to their owners, in fp32 unless all is in 16 bit."""
        if self.recipe.sharding != "fsdp" or self.shards == 1:
            return 0.0
        in_layers = sum(p.count(self.recipe.rank) for p in self.profile.parameters if p.trained and p.role == "layers")
        return self.recipe.state_bytes * in_layers / self.profile.depth


def predict(profile: Profile, recipe: Recipe, at: Situation) -> Memory:
    """Peak memory of one device.

    Args:
        profile: trace of the recipe's layout.
        recipe: what is done.
        at: batch, context and devices.
    """
    states = _States(profile, recipe, at)
    curves = profile.curves(at.batch, recipe.positions(at.context), max(recipe.rank, 1))
    activations = curves[SAVED] + curves[POINTWISE]
    if recipe.fuses:
        activations = curves[SAVED]  # the partitioner computes cheap operations again (functorch's min-cut)
    if recipe.has("activation_offload"):
        share = min(1.0, 2 / profile.depth)  # the layer at work, and one under way
        # Until forward ends autocast's cache has the 16-bit copies of the weights, which don't grow with the batch.
        of_weights = profile.curves(0, at.context, max(recipe.rank, 1))
        copies = np.where(profile.backward, 0.0, of_weights[SAVED] + of_weights[POINTWISE])
        activations = copies + (activations - copies) * share
    logits = curves[LOGITS] + np.where(profile.turn, _chunked_logits(profile, recipe, at), 0.0)
    new = curves[NEW_GRADIENT]
    if recipe.has("optimizer_in_backward"):
        held = np.zeros_like(new)
    elif at.gradient_accumulation_steps > 1 or recipe.sharding == "zero3":
        held = np.full_like(new, states.accumulated_gradients)
    else:
        held = curves[GRADIENT] * states.gradient_share
    workspace = 0.0
    if at.device == "cuda":
        workspace = CUBLAS_HANDLES * CUBLAS_WORKSPACE_BYTES["hopper" if at.hopper else "other"]
    backward = profile.backward
    moving = states.buckets + states.gathered + np.where(backward, states.reducing, 0.0)
    fixed = states.parameters + states.optimizer_states + workspace
    heap, most_on_heap = np.zeros_like(activations), 0.0
    if at.device == "cpu" and not at.maps_tensors:
        mapped = at.batch * at.context * profile.vocabulary * BYTES[recipe.compute] >= CPU_HEAP_BLOCK_BYTES
        on_heap = activations if mapped else activations + logits
        most_on_heap = CPU_HEAP_COPIES * float(on_heap.max())
        heap = most_on_heap - on_heap
    total = fixed + activations + logits + curves[TEMPORARY] + new + held + moving + heap
    peak = int(total.argmax())
    # ZeRO gives back gathered weights before the step (stage3.py, step: _partition_all_parameters), stages 1 and 2
    # their buckets, too (stage_1_and_2.py, _release_ipg_buffers).
    step_buckets = 0.0 if recipe.sharding in ("zero1", "zero2") else states.buckets
    step = fixed + states.step_gradients + states.step_transient + step_buckets + most_on_heap
    phases = {
        "load": states.parameters,
        "forward": float(total[~backward].max(initial=0.0)),
        "backward": float(total[backward].max(initial=0.0)),
        "optimizer_step": step,
    }
    context = CPU_RUNTIME_BYTES if at.device == "cpu" else CONTEXT_BYTES + (NCCL_BYTES if at.num_gpus > 1 else 0.0)
    categories = {
        "parameters": states.parameters,
        "optimizer": states.optimizer_states,
        "context": context,
    }
    if step >= total[peak]:
        categories |= {
            "gradients": states.step_gradients,
            "activations": 0.0,
            "logits": 0.0,
            "temporary": states.step_transient + workspace + most_on_heap,
            "communication": step_buckets,
        }
    else:
        categories |= {
            "gradients": float(held[peak] + new[peak]),
            "activations": float(activations[peak]),
            "logits": float(logits[peak]),
            "temporary": float(curves[TEMPORARY][peak] + heap[peak]) + workspace,
            "communication": float(np.broadcast_to(moving, total.shape)[peak]),
        }
    allocated = max(step, float(total[peak]))
    reserved = allocated
    if at.device == "cuda":
        share = FRAGMENTATION_OF_VARYING_LENGTHS if at.lengths_vary else FRAGMENTATION
        varying = activations + logits + curves[TEMPORARY] + new
        reserved = max(allocated, float((total + share * varying).max())) + ALLOCATOR_GRAIN_BYTES
    ordered = {name: categories[name] for name in CATEGORIES}
    return Memory(ordered, phases, allocated, reserved, context, states.paged_states)


def _chunked_logits(profile: Profile, recipe: Recipe, at: Situation) -> float:
    """Logits where the loss is computed in chunks; the trace then ends at the last hidden state."""
    tokens, vocabulary, width = at.batch * recipe.positions(at.context), profile.vocabulary, BYTES[recipe.compute]
    head = vocabulary * profile.hidden_size
    dequantized = float(head * width) if recipe.quantized_head else 0.0
    if recipe.quantized_head and recipe.quantized_from != recipe.compute:
        dequantized *= 2  # once in the format that it was quantised from, once in that of the product
    # A trained output layer gets a gradient from every chunk: one that is there and one that is added to it
    gradient = 0 if recipe.peft else 2 * head * width
    if recipe.fused_loss:
        # liger_kernel/ops/fused_linear_cross_entropy.py: as many chunks as the vocabulary is wider than the model;
        # one chunk's logits, and the gradient of the hidden states
        chunks = max(1, -(-vocabulary // profile.hidden_size))
        return float(-(-tokens // chunks) * vocabulary * width + tokens * profile.hidden_size * width + gradient / 2)
    if recipe.has("chunked_cross_entropy"):
        # The chunks' logits are kept together, each saves its log-softmax, one has a gradient; a compiler computes the
        # log-softmax again. `upcast` turns a chunk to fp32 for the loss, "logits" all of them before it.
        chunks = max(1, recipe.setting("chunked_cross_entropy", "num_chunks", 8))
        upcast = recipe.techniques["chunked_cross_entropy"].get("upcast", True)
        kept = 4 if upcast == "logits" else width
        saved = 4 if upcast else width
        if recipe.fuses:
            return float(tokens * vocabulary * width * (1 + 1 / chunks) + gradient) + dequantized
        return float(tokens * vocabulary * (kept + saved + saved / chunks) + gradient) + dequantized
    return 0.0


def as_gib(values: Mapping[str, float]) -> dict[str, Any]:
    """Bytes as GiB."""
    return {name: value / GIB for name, value in values.items()}
