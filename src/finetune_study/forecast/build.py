"""The model that is traced: the real class of a configuration, on fake tensors, as a recipe changes it."""

import contextlib
import copy
import json
import math
import re
import signal
import threading
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch._subclasses.fake_tensor import FakeTensor

from finetune_study.errors import ModelError
from finetune_study.forecast.layout import CODE, Layout
from finetune_study.forecast.tape import within_window
from finetune_study.techniques import gradient_checkpointing, quantised
from finetune_study.techniques.peft_method import DEPTH, WIDTH

FUSED = "finetune_study_fused"
"""Name under which transformers knows our attention function."""


def _fused_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """A kernel with masks and windows of its own, as FlashAttention has: no mask in memory, keys are not repeated."""
    grouped = query.shape[1] != key.shape[1]
    with within_window(sliding_window or None):  # 0: none
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    return out.transpose(1, 2).contiguous(), None


transformers.AttentionInterface.register(FUSED, _fused_attention)
transformers.AttentionMaskInterface.register(FUSED, lambda *args, **kwargs: None)


DEEPEST = 1024
"""Layers; more is a slip of the pen, and would take minutes to build."""

LARGEST = {
    **dict.fromkeys(WIDTH, 1 << 20),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "vocab_size"), 1 << 24),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_key_value_heads", "num_kv_heads", "head_dim"), 1 << 16),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts"), 1 << 16),
    "max_position_embeddings": 1 << 30,
    "sliding_window": 1 << 30,
    **dict.fromkeys(DEPTH, DEEPEST),
    **dict.fromkeys(("encoder_layers", "num_decoder_layers", "num_encoder_layers"), DEEPEST),
    "num_labels": 1 << 20,  # transformers makes a dictionary of them
}
"""What is still believed of a configuration's sizes; more is a slip of the pen. Published models stay below a tenth."""

DROPOUT = re.compile("dropout|layerdrop|drop_?path|_pdrop$")
"""Names of shares that are dropped, such as attention_dropout, resid_pdrop, drop_path_rate."""

LEAST = dict.fromkeys(
    ("sliding_window", "num_experts", "n_routed_experts", "encoder_layers", "num_encoder_layers", "num_labels"), 0
)
"""Of those that may be less than 1; 0 switches it off."""


def check_sizes(settings: Mapping[str, Any], where: str = "model_config") -> None:
    """Checks what transformers does not, or says in words of its own code; in the parts of a model, too.

    Raises:
        ModelError: for a size that is out of range, or heads that can't be shared out.
    """
    for name, part in settings.items():
        if isinstance(part, Mapping):
            check_sizes(part, f"{where}.{name}")
    for key, most in LARGEST.items():
        size = settings.get(key)
        least = LEAST.get(key, 1)
        if isinstance(size, int | float) and not least <= size <= most:
            raise ModelError(
                "A size of the model is out of range",
                where=f"{where}.{key}",
                given=size,
                allowed=f"a whole number from {least} to {most}",
            )
    for key, share in settings.items():
        if DROPOUT.search(key) and isinstance(share, int | float) and not 0 <= share <= 1:
            raise ModelError(
                "The model can't drop such a share", where=f"{where}.{key}", given=share, allowed="a number from 0 to 1"
            )
    _check_experts(settings, where)
    heads = settings.get("num_attention_heads")
    for key in ("num_key_value_heads", "num_kv_heads"):
        shared = settings.get(key)
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            raise ModelError(
                "The attention heads can't share the key-value heads evenly",
                where=f"{where}.{key}",
                given=f"{shared} for {heads} attention heads",
                allowed=f"a number that divides {heads}",
            )


def _check_experts(settings: Mapping[str, Any], where: str = "model_config") -> None:
    chosen = settings.get("num_experts_per_tok")
    for key in ("num_local_experts", "num_experts", "n_routed_experts"):
        experts = settings.get(key)
        if isinstance(chosen, int) and isinstance(experts, int) and not 0 < chosen <= experts:
            raise ModelError(
                "A token can't go to so many experts",
                where=f"{where}.num_experts_per_tok",
                given=f"{chosen} of {experts} experts ({key})",
                allowed=f"a whole number from 1 to {experts}",
            )


