"""What a recipe of techniques means for memory and time.

Names are those of the study; settings keep the spelling of the library that applies them. The study's own techniques
are one part of the names: the predictor also knows what the study can't run yet.
"""

import difflib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, cast

from pydantic import ValidationError

from finetune_study import techniques as known
from finetune_study.config import Hardware
from finetune_study.errors import ConfigError
from finetune_study.forecast.hardware import Device
from finetune_study.forecast.layout import BYTES, Dtype, Layout, canonical
from finetune_study.techniques.attention import Attention
from finetune_study.techniques.base import ModelState, Technique

PRECISIONS = ("fp32", "tf32", "fp16", "bf16", "bf16_pure", "fp8")
ATTENTIONS = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
PEFT = (
    "lora", "qlora", "adalora", "ia3", "loha", "lokr", "oft", "prompt_tuning", "prefix_tuning", "p_tuning",
    "adaption_prompt",
)  # fmt: skip
SHARDINGS = ("ddp", "fsdp", "zero1", "zero2", "zero3")
OTHERS = (
    "gradient_checkpointing",
    "activation_offload",
    "offload_optimizer",
    "offload_param",
    "zeropp",
    "torch_compile",
    "liger",
    "chunked_cross_entropy",
    "optimizer_in_backward",
    "packing",
)


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer keeps for each trained weight, and what a step takes for a moment."""

    states: float
    """States of the weight's own format."""
    bytes_per_weight: float = 0.0
    """Bytes of other states."""
    transient: str = "tensor"
    """`copy`: one format-wide copy of all trained weights (foreach kernels); `tensor`: of the largest; `none`."""
    fused: bool = False
    """One kernel reads and writes each number once."""
    paged: bool = False
    """States lie in unified memory that torch's allocator does not count, and move to the host under pressure."""
    factored: bool = False
    """Row and column sums instead of states."""
    muon: bool = False
    """One state for matrices of the layers, two for the rest."""
    full_embedding: bool = False
    """States of embeddings stay in 32 bit, but under ZeRO: Trainer tells bitsandbytes so of weights (trainer.py,
    create_optimizer: register_module_override), and DeepSpeed steps flat tensors in their place."""
    low_rank: float = 0.0
    """Of the layers' matrices m × n, states for rank × (m + n) numbers, so often; 0: full states."""
    projections: int = 0
    """Products of a gradient of such a matrix with a projection, in each step."""


# Dettmers et al., arXiv 2110.02861: one byte for a state, one fp32 maximum for each block of 256 of them
_EIGHT_BIT_STATE = 1 + 4 / 256
# torchao/optim/subclass_4bit.py: half a byte, one fp32 scale for each block of 128
_FOUR_BIT_STATE = 0.5 + 4 / 128

OPTIMIZERS: dict[str, Optimizer] = {
    # torch/optim/adamw.py: foreach takes one copy (`exp_avg_sq_sqrt`), fused none
    "adamw_torch": Optimizer(2, transient="copy"),
    "adamw_torch_fused": Optimizer(2, transient="none", fused=True),
    "adamw_torch_8bit": Optimizer(0, 2 * _EIGHT_BIT_STATE, fused=True),  # torchao compiles its step
    "adamw_torch_4bit": Optimizer(0, 2 * _FOUR_BIT_STATE, fused=True),
    # Zhao et al., arXiv 2403.03507, table 1: two moments of r × n and a projection of m × r, taken as square;
    # Zhu et al., arXiv 2412.05270: the projection is drawn anew from its seed
    # galore_torch/adamw.py projects there and back; apollo_torch/apollo.py scales the gradient itself
    "galore_adamw": Optimizer(2, low_rank=1.5, projections=2),
    "apollo_adamw": Optimizer(2, low_rank=1.0, projections=1),
    "adamw_hf": Optimizer(2),
    "adamw_apex_fused": Optimizer(2, transient="none", fused=True),
    "adamw_anyprecision": Optimizer(2),
    "adamw_8bit": Optimizer(0, 2 * _EIGHT_BIT_STATE, full_embedding=True, fused=True),
    "adamw_bnb_8bit": Optimizer(0, 2 * _EIGHT_BIT_STATE, full_embedding=True, fused=True),
    "paged_adamw_32bit": Optimizer(0, 8, paged=True, fused=True),
    "paged_adamw": Optimizer(0, 8, paged=True, fused=True),
    "paged_adamw_8bit": Optimizer(0, 2 * _EIGHT_BIT_STATE, paged=True, full_embedding=True, fused=True),
    "lion_32bit": Optimizer(0, 4, fused=True),
    "lion_8bit": Optimizer(0, _EIGHT_BIT_STATE, full_embedding=True, fused=True),
    "paged_lion_32bit": Optimizer(0, 4, paged=True, fused=True),
    "paged_lion_8bit": Optimizer(0, _EIGHT_BIT_STATE, paged=True, full_embedding=True, fused=True),
    "rmsprop": Optimizer(1, transient="copy"),
    "adagrad": Optimizer(1, transient="copy"),
    "sgd": Optimizer(0, transient="none", fused=True),
    "adafactor": Optimizer(0, factored=True),
    "muon": Optimizer(2, muon=True),
}

