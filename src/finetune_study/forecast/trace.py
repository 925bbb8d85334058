"""One training step of the real model class on fake tensors: what is alive when, and what is computed.

Fake tensors have shapes and no storage, so that a step of a 70B model costs a second and no memory. Two properties
make the answer exact and quick:

- **Sizes are monomials.** Batch, context and LoRA rank of the trace are primes that divide nothing else in the model,
  so the number of elements of a tensor factors into coefficient × batch^i × context^j × rank^k. One trace then answers
  for every batch, context and rank.
- **Stacks repeat.** Only three periods of equal layers are traced. What the middle one leaves behind counts as often as
  the model has it; layers before the period begins (dense layers of a mixture) and after it are traced as they are. A
  stack that never repeats is traced in full.

Fake tensors pose as CPU tensors: there attention takes a fused kernel that saves what CUDA's does, while on fake CUDA
and on meta tensors it would take the quadratic one. Where the CPU differs from CUDA, `_CudaManners` mends it.
"""

import contextlib
import json
import logging
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_study.errors import ModelError, StudyError
from finetune_study.forecast.layout import Layout
from finetune_study.forecast.profile import (
    GRADIENT,
    LOGITS,
    NEW_GRADIENT,
    POINTWISE,
    SAVED,
    TEMPORARY,
    Monomial,
    Parameters,
    Profile,
    Work,
)

aten = torch.ops.aten

MATMULS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten._grouped_mm, aten.convolution, aten._scaled_mm}
ATTENTION_FORWARD = {aten._scaled_dot_product_flash_attention_for_cpu}
ATTENTION_BACKWARD = {aten._scaled_dot_product_flash_attention_for_cpu_backward}
NO_KERNEL = {aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.lift_fresh}

OWN_OF_NO_LAYER = -1

MOST_OPERATIONS = 60_000
"""Of a trace; they take about ten seconds. A layer of a transformer has some hundred."""


def primes_above(start: int, avoid: set[int]) -> Iterator[int]:
    """Primes from `start` that divide none of the numbers to avoid."""
    number = start | 1
    while True:
        if all(number % d for d in range(3, math.isqrt(number) + 1, 2)) and all(n % number for n in avoid):
            yield number
        number += 2


def integers(value: Any) -> Iterator[int]:
    """Every positive integer in a configuration."""
    if isinstance(value, bool):
        return
    if isinstance(value, int):
        if value > 1:
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from integers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from integers(inner)


@dataclass
class Sizes:
    """The primes of a trace, and how a number of bytes factors into them."""

    batch: int
    context: int
    rank: int
    virtual: int = 0
    """Virtual tokens that a PEFT method puts before the context; both lengths count as the context's."""
    _known: dict[int, tuple[float, Monomial]] = field(default_factory=dict)

    def factor(self, number: int) -> tuple[float, Monomial]:
        """Coefficient and exponents of batch, context and rank."""
        found = self._known.get(number)
        if found is None:
            found = self._known[number] = self._factor(number)
        return found

    def _factor(self, number: int) -> tuple[float, Monomial]:
        rest, in_batch = _divide(number, self.batch)
        rest, in_context = _divide(rest, self.context)
        if self.virtual and not in_context:
            rest, in_context = _divide(rest, self.context + self.virtual)
        if in_batch and not in_context and rest % (self.context + 1) == 0:
            rest, in_context = rest // (self.context + 1), 1  # labels, shifted by one
        rest, in_rank = _divide(rest, self.rank)
        return float(rest), (in_batch, in_context, in_rank)


def _divide(number: int, prime: int) -> tuple[int, int]:
    """What is left of a number without a prime, and how often the prime was in it."""
    times = 0
    while number and number % prime == 0:
        number //= prime
        times += 1
    return number, times


@dataclass
class Storage:
    """One piece of memory of the trace."""

    size: int
    born: int
    layer: int
    in_forward: bool
    kept: bool
    """A compiler would not compute it again."""
    after_layers: bool
    died: int | None = None
    accumulated: int | None = None
    """When it became, or was added to, the gradient of a parameter."""


