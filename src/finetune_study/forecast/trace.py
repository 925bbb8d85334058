"""One training step of the real model class on fake tensors: what is alive when, and what is computed.

Fake tensors have shapes and no storage, so that a step of a 70B model costs a second and no memory. Three properties
make the answer exact and quick:

- **Sizes are monomials.** Batch, context and LoRA rank of the trace are primes that divide nothing else in the model,
  so the number of elements of a tensor factors into coefficient × batch^i × context^j × rank^k. One trace then answers
  for every batch, context and rank.
- **Contexts repeat.** Where layers work on chunks of the context, and pad the last, a second trace takes a prime number
  of whole chunks; where they loop over positions, it takes few positions. What each turn of a loop leaves behind counts
  as often as the context has turns.
- **Stacks repeat.** One period of equal layers is traced, between layers before and after it. What it leaves behind
  counts as often as the model has it, and its own moments as those of the first period and of the last. A stack that
  never repeats is traced in full.

Fake tensors pose as CPU tensors: there attention takes a fused kernel that saves what CUDA's does, while on fake CUDA
and on meta tensors it would take the quadratic one. Where the CPU differs from CUDA, `tape.CudaManners` mends it.
"""

import contextlib
import gc
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
import transformers
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)

from finetune_study.errors import ModelError, StudyError
from finetune_study.forecast.build import (
    DEEPEST,
    LayerKind,
    QuantizedLinear,
    Stack,
    build,
    check_expressions,
    check_layers,
    find_stack,
    first_line,
    joins_layers,
    layer_kinds,
    layer_stack,
    make_config,
    outside_layers,
    shorten,
    traced_model,
    warnings_of,
)
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
from finetune_study.forecast.tape import (
    OPERATIONS_WITHOUT_LOOPS,
    OWN_OF_NO_LAYER,
    PADDINGS,
    CudaManners,
    PaddedError,
    Sizes,
    Storage,
    Tape,
    TooManyOperationsError,
    most_operations,
)


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


def trace(layout: Layout) -> Profile:
    """Traces one training step.

    Raises:
        ModelError: for a model that can't be made, or whose step can't be traced.
    """
    with _uncollected():
        try:
            return _trace(layout)
        except StudyError:
            raise
        except (DynamicOutputShapeException, DataDependentOutputException) as error:
            raise ModelError(
                "The model's sizes depend on the values that it computes, so that no step can be traced without them",
                where="model_config.model_type",
                given=f"{json.loads(layout.config).get('model_type')}, which runs {error}",
                allowed="layers whose sizes follow from the batch and the context",
                do="measure this model",
            ) from None
        except RecursionError:
            raise ModelError("The model's configuration is nested too deeply", where="model_config") from None
        except Exception as error:  # whatever the model's own code raises about a configuration that makes no sense
            raise ModelError(
                "A training step of this model can't be traced",
                where="model_config",
                given=f"{type(error).__name__}: {first_line(error)}",
                do="see that the sizes fit each other, and the recipe the model: a real step runs the same code",
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
    check_expressions(skeleton, layout)
    check_layers(layout, depth)
    kinds = layer_kinds(skeleton, layout)
    stack = find_stack(kinds)
    short = None if joins_layers(skeleton, layout) else _shortened(config, skeleton, kinds, stack, layout)
    if short is None:
        stack, short = Stack(len(kinds), 0, 0, 0), config
    return _traced(short, stack, layout, skeleton)


def _shortened(config: Any, skeleton: Any, kinds: list[LayerKind], stack: Stack, layout: Layout) -> Any | None:
    """The configuration of the traced layers alone; None where the model would not be the rest of the whole one.

    What decides may lie outside of the lists that we shorten, or in a layer's number, which peft's settings may name;
    and weights beside the layers may grow with their number (Gemma 4's embeddings for each layer).
    """
    try:
        short = shorten(config, stack.traced)
        with torch.device("meta"):
            model = build(short, torch.float32, "eager")
        found = layer_kinds(model, layout)
    except Exception:  # transformers' own checks raise what they like; the whole configuration has passed them
        return None
    expected = [kinds[number] for number in stack.traced]
    same = [(kind.of_model, kind.named) for kind in found] == [(kind.of_model, kind.named) for kind in expected]
    return short if same and outside_layers(model) == outside_layers(skeleton) else None


def _traced(short: Any, stack: Stack, layout: Layout, skeleton: Any) -> Profile:
    """The trace over a prime number of positions, or, where layers do not take these at once, of chunks."""
    layers = len(stack.traced)
    most = most_operations(layers)

    def over(context: tuple[int, int], most: int, may_pad: bool = True) -> Profile:
        return _Tracer(short, stack, layout, skeleton, context).run(most, may_pad)

    may_pad = any(one["method"] in PROMPTS for one in json.loads(layout.peft or "[]"))
    try:
        try:
            return over(_context(short, layout), min(most, OPERATIONS_WITHOUT_LOOPS * (layers + 1)), may_pad)
        except TooManyOperationsError:
            return over(_few_positions(short, skeleton), most, may_pad)
    except PaddedError:
        return over(_whole_chunks(short, skeleton), most)


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Cycles of an earlier model, with its graph, are not collected in the middle of a trace.

    What is alive when should not depend on when the collector runs.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.collect()


@contextlib.contextmanager
def _whole_sequences() -> Iterator[None]:
    """No sequences are packed into one: positions count up.

    transformers looks for the seams in the positions' values. Fake ones have none, and it then takes a mask of context
    × context to be on the safe side, which a real run without packing does not have (masking_utils.py,
    find_packed_sequence_indices). Masks that a model or its window really needs are made all the same.
    """
    masking = transformers.masking_utils
    original = masking.find_packed_sequence_indices
    masking.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = original


def _positions(config: Any) -> int | None:
    """Positions that a model was made for; MPT has a name of its own for them."""
    found = getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None)
    return found if isinstance(found, int) else None