KNOWN = (*PRECISIONS, *ATTENTIONS, *PEFT, *SHARDINGS, *OTHERS, *OPTIMIZERS)

_ADAM = ("adam_beta1", "adam_beta2", "adam_epsilon")
_LOW_RANK = (*_ADAM, "rank", "update_proj_gap", "scale", "optim_target_modules")
_ZERO = ("stage", "reduce_bucket_size", "allgather_bucket_size", "overlap_comm", "contiguous_gradients",
         "reduce_scatter", "allgather_partitions", "round_robin_gradients")  # fmt: skip
_LORA = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "use_dora", "init_lora_weights",
         "modules_to_save", "autocast_adapter_dtype", "bias", "layers_to_transform", "layers_pattern",
         "rank_pattern", "alpha_pattern", "exclude_modules", "task_type", "fan_in_fan_out",
         "inference_mode")  # fmt: skip
_OFFLOAD = ("device", "pin_memory", "nvme_path")

SETTINGS: dict[str, tuple[str, ...]] = {
    "bf16": ("dtype",),
    "fp16": ("dtype",),
    "fp8": ("recipe", "emulate"),
    "sdpa": ("kernel",),
    "flash_attention_2": ("hub_kernel",),
    "flash_attention_3": ("hub_kernel",),
    "flash_attention_4": ("hub_kernel",),
    "liger": ("rope", "rms_norm", "swiglu", "fused_linear_cross_entropy"),
    "gradient_checkpointing": ("every", "use_reentrant"),
    "activation_offload": ("pin_memory",),
    "lora": _LORA,
    "qlora": (*_LORA, "bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_compute_dtype", "load_in_8bit",
              "load_in_4bit", "llm_int8_skip_modules", "prepare_model_for_kbit_training", "quantized_from",
              "bitsandbytes_before_0_44", "loop_holds_loss"),
    "adalora": (*_LORA, "init_r", "target_r", "tinit", "tfinal", "deltaT", "orth_reg_weight", "total_step", "beta1",
                "beta2"),
    "loha": ("r", "alpha", "target_modules"),
    "lokr": ("r", "alpha", "target_modules"),
    "oft": ("oft_block_size", "target_modules"),
    "ia3": ("target_modules", "feedforward_modules"),
    "adaption_prompt": ("adapter_len", "adapter_layers"),
    "prompt_tuning": ("num_virtual_tokens",),
    "p_tuning": ("num_virtual_tokens", "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers",
                 "encoder_dropout"),
    "prefix_tuning": ("num_virtual_tokens", "prefix_projection", "encoder_hidden_size"),
    "zero1": _ZERO,
    "zero2": _ZERO,
    "zero3": (*_ZERO, "stage3_max_live_parameters", "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
              "stage3_prefetch_bucket_size", "stage3_gather_16bit_weights_on_model_save", "sub_group_size"),
    "fsdp": ("sync_each_batch", "reshard_after_forward"),
    "zeropp": ("zero_quantized_weights", "zero_quantized_gradients", "zero_hpz_partition_size"),
    "offload_optimizer": _OFFLOAD,
    "offload_param": _OFFLOAD,
    **dict.fromkeys((name for name in OPTIMIZERS if "adam" in name), _ADAM),
    "galore_adamw": _LOW_RANK,
    "apollo_adamw": _LOW_RANK,
    "muon": ("momentum", "nesterov", "ns_steps", "adjust_lr_fn"),
    "torch_compile": ("torch_compile_backend", "torch_compile_mode"),
    "chunked_cross_entropy": ("num_chunks", "upcast"),
}  # fmt: skip
"""Settings of each technique, whether they change a number or not; one without an entry has none. Of peft's methods
others may be given as well: peft itself judges them, when the model is built."""