class Tape(TorchDispatchMode):
    """Sees every operation below autograd, and every storage from its birth to its death."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.now = 0
        self.layer = OWN_OF_NO_LAYER
        self.forward, self.after_layers, self.recomputing = True, False, False
        self.storages: list[Storage] = []
        self.layer_of_time: list[int] = []
        self.turn_of_time: list[bool] = []
        self._alive: dict[int, int] = {}
        self.work: dict[tuple[str, str, int], dict[Monomial, float]] = defaultdict(lambda: defaultdict(float))
        self.kernels: dict[tuple[str, int], int] = defaultdict(int)
        self.end_of_forward = 0

    def know(self, tensor: torch.Tensor) -> None:
        """A tensor that was there before the step: parameters, inputs."""
        self._alive[tensor.untyped_storage()._cdata] = -1

    def tick(self) -> None:
        self.now += 1
        if self.now > MOST_OPERATIONS:
            raise ModelError(
                "A training step of this model has too many operations to be traced",
                where="model_config",
                given=f"more than {MOST_OPERATIONS}: a loop over positions, as in recurrent layers without a kernel?",
            )
        self.layer_of_time.append(self.layer)
        self.turn_of_time.append(self.after_layers)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in ATTENTION_BACKWARD:
            self._scratch(attention_scratch(args))
        out = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        product = packet in MATMULS or packet in ATTENTION_FORWARD
        if product and self.forward:
            self._keep(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        for tensor in outputs:
            self._see(tensor, product)
        if packet not in NO_KERNEL and not _is_view(func):
            self._count(packet, args, kwargs or {}, outputs)
        self.tick()
        return out

    def _keep(self, operands: Iterable[torch.Tensor]) -> None:
        """A compiler keeps what backward's products read, save weights in another format.

        torch/_functorch/config.py: ban_recompute_materialized_backward.
        """
        for tensor in operands:
            number = self._alive.get(tensor.untyped_storage()._cdata, -1)
            if number >= 0 and self.sizes.factor(self.storages[number].size)[1][1]:
                self.storages[number].kept = True

    def _see(self, tensor: torch.Tensor, kept: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = number = len(self.storages)
        self.storages.append(Storage(storage.nbytes(), self.now, self.layer, self.forward, kept, self.after_layers))
        weakref.finalize(storage, self._die, key, number)

    def _die(self, key: int, number: int) -> None:
        self._alive.pop(key, None)
        self.storages[number].died = self.now

    def _scratch(self, size: int) -> None:
        """Memory that a CUDA kernel takes for itself."""
        self.storages.append(Storage(size, self.now, self.layer, False, False, False, died=self.now + 1))

    def accumulate(self, gradient: torch.Tensor) -> None:
        """A parameter's gradient is complete."""
        number = self._alive.get(gradient.untyped_storage()._cdata, -1)
        if number >= 0:
            self.storages[number].accumulated = self.now

    def _count(self, packet: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        phase = "forward" if self.forward else "recompute" if self.recomputing else "backward"
        self.kernels[phase, self.layer] += 1
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        if packet in MATMULS:
            kind, operations = f"matmul_{_precision(outputs[0])}", 2 * _products(packet, args, outputs)
        elif packet in ATTENTION_FORWARD or packet in ATTENTION_BACKWARD:
            query, key = (args[0], args[1]) if packet in ATTENTION_FORWARD else (args[1], args[2])
            causal_half = 0.5  # fused kernels skip the blocks above the diagonal (arXiv 2307.08691, section 3.1)
            products = 2 if packet in ATTENTION_FORWARD else 5  # q·k and p·v; backward recomputes q·k
            operations = int(causal_half * products * 2 * query.numel() * key.shape[-2])
            kind = f"attention_{_precision(query)}"
        else:
            kind, operations = "", 0
        if operations:
            coefficient, monomial = self.sizes.factor(operations)
            self.work[phase, kind, self.layer][monomial] += coefficient
        group = "bytes_matmul" if kind else "bytes_pointwise"
        for tensor in (*inputs, *outputs):
            coefficient, monomial = self.sizes.factor(tensor.numel() * tensor.element_size())
            self.work[phase, group, self.layer][monomial] += coefficient


def _precision(tensor: torch.Tensor) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensor.dtype, "fp32")


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _products(packet: Any, args: Any, outputs: list[torch.Tensor]) -> int:
    """Multiplications of a matrix product."""
    left = args[1] if packet in (aten.addmm, aten.baddbmm) else args[0]
    if packet is aten._grouped_mm:
        return int(left.numel() * args[1].shape[-1])  # a token meets one expert's matrix
    if packet is aten.convolution:
        return int(outputs[0].numel() * args[1][0].numel())
    return int(outputs[0].numel() * left.shape[-1])


