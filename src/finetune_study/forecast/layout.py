"""What a trace depends on, and nothing else: its key in the cache."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from typing import Any, Literal

Dtype = Literal["float32", "float16", "bfloat16"]
BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}

CODE = "_code"
"""Key of a configuration whose model's own code may be run: its folder, and a digest of the code."""

TRACE_VERSION = 20
"""Raise it when a trace of the same layout would come out differently."""


@dataclass(frozen=True)
class Layout:
    """A model as it is trained, whatever its batch, context and rank."""

    config: str
    """The model's configuration, as canonical JSON."""
    weights: Dtype = "float32"
    """Number format of the weights as they are loaded."""
    autocast: Dtype | None = None
    """Number format of autocast; None: every operation computes in the weights' own."""
    attention: Literal["sdpa", "math", "flash", "eager"] = "sdpa"
    """`sdpa`: torch's choice of kernel; `math`: its unfused one; `flash`: FlashAttention, with masks of its own;
    `eager`: transformers' own code."""
    windowed: bool = False
    """The context is longer than the model's attention window, and the kernel is given a mask for it."""
    checkpoint_every: int | Literal["sqrt"] = 0
    """Every how many-th layer is checkpointed; 0: none; `sqrt`: all of n layers, in groups of about √n."""
    use_reentrant: bool = False
    """torch's older implementation of checkpointing."""
    peft: str | None = None
    """Methods and their settings that change the trace, as canonical JSON; LoRA's rank is not one of them."""
    virtual_tokens: int = 0
    """Tokens that a prompt method puts before the context, or before its keys and values."""
    adapters: Dtype = "float32"
    """Number format of what PEFT adds."""
    quantized: Literal["nf4", "int8"] | None = None
    """How the frozen linear layers are stored."""
    keeps_input: bool = False
    """Quantised layers keep their input, though nothing needs it (bitsandbytes: in 8 bit, and before 0.44)."""
    quantized_from: Dtype = "bfloat16"
    """Number format that weights had when they were quantised; dequantised ones come in it."""
    quantized_head: bool = False
    """The output layer is quantised, too."""
    holds_loss: bool = False
    """The loop holds the last loss, and with it the nodes of its graph, until the next forward has ended."""
    upcast: bool = False
    """What is not quantised is turned to fp32 (peft.prepare_model_for_kbit_training)."""
    loss: Literal["full", "hidden"] = "full"
    """`full`: logits of all positions at once, as transformers does it; `hidden`: up to the last hidden state."""

    @property
    def masks(self) -> bool:
        """The kernel knows no windows of its own, and is given masks for them."""
        return self.attention != "flash"

    @property
    def key(self) -> str:
        """Digest of all fields, and of the versions whose code is traced."""
        parts = [TRACE_VERSION, dataclasses.asdict(self), *_versions()]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


@cache
def _versions() -> tuple[str, ...]:
    """Looked up once: it reads the packages' files."""
    return tuple(version(package) for package in ("torch", "transformers", "peft"))


def canonical(value: Any) -> str:
    """JSON with sorted keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"))