JUDGED_BY_PEFT = ("loha", "lokr", "oft", "ia3", "adaption_prompt", "prompt_tuning", "p_tuning", "prefix_tuning")
CHANGE_NOTHING = ("init_lora_weights", "lora_alpha", "alpha", "target_modules")
"""Settings of the study that are not checked here: they change no number, or are peft's to judge."""

_ELEMENTS = (0, 1 << 40)
RANGES: dict[str, tuple[int, int]] = {
    **dict.fromkeys(("r", "init_r", "rank", "oft_block_size"), (0, 1 << 16)),
    **dict.fromkeys(("adapter_len", "num_virtual_tokens", "encoder_hidden_size"), (0, 1 << 20)),
    **dict.fromkeys(("reduce_bucket_size", "allgather_bucket_size", "stage3_max_live_parameters", "sub_group_size",
                     "stage3_max_reuse_distance", "stage3_param_persistence_threshold",
                     "stage3_prefetch_bucket_size"), _ELEMENTS),
    "num_chunks": (1, 1 << 20),
}  # fmt: skip
"""What is still believed of whole numbers; more is a slip of the pen. Where 0 means nothing, the technique says so, or
peft."""

NAMES = ("target_modules", "modules_to_save", "exclude_modules", "llm_int8_skip_modules")
"""Settings that name layers."""

PATTERNS = {"rank_pattern": RANGES["r"][1], "alpha_pattern": RANGES["r"][1]}
"""Settings that give some layers, by name, a number of their own, and the largest that is believed."""

_YES_OR_NO = (True, False)
OF_OURS: dict[str, tuple[Any, ...]] = {
    "kernel": ("math", "auto"),
    "upcast": (True, False, "logits"),
    "overlap_comm": (True, False, None, "auto"),
    **dict.fromkeys(("sync_each_batch", "use_dora", "load_in_4bit", "bitsandbytes_before_0_44", "loop_holds_loss",
                     "autocast_adapter_dtype"), _YES_OR_NO),
}  # fmt: skip
"""Values of settings that the study does not have."""

FUSES = ("inductor",)
"""Backends of torch.compile that fuse operations and compute cheap ones again in backward."""

NOT_FOR_PEFT = (
    "autocast_adapter_dtype",
    "bnb_4bit_quant_type",
    "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype",
    "load_in_8bit",
    "load_in_4bit",
    "llm_int8_skip_modules",
    "prepare_model_for_kbit_training",
    "quantized_from",
    "bitsandbytes_before_0_44",
    "loop_holds_loss",
    "init_lora_weights",
    "task_type",
    "inference_mode",
)
"""Settings of a PEFT method that change no size, or are dealt with elsewhere."""