def make_config(settings: dict[str, Any]) -> Any:
    """transformers' configuration of a model.

    Raises:
        ModelError: for an architecture that transformers does not have, or settings that it refuses.
    """
    settings = dict(settings)
    if CODE in settings:
        return _with_own_code(settings[CODE][0])
    check_sizes(settings)
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
            "transformers refuses this configuration", where="model_config", given=one_line(error)
        ) from None
    if "num_experts_per_tok" in settings:  # of as many experts as transformers has where none are given
        _check_experts({**config.to_dict(), **settings})
    masked = transformers.models.auto.modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    if model_type in masked and not getattr(config, "is_decoder", True) and not config.is_encoder_decoder:
        raise ModelError(
            "The model is an encoder, which sees the tokens that it is to predict",
            where="model_config.model_type",
            given=model_type,
            allowed="a causal language model; or the same with is_decoder: true, if its layers are to be a decoder's",
        )
    sequence_to_sequence = transformers.models.auto.modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    if model_type in sequence_to_sequence and config.is_encoder_decoder:
        raise ModelError(
            "The model has an encoder beside its decoder: it is no causal language model",
            where="model_config.model_type",
            given=model_type,
            allowed="a model of a decoder alone, for example llama, falcon or gpt_neox",
        )
    config.use_cache = False
    return config


OWN_CODE: dict[type, Any] = {}
"""Model classes that came as a model's own code, by the class of their configuration."""


def _with_own_code(folder: str) -> Any:
    """The configuration of a model whose own code may be run."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
        reference = config.auto_map["AutoModelForCausalLM"]
        OWN_CODE[type(config)] = get_class_from_dynamic_module(reference, folder, local_files_only=True)
    except Exception as error:  # the code may raise what it likes
        raise ModelError("The model's own code can't be used", where=folder, given=one_line(error)) from None
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
    if kind.config_class is not None and kind.config_class is config.sub_configs.get("text_config"):
        config = config.get_text_config()  # of several parts, AutoModelForCausalLM takes the text's (auto_factory.py)
    if attention == FUSED and not kind._supports_attention_backend:
        attention = "sdpa"  # code from before transformers' attention functions; `CudaManners` mends the call
    if attention == "sdpa" and not kind._supports_sdpa:
        attention = "eager"  # as transformers does it by itself where nothing is asked
    try:
        with _default_dtype(dtype), _no_initialisation():
            model = kind._from_config(config, attn_implementation=attention, dtype=dtype)
    except Exception as error:
        if isinstance(error, KeyError):
            _explain_name(config, error.args[0])
        raise ModelError(
            "No causal language model can be made of this configuration",
            where="model_config",
            given=f"{type(error).__name__}: {first_line(error)}",
            allowed="a configuration that transformers' AutoModelForCausalLM takes, without code of its own",
        ) from None
    model.config.use_cache = False
    return model


def _explain_name(config: Any, name: Any) -> None:
    """transformers looks up activations and rotary embeddings by name, and says no more than the name it lacks.

    Raises:
        ModelError: where the name is one of these.
    """
    text = config.get_text_config()
    for key in ("hidden_act", "hidden_activation", "activation_function"):
        if getattr(text, key, None) == name:
            known = transformers.activations.ACT2FN
            raise ModelError(
                "The activation is not known", where=f"model_config.{key}", given=name, allowed=", ".join(sorted(known))
            )
    if name in _rope_types(getattr(text, "rope_parameters", None)):
        known = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS
        raise ModelError(
            "The rotary embedding is not known",
            where="model_config.rope_parameters.rope_type (or rope_scaling.type)",
            given=name,
            allowed=", ".join(["default", *sorted(known)]),
        )


def _rope_types(parameters: Any) -> list[Any]:
    """Of all layers, or of each kind of layers."""
    if not isinstance(parameters, dict):
        return []
    return [one.get("rope_type") for one in (parameters, *parameters.values()) if isinstance(one, dict)]


def _class_of(config: Any) -> Any:
    mapping = transformers.models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    if type(config) in OWN_CODE:
        return OWN_CODE[type(config)]
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
    """How a stack of layers repeats: one period is traced, with what comes before and after."""

    depth: int
    before: int
    """Layers before the traced period."""
    period: int
    """Layers of a period; 0: nothing repeats."""
    after: int
    """Layers after the last period."""

    @property
    def traced(self) -> list[int]:
        """Numbers of the layers that are traced."""
        if not self.period:
            return list(range(self.depth))
        return [*range(self.before + self.period), *range(self.depth - self.after, self.depth)]

    @property
    def middle(self) -> range:
        """Positions of the period among the traced layers."""
        return range(self.before, self.before + self.period)

    @property
    def times(self) -> int:
        """How often the period counts."""
        return (self.depth - self.before - self.after) // self.period if self.period else 1


def find_stack(kinds: list["LayerKind"]) -> Stack:
    """The shortest trace of layers of these kinds.

    A layer of the repeating part lies on either side of the traced period, so that what it hands on and is handed is
    what any period would be. Where checkpoints take layers in groups, whole periods do, which keeps the groups whole.
    """
    depth = len(kinds)
    best = Stack(depth, 0, 0, 0)
    grouped = any(kind.in_group for kind in kinds)
    for start in range(min(depth, 8)):
        rest = kinds[start:]
        for period in range(1, len(rest) // 3 + 1):
            if all(kind == rest[i % period] for i, kind in enumerate(rest)):
                beside = period if grouped else 1
                before = start + beside
                found = Stack(depth, before, period, beside + (depth - before - beside) % period)
                if len(found.traced) < len(best.traced):
                    best = found
                break
    return best


def group_size(checkpoint_every: int | str, depth: int) -> int:
    """Layers after which checkpoints repeat, in a model of this depth; 0: there are none."""
    return math.isqrt(depth) if checkpoint_every == "sqrt" else int(checkpoint_every)


@dataclass(frozen=True)
class LayerKind:
    """What tells layers apart."""

    of_model: tuple[Any, ...]
    """Shapes of their weights, and kinds of their attention."""
    settings: tuple[Any, ...]
    """What the configuration gives for each layer by itself, such as whether it has a rotary embedding (SmolLM3)."""
    in_group: int
    """Place among the layers after which checkpoints repeat."""
    adapted: tuple[bool, ...]
    """Whether each method of peft adapts it."""
    named: tuple[tuple[str, ...], ...]
    """Its modules that each name in peft's settings means; by the layer's number, for some."""


def layer_kinds(model: Any, layout: Layout) -> list[LayerKind]:
    """Kinds of a model's layers, first to last."""
    config = model.config.get_text_config()
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    stack_name, layers = layer_stack(model)
    lists, overrides = lists_of_layers(config), overrides_of_layers(config)
    expressions = [re.compile(expression) for _, _, expression in _names(layout)]
    size = group_size(layout.checkpoint_every, len(layers))
    methods = [adapted_layers(settings, len(layers)) for settings in json.loads(layout.peft or "[]")]
    kinds = []
    for number, layer in enumerate(layers):
        shapes = tuple((name, tuple(p.shape)) for name, p in layer.named_parameters())
        windows = tuple(getattr(m, "sliding_window", None) for m in layer.modules() if hasattr(m, "sliding_window"))
        inner = [name for name, _ in layer.named_modules()]
        kinds.append(
            LayerKind(
                of_model=(shapes, windows, types[number]),
                settings=(*(values[number] for values in lists.values()), overrides.get(number)),
                in_group=number % size if size else 0,
                adapted=tuple(number in adapted for adapted in methods),
                named=tuple(
                    tuple(name for name in inner if one.fullmatch(f"{stack_name}.{number}.{name}".removesuffix(".")))
                    for one in expressions
                ),
            )
        )
    return kinds