def _window(config: Any) -> int | None:
    """Positions beyond which layers mask some; a chunk of Llama 4's attention is a window that doesn't move."""
    found = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((positions for positions in found if isinstance(positions, int) and positions > 0), default=None)


def _avoided(config: Any) -> set[int]:
    return {times * n for n in integers(config.to_dict()) for times in (1, 2)}


def _context(config: Any, layout: Layout) -> tuple[int, int]:
    """Positions of a trace, a prime, and the length of a chunk: 1."""
    text, avoid = config.get_text_config(), _avoided(config)
    window, positions = _window(text), _positions(text) or 1 << 20
    start = max(2048, window + 1) if window and layout.windowed else 2048
    context = next(primes_above(start, avoid))
    most = min(window or positions, positions) if layout.masks and not layout.windowed else positions
    if context >= most:  # learned positions end there, and a window begins to mask
        context = next(primes_above(max(most // 2, 3), avoid))
    return context, 1


USUAL_CHUNK = 64
"""Positions of a chunk in the gated delta rule (transformers, torch_chunk_gated_delta_rule). Where a configuration has
a length of its own, as that of state spaces does, chunks are a multiple of both."""
FEWEST_TURNS = 31
"""Of the loops of a trace: its positions, or chunks of them."""


def _whole_chunks(config: Any, skeleton: Any) -> tuple[int, int]:
    """Positions of a trace, a prime number of chunks, and the length of one."""
    settings = config.get_text_config().to_dict()
    own = [n for name, n in settings.items() if name.endswith(("chunk_size", "block_size")) and isinstance(n, int)]
    chunk = math.lcm(USUAL_CHUNK, *(n for n in own if 0 < n <= LARGEST_CHUNK))
    return chunk * _turns(config, skeleton, chunk), chunk


PROMPTS = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT")
"""Methods of peft with tokens of their own: sizes of the batch that are not the context's."""
LARGEST_CHUNK = 1024
"""Positions; a larger one is traced like a context that is not a multiple of it."""


def _few_positions(config: Any, skeleton: Any) -> tuple[int, int]:
    return _turns(config, skeleton, 1), 1


def _turns(config: Any, skeleton: Any, chunk: int) -> int:
    """A small prime that divides no length of the model, nor is near one of them, padded or not.

    Else a loop over experts, for example, would be taken for one over the context.
    """
    lengths = {length for parameter in skeleton.parameters() for length in parameter.shape} | _avoided(config)
    for turns in primes_above(FEWEST_TURNS, lengths):
        near = {turns - 1, turns + 1, *(turns * chunk + padding for padding in PADDINGS)}
        if not near & lengths and (turns + 1) & turns:
            return turns
    raise AssertionError("there are endless primes")


LOOPS = (
    "layers work through the context in chunks, or position by position, in transformers' own code: that is what is "
    "predicted; with kernels made for them (mamba_ssm, causal_conv1d, fla) a step takes less memory and time"
)


class _Tracer:
    def __init__(self, config: Any, stack: Stack, layout: Layout, skeleton: Any, context: tuple[int, int]) -> None:
        self.config, self.stack, self.layout, self.skeleton = config, stack, layout, skeleton
        positions, chunk = context
        candidates = primes_above(1009, _avoided(config))
        self.rank_prime, batch = next(candidates), next(candidates)
        self.sizes = Sizes(batch, positions, self.rank_prime, layout.virtual_tokens, chunk)

    def run(self, most: int, may_pad: bool) -> Profile:
        """
        Args:
            most: operations of a forward pass.
            may_pad: the trace stands although something in it is padded.

        Raises:
            TooManyOperationsError: where it takes more.
            PaddedError: as early as it is seen.
        """
        self.may_pad = may_pad
        # Given up in the middle, a trace may leave gradients switched off: `enable_grad` puts back what was.
        with torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True), _whole_sequences():
            model = traced_model(self.config, self.layout, self.rank_prime, self.stack)
            self.tape = Tape(self.sizes, len(self.stack.traced), most)
            self._step(model, self.tape)
            self._check_padding()
            return self._profile(model, self.tape)

    def _step(self, model: Any, tape: Tape) -> None:
        for tensor in (*model.parameters(), *model.buffers()):
            tape.know(tensor)
        ids = torch.zeros(self.sizes.batch, self.sizes.context, dtype=torch.long)
        tape.know(ids)
        self._follow(model, tape)
        autocast = self.layout.autocast
        # Without autocast the output layer's gradient is a view, which nothing is added to.
        tape.tied = tied_shape(model) if autocast else None
        with contextlib.ExitStack() as manners, tape:
            manners.enter_context(CudaManners(tape, autocast and getattr(torch, autocast), self.layout.attention))
            if self.layout.attention == "math":
                manners.enter_context(torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH))
            held: list[torch.Tensor] = []
            if self.layout.holds_loss:
                held.append(self._run(model, tape, ids, held))
                model.zero_grad()
                tape.begin_anew()
            self._run(model, tape, ids, held)
            tape.tick()

    def _run(self, model: Any, tape: Tape, ids: torch.Tensor, held: list[torch.Tensor]) -> torch.Tensor:
        """Forward and backward; what is held of an earlier step is let go in between."""
        autocast = self.layout.autocast
        with torch.autocast("cpu", getattr(torch, autocast or "bfloat16"), enabled=autocast is not None):
            loss = self._loss(model, ids)
        self._check_padding()
        tape.end_of_forward, tape.forward = tape.now, False
        held.clear()
        # As loss.backward() does, which would leave the function mode out while checkpoints recompute.
        engine = torch.autograd.Variable._execution_engine
        engine.run_backward((loss,), (torch.ones_like(loss),), False, False, (), True, True)
        return loss

    def _check_padding(self) -> None:
        if not self.may_pad and self.tape.is_padded:
            raise PaddedError

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
                if number == 0:  # more of its kind follow, for most of a trace that would then be made anew
                    self._check_padding()
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                key = tape._alive.get(first.untyped_storage()._cdata, -1)
                if key >= 0:
                    tape.storages[key].kept = True  # the residual stream is kept, compiled or not
                if first.grad_fn is not None and tape.forward:
                    first.grad_fn.register_prehook(lambda gradients: enter(number))

        def inside(number: int, checkpoint: Any, function: Any, *arguments: Any) -> Any:
            def followed(*inputs: Any) -> Any:
                enter(number)
                output = function(*inputs)
                leave(number, output)
                return output

            return checkpoint(followed, *arguments)

        for number, layer in enumerate(layers):
            if self.layout.checkpoint_every == "sqrt":  # called one by one, layers run when their group does
                layer._gradient_checkpointing_func = partial(inside, number, layer._gradient_checkpointing_func)
                continue
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
        if storage.left:
            return SAVED
        if _outlives_forward(storage, end_of_forward):
            return SAVED if storage.kept else POINTWISE
        return TEMPORARY

    def _profile(self, model: Any, tape: Tape) -> Profile:
        kinds, monomials, phases, alive = self._moments(tape)
        loops = self.sizes.chunk > 1 or any(tape.is_loop(operations.count) for operations in tape.work.values())
        work: dict[tuple[str, str, int | None], dict[Monomial, float]] = defaultdict(lambda: defaultdict(float))
        for (phase, layer, *_), operations in tape.work.items():
            looped = tape.is_loop(operations.count)
            for kind, coefficient, (i, j, k) in operations.amounts:
                amount = coefficient * operations.count * self._times(layer)
                window = operations.window if kind.startswith("attention") else None
                work[phase, kind, window][i, j + looped, k] += amount / (self.sizes.context if looped else 1)
        parameters = self._parameters(model)
        _, layers = layer_stack(self.skeleton)
        text = self.config.get_text_config()
        return Profile(
            model_class=type(self.skeleton).__name__,
            depth=self.stack.depth,
            vocabulary=text.vocab_size,
            hidden_size=text.hidden_size,
            positions=_positions(text),
            window=_window(text),
            warnings=warnings_of(self.skeleton, self.layout) + ([LOOPS] if loops else []),
            parameters=parameters,
            largest_layer=float(max(sum(p.numel() for p in layer.parameters()) for layer in layers)),
            largest_trained=self._largest_trained(model),
            phases=phases,
            kinds=kinds,
            monomials=monomials,
            alive=alive,
            work=[Work(phase, kind, dict(amounts), window) for (phase, kind, window), amounts in work.items()],
        )

    def _moments(self, tape: Tape) -> tuple[list[str], Any, Any, Any]:
        """The moments that can be a peak, with what is alive then."""
        columns: dict[tuple[str, Monomial], int] = {}
        changes: list[tuple[int, int, int, float, float]] = []  # born, died, column, bytes, those of other periods
        looped = tape.looped()
        for number, storage in enumerate(tape.storages):
            coefficient, monomial = self.sizes.factor(storage.size, storage.shape)
            if number in looped:
                coefficient, monomial = coefficient / self.sizes.context, (monomial[0], 1, monomial[2])
            others = coefficient * (self._times(storage.layer) - 1) if _stays(storage, tape.end_of_forward) else 0.0
            died = tape.now + 1 if storage.died is None else storage.died
            if storage.accumulated is None:
                kind = self._kind(storage, tape.end_of_forward, monomial, coefficient)
                lives = [(kind, storage.born, died)]
            else:
                lives = [(NEW_GRADIENT, storage.born, storage.accumulated), (GRADIENT, storage.accumulated, died)]
            for kind, begin, end in lives:
                if end > begin:
                    column = columns.setdefault((kind, monomial), len(columns))
                    changes.append((begin, end, column, coefficient, 0.0 if kind == NEW_GRADIENT else others))
        delta = np.zeros((2, tape.now + 2, len(columns)))
        for begin, end, column, *amounts in changes:
            delta[:, begin, column] += amounts
            delta[:, end, column] -= amounts
        traced, others_alive = np.cumsum(delta, axis=1)[:, : tape.now]
        phases = (np.arange(tape.now) >= tape.end_of_forward).astype(np.int64)
        phases += 2 * np.array(tape.turn_of_time[: tape.now], dtype=np.int64)
        keep = _local_peaks(delta[0, : tape.now]) | (phases >= 2)
        rows = [(now, others) for now, others in self._states(tape) if keep[now]]
        now, of_others = np.array(rows, dtype=np.int64).T
        alive, phases = _undominated(traced[now] + others_alive[of_others], phases[now])
        return (
            [kind for kind, _ in columns],
            np.array([monomial for _, monomial in columns], dtype=np.int64).reshape(-1, 3),
            phases,
            alive,
        )

    def _states(self, tape: Tape) -> Iterator[tuple[int, int]]:
        """Every moment, with one at which the other periods are as they are at it.

        While the traced period runs as the first of all, the others are as before it began, and while it runs as the
        last, as after it ended.
        """
        inside = np.isin(tape.layer_of_time[: tape.now], self.stack.middle if self.stack.times > 1 else [])
        spans = []
        for begin, end in ((0, tape.end_of_forward), (tape.end_of_forward, tape.now)):
            (moments,) = np.nonzero(inside[begin:end])
            if moments.size:
                spans.append((begin + int(moments[0]), begin + int(moments[-1]) + 1))
        for now in range(tape.now):
            span = next((span for span in spans if span[0] <= now < span[1]), None)
            yield from [(now, now)] if span is None else [(now, span[0] - 1), (now, span[1])]

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
            matrix = parameter.dim() == 2 and role == "layers"  # no optimizer takes stacked experts for matrices
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


def tied_shape(model: Any) -> torch.Size | None:
    """Of the weight that is embedding and output layer at once; None where there is none."""
    head = getattr(model.get_output_embeddings(), "weight", None)
    return next(
        (torch.Size(one.shape) for one in model.get_input_embeddings().parameters() if id(one) == id(head)), None
    )


def _outlives_forward(storage: Storage, end_of_forward: int) -> bool:
    """Whether forward leaves it behind: saved for backward, or held until the pass has ended.

    autocast casts a weight once, and holds the copies until its context is left, whoever needs them
    (aten/src/ATen/autocast_mode.cpp, clear_cache); under checkpointing nothing else holds them.
    """
    return storage.in_forward and (storage.died is None or storage.died >= end_of_forward)


def _stays(storage: Storage, end_of_forward: int) -> bool:
    """Whether a layer leaves it behind: after forward, or as a gradient; else it is handed to the next layer."""
    return _outlives_forward(storage, end_of_forward) or storage.left or storage.accumulated is not None


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