def names(techniques: Any) -> dict[str, dict[str, Any]]:
    """A recipe as a mapping of names to settings, checked.

    Raises:
        ConfigError: for names that are not known, alternatives that exclude each other, or settings of a wrong kind.
    """
    if isinstance(techniques, list | tuple) and all(isinstance(name, str) for name in techniques):
        techniques = {name: {} for name in techniques}
    if techniques is None:
        techniques = {}
    if not isinstance(techniques, Mapping):
        raise _wrong("techniques", techniques, 'an object, for example {"lora": {"r": 8}, "zero3": {}, "bf16": {}}')
    recipe: dict[str, dict[str, Any]] = {}
    for name, settings in techniques.items():
        if name not in KNOWN:
            close = difflib.get_close_matches(str(name), KNOWN, 2)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise _wrong("techniques", name, hint + ", ".join(KNOWN), "The technique is not known")
        if not isinstance(settings, Mapping | None):
            raise _wrong(f"techniques.{name}", settings, "an object of settings, or null")
        recipe[name] = _checked(name, settings or {})
    for group in (PRECISIONS, ATTENTIONS, PEFT, SHARDINGS, tuple(OPTIMIZERS)):
        chosen = [name for name in recipe if name in group]
        if any(not _beside(*pair) for pair in itertools.combinations(chosen, 2)):
            raise _wrong("techniques", ", ".join(chosen), f"one of {', '.join(group)}", "These exclude each other")
    for name in filter(known.ALL.__contains__, recipe):
        if without := known.missing(name, recipe):
            raise ConfigError(without, where="techniques", given=", ".join(recipe))
    return recipe


def _beside(one: str, other: str) -> bool:
    """Whether peft trains two methods together."""
    return other in known.ALL and one in known.ALL[other].beside


