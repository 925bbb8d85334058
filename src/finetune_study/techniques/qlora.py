"""Low-rank adaptation of quantised weights, by bitsandbytes and peft."""

from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from finetune_study.techniques.base import Recipe
from finetune_study.techniques.lora import Lora
from finetune_study.techniques.peft_method import model_type
from finetune_study.techniques.quantised import NOT_QUANTISED, WHY

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run

_QUANTISATION = ("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "load_in_8bit", "prepare_model_for_kbit_training")


class Qlora(Lora):
    """LoRA on weights that bitsandbytes holds in 4 bit (NF4) or 8 bit and turns back for every product.
    transformers quantises plain linear layers alone: of a mixture of experts most weights stay as they are, which the
    log says, and a run of a model type of which it quantises none (falcon) is refused.
    """

    name: ClassVar[str] = "qlora"
    beside: ClassVar[frozenset[str]] = frozenset()
    packages: ClassVar[tuple[str, ...]] = ("bitsandbytes",)
    effect: ClassVar[str] = (
        "memory: weights in a quarter of 16 bit, the rest as lora; "
        "speed: about 30 % slower than lora; "
        "quality: a little worse than lora"
    )
    source: ClassVar[str] = "Dettmers et al., arXiv 2305.14314"

    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Number format of the weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantise the scales as well: 0.4 bits less for a weight."""
    load_in_8bit: bool = False
    """Weights in 8 bit (arXiv 2208.07339) instead of 4; not beside fsdp."""
    prepare_model_for_kbit_training: bool = True
    """Hold what is not quantised in fp32, as peft's function of this name does."""

    @model_validator(mode="after")
    def _has_effect(self) -> Self:
        if self.load_in_8bit and (self.bnb_4bit_quant_type != "nf4" or not self.bnb_4bit_use_double_quant):
            raise ValueError("bnb_4bit_quant_type and bnb_4bit_use_double_quant are of 4 bits, and load_in_8bit is on")
        return self

    def why_not(self, hardware: "Hardware", recipe: Recipe) -> str | None:
        if self.load_in_8bit and "fsdp" in recipe:
            return (
                "FSDP2 puts others in the place of bitsandbytes' weights of 8 bit ('Parameter' object has no attribute "
                "'CB'): use 4 bit, or ddp"
            )
        if self.use_dora and "zero3" in recipe:
            return (
                "peft gathers the weights whose norm DoRA takes as DeepSpeed's, which quantised ones are not "
                "('Params4bit' object has no attribute 'ds_id'): leave out use_dora, or use ddp, zero1 or zero2"
            )
        if self.use_dora and self.load_in_8bit and hardware.device == "cpu":
            return (
                "on a CPU bitsandbytes has no scales yet when peft takes DoRA's norm of weights in 8 bit ('NoneType' "
                "object has no attribute 'dtype'): use 4 bit, or leave out use_dora"
            )
        if self.init_lora_weights == "loftq":
            return (
                "peft: LoftQ quantises the model itself, so it can't begin with one that is (you should not pass a "
                "quantized model in this case): use lora, or another start"
            )
        if str(self.init_lora_weights).startswith("pissa"):
            return (
                "peft takes singular vectors of whole weights, not of quantised ones (Please initialize PiSSA under "
                "float32, float16, or bfloat16): use lora, or another start"
            )
        if self.init_lora_weights == "orthogonal":
            return (
                "peft makes matrices in the format of the weights, and orthogonal ones of bytes can't be trained (Only "
                "Tensors of floating point and complex dtype can require gradients): use lora, or another start"
            )
        return None

    def why_not_run(self, run: "Run") -> str | None:
        if (found := model_type(run)) in NOT_QUANTISED:
            return WHY.format(model_type=found)
        return super().why_not_run(run)

    def uses_loaded_weights(self) -> bool:
        return True

    def number_format(self) -> str | None:
        # 4 bits are turned back into the precision's format; 8 bits are multiplied as they are (arXiv 2208.07339).
        return "int8" if self.load_in_8bit else None

    def load_arguments(self, recipe: Recipe) -> dict[str, Any]:
        quantisation: dict[str, Any] = {"quant_method": "bitsandbytes"}
        if self.load_in_8bit:
            return {"quantization_config": quantisation | {"load_in_8bit": True}}
        compute = next((t.load_arguments(recipe)["dtype"] for t in recipe.values() if t.kind == "precision"), "float32")
        if "fsdp" in recipe:
            # accelerate shards 4-bit weights only where their bytes are held as floating point; else a device has all.
            # In mixed precision FSDP2 casts all that is such: to that very type, or bytes would be lost.
            mixed = {k for t in recipe.values() for k, is_on in t.training_arguments(recipe).items() if is_on is True}
            quantisation["bnb_4bit_quant_storage"] = (
                "bfloat16" if "bf16" in mixed else "float16" if "fp16" in mixed else compute
            )
        return {
            "quantization_config": quantisation
            | {
                "load_in_4bit": True,
                "bnb_4bit_quant_type": self.bnb_4bit_quant_type,
                "bnb_4bit_use_double_quant": self.bnb_4bit_use_double_quant,
                "bnb_4bit_compute_dtype": compute,
            }
        }

    def peft_settings(self, run: "Run") -> dict[str, Any]:
        return {name: value for name, value in super().peft_settings(run).items() if name not in _QUANTISATION}

    def wrap(self, model: Any, run: "Run") -> Any:
        import peft

        for module in model.modules():
            # On a CPU bitsandbytes packs weights anew for its first evaluation, and later steps get other gradients.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        if self.prepare_model_for_kbit_training:
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        return super().wrap(model, run)
