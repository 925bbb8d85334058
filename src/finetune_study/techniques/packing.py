"""How examples fill the context."""

from typing import ClassVar

from finetune_study.techniques.base import Kind, Technique


class Packing(Technique):
    """Puts whole examples one after another until the context is full; without it each is padded to the context alone.

    Positions start anew with every example, attention does not look across them only where the model honours
    `position_ids`; finetune_study.data does the work when the data is prepared. With FlashAttention the sequences of a
    micro-batch become one, in which transformers tells examples apart.
    """

    name: ClassVar[str] = "packing"
    kind: ClassVar[Kind] = "sequences"
    effect: ClassVar[str] = (
        "memory: more real tokens in the same; "
        "speed: fewer padded positions, so more real tokens in the same time; "
        "quality: more examples in a step, attention may look across them"
    )
    source: ClassVar[str] = "Raffel et al., arXiv 1910.10683, section 3.5.2"