def attention_scratch(args: Any) -> int:
    """Bytes that FlashAttention-2's backward kernel needs beside its outputs.

    The gradient of the queries is summed in fp32; where several query heads share keys, their gradients are written per
    query head and summed afterwards (csrc/flash_attn/flash_api.cpp, mha_bwd: dq_accum, dk_expanded, dv_expanded).
    """
    query, key = args[1], args[2]
    accumulator = 4 * query.numel()
    expanded = 0 if query.shape[1] == key.shape[1] else 2 * query.numel() * query.element_size()
    return int(accumulator + expanded)


IN_FP32 = {
    torch.nn.functional.layer_norm,
    torch.nn.functional.softmax,
    torch.nn.functional.softplus,
    torch.nn.functional.cross_entropy,
    torch.nn.functional.rms_norm,
    torch.softmax,
    torch.Tensor.softmax,
    torch.pow,
    torch.Tensor.pow,
    torch.Tensor.__pow__,
    torch.cumsum,
}
"""Of CUDA's "ops that can autocast to float32" those that models use (https://docs.pytorch.org/docs/stable/amp.html)."""


class _CudaManners(TorchFunctionMode):
    """What CUDA does and a CPU does not: one-byte dropout masks, and autocast's list of operations in fp32."""

    def __init__(self, tape: Tape, autocast: torch.dtype | None, flash: bool) -> None:
        super().__init__()
        self._autocast = autocast
        self._flash = flash
        self.tape = tape
        self._in_fp32 = set() if autocast is None else IN_FP32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if self._flash and func is torch.nn.functional.scaled_dot_product_attention:
            query, key, value = (*args, *kwargs.values())[:3]
            args = (query, key, value)
            kwargs = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
        if self._autocast is not None and "grouped_mm" in getattr(func, "__name__", ""):
            args = tuple(
                _to(a, self._autocast) for a in args
            )  # on a CPU autocast leaves it out, and it takes bf16 alone
        if func in self._in_fp32:
            args = tuple(_to_fp32(a) for a in args)
            kwargs = {k: _to_fp32(v) for k, v in kwargs.items()}
        if self.tape.forward or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        self.tape.recomputing = True  # Python code with gradients, while backward runs: a checkpoint
        try:
            return func(*args, **kwargs)
        finally:
            self.tape.recomputing = False

    @staticmethod
    def _dropout(input: torch.Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> torch.Tensor:
        if not training or p == 0:
            return input
        return torch.native_dropout(input, p, True)[0]


def _to(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _to_fp32(value: Any) -> Any:
    return (
        value.float() if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
    )


# --- the model --------------------------------------------------------------------------------------------------


FUSED = "finetune_study_fused"
"""Name under which transformers knows our attention function."""


def _fused_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **kwargs: Any
) -> tuple[torch.Tensor, None]:
    """A kernel with masks and windows of its own, as FlashAttention has: no mask in memory, keys are not repeated."""
    grouped = query.shape[1] != key.shape[1]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(FUSED, _fused_attention)
transformers.AttentionMaskInterface.register(FUSED, lambda *args, **kwargs: None)


def make_config(settings: dict[str, Any]) -> Any:
    """transformers' configuration of a model.

    Raises:
        ModelError: for an architecture that transformers does not have, or settings that it refuses.
    """
    settings = dict(settings)
    model_type = settings.pop("model_type", None)
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    if not isinstance(model_type, str) or model_type not in known:
        raise ModelError(
            "The architecture is not known",
            where="model_config.model_type",
            given=model_type,
            allowed=f"a model_type of transformers {transformers.__version__}, for example llama, falcon or gpt_neox",
        )
    for key in ("torch_dtype", "dtype", "quantization_config", "auto_map", "transformers_version", "architectures"):
        settings.pop(key, None)
    try:
        config = transformers.AutoConfig.for_model(model_type, **settings)
    except Exception as error:  # transformers' own checks raise what they like
        raise ModelError(
            "transformers refuses this configuration", where="model_config", given=_one_line(error)
        ) from None
    config.use_cache = False
    return config


@contextlib.contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextlib.contextmanager
def _no_initialisation() -> Iterator[None]:
    """Weights are not drawn: fake ones have no values, and the draws cost most of the time."""
    original = transformers.PreTrainedModel._initialize_weights

    def nothing(self: Any, module: Any, *rest: Any, **keywords: Any) -> None:
        return None

    transformers.PreTrainedModel._initialize_weights = nothing
    try:
        yield
    finally:
        transformers.PreTrainedModel._initialize_weights = original


def build(config: Any, dtype: torch.dtype, attention: str) -> Any:
    """The model of a configuration, inside a fake mode or on the meta device.

    Raises:
        ModelError: for a configuration from which no causal language model can be made.
    """
    config = _plain_rope(config)
    kind = _class_of(config)
    if attention == FUSED and not kind._supports_attention_backend:
        attention = "sdpa"  # code from before transformers' attention functions; `_CudaManners` mends the call
    if attention == "sdpa" and not kind._supports_sdpa:
        attention = "eager"  # as transformers does it by itself where nothing is asked
    try:
        with _default_dtype(dtype), _no_initialisation():
            model = transformers.AutoModelForCausalLM.from_config(
                config, attn_implementation=attention, trust_remote_code=False, dtype=dtype
            )
    except Exception as error:
        raise ModelError(
            "No causal language model can be made of this configuration",
            where="model_config",
            given=f"{type(error).__name__}: {_first_line(error)}",
            allowed="a configuration that transformers' AutoModelForCausalLM takes, without code of its own",
        ) from None
    model.config.use_cache = False
    return model


def _class_of(config: Any) -> Any:
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) not in mapping:
        raise ModelError(
            "The architecture is no causal language model of transformers",
            where="model_config.model_type",
            given=config.model_type,
            allowed="one that AutoModelForCausalLM takes, for example llama, falcon, mistral, qwen2, gemma, gpt_neox",
        )
    return mapping[type(config)]


