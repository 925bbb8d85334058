"""Implementations of the same attention."""

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field

from finetune_study.section import LATER
from finetune_study.techniques.base import Kind, Recipe, Technique
from finetune_study.techniques.peft_method import model_type

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run


NO_SDPA = frozenset({
    "big_bird", "bigbird_pegasus", "bloom", "codegen", "cpmant", "deepseek_v4", "falcon_mamba", "flint", "gemma2",
    "git", "got_ocr2", "gpt_neo", "gpt_neox_japanese", "gpt_oss", "gptj", "granite_swa", "granitemoe_swa", "hy_v4",
    "inkling2_text", "mamba", "mamba2", "megatron-bert", "mimo_v2_flash", "mpt", "mvp", "openai-gpt", "prophetnet",
    "reformer", "rembert", "roformer", "rwkv", "trocr", "vaultgemma", "xglm", "xlm", "xlnet", "xlstm",
})  # fmt: skip
"""Model types that transformers does not train with sdpa (`_supports_sdpa` of their classes, transformers 5.x)."""
NO_FLASH = frozenset({
    "axk2", "big_bird", "bigbird_pegasus", "bloom", "blt", "codegen", "cpmant", "deepseek_v32", "deepseek_v4",
    "doge", "dots3_note", "dots3_note_text", "falcon_mamba", "git", "glm_moe_dsa", "got_ocr2", "gpt_neox_japanese",
    "hy_v4", "inkling2_text", "inkling_text", "llama4", "llama4_text", "mamba", "mamba2", "megatron-bert",
    "minimax_m3_vl_text", "mllama", "mpt", "mvp", "openai-gpt", "prophetnet", "qwen4_exp", "qwen4_exp_text",
    "reformer", "rembert", "roformer", "rwkv", "trocr", "xglm", "xlm", "xlnet", "xlstm",
})  # fmt: skip
"""The same of FlashAttention (`_supports_flash_attn`)."""


class Attention(Technique):
    """One of them."""

    kind: ClassVar[Kind] = "attention"
    refused: ClassVar[frozenset[str]] = frozenset()
    """Model types that transformers does not run with it."""

    def why_not_run(self, run: "Run") -> str | None:
        return self.why_not_model(model_type(run)) if self.refused else None

    @classmethod
    def why_not_model(cls, model_type: str | None) -> str | None:
        """Why a model of this type does not run with it."""
        if model_type not in cls.refused:
            return None
        return (
            f"transformers: a {model_type} does not support {cls.name} (does not support an attention implementation, "
            "or Flash Attention): name another in the recipe; eager works for every model"
        )

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"attn_implementation": self.name}


class Eager(Attention):
    """Attention written out: scores, softmax and product are tensors of their own."""

    name: ClassVar[str] = "eager"
    effect: ClassVar[str] = (
        "memory: grows with the square of the context; "
        "speed: slows down with the square of the context, and moves all scores through memory; "
        "quality: the reference"
    )
    source: ClassVar[str] = "Vaswani et al., arXiv 1706.03762"


class Sdpa(Attention):
    """`torch.nn.functional.scaled_dot_product_attention`: torch chooses the kernel."""

    name: ClassVar[str] = "sdpa"
    refused: ClassVar[frozenset[str]] = NO_SDPA
    effect: ClassVar[str] = (
        "memory: linear in the context where a fused kernel is chosen; "
        "speed: faster than eager where a fused kernel is chosen; "
        "quality: as eager within rounding"
    )
    source: ClassVar[str] = (
        "https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html"
    )


class _FlashAttention(Attention):
    refused: ClassVar[frozenset[str]] = NO_FLASH
    excludes: ClassVar[dict[str, str]] = {
        precision: f"FlashAttention takes fp16 and bf16 alone, not {precision}: use one of these, or sdpa"
        for precision in ("fp32", "tf32")
    }
    version: ClassVar[int]
    capabilities: ClassVar[tuple[float, float]]
    """Lowest, and the first that is too high."""

    hub_kernel: Annotated[str, Field(pattern=r"^kernels-community/[\w.-]+$")] | None = Field(
        default=None, json_schema_extra=LATER
    )
    """A kernel of the hub, used instead of the package: `kernels-community/…`, from where alone transformers takes one.
    It is a program that somebody else compiled, so none is fetched or loaded that is not named here. Runs are offline:
    `prepare` fetches it into the study's cache (`places.cache`; a hardware entry with a cache of its own does not see
    it). The environment of the runs needs the package kernels."""

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        capability, (lowest, too_high) = hardware.compute_capability, self.capabilities
        if hardware.device == "cpu":
            return f"FlashAttention-{self.version} has CUDA kernels alone: use sdpa"
        if capability is not None and capability < lowest:
            return (
                f"FlashAttention-{self.version} needs compute capability {lowest}; this GPU has {capability}: use sdpa"
            )
        if capability is not None and capability >= too_high:
            return (
                f"FlashAttention-{self.version} is made for compute capability {lowest} and below {too_high}; this GPU "
                f"has {capability}: use flash_attention_2 or sdpa"
            )
        return None

    def packages_needed(self) -> tuple[str, ...]:
        # Without the package transformers would look for a kernel on the hub by itself.
        return ("kernels",) if self.hub_kernel else self.packages

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        return {"attn_implementation": self.hub_kernel or self.name}


class FlashAttention2(_FlashAttention):
    """The kernels of the flash-attn package."""

    name: ClassVar[str] = "flash_attention_2"
    packages: ClassVar[tuple[str, ...]] = ("flash_attn",)
    version: ClassVar[int] = 2
    capabilities: ClassVar[tuple[float, float]] = (8.0, float("inf"))  # README of the flash-attn package
    effect: ClassVar[str] = (
        "memory: linear in the context; "
        "speed: faster at long contexts, little below 1024 tokens; "
        "quality: as eager within rounding"
    )
    source: ClassVar[str] = "Dao, arXiv 2307.08691"


class FlashAttention3(_FlashAttention):
    """The kernels for Hopper, of the package flash_attn_interface."""

    name: ClassVar[str] = "flash_attention_3"
    packages: ClassVar[tuple[str, ...]] = ("flash_attn_interface",)
    version: ClassVar[int] = 3
    # README of flash-attention, "FlashAttention-3 beta release": H100 and H800
    capabilities: ClassVar[tuple[float, float]] = (9.0, 10.0)
    effect: ClassVar[str] = (
        "memory: as flash_attention_2; "
        "speed: up to twice as fast as flash_attention_2 on Hopper; "
        "quality: as eager within rounding"
    )
    source: ClassVar[str] = "Shah et al., arXiv 2407.08608"


class FlashAttention4(_FlashAttention):
    """The kernels in CuTe DSL for Hopper and Blackwell, of the package flash-attn-4."""

    name: ClassVar[str] = "flash_attention_4"
    packages: ClassVar[tuple[str, ...]] = ("flash_attn.cute",)
    version: ClassVar[int] = 4
    capabilities: ClassVar[tuple[float, float]] = (9.0, float("inf"))  # README of flash_attn/cute: Hopper, Blackwell
    effect: ClassVar[str] = (
        "memory: as flash_attention_2; "
        "speed: faster than flash_attention_2 on Blackwell; "
        "quality: as eager within rounding"
    )
    source: ClassVar[str] = "https://github.com/Dao-AILab/flash-attention/tree/main/flash_attn/cute"
