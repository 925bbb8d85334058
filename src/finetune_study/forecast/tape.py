"""What a traced step does to memory and how much it computes: every storage from its birth to its death."""

import contextlib
import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from finetune_study.errors import ModelError
from finetune_study.forecast.profile import (
    Monomial,
)

aten = torch.ops.aten

MATMULS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten._grouped_mm, aten.convolution, aten._scaled_mm}
ATTENTION_FORWARD = {aten._scaled_dot_product_flash_attention_for_cpu}
ATTENTION_BACKWARD = {aten._scaled_dot_product_flash_attention_for_cpu_backward}
NO_KERNEL = {
    aten.detach, aten.empty, aten.empty_like, aten.new_empty, aten.empty_strided, aten.lift_fresh, aten._unsafe_view,
    aten.set_,
}  # fmt: skip

IS_WHERE = torch.ops.prim.device
"""A fake tensor is asked where it lies, dozens of times for an operation: nothing that a device does."""

OWN_OF_NO_LAYER = -1

_WINDOW: ContextVar[int | None] = ContextVar("_WINDOW", default=None)


@contextlib.contextmanager
def within_window(positions: int | None) -> Iterator[None]:
    """Fused attention in it skips what lies outside a window of so many positions; None: it has no window."""
    token = _WINDOW.set(positions)
    try:
        yield
    finally:
        _WINDOW.reset(token)


MOST_OPERATIONS = 30_000
"""Of a forward pass of up to `MANY_LAYERS`, of more layers in proportion; with backward they take about 15 seconds. A
layer of a transformer has some hundred."""
MANY_LAYERS = 50
"""More are traced where few layers are alike."""
OPERATIONS_WITHOUT_LOOPS = 1000
"""Of a layer; where there are more, it is taken to loop over positions, and is traced over few of them."""
MOST_BESIDE_A_LOOP = 4
"""Tensors, or operations, of the same sort and size as those of a loop's turns, before and after it."""
PADDINGS = (1, 2, 3)
"""Positions that are added to a context: labels are shifted by one, attention to a sink takes one, and convolutions are
padded by their width less one."""


def most_operations(layers: int) -> int:
    """Of a forward pass of so many layers."""
    return MOST_OPERATIONS * max(MANY_LAYERS, layers) // MANY_LAYERS


class TooManyOperationsError(ModelError):
    """A forward pass takes more operations than are traced."""


class PaddedError(Exception):
    """Layers do not take the positions of the trace at once."""


@dataclass
class Sizes:
    """The primes of a trace, and how a number of bytes factors into them."""

    batch: int
    context: int
    rank: int
    virtual: int = 0
    """Virtual tokens that a PEFT method puts before the context, or before its keys; both lengths count as the
    context's."""
    chunk: int = 1
    """The context is a prime number of chunks of this length, so that none of them is padded."""
    _known: dict[tuple[int, int], tuple[float, Monomial]] = field(default_factory=dict)

    def factor(self, number: int, shape: Iterable[int] = ()) -> tuple[float, Monomial]:
        """Coefficient and exponents of batch, context and rank.

        Args:
            number: of bytes, or of elements.
            shape: of the tensor that has them, where it may be padded.
        """
        padding = self._padding(shape)
        found = self._known.get((number, padding))
        if found is None:
            found = self._known[number, padding] = self._factor(number, padding)
        return found

    def _padding(self, shape: Iterable[int]) -> int:
        padded = {self.context + padding: padding for padding in PADDINGS}
        padded |= {length * self.batch: padding for length, padding in padded.items()}
        return next((padded[length] for length in shape if length in padded), 0)

    @property
    def chunks(self) -> int:
        """How many of them the context has; with chunks of one position, the context."""
        return self.context // self.chunk

    def _factor(self, number: int, padding: int) -> tuple[float, Monomial]:
        rest, in_batch = _divide(number, self.batch)
        rest, in_context = _divide(rest, self.chunks)
        per_position = float(self.chunk**in_context)
        if self.virtual:
            rest, with_virtual = _divide(rest, self.context + self.virtual)
            in_context += with_virtual
        if padding:
            rest, padded = _divide(rest, self.context + padding)
            in_context += padded
        if in_batch and not in_context and self.chunk > 1:  # states before each chunk, and after the last
            rest, in_context = _divide(rest, self.chunks + 1)
            per_position = float(self.chunk**in_context)
        rest, in_rank = _divide(rest, self.rank)
        return rest / per_position, (in_batch, in_context, in_rank)


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
    shape: tuple[int, ...]
    born: int
    layer: int
    in_forward: bool
    kept: bool
    """A compiler would not compute it again."""
    after_layers: bool
    died: int | None = None
    left: bool = False
    """An earlier step left it behind."""
    accumulated: int | None = None
    """When it became, or was added to, the gradient of a parameter."""