def _plain_rope(config: Any) -> Any:
    """Rotary embeddings that look at the positions' values can't be traced, and cost no more memory than plain ones."""
    config = type(config).from_dict(config.to_dict())
    for part in {id(c): c for c in (config, config.get_text_config())}.values():
        rope = getattr(part, "rope_parameters", None)
        for one in [rope, *(rope.values() if isinstance(rope, dict) else [])]:
            if isinstance(one, dict) and one.get("rope_type") in ("dynamic", "longrope"):
                one["rope_type"] = "default"
    return config


def layer_stack(model: Any) -> tuple[str, torch.nn.ModuleList]:
    """The decoder's layers: the list of modules with most weights."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [(name, m) for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) == depth]
    if not lists:
        raise ModelError("The model's layers are not found", where="model_config", given=type(model).__name__)
    return max(lists, key=lambda item: sum(p.numel() for p in item[1].parameters()))


@dataclass(frozen=True)
class Stack:
    """How a stack of layers repeats."""

    depth: int
    before: int
    """Layers before the first period."""
    period: int
    """Layers of a period; 0: nothing repeats."""
    after: int
    """Layers after the last whole period."""

    @property
    def traced(self) -> list[int]:
        """Numbers of the layers that are traced: three periods, and what does not repeat."""
        if not self.period:
            return list(range(self.depth))
        first = self.before + 3 * self.period
        return [*range(first), *range(self.depth - self.after, self.depth)]

    @property
    def middle(self) -> range:
        """Positions among the traced layers whose leavings count several times."""
        return range(self.before + self.period, self.before + 2 * self.period)

    @property
    def times(self) -> int:
        """How often the middle period counts."""
        return (self.depth - self.before - self.after) // self.period - 2 if self.period else 1


def find_stack(kinds: list[Any]) -> Stack:
    """The shortest trace of layers of these kinds."""
    depth = len(kinds)
    best = Stack(depth, 0, 0, 0)
    for before in range(min(depth, 8)):
        rest = kinds[before:]
        for period in range(1, len(rest) // 3 + 1):
            if all(kind == rest[i % period] for i, kind in enumerate(rest)):
                found = Stack(depth, before, period, len(rest) % period)
                if len(found.traced) < len(best.traced):
                    best = found
                break
    return best


def layer_kinds(model: Any, checkpoint_every: int) -> list[Any]:
    """What tells layers apart: shapes of their weights, kinds of their attention, and whether they are checkpointed."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    _, layers = layer_stack(model)
    kinds = []
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        windows = tuple(getattr(m, "sliding_window", None) for m in layer.modules() if hasattr(m, "sliding_window"))
        checkpointed = checkpoint_every and number % checkpoint_every == 0
        kinds.append((shapes, windows, types[number], checkpointed))
    return kinds


