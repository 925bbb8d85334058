"""What of a model transformers hands to bitsandbytes, and what it leaves as it is."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

LEAST = 0.5
"""Of the weights of the layers; with less quantised the memory is not what one expects of QLoRA."""
WORTH_A_NAME = 0.05
"""Of the weights of the layers, that a kind of module holds."""

NOT_QUANTISED = frozenset({"falcon"})
"""Model types none of whose layers transformers quantises with bitsandbytes (transformers 5.20 and later)."""
WHY = (
    "transformers has bitsandbytes quantise what is exactly torch.nn.Linear or Conv1D, which no layer of a "
    "{model_type} is: use lora, or another model (transformers up to 5.0 quantised its subclasses as well)"
)


@dataclass(frozen=True)
class Quantised:
    """How much of a model's layers is quantised; embeddings and the output layer are apart."""

    share: float
    left: str
    """Kinds of modules that hold the rest, and their shares."""
    before: tuple[str, ...]
    """What other versions of transformers did with them."""

    def warning(self, note: str = "") -> str | None:
        """What to say where most of the weights are not quantised.

        Args:
            note: what becomes of them.
        """
        import transformers

        if self.share >= LEAST:
            return None
        how = f"transformers {transformers.__version__} replaces what is exactly torch.nn.Linear or Conv1D"
        return (
            f"only {self.share:.1%} of the weights of the layers are quantised; not {self.left}{note}: "
            f"{'; '.join((how, *self.before))}"
        )


def measure(model: Any, kinds: tuple[Any, ...]) -> Quantised:
    """Counts the weights of a model that was loaded with a `quantization_config`.

    Args:
        model: one of transformers.
        kinds: modules that hold quantised weights; bitsandbytes packs these, so that their tensors don't tell how many.
    """
    import torch

    head = model.get_output_embeddings()
    apart = [module for module in model.modules() if isinstance(module, torch.nn.Embedding) or module is head]
    seen = {id(parameter) for module in apart for parameter in module.parameters()}
    quantised, rest = 0, Counter[type]()
    stacked: set[type] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            if isinstance(module, kinds) and name == "weight":
                quantised += module.in_features * module.out_features
                continue
            rest[type(module)] += parameter.numel()
            if parameter.dim() > 2:
                stacked.add(type(module))
    total = quantised + rest.total()
    left = [kind for kind, number in rest.most_common() if number >= WORTH_A_NAME * total]
    before = []
    if any(issubclass(kind, torch.nn.Linear) and kind not in kinds for kind in left):
        before.append("versions up to 5.0 replaced subclasses of torch.nn.Linear as well")
    if stacked.intersection(left):
        before.append("versions before 5 had each expert of Mixtral, for example, as layers, and replaced them")
    return Quantised(
        quantised / total, ", ".join(f"{kind.__name__} ({rest[kind] / total:.1%})" for kind in left), tuple(before)
    )


def by_bitsandbytes(model: Any) -> Quantised:
    """The same, of a model in which bitsandbytes' layers are."""
    import bitsandbytes

    return measure(model, (bitsandbytes.nn.Linear4bit, bitsandbytes.nn.Linear8bitLt))