def outside_layers(model: Any) -> dict[str, torch.Size]:
    """Shapes of a model's weights that are in none of its layers."""
    start = f"{layer_stack(model)[0]}."
    return {name: p.shape for name, p in model.named_parameters() if not name.startswith(start)}


def joins_layers(model: Any, layout: Layout) -> bool:
    """Whether something is computed of all layers at once: the loss of their routers, or the prefixes of all."""
    methods = json.loads(layout.peft or "[]")
    return getattr(model.config.get_text_config(), "output_router_logits", False) or any(
        settings["method"] == "PREFIX_TUNING" or settings.get("layer_replication") for settings in methods
    )


def lists_of_layers(text: Any) -> dict[str, list[Any]]:
    """Settings of a configuration that have a value for each layer."""
    depth = text.num_hidden_layers
    settings = vars(text).items()
    return {k: v for k, v in settings if isinstance(v, list) and len(v) == depth and k != "architectures"}


def overrides_of_layers(text: Any) -> dict[int, Any]:
    """Settings of single layers, by their numbers (transformers' `per_layer_config`, which Gemma 4 has)."""
    return {int(number): settings for number, settings in (text.to_dict().get("per_layer_config") or {}).items()}


def adapted_layers(settings: Mapping[str, Any], depth: int) -> Collection[int]:
    """Numbers of the layers that a method of peft adapts, in a model of this depth."""
    chosen = settings.get("layers_to_transform")
    if settings["method"] == "ADAPTION_PROMPT":
        return range(max(0, depth - (settings.get("adapter_layers") or depth)), depth)
    return range(depth) if chosen is None else [chosen] if isinstance(chosen, int) else list(chosen)