def shorten(config: Any, layers: list[int]) -> Any:
    """The configuration with some of its layers alone."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    depth = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == depth and name != "architectures":
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    return config


# --- what is changed in it -------------------------------------------------------------------------------------


class _Dequantized(torch.autograd.Function):
    """A linear layer whose weight is made from its quantised form for every product, forward and backward.

    bitsandbytes' MatMul4Bit and MatMul8bitLt do the same; of the weight nothing is saved but a reference.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return torch.nn.functional.linear(x, torch.empty_like(weight).mul_(1).to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ torch.empty_like(weight).mul_(1).to(gradient.dtype), None, None


class QuantizedLinear(torch.nn.Linear):
    """Stands for bitsandbytes' Linear4bit and Linear8bitLt, which do not run on fake tensors."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        return _Dequantized.apply(input.to(dtype), self.weight, self.bias).to(input.dtype)


def quantize(model: Any) -> None:
    """Turns the layers' linear modules into quantised ones; the output layer stays, as in transformers."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            module.__class__ = QuantizedLinear
            module.weight.requires_grad_(False)


def upcast(model: Any) -> None:
    """What peft.prepare_model_for_kbit_training does to weights that are not quantised."""
    for module in model.modules():
        if not isinstance(module, QuantizedLinear):
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and parameter.dtype in (torch.float16, torch.bfloat16):
                    module._parameters[name] = torch.nn.Parameter(parameter.data.float(), requires_grad=False)
    model.tie_weights()


@contextlib.contextmanager
def _fake_parameters_can_move() -> Iterator[None]:
    """`Module.to` swaps parameters, which fake ones refuse; where they are does not matter here, their dtype does."""
    original = torch.nn.Module.to

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        if dtype is not None:
            for module in self.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and parameter.is_floating_point():
                        module._parameters[name] = torch.nn.Parameter(parameter.data.to(dtype), parameter.requires_grad)
        return self

    torch.nn.Module.to = to
    try:
        yield
    finally:
        torch.nn.Module.to = original


def adapt(model: Any, layout: Layout, rank: int) -> Any:
    """The model with what PEFT adds.

    Raises:
        ModelError: where peft refuses.
    """
    import peft

    assert layout.peft is not None
    settings = json.loads(layout.peft)
    kind = settings.pop("method")
    if kind == "LORA" and settings.pop("rank_is_traced", True):
        settings["r"] = rank
    config_class = peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)]
    try:
        config = config_class(task_type="CAUSAL_LM", **settings)
        with _fake_parameters_can_move():
            adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=layout.adapters == "float32")
    except Exception as error:
        raise ModelError(
            "peft refuses these settings", where="techniques", given=f"{type(error).__name__}: {error}"
        ) from None
    return adapted


def traced_model(config: Any, layout: Layout, rank: int) -> Any:
    """The model as it is trained."""
    weights = getattr(torch, layout.weights)
    model = build(config, weights, {"eager": "eager", "flash": FUSED}.get(layout.attention, "sdpa"))
    model.train()
    if layout.quantized:
        quantize(model)
    if layout.upcast:
        upcast(model)
    if layout.checkpoint_every:
        model.gradient_checkpointing_enable({"use_reentrant": layout.use_reentrant})
        for number, layer in enumerate(layer_stack(model)[1]):
            if number % layout.checkpoint_every:
                layer.gradient_checkpointing = False
    if layout.peft:
        model.requires_grad_(False)
        model = adapt(model, layout, rank)
        if layout.checkpoint_every:
            model.enable_input_require_grads()
    return model