def _checked(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a technique; those that the study has, too, as the study reads them.

    Raises:
        ConfigError: for one that is not known, or has a value that is not allowed.
    """
    allowed = SETTINGS.get(name, ())
    for key in settings:
        if key not in allowed and name not in JUDGED_BY_PEFT:
            close = difflib.get_close_matches(str(key), allowed, 1)
            hint = f"did you mean {close[0]}? " if close else ""
            listed = ", ".join(allowed) or "no settings"
            raise _wrong(f"techniques.{name}", key, hint + listed, "The setting is not known")
        if key in OF_OURS and not _is_one_of(settings[key], OF_OURS[key]):
            raise _wrong(f"techniques.{name}.{key}", settings[key], ", ".join(map(str, OF_OURS[key])))
        if key == "stage" and settings[key] != int(name[-1]):
            raise _wrong(f"techniques.{name}.{key}", settings[key], f"{name[-1]}, or nothing; the name says it")
        if settings[key] == [] and key == "target_modules":
            raise _wrong(f"techniques.{name}.{key}", settings[key], "names of layers, or all-linear")
        _check_value(f"techniques.{name}", key, settings)
    technique = known.ALL.get(name)
    fields = technique.model_fields.keys() - CHANGE_NOTHING if technique else set()
    own = {key: value for key, value in settings.items() if key in fields and value is not None}
    for key, value in own.items():
        if isinstance(value, bool) and technique and not _takes_bool(technique, key):
            raise _wrong(f"techniques.{name}.{key}", value, "a number or a word, not true or false")
    try:
        parsed = technique.model_validate(own) if technique else None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(("techniques", name, *map(str, problem["loc"][:1])))
        raise _wrong(where, problem["input"], str(problem["msg"])) from None
    return dict(settings) | {key: getattr(parsed, key) for key in own}


def _check_value(where: str, key: str, settings: Mapping[str, Any]) -> None:
    """Checks what the libraries take without a word, or in words of their own code.

    Raises:
        ConfigError: for a value that can't be meant.
    """
    value = settings[key]
    if value is None:
        return
    if key in RANGES:
        _number(settings, key, 0, where, *RANGES[key])
    if key == "layers_to_transform" and not all(
        isinstance(number, int) and not isinstance(number, bool)
        for number in (value if isinstance(value, list | tuple) else [value])
    ):
        raise _wrong(f"{where}.{key}", value, "a layer's number, counted from 0, or a list of such numbers")
    if key in NAMES and not isinstance(value, str) and not _are_names(value):
        raise _wrong(f"{where}.{key}", value, "a list of names of layers")
    if key in PATTERNS:
        most = PATTERNS[key]
        allowed = f'an object of names of layers and numbers above 0, up to {most}, for example {{"q_proj": 16}}'
        if not isinstance(value, Mapping):
            raise _wrong(f"{where}.{key}", value, allowed)
        for layer, number in value.items():
            if isinstance(number, bool) or not isinstance(number, int | float) or not 0 < number <= most:
                raise _wrong(f"{where}.{key}.{layer}", number, allowed)


def _are_names(value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(name, str) for name in value)


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Without taking 1 for true."""
    return any(type(value) is type(one) and value == one for one in allowed)


def _takes_bool(technique: type[Technique], key: str) -> bool:
    return "bool" in str(technique.model_fields[key].annotation)


def _wrong(where: str, given: object, allowed: str, what: str = "This is not understood") -> ConfigError:
    return ConfigError(what, where=where, given=given, allowed=allowed)


def _number(
    settings: Mapping[str, Any], key: str, default: int, where: str, least: int = 0, most: int | None = None
) -> int:
    value = settings.get(key, default)
    if value == "auto":
        return default
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        raise _wrong(f"{where}.{key}", value, f"a whole number, {least} " + (f"to {most}" if most else "or more"))
    return value


@dataclass(frozen=True)
class Recipe:
    """A recipe, with what it leaves open filled in."""

    techniques: dict[str, dict[str, Any]]
    precision: str
    attention: str
    optimizer: str
    sharding: str | None
    peft: str | None
    mixed: tuple[str, ...]
    """Methods of peft that are trained beside it."""
    rank: int
    master: bool
    """The optimizer keeps an fp32 copy of trained weights that are held in 16 bit (DeepSpeed)."""
    weights: Dtype
    autocast: Dtype | None
    adapters: Dtype

    def has(self, name: str) -> bool:
        return name in self.techniques

    def setting(self, name: str, key: str, default: int) -> int:
        return _number(self.techniques.get(name, {}), key, default, f"techniques.{name}")

    def why_not(self, device: Device) -> list[str]:
        """Why a device can't run it, in the words of the techniques that the study knows; none where nothing does."""
        chosen = (self.precision, self.attention, self.optimizer, self.sharding)
        completed = self.techniques | {name: {} for name in chosen if name and name not in self.techniques}
        place = Hardware.model_construct(device=device.device, gpu=device.gpu,
                                         compute_capability=device.compute_capability)  # fmt: skip
        return list(known.reasons(_as_the_study_has_it(completed), place))

    def why_not_model(self, model_type: str | None) -> list[str]:
        """Why a model of this type can't run with its attention, in the same words."""
        why = cast(type[Attention], known.ALL[self.attention]).why_not_model(model_type)
        return [why] if why else []

    @cached_property
    def offloaded(self) -> frozenset[ModelState]:
        """Model states that wait outside the device, as the study's techniques say it.

        DeepSpeed offloads weights, or optimizer states with their gradients; FSDP2 all of them
        (torch.distributed.fsdp.CPUOffloadPolicy), and the optimizer then steps on the host, too.
        """
        techniques = _as_the_study_has_it(self.techniques)
        return frozenset(state for technique in techniques.values() for state in technique.offloads(techniques))

    @property
    def fused_loss(self) -> bool:
        """liger computes logits and loss together, chunk by chunk, unless it is told not to."""
        return self._setting_of("liger", "fused_linear_cross_entropy", True) if self.has("liger") else False

    @property
    def chunks_loss(self) -> bool:
        """The output layer and the loss are computed in chunks; the trace ends before them."""
        return self.fused_loss or self.has("chunked_cross_entropy")

    @property
    def fuses(self) -> bool:
        """A compiler fuses operations, and computes cheap ones again in backward."""
        return self.has("torch_compile") and self._compiler in FUSES

    @property
    def _compiler(self) -> str:
        return str(self.techniques["torch_compile"].get("torch_compile_backend", "inductor"))

    @property
    def swaps_to_nvme(self) -> bool:
        """States or weights lie on a drive."""
        return any(self.techniques.get(n, {}).get("device") == "nvme" for n in ("offload_optimizer", "offload_param"))

    @property
    def emulates_fp8(self) -> bool:
        """Products are rounded as fp8's are, and multiplied in fp32."""
        return self._setting_of("fp8", "emulate", False)

    @property
    def not_modelled(self) -> list[str]:
        """What of the recipe is not in the numbers, and which way they are wrong."""
        found = []
        if self.has("torch_compile") and not self.fuses:
            found.append(f"what torch_compile's backend {self._compiler} saves is not known: as without it")
        if self.techniques.get("qlora", {}).get("llm_int8_skip_modules"):
            found.append("layers of llm_int8_skip_modules are counted as quantised, but for the output layer")
        if self.techniques.get("zero3", {}).get("stage3_param_persistence_threshold") not in (None, "auto"):
            found.append(
                "stage3_param_persistence_threshold is not counted: weights up to so many elements stay whole on every "
                "device, which takes more memory than this and less time"
            )
        if self.has("liger"):
            found.append("of liger its loss alone is modelled: its other kernels need less memory and time than this")
        if self.optimizer == "galore_adamw":
            found.append("the SVD of galore_adamw is not counted: of update_proj_gap steps one takes longer than this")
        if self.optimizer == "muon" and self.sharding == "fsdp":
            found.append("what muon's products send between the shards is not counted: a step takes longer than this")
        if self.precision == "fp8" and not self.emulates_fp8:
            found.append("casts to fp8 and their scales are not counted: a step takes longer than this")
        return found

    @property
    def overlaps(self) -> bool:
        """Whether communication runs beside the pass that it belongs to.

        DDP and FSDP do so (arXiv 2006.15704, section 3.2.3; arXiv 2304.11277, section 3.3); DeepSpeed's stage 3 does,
        its stages 1 and 2 do where `overlap_comm` is set (runtime/zero/config.py, overlap_comm_valid).
        """
        if not self.deepspeed:
            return True
        return self._setting_of(str(self.sharding), "overlap_comm", self.sharding == "zero3")

    @property
    def accumulates_whole(self) -> bool:
        """FSDP does not scatter gradients before the last micro-batch, where the loop says `no_sync`, as transformers'
        Trainer does: they stay whole, and travel once (accelerate/accelerator.py, no_sync; torch's
        _fsdp_param_group.py, post_backward: `reduce_grads`). accelerate's `sync_each_batch` scatters them each time."""
        return self.sharding == "fsdp" and not self._setting_of("fsdp", "sync_each_batch", False)

    @property
    def keeps_gathered(self) -> bool:
        """FSDP keeps the weights that it gathered in forward for backward."""
        return not self._setting_of("fsdp", "reshard_after_forward", True)

    @property
    def secondary_shards(self) -> int:
        """ZeRO++: how many devices share a second copy of the weights; 1: there is none."""
        return self.setting("zeropp", "zero_hpz_partition_size", 1) if self.has("zeropp") else 1

    @property
    def gathered_share(self) -> float:
        """Of the bytes of the weights, what travels when they are gathered: ZeRO++ sends them in 8 bit."""
        quantized = self.has("zeropp") and self.techniques["zeropp"].get("zero_quantized_weights", True)
        return 1 / BYTES[self.compute] if quantized else 1.0

    @property
    def scattered_share(self) -> float:
        """The same of gradients: in 4 bit."""
        quantized = self.has("zeropp") and self.techniques["zeropp"].get("zero_quantized_gradients", True)
        return 0.5 / BYTES[self.compute] if quantized else 1.0

    @property
    def deepspeed(self) -> bool:
        return self.sharding in ("zero1", "zero2", "zero3")

    @property
    def quantized(self) -> Literal["nf4", "int8"] | None:
        if self.peft != "qlora":
            return None
        return "int8" if self.techniques["qlora"].get("load_in_8bit") else "nf4"

    @property
    def quantized_from(self) -> Dtype:
        """Number format that quantised weights had before: that in which the model is loaded."""
        asked = self.techniques.get("qlora", {}).get("quantized_from", self.weights)
        if asked not in BYTES:
            raise _wrong("techniques.qlora.quantized_from", asked, ", ".join(BYTES))
        return asked if self.quantized else "bfloat16"

    @property
    def quantized_head(self) -> bool:
        """transformers leaves the output layer as it is, unless an empty list says that nothing is left out."""
        return self.quantized is not None and self.techniques["qlora"].get("llm_int8_skip_modules") == []

    @property
    def compute(self) -> Dtype:
        """Number format of matrix products."""
        return self.autocast or self.weights

    @property
    def projection_rank(self) -> int:
        """Of GaLore and APOLLO; 0: nothing is projected."""
        return self.setting(self.optimizer, "rank", 128) if OPTIMIZERS[self.optimizer].low_rank else 0

    @property
    def state_bytes(self) -> int:
        """Bytes of a full state of a trained weight."""
        if self.master:
            return 4
        if self.peft:
            return BYTES[self.adapters]
        return 4 if self.sharding == "fsdp" and self.precision != "bf16_pure" else BYTES[self.weights]

    def layout(self, config: dict[str, Any], context: int) -> Layout:
        """What has to be traced for it."""
        window = config.get("sliding_window")
        checkpointing = self.techniques.get("gradient_checkpointing")
        return Layout(
            config=canonical(config),
            weights=self.weights,
            autocast=self.autocast,
            attention=self._kernel(),
            windowed=isinstance(window, int) and context > window and self._kernel() != "flash",
            checkpoint_every=0 if checkpointing is None else checkpointing.get("every", 1),
            use_reentrant=bool(self.techniques.get("gradient_checkpointing", {}).get("use_reentrant", False)),
            peft=self._peft_settings(),
            virtual_tokens=self._virtual_tokens(),
            adapters=self.adapters,
            quantized=self.quantized,
            keeps_input=self.quantized == "int8" or self._setting_of("qlora", "bitsandbytes_before_0_44", False),
            quantized_from=self.quantized_from,
            quantized_head=self.quantized_head,
            holds_loss=self._setting_of("qlora", "loop_holds_loss", False),
            upcast=self._upcast(),
            loss="hidden" if self.chunks_loss else "full",
        )

    def _setting_of(self, name: str, key: str, default: bool) -> bool:
        return bool(self.techniques.get(name, {}).get(key, default))

    def _kernel(self) -> Literal["sdpa", "math", "flash", "eager"]:
        if self.attention == "eager":
            return "eager"
        if self.attention.startswith("flash"):
            return "flash"
        return "math" if self.techniques.get("sdpa", {}).get("kernel") == "math" else "sdpa"

    def _upcast(self) -> bool:
        """Whether what is not quantised is turned to fp32, as peft's guide to quantised training does it."""
        asked = self.techniques.get("qlora", {}).get("prepare_model_for_kbit_training", True)
        return bool(self.quantized and self.autocast and asked)

    def positions(self, context: int) -> int:
        """Of a sequence in the layers: the virtual tokens of prompts go through them with the context."""
        return context + (self._virtual_tokens() if self.peft != "prefix_tuning" else 0)

    def _virtual_tokens(self) -> int:
        field = known.ALL[self.peft].model_fields.get("num_virtual_tokens") if self.peft else None
        return self.setting(str(self.peft), "num_virtual_tokens", field.default) if field else 0

    def _peft_settings(self) -> str | None:
        if self.peft is None:
            return None
        return canonical([self._settings_for_peft(name) for name in (self.peft, *self.mixed)])

    def _settings_for_peft(self, name: str) -> dict[str, Any]:
        """What peft is told of one of its methods; what is left open is as the study has it."""
        given = {key: value for key, value in self.techniques[name].items() if value is not None}
        defaults = {key: field.default for key, field in known.ALL[name].model_fields.items()}
        settings = {key: value for key, value in (defaults | given).items() if key not in NOT_FOR_PEFT}
        method = "LORA" if name == "qlora" else name.upper()
        if method == "LORA":
            for key in ("r", "lora_alpha", "use_rslora"):
                settings.pop(key, None)
            settings["target_modules"] = settings["target_modules"] or "all-linear"
            settings["lora_dropout"] = 0.05 if settings["lora_dropout"] else 0.0
        elif method == "ADALORA":
            settings.setdefault("total_step", 1000)  # peft asks for it; it changes no size
        if isinstance(settings.get("target_modules"), list):
            settings["target_modules"] = sorted(settings["target_modules"])
        return {"method": method, **{key: value for key, value in settings.items() if value is not None}}


def resolve(techniques: Any, *, num_gpus: int, device: str = "cuda", has_bf16: bool = True) -> Recipe:
    """A recipe with the defaults of the study filled in.

    They are bf16 where the hardware has it, else fp16, on a CPU fp32; SDPA; adamw_torch; DDP on several GPUs.

    Raises:
        ConfigError: for a recipe that does not hold together.
    """
    recipe = names(techniques)
    precision = _first(recipe, PRECISIONS) or ("fp32" if device == "cpu" else "bf16" if has_bf16 else "fp16")
    sharding = _first(recipe, SHARDINGS) or ("ddp" if num_gpus > 1 else None)
    methods = sorted((name for name in recipe if name in PEFT), key=PEFT.index)
    peft = methods[0] if methods else None
    half: Dtype | None = {"fp16": "float16", "bf16": "bfloat16", "bf16_pure": "bfloat16", "fp8": "bfloat16"}.get(
        precision
    )  # type: ignore[assignment]
    deepspeed = sharding in ("zero1", "zero2", "zero3")
    mixed = half is not None and precision != "bf16_pure"
    asked = recipe.get(precision, {}).get("dtype", "auto")
    weights: Dtype
    if half is None:
        weights = "float32"
    elif precision == "bf16_pure" or deepspeed or sharding == "fsdp" or (peft and asked == "auto"):
        weights = half
    else:
        weights = asked if asked in BYTES else "float32"
    autocast = half if mixed and not deepspeed and sharding != "fsdp" else None
    settings = recipe.get(peft or "", {})
    # peft turns adapters to fp32 unless it is told not to; those of mixed methods are turned by techniques.peft_method
    in_fp32 = settings.get("autocast_adapter_dtype", precision != "bf16_pure")
    adapters: Dtype = weights if (deepspeed or sharding == "fsdp" or not in_fp32) and half else "float32"
    rank = _number(settings, "r", 8, f"techniques.{peft}", least=1) if peft in ("lora", "qlora") else 0
    _check_settings(recipe, num_gpus)
    return Recipe(
        techniques=recipe,
        precision=precision,
        attention=_first(recipe, ATTENTIONS) or "sdpa",
        optimizer=_first(recipe, tuple(OPTIMIZERS)) or "adamw_torch",
        sharding=sharding,
        peft=peft,
        mixed=tuple(methods[1:]),
        rank=rank,
        master=deepspeed,
        weights=weights,
        autocast=autocast,
        adapters=adapters,
    )


def _as_the_study_has_it(techniques: Mapping[str, Mapping[str, Any]]) -> known.Techniques:
    """Those that the study knows; not validated, since what the predictor allows differs in some settings."""
    return {
        name: known.ALL[name].model_construct(
            **{key: value for key, value in settings.items() if key in known.ALL[name].model_fields}
        )
        for name, settings in techniques.items()
        if name in known.ALL
    }


def _check_settings(recipe: Mapping[str, dict[str, Any]], num_gpus: int) -> None:
    """Checks settings that must lie in a range.

    Raises:
        ConfigError: for one that does not.
    """
    _check_bits(recipe.get("qlora", {}))
    share = _number(recipe.get("zeropp", {}), "zero_hpz_partition_size", 1, "techniques.zeropp", least=1)
    if num_gpus % min(share, num_gpus):  # deepspeed/utils/groups.py, _create_zero_param_parallel_group
        raise _wrong(
            "techniques.zeropp.zero_hpz_partition_size", share, f"a number that divides num_gpus, here {num_gpus}"
        )


def _check_bits(settings: Mapping[str, Any]) -> None:
    """Checks that QLoRA quantises, and in one way.

    Raises:
        ConfigError: where it does not; bitsandbytes' configuration refuses both, and takes neither for no quantisation.
    """
    in_8bit = bool(settings.get("load_in_8bit"))
    in_4bit = settings.get("load_in_4bit")
    if in_4bit is not None and in_4bit == in_8bit:
        given = f"load_in_4bit and load_in_8bit are both {str(in_8bit).lower()}"
        raise _wrong(
            "techniques.qlora", given, "one of them; lora is without quantisation", "QLoRA is in 4 or in 8 bit"
        )


def _first(recipe: Mapping[str, Any], group: tuple[str, ...]) -> str | None:
    return next((name for name in recipe if name in group), None)