def check_layers(layout: Layout, depth: int) -> None:
    """Checks the layers that methods of peft are to adapt.

    Raises:
        ModelError: for one that a model of this depth does not have.
    """
    for settings in json.loads(layout.peft or "[]"):
        asked = settings.get("adapter_layers") or 0
        beyond = [number for number in adapted_layers(settings, depth) if not 0 <= number < depth]
        if beyond or (settings["method"] == "ADAPTION_PROMPT" and asked > depth):
            setting = "layers_to_transform" if beyond else "adapter_layers"
            raise ModelError(
                "The model has no such layer to adapt",
                where=f"techniques.{settings['method'].lower()}.{setting}",
                given=f"{beyond or asked}",
                allowed=f"layers 0 to {depth - 1}" if beyond else f"at most {depth} layers",
            )


NAMING = (
    "target_modules",
    "exclude_modules",
    "modules_to_save",
    "feedforward_modules",
    "rank_pattern",
    "alpha_pattern",
)
"""Settings of peft that name modules."""


def _names(layout: Layout) -> Iterator[tuple[str, str, str]]:
    """Each setting with each name in it, and the regular expression of modules that peft takes the name for."""
    for settings in json.loads(layout.peft or "[]"):
        for setting in NAMING:
            given = settings.get(setting) or ()
            if given == "all-linear":
                continue
            if isinstance(given, str):
                yield setting, given, given
                continue
            for name in map(str, given):
                start = ".*" if setting == "modules_to_save" else r"(.*\.)?"
                yield setting, name, f"{start}({name if setting.endswith('_pattern') else re.escape(name)})"


SECONDS_OF_A_MATCH = 2.0
"""For all expressions of a recipe on all names of a model: sensible ones take milliseconds."""


def check_expressions(model: Any, layout: Layout) -> None:
    """Tries the expressions that name modules as peft will, which knows no limit of time.

    Raises:
        ModelError: for one that is no regular expression, or does not come to an end.
    """
    modules = [name for name, _ in model.named_modules()]
    for setting, name, expression in _names(layout):
        try:
            with _limited(SECONDS_OF_A_MATCH):
                for module in modules:
                    re.fullmatch(expression, module)
        except re.error as error:
            raise ModelError("This is no regular expression", where=setting, given=f"{name}: {error}") from None
        except TimeoutError:
            raise ModelError(
                "This regular expression takes too long to match",
                where=setting,
                given=name,
                allowed="one without repeats inside repeats, or a list of names",
            ) from None


@contextlib.contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Ends what runs inside after this time with a TimeoutError: `re` looks for signals while it matches.

    Elsewhere than in the main thread there are no signals, and no limit."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def warnings_of(model: Any, layout: Layout) -> list[str]:
    """What was assumed of a whole model, or has no effect on it."""
    defaults, names = _defaults(model.config, layout), _unmatched(model, layout)
    warnings = [f"not given, so as transformers has it: {', '.join(defaults)}"] if defaults else []
    warnings += [f"the model has no such modules, and peft leaves them out: {', '.join(names)}"] if names else []
    if layout.attention == "flash" and not (model._supports_attention_backend or model._supports_sdpa):
        warnings.append(
            "the FlashAttention of this model is code of its own in transformers, which is not traced: predicted as "
            "eager, whose memory and time are larger at long contexts"
        )
    return warnings + _unquantized(model, layout)


SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
"""What makes most of a model's size; transformers has a default for each."""


def _defaults(config: Any, layout: Layout) -> list[str]:
    """Sizes that the configuration does not give, by any name that transformers knows for them."""
    given = json.loads(layout.config)
    if CODE in given:
        return []
    text = config.get_text_config()
    names = given | (given.get("text_config") or {})
    aliases = getattr(text, "attribute_map", {})
    missing = [size for size in SIZES if not {size, aliases.get(size)} & names.keys()]
    return [f"{size} {getattr(text, size)}" for size in missing if isinstance(getattr(text, size, None), int)]


def _unmatched(model: Any, layout: Layout) -> list[str]:
    """Names in the settings of peft's methods that no module of the model has.

    peft passes over them without a word, as long as one of the targets is there (tuners_utils.py, inject_adapter;
    utils/other.py, _set_trainable and get_pattern_key).
    """
    modules = [name for name, _ in model.named_modules()]
    return [
        f"{setting}: {name}"
        for setting, name, expression in _names(layout)
        if not any(re.fullmatch(expression, module) for module in modules)
    ]