# --- the step ---------------------------------------------------------------------------------------------------


DEEPEST = 1024
"""Layers; more is a slip of the pen, and would take minutes to build."""


def trace(layout: Layout) -> Profile:
    """Traces one training step.

    Raises:
        ModelError: for a model that can't be made, or whose step can't be traced.
    """
    with _quiet():
        try:
            return _trace(layout)
        except StudyError:
            raise
        except Exception as error:  # whatever the model's own code raises about a configuration that makes no sense
            raise ModelError(
                "A training step of this model can't be traced",
                where="model_config",
                given=f"{type(error).__name__}: {_first_line(error)}",
            ) from error


def _trace(layout: Layout) -> Profile:
    config = make_config(json.loads(layout.config))
    depth = getattr(config.get_text_config(), "num_hidden_layers", None)
    if not isinstance(depth, int) or not 1 <= depth <= DEEPEST:
        raise ModelError(
            "The number of layers is out of range",
            where="model_config.num_hidden_layers",
            given=depth,
            allowed=f"a whole number from 1 to {DEEPEST}",
        )
    with torch.device("meta"):
        skeleton = build(config, torch.float32, "eager")
    kinds = layer_kinds(skeleton, layout.checkpoint_every)
    stack = find_stack(kinds)
    short = shorten(config, stack.traced)
    with torch.device("meta"):
        found = layer_kinds(build(short, torch.float32, "eager"), 0)
    if [k[:3] for k in found] != [kinds[i][:3] for i in stack.traced]:
        stack, short = Stack(len(kinds), 0, 0, 0), config  # what decides is not in the lists that we shorten
    return _Tracer(short, stack, layout, skeleton).run()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A prediction is one line; what libraries say to themselves is not part of it."""
    fake = logging.getLogger("torch._subclasses.fake_tensor")
    levels = fake.level, transformers.utils.logging.get_verbosity()
    fake.setLevel(logging.CRITICAL)
    transformers.utils.logging.set_verbosity(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        fake.setLevel(levels[0])
        transformers.utils.logging.set_verbosity(levels[1])


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


class _Tracer:
    def __init__(self, config: Any, stack: Stack, layout: Layout, skeleton: Any) -> None:
        self.config, self.stack, self.layout, self.skeleton = config, stack, layout, skeleton
        window = getattr(config.get_text_config(), "sliding_window", None)
        avoid = set(integers(config.to_dict())) | {2 * n for n in integers(config.to_dict())}
        candidates = primes_above(1009, avoid)
        self.rank_prime, batch = next(candidates), next(candidates)
        positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 1 << 20
        start = max(2048, window + 1) if window and layout.windowed else 2048
        context = next(primes_above(start, avoid))
        most = min(window or positions, positions) if not layout.windowed else positions
        if context >= most:  # learned positions end there, and a window begins to mask
            context = next(primes_above(max(most // 2, 3), avoid))
        self.sizes = Sizes(batch, context, self.rank_prime, layout.virtual_tokens)

    def run(self) -> Profile:
        with FakeTensorMode(allow_non_fake_inputs=True):
            model = traced_model(self.config, self.layout, self.rank_prime)
            tape = Tape(self.sizes)
            self._step(model, tape)
            return self._profile(model, tape)

    def _step(self, model: Any, tape: Tape) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tape.know(tensor)
        ids = torch.zeros(self.sizes.batch, self.sizes.context, dtype=torch.long)
        tape.know(ids)
        self._follow(model, tape)
        autocast = self.layout.autocast
        with contextlib.ExitStack() as manners, tape:
            manners.enter_context(
                _CudaManners(tape, autocast and getattr(torch, autocast), self.layout.attention == "flash")
            )
            if self.layout.attention == "math":
                manners.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            with torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
                loss = self._loss(model, ids)
            tape.end_of_forward, tape.forward = tape.now, False
            # As loss.backward() does, which would leave the function mode out while checkpoints recompute.
            engine = torch.autograd.Variable._execution_engine
            engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
            tape.tick()

    def _loss(self, model: Any, ids: torch.Tensor) -> torch.Tensor:
        if self.layout.loss == "full":
            loss: torch.Tensor = model(input_ids=ids, labels=ids).loss
            return loss
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        hidden = inner.base_model(input_ids=ids)[0]
        total: torch.Tensor = hidden.sum()
        return total

    def _follow(self, model: Any, tape: Tape) -> None:
        """Tells the tape which layer runs, forward, backward and recomputing, and when gradients are complete."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        _, layers = layer_stack(inner)

        def enter(number: int) -> None:
            tape.layer = number
            tape.after_layers = False

        def leave(number: int, output: Any) -> None:
            if tape.forward:
                tape.layer = OWN_OF_NO_LAYER
                tape.after_layers = number == len(layers) - 1
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                key = tape._alive.get(first.untyped_storage()._cdata, -1)
                if key >= 0:
                    tape.storages[key].kept = True  # the residual stream is kept, compiled or not
                if first.grad_fn is not None and tape.forward:
                    first.grad_fn.register_prehook(lambda gradients: enter(number))

        for number, layer in enumerate(layers):
            layer.register_forward_pre_hook(lambda module, inputs, number=number: enter(number))
            layer.register_forward_hook(lambda module, inputs, output, number=number: leave(number, output))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda p: tape.accumulate(p.grad))

    # --- what the tape says -------------------------------------------------------------------------------------

    def _times(self, layer: int) -> int:
        return self.stack.times if self.stack.period and layer in self.stack.middle else 1

    def _kind(self, storage: Storage, end_of_forward: int, monomial: Monomial, coefficient: float) -> str:
        vocabulary = self.config.get_text_config().vocab_size
        if storage.after_layers and monomial[1] and coefficient % vocabulary == 0:
            return LOGITS
        if storage.in_forward and (storage.died is None or storage.died > end_of_forward):
            return SAVED if storage.kept else POINTWISE
        return TEMPORARY

    def _profile(self, model: Any, tape: Tape) -> Profile:
        kinds, monomials, phases, alive = self._moments(tape)
        work: dict[tuple[str, str], dict[Monomial, float]] = defaultdict(lambda: defaultdict(float))
        for (phase, kind, layer), amounts in tape.work.items():
            for monomial, amount in amounts.items():
                work[phase, kind][monomial] += amount * self._times(layer)
        kernels: dict[str, int] = defaultdict(int)
        for (phase, layer), count in tape.kernels.items():
            kernels[phase] += count * self._times(layer)
        parameters = self._parameters(model)
        _, layers = layer_stack(self.skeleton)
        text = self.config.get_text_config()
        return Profile(
            model_class=type(self.skeleton).__name__,
            depth=self.stack.depth,
            vocabulary=text.vocab_size,
            hidden_size=text.hidden_size,
            parameters=parameters,
            largest_layer=float(max(sum(p.numel() for p in layer.parameters()) for layer in layers)),
            largest_trained=self._largest_trained(model),
            phases=phases,
            kinds=kinds,
            monomials=monomials,
            alive=alive,
            work=[Work(phase, kind, dict(amounts)) for (phase, kind), amounts in work.items()],
            kernels=dict(kernels),
        )

    def _moments(self, tape: Tape) -> tuple[list[str], Any, Any, Any]:
        """The moments that can be a peak, with what is alive then."""
        columns: dict[tuple[str, Monomial], int] = {}
        changes: list[tuple[int, int, int, float]] = []  # born, died, column, bytes
        for storage in tape.storages:
            coefficient, monomial = self.sizes.factor(storage.size)
            if _stays(storage, tape.end_of_forward):
                coefficient *= self._times(storage.layer)
            died = tape.now + 1 if storage.died is None else storage.died
            if storage.accumulated is None:
                kind = self._kind(storage, tape.end_of_forward, monomial, coefficient)
                lives = [(kind, storage.born, died)]
            else:
                lives = [(NEW_GRADIENT, storage.born, storage.accumulated), (GRADIENT, storage.accumulated, died)]
            for kind, begin, end in lives:
                if end > begin:
                    column = columns.setdefault((kind, monomial), len(columns))
                    changes.append((begin, end, column, coefficient))
        delta = np.zeros((tape.now + 2, len(columns)))
        for begin, end, column, coefficient in changes:
            delta[begin, column] += coefficient
            delta[end, column] -= coefficient
        alive = np.cumsum(delta, axis=0)[: tape.now]
        layer = np.array(tape.layer_of_time[: tape.now])
        phases = (np.arange(tape.now) >= tape.end_of_forward).astype(np.int64)
        phases += 2 * np.array(tape.turn_of_time[: tape.now], dtype=np.int64)
        keep = np.array(
            [not (self.stack.period and number in self.stack.middle and self.stack.times > 1) for number in layer]
        )
        keep &= _local_peaks(delta[: tape.now]) | (phases >= 2)
        alive, phases = _undominated(alive[keep], phases[keep])
        return (
            [kind for kind, _ in columns],
            np.array([monomial for _, monomial in columns], dtype=np.int64).reshape(-1, 3),
            phases,
            alive,
        )

    def _parameters(self, model: Any) -> list[Parameters]:
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        stack_name, _ = layer_stack(inner)
        embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
        roles = {id(p): "embedding" for p in embedding.parameters()}
        if head is not None:
            roles |= {id(p): "head" for p in head.parameters() if id(p) not in roles}
        quantized = {id(m.weight) for m in model.modules() if isinstance(m, QuantizedLinear)}
        sums: dict[tuple[Any, ...], tuple[dict[Monomial, float], dict[Monomial, float]]] = {}
        for name, parameter in model.named_parameters():
            marker = f"{stack_name}."
            inside = marker in name
            layer = int(name.split(marker, 1)[1].split(".")[0]) if inside else OWN_OF_NO_LAYER
            role = roles.get(id(parameter), "layers" if inside else "other")
            dtype = str(parameter.dtype).removeprefix("torch.")
            matrix = parameter.dim() >= 2 and role == "layers"
            sort = (parameter.requires_grad, dtype, id(parameter) in quantized, role, matrix)
            numbers, rows = sums.setdefault(sort, (defaultdict(float), defaultdict(float)))
            _add(numbers, self.sizes.factor(parameter.numel()), self._times(layer))
            if parameter.dim() >= 2:
                for length in (parameter.shape[0], parameter.numel() // parameter.shape[0]):
                    _add(rows, self.sizes.factor(length), self._times(layer))
            else:
                _add(rows, self.sizes.factor(parameter.numel()), self._times(layer))
        return [
            Parameters(trained, dtype, is_quantized, role, matrix, dict(numbers), dict(rows))
            for (trained, dtype, is_quantized, role, matrix), (numbers, rows) in sums.items()
        ]

    def _largest_trained(self, model: Any) -> dict[Monomial, float]:
        trained = [self.sizes.factor(p.numel()) for p in model.parameters() if p.requires_grad]
        if not trained:
            raise ModelError("Nothing would be trained", where="techniques", given=str(self.layout.peft))
        usual_rank = 16  # of a low-rank matrix, only to say which of them is the largest
        coefficient, monomial = max(trained, key=lambda item: item[0] * usual_rank ** item[1][2])
        return {monomial: coefficient}


def _stays(storage: Storage, end_of_forward: int) -> bool:
    """Whether a layer leaves it behind: saved for backward, or a gradient; else it is handed to the next layer."""
    saved = storage.in_forward and (storage.died is None or storage.died > end_of_forward)
    return saved or storage.accumulated is not None


def _add(polynomial: dict[Monomial, float], term: tuple[float, Monomial], times: int) -> None:
    polynomial[term[1]] += term[0] * times


def _local_peaks(delta: Any) -> Any:
    """Moments before something dies: only they can be a peak."""
    falls = (delta < 0).any(axis=1)
    peaks = np.zeros(len(delta), dtype=bool)
    peaks[:-1] = falls[1:]
    peaks[-1] = True
    return peaks


def _undominated(alive: Any, phases: Any) -> Any:
    """Leaves out moments that hold no more than another of their phase, in every column."""
    kept: list[int] = []
    order = np.argsort(-alive.sum(axis=1), kind="stable")
    for row in order:
        same = [k for k in kept if phases[k] == phases[row]]
        if not same or not (alive[same] >= alive[row]).all(axis=1).any():
            kept.append(int(row))
    kept.sort()
    return alive[kept], phases[kept]
