"""Model of a run: loaded or drawn at random, in its dtype, with its attention."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, modeling_utils

from finetune_study import sharded_loading
from finetune_study.errors import RunFailedError
from finetune_study.run import Run
from finetune_study.techniques import quantised


def load(run: Run, folder: Path) -> Any:
    """The bare model, before any technique wraps it.

    Args:
        run: decides about weights, dtype and attention.
        folder: the prepared model.

    ZeRO-3 shards the weights while they are made or read when its `TrainingArguments` exist before this call: no rank
    ever holds all of them.

    Raises:
        RunFailedError: where weights were to be quantised, and transformers quantises none of the layers'.
    """
    arguments: dict[str, Any] = {}
    for technique in run.parsed_techniques.values():
        arguments |= technique.load_arguments(run.parsed_techniques)
    if run.model.weights == "random":
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        if "quantization_config" in arguments:
            model = _quantised_as_drawn(config, arguments, run.seed)
        else:
            with _seeded_initialisation(run.seed):
                model = AutoModelForCausalLM.from_config(config, **arguments)
    else:
        with sharded_loading.in_chunks(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, **arguments)
    if "quantization_config" in arguments and not quantised.by_bitsandbytes(model).share:
        raise RunFailedError(
            "None of the model's layers is quantised",
            where="the recipe's qlora",
            given=f"{run.model.name_or_path or run.target}, a {model.config.model_type}",
            allowed="a model whose layers are exactly torch.nn.Linear or Conv1D, which transformers "
            f"{transformers.__version__} has bitsandbytes quantise",
            do="use lora, or another model",
        )
    model.config.use_cache = False  # keys and values of past tokens serve generation alone
    return model


def _quantised_as_drawn(config: Any, arguments: Mapping[str, Any], seed: int) -> Any:
    """A model of quantised random weights, of which no process ever holds more than one module's unquantised.

    transformers quantises weights while it reads them, one after the other (core_model_loading.py). So random ones are
    read as well, from a state dict that draws what it is asked for: the same as `_seeded_initialisation` draws.
    """
    plain = {name: value for name, value in arguments.items() if name != "quantization_config"}
    # transformers' own word for a model that ZeRO-3 is not to shard while it is made; DeepSpeed does so later.
    with torch.device("meta"), modeling_utils.set_quantized_state():
        model = AutoModelForCausalLM.from_config(config, **plain)
    order: dict[torch.nn.Module, tuple[PreTrainedModel, int]] = {}

    def note(self: PreTrainedModel, module: torch.nn.Module, *_: Any) -> None:
        order.setdefault(module, (self, len(order) + 1))

    with _initialising_by(note):
        model.initialize_weights()
    paths = {module: path for path, module in model.named_modules()}
    weights = {
        key: _Drawn(module, attribute, of_model, _seed_of_module(seed, number))
        for module, (of_model, number) in order.items()
        for attribute, _ in module.named_parameters(recurse=False)
        if (key := f"{paths[module]}.{attribute}".lstrip(".")) not in model.all_tied_weights_keys
    }
    quantised = type(model).from_pretrained(None, config=config, state_dict=weights, **arguments)
    transformers.set_seed(seed)
    return quantised


class _Drawn:
    """A random weight that is drawn whenever it is read; transformers reads it as it does a safetensors slice."""

    def __init__(self, module: torch.nn.Module, attribute: str, of_model: PreTrainedModel, seed: int) -> None:
        self.module, self.attribute, self.of_model, self.seed = module, attribute, of_model, seed

    def __getitem__(self, _: Any) -> torch.Tensor:
        module = copy.deepcopy(self.module).to_empty(device="cpu", recurse=False)
        torch.manual_seed(self.seed)
        with torch.no_grad():
            self.of_model._init_weights(module)
        drawn: torch.Tensor = getattr(module, self.attribute).detach()
        return drawn


def _seed_of_module(seed: int, number: int) -> int:
    """Of the module whose turn it is as the `number`-th."""
    return seed * 1_000_003 + number


@contextmanager
def _seeded_initialisation(seed: int) -> Iterator[None]:
    """Each module draws its weights from a seed of its own, so that they are equal however many ranks share the work.

    ZeRO-3 initialises on one rank and in another order of random draws than the plain path; the order of modules is
    the same in both (transformers.integrations.deepspeed.initialize_weights_zero3).
    """
    original = PreTrainedModel._initialize_weights
    state = torch.get_rng_state()
    count = 0

    def initialise(self: PreTrainedModel, module: torch.nn.Module, *rest: Any, **keywords: Any) -> None:
        nonlocal count
        if not getattr(module, "_is_hf_initialized", False):
            count += 1
            torch.manual_seed(_seed_of_module(seed, count))
        original(self, module, *rest, **keywords)

    try:
        with _initialising_by(initialise):
            yield
    finally:
        torch.set_rng_state(state)
        transformers.set_seed(seed)


@contextmanager
def _initialising_by(initialise: Callable[..., None]) -> Iterator[None]:
    """transformers, which gives no way in, calls this for each module in its turn."""
    original = PreTrainedModel._initialize_weights
    PreTrainedModel._initialize_weights = initialise
    try:
        yield
    finally:
        PreTrainedModel._initialize_weights = original


def count_weights(model: Any) -> tuple[int, int]:
    """Trained weights and all weights, of sharded and of quantised layers too."""

    def count(parameter: torch.nn.Parameter) -> int:
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        # bitsandbytes packs two weights into a byte; peft counts so as well.
        return size * 2 * parameter.element_size() if type(parameter).__name__ == "Params4bit" else size

    counts = [(count(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(size for size, trained in counts if trained), sum(size for size, _ in counts)


def compute_dtype_probe(model: Any, tell: Any) -> None:
    """Calls `tell` with the number format of the first linear layer's output in the first forward pass, or when
    torch.compile traces it.

    Removing a hook, or writing, would break the graph there, and each later one: Dynamo calls what is marked as a
    constant while it traces, and compiles nothing of it.
    """
    layer = next(module for module in model.modules() if isinstance(module, torch.nn.Linear))

    @torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
    def seen(dtype: torch.dtype) -> None:
        tell(str(dtype).removeprefix("torch."))

    def once(module: Any, inputs: Any, output: torch.Tensor) -> None:
        if not torch.compiler.is_compiling():
            handle.remove()
        seen(output.dtype)

    handle = layer.register_forward_hook(once)


def attention_kernel_probe(tell: Any) -> None:
    """Calls `tell` with the kernel that torch chooses for scaled_dot_product_attention, the next time it is called.

    Nothing is told where it is never called, or only inside a compiled program.
    """
    functional = torch.nn.functional
    original = functional.scaled_dot_product_attention

    def once(*arguments: Any, **keywords: Any) -> torch.Tensor:
        if not torch.compiler.is_compiling():
            functional.scaled_dot_product_attention = original
            cast = {name: _autocast(value) for name, value in keywords.items()}
            chosen = torch._fused_sdp_choice(*map(_autocast, arguments), **cast)
            tell(torch.nn.attention.SDPBackend(chosen).name.lower())
        return original(*arguments, **keywords)

    functional.scaled_dot_product_attention = once


def _autocast(value: Any) -> Any:
    """An argument as autocast would hand it on: torch chooses the kernel by what comes after it."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        return value
    device = value.device.type
    return value.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else value