def shorten(config: Any, layers: list[int]) -> Any:
    """The configuration with some of its layers alone."""
    config = type(config).from_dict(config.to_dict())
    text = config.get_text_config()
    depth, overrides = text.num_hidden_layers, overrides_of_layers(text)
    for name, values in lists_of_layers(text).items():
        setattr(text, name, [values[i] for i in layers])
    for name in ("num_hidden_layers", "num_blocks"):  # xLSTM's own name
        if getattr(text, name, None) == depth:
            setattr(text, name, len(layers))
    if overrides:
        text.per_layer_config = {place: overrides[i] for place, i in enumerate(layers) if i in overrides}
    return config


class _Dequantized(torch.autograd.Function):
    """A linear layer whose weight is made from its quantised form for every product, forward and backward.

    bitsandbytes' MatMul4Bit and MatMul8bitLt do the same; of the weight nothing is saved but a reference. What comes
    out has the format that the weight was quantised from (QuantState.dtype), and is copied where that is not the
    input's.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        keeps_input: bool,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.save_for_backward(weight)
        ctx.dtype = dtype
        ctx.kept = x if keeps_input else None
        return torch.nn.functional.linear(x, _dequantized(weight, dtype, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ _dequantized(weight, ctx.dtype, gradient.dtype), None, None, None, None


def _dequantized(weight: torch.Tensor, stored: torch.dtype, wanted: torch.dtype) -> torch.Tensor:
    return torch.empty_like(weight, dtype=stored).mul_(1).to(wanted)


class QuantizedLinear(torch.nn.Linear):
    """Stands for bitsandbytes' Linear4bit and Linear8bitLt, which do not run on fake tensors."""

    keeps_input = False
    """bitsandbytes/autograd/_functions.py: MatMul8bitLt keeps its input, MatMul4Bit did before version 0.44."""
    quantized_from = torch.bfloat16

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else self.weight.dtype
        return _Dequantized.apply(input.to(dtype), self.weight, self.bias, self.keeps_input, self.quantized_from).to(
            input.dtype
        )


def quantize(model: Any, layout: Layout) -> None:
    """Puts `QuantizedLinear` wherever transformers puts bitsandbytes' layers: it is transformers that chooses.

    The output layer stays where the layout does not say otherwise.
    """
    like = next(model.parameters())

    def stand_in(in_features: int, out_features: int, bias: bool, *_: Any, **__: Any) -> QuantizedLinear:
        layer = QuantizedLinear(in_features, out_features, bias, device=like.device, dtype=like.dtype)
        layer.keeps_input = layout.keeps_input
        layer.quantized_from = getattr(torch, layout.quantized_from)
        return layer

    asked = {"load_in_8bit" if layout.quantized == "int8" else "load_in_4bit": True}
    skipped: list[str] | None = [] if layout.quantized_head else None
    config = transformers.BitsAndBytesConfig(llm_int8_skip_modules=skipped, **asked)
    quantizer = transformers.quantizers.AutoHfQuantizer.from_config(config, pre_quantized=False)
    integration = transformers.integrations.bitsandbytes
    original = integration.bnb
    integration.bnb = SimpleNamespace(nn=SimpleNamespace(Linear4bit=stand_in, Linear8bitLt=stand_in))
    try:
        quantizer.preprocess_model(model, device_map=None)
    finally:
        integration.bnb = original
    model.tie_weights()