@dataclass
class Operations:
    """Operations of one sort, on tensors of the same sizes, in one layer."""

    amounts: list[tuple[str, float, Monomial]]
    """What each of them does: kind of work, coefficient and exponents."""
    window: int | None = None
    """Positions that attention looks back, its own one included; None: all."""
    count: int = 0


class Tape(TorchDispatchMode):
    """Sees every operation below autograd, and every storage from its birth to its death."""

    def __init__(self, sizes: Sizes, layers: int, most: int) -> None:
        """
        Args:
            sizes: that are factored.
            layers: that are traced.
            most: operations of a forward pass.
        """
        super().__init__()
        self.sizes, self.layers, self.most = sizes, layers, most
        self.now = 0
        self.layer = OWN_OF_NO_LAYER
        self.forward, self.after_layers, self.recomputing = True, False, False
        self.storages: list[Storage] = []
        self.layer_of_time: list[int] = []
        self.turn_of_time: list[bool] = []
        self._alive: dict[int, int] = {}
        self._windows: dict[int, int | None] = {}
        """Of the attention of each layer."""
        self.work: dict[tuple[Any, ...], Operations] = {}
        """By phase, layer, operation and sizes."""
        self.end_of_forward = 0
        self.tied: torch.Size | None = None
        """Shape of a trained weight that is embedding and output layer, where its gradients are added in place."""

    def know(self, tensor: torch.Tensor) -> None:
        """A tensor that was there before the step: parameters, inputs."""
        self._alive[tensor.untyped_storage()._cdata] = -1

    def begin_anew(self) -> None:
        """Time begins again: of what happened so far only what is still there counts."""
        for storage in self.storages:
            storage.left = storage.died is None
            storage.born, storage.died, storage.accumulated = 0, None if storage.left else 0, None
        self.now, self.layer, self.forward, self.after_layers = 0, OWN_OF_NO_LAYER, True, False
        for log in (self.layer_of_time, self.turn_of_time, self.work):
            log.clear()

    def tick(self) -> None:
        self.now += 1
        self.layer_of_time.append(self.layer)
        self.turn_of_time.append(self.after_layers)

    def check(self) -> None:
        """To be asked between operations: torch runs some, such as a view's `detach`, where an error ends the process.

        Raises:
            ModelError: where a forward pass takes too many of them.
        """
        if self.forward and self.now > self.most:
            raise TooManyOperationsError(
                "A training step of this model has too many operations to be traced",
                where="model_config",
                given=f"more than {self.most:,} in a forward pass of {self.layers} layers over {self.sizes.context:,} "
                "positions: layers that loop over positions, as recurrent ones do without a kernel of their own",
                allowed=f"at most {self.most:,}; layers of attention take some hundred each, at any length",
                do="measure this model, or ask for fewer layers that differ from each other",
            )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet is IS_WHERE:
            return func(*args)
        if packet is aten._local_scalar_dense and args[0].dtype is torch.bool:
            return True  # a draw, such as "keep this module" in peft's LoHa and LoKr; fake tensors have no values
        if packet in ATTENTION_BACKWARD:
            self._scratch(attention_scratch(args))
        call = _grouped_products if packet is aten._grouped_mm else func
        if packet is aten.add and not self.forward and self.tied is not None and self._is_sum_of_tied(args):
            call = aten.add_.Tensor
        out = call(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor)]
        product = packet in MATMULS or packet in ATTENTION_FORWARD
        if product and self.forward:
            self._keep(leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor))
        for tensor in outputs:
            self._see(tensor, product)
        if is_kernel(func):
            self._count(packet, args, kwargs or {}, outputs)
        self.tick()
        return out

    def _is_sum_of_tied(self, args: Any) -> bool:
        """Whether autograd adds up what a tied weight gets as embedding and as output layer.

        It does so in place, but not where a mode like this one is at work (torch/csrc/autograd/input_buffer.cpp,
        can_accumulate_inplace and isTensorSubclassLike).
        """
        return all(isinstance(arg, torch.Tensor) and arg.shape == self.tied for arg in args[:2])

    def _keep(self, operands: Iterable[torch.Tensor]) -> None:
        """A compiler keeps what backward's products read, save weights in another format.

        torch/_functorch/config.py: ban_recompute_materialized_backward.
        """
        for tensor in operands:
            number = self._alive.get(tensor.untyped_storage()._cdata, -1)
            if number >= 0 and self.sizes.factor(self.storages[number].size, self.storages[number].shape)[1][1]:
                self.storages[number].kept = True

    def _see(self, tensor: torch.Tensor, kept: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        self._alive[key] = number = len(self.storages)
        self.storages.append(
            Storage(storage.nbytes(), tuple(tensor.shape), self.now, self.layer, self.forward, kept, self.after_layers)
        )
        weakref.finalize(storage, self._die, key, number)

    def _die(self, key: int, number: int) -> None:
        self._alive.pop(key, None)
        self.storages[number].died = self.now

    def _scratch(self, size: int) -> None:
        """Memory that a CUDA kernel takes for itself."""
        self.storages.append(Storage(size, (), self.now, self.layer, False, False, False, died=self.now + 1))

    def accumulate(self, gradient: torch.Tensor) -> None:
        """A parameter's gradient is complete."""
        number = self._alive.get(gradient.untyped_storage()._cdata, -1)
        if number >= 0:
            self.storages[number].accumulated = self.now

    def _count(self, packet: Any, args: Any, kwargs: Any, outputs: list[torch.Tensor]) -> None:
        phase = "forward" if self.forward else "recompute" if self.recomputing else "backward"
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        window = None
        touched = [(t.numel() * t.element_size(), tuple(t.shape)) for t in (*inputs, *outputs)]
        if packet in MATMULS:
            kind, operations = f"matmul_{_precision(outputs[0])}", 2 * _products(packet, args, outputs)
        elif packet in ATTENTION_FORWARD or packet in ATTENTION_BACKWARD:
            forward = packet in ATTENTION_FORWARD
            query, key = args[:2] if forward else args[1:3]
            # Fused kernels skip blocks above the diagonal (arXiv 2307.08691, section 3.1), but not what a mask hides.
            place = 4 if forward else 7
            is_causal = args[place] if len(args) > place else kwargs.get("is_causal", False)
            products = 2 if forward else 5  # q·k and p·v; backward recomputes q·k
            operations = products * 2 * query.numel() * key.shape[-2] // (2 if is_causal else 1)
            if forward:
                self._windows[self.layer] = _WINDOW.get()
            window = self._windows[self.layer]
            kind = f"attention_{_precision(query)}"
        else:
            kind, operations = "", 0
        sort = (phase, self.layer, packet, kind, operations, window, *touched)
        found = self.work.get(sort)
        if found is None:
            amounts: list[tuple[str, float, Monomial]] = [("kernels", 1.0, (0, 0, 0))]
            if operations:
                amounts.append((kind, *self.sizes.factor(operations, outputs[0].shape)))
            group = "bytes_matmul" if kind else "bytes_pointwise"
            amounts += [(group, *self.sizes.factor(*one)) for one in touched]
            found = self.work[sort] = Operations(amounts, window)
        found.count += 1

    def _alike(self) -> Iterator[tuple[list[int], float, Monomial]]:
        """Storages of one size in one layer, forward or backward, with coefficient and exponents of that size."""
        alike: dict[tuple[int, bool, tuple[float, Monomial]], list[int]] = defaultdict(list)
        for number, storage in enumerate(self.storages):
            factors = self.sizes.factor(storage.size, storage.shape)
            alike[storage.layer, storage.in_forward, factors].append(number)
        for (_, _, (coefficient, monomial)), numbers in alike.items():
            yield numbers, coefficient, monomial

    @property
    def is_padded(self) -> bool:
        """Whether something grows with the batch, is as large as the context, and is neither a multiple of it nor made
        in a loop over it."""
        return any(
            i and not j and coefficient >= self.sizes.context and not self.is_loop(len(numbers))
            for numbers, coefficient, (i, j, _) in self._alike()
        )

    def looped(self) -> set[int]:
        """Numbers of the storages of which there is one for each position, or for each chunk of positions.

        A loop over the context leaves them: as many of one size as it has turns, most of them there at once. What a
        turn leaves to the next one alone is not among them, nor what is larger for a longer context.
        """
        return {
            number
            for numbers, _, (_, in_context, _) in self._alike()
            if not in_context and self.is_loop(len(numbers)) and self._pile_up(numbers)
            for number in numbers[
                -self.sizes.chunks * round(len(numbers) / self.sizes.chunks) :
            ]  # without a first state
        }

    def is_loop(self, count: int) -> bool:
        """Whether so many of one sort are those of a loop over the context.

        The first turn, or the last, may lack some of its own; some beside the loop may be of the same sort.
        """
        turns = self.sizes.chunks
        each = round(count / turns)
        return each > 0 and abs(count - each * turns) <= max(each, MOST_BESIDE_A_LOOP)

    def _pile_up(self, numbers: list[int]) -> bool:
        changes = sorted(
            change
            for storage in (self.storages[number] for number in numbers)
            for change in ((storage.born, 1), (self.now + 1 if storage.died is None else storage.died, -1))
        )
        alive = most = 0
        for _, change in changes:
            alive += change
            most = max(most, alive)
        return most >= self.sizes.chunks // 2


def _precision(tensor: torch.Tensor) -> str:
    return {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}.get(tensor.dtype, "fp32")


def is_kernel(func: Any) -> bool:
    """Whether a device does something for an operation of torch, such as `torch.ops.aten.mul.Tensor`."""
    return func.overloadpacket not in NO_KERNEL and func.overloadpacket is not IS_WHERE and not _is_view(func)


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _grouped_products(left: torch.Tensor, right: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """torch's product of groups: its rule for fake tensors takes bf16 alone, its kernels other formats as well.

    In another format CUDA multiplies group by group, into the same output (aten/src/ATen/native/GroupedMMUtils.h,
    _grouped_mm_fallback).
    """
    operands = (one.to(torch.bfloat16) for one in (left, right))
    out: torch.Tensor = aten._grouped_mm(*operands, *args, **kwargs)
    return out.to(left.dtype)


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


class CudaManners(TorchFunctionMode):
    """What CUDA does and a CPU does not: one-byte dropout masks, dropout within fused attention, and autocast's list of
    operations in fp32."""

    def __init__(self, tape: Tape, autocast: torch.dtype | None, attention: str) -> None:
        super().__init__()
        self._autocast = autocast
        self._attention = attention
        self.tape = tape
        self._in_fp32 = set() if autocast is None else IN_FP32

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.tape.check()
        kwargs = kwargs or {}
        if func is torch.nn.functional.dropout:
            return self._dropout(*args, **kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention and self._attention != "math":
            if self._attention == "flash":
                query, key, value = (*args, *kwargs.values())[:3]
                args = (query, key, value)
                kwargs = {"is_causal": True, "enable_gqa": query.shape[1] != key.shape[1]}
            else:  # CUDA's fused kernels draw their dropout themselves; a CPU has none, and takes `math` with dropout
                args, kwargs = args[:4] + args[5:], {**kwargs, "dropout_p": 0.0}
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


def _to_fp32(value: Any) -> Any:
    return (
        value.float() if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16) else value
    )