def _unquantized(model: Any, layout: Layout) -> list[str]:
    """The warning where transformers leaves most of the layers' weights as they are; else none."""
    if not layout.quantized:
        return []
    model = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    quantize(model, layout)
    note = ", which peft holds in fp32" if layout.upcast else ""
    warning = quantised.measure(model, (QuantizedLinear,)).warning(note)
    return [] if warning is None else [warning]


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
    """`Module.to` swaps parameters, which fake ones refuse; where they are does not matter here, their dtype does.

    A copy (peft's `modules_to_save`) would read memory that fake ones do not have, and end the process.
    """
    original = torch.nn.Module.to

    def copied(self: FakeTensor, memo: dict[int, Any]) -> torch.Tensor:
        copy: torch.Tensor = self.detach().clone()
        memo[id(self)] = copy = torch.nn.Parameter(copy, self.requires_grad) if self._is_param else copy
        return copy

    def to(self: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.nn.Module:
        dtype = next((a for a in (*args, *kwargs.values()) if isinstance(a, torch.dtype)), None)
        if dtype is not None:
            for module in self.modules():
                for name, parameter in list(module._parameters.items()):
                    if parameter is not None and parameter.is_floating_point():
                        module._parameters[name] = torch.nn.Parameter(parameter.data.to(dtype), parameter.requires_grad)
        return self

    torch.nn.Module.to = to
    FakeTensor.__deepcopy__ = copied
    try:
        yield
    finally:
        torch.nn.Module.to = original
        del FakeTensor.__deepcopy__


def adapt(model: Any, layout: Layout, rank: int, stack: Stack) -> Any:
    """The model with what PEFT adds.

    Raises:
        ModelError: where peft refuses.
    """
    import peft

    assert layout.peft is not None
    try:
        methods = json.loads(layout.peft)
        configs = {settings["method"]: _peft_config(settings, rank, stack, model) for settings in methods}
        first, *others = configs
        with _fake_parameters_can_move():
            if not others:
                return peft.get_peft_model(model, configs[first], autocast_adapter_dtype=layout.adapters == "float32")
            adapted = peft.get_peft_model(model, configs[first], adapter_name=first, mixed=True)
            for name in others:  # as techniques.peft_method does it
                if configs[name].target_modules == "all-linear":
                    configs[name].target_modules = adapted.peft_config[first].target_modules
                adapted.add_adapter(name, configs[name])
            adapted.set_adapter(list(configs))
    except Exception as error:
        raise ModelError("peft refuses these settings", where="techniques", given=one_line(error)) from None
    for module in adapted.modules():  # peft makes those of the first method in the format of the weights
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad:
                module._parameters[name] = torch.nn.Parameter(parameter.data.to(getattr(torch, layout.adapters)))
    return adapted


def _peft_config(settings: dict[str, Any], rank: int, stack: Stack, model: Any) -> Any:
    """A method's configuration, for the layers that are traced."""
    import peft

    adapted = adapted_layers(settings, stack.depth)
    traced = [place for place, number in enumerate(stack.traced) if number in adapted]
    settings = dict(settings)
    kind = settings.pop("method")
    if kind == "LORA":
        settings["r"] = rank
    if kind == "ADAPTION_PROMPT":
        settings["adapter_layers"] = len(traced)
    elif kind == "PREFIX_TUNING":
        settings["num_layers"] = stack.depth  # one module makes the prefixes of all layers
    elif "layers_to_transform" in settings:
        settings["layers_to_transform"] = traced
        if settings.get("target_modules") == "all-linear":  # peft takes names alone beside it
            settings["target_modules"] = _linear_names(model)
    return peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(kind)](task_type="CAUSAL_LM", **settings)


def _linear_names(model: Any) -> list[str]:
    """Last parts of the names of what `all-linear` stands for: every linear layer but the output layer."""
    head, kinds = model.get_output_embeddings(), (torch.nn.Linear, transformers.pytorch_utils.Conv1D)
    modules = model.named_modules()
    return sorted({name.rpartition(".")[2] for name, m in modules if isinstance(m, kinds) and m is not head})


def traced_model(config: Any, layout: Layout, rank: int, stack: Stack) -> Any:
    """The model as it is trained.

    Args:
        config: of the layers that are traced.
        layout: how it is trained.
        rank: of LoRA.
        stack: which layers of the whole model these are.
    """
    weights = getattr(torch, layout.weights)
    model = build(config, weights, {"eager": "eager", "flash": FUSED}.get(layout.attention, "sdpa"))
    model.train()
    if layout.quantized:
        quantize(model, layout)
    if layout.upcast:
        upcast(model)
    if layout.checkpoint_every:
        if not model.supports_gradient_checkpointing:
            raise ModelError(
                "transformers can't checkpoint the layers of this model",
                where="techniques.gradient_checkpointing",
                given=model.config.model_type,
                do="leave gradient_checkpointing out",
            )
        model.gradient_checkpointing_enable({"use_reentrant": layout.use_reentrant})
        layers, size = layer_stack(model)[1], group_size(layout.checkpoint_every, stack.depth)
        if layout.checkpoint_every == "sqrt":
            gradient_checkpointing.join(list(layers), size, layout.use_reentrant)
        else:
            for number, layer in enumerate(layers):
                if number % size:
                    layer.gradient_checkpointing = False
    if layout.peft:
        model.requires_grad_(False)
        model = adapt(model, layout, rank, stack)
        if layout.checkpoint_every:
            model.enable_input_require_grads()
    return model


def one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
