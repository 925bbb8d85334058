"""The registry of techniques, and what a recipe of them means."""

import difflib
from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from finetune_study.errors import ConfigError
from finetune_study.techniques.activation_offload import ActivationOffload
from finetune_study.techniques.adapters import Adalora, AdaptionPrompt, Ia3, Loha, Lokr, Oft
from finetune_study.techniques.attention import Eager, FlashAttention2, FlashAttention3, FlashAttention4, Sdpa
from finetune_study.techniques.base import WHY_ONE, Kind, Technique
from finetune_study.techniques.compilation import TorchCompile
from finetune_study.techniques.fp8 import Fp8
from finetune_study.techniques.fsdp import Fsdp
from finetune_study.techniques.gradient_checkpointing import GradientCheckpointing
from finetune_study.techniques.liger import Liger
from finetune_study.techniques.lora import Lora
from finetune_study.techniques.muon import Muon
from finetune_study.techniques.offload_optimizer import OffloadOptimizer
from finetune_study.techniques.offload_param import OffloadParam
from finetune_study.techniques.optimizer import (
    Adafactor,
    Adamw8bit,
    AdamwTorch,
    AdamwTorch4bit,
    AdamwTorch8bit,
    AdamwTorchFused,
    ApolloAdamw,
    GaloreAdamw,
    PagedAdamw8bit,
    PagedAdamw32bit,
)
from finetune_study.techniques.optimizer_in_backward import OptimizerInBackward
from finetune_study.techniques.packing import Packing
from finetune_study.techniques.precision import BF16_COMPUTE_CAPABILITY, Bf16, Bf16Pure, Fp16, Fp32, Tf32
from finetune_study.techniques.prompts import PrefixTuning, PromptTuning, PTuning
from finetune_study.techniques.qlora import Qlora
from finetune_study.techniques.sharding import Ddp, Zero1, Zero2, Zero3
from finetune_study.techniques.zeropp import Zeropp

if TYPE_CHECKING:
    from finetune_study.config import Hardware
    from finetune_study.run import Run

ALL: dict[str, type[Technique]] = {
    technique.name: technique
    for technique in (
        Fp32, Tf32, Fp16, Bf16, Bf16Pure, Fp8,
        Eager, Sdpa, FlashAttention2, FlashAttention3, FlashAttention4,
        Liger,
        Lora, Qlora, Adalora, Loha, Lokr, Oft, Ia3, AdaptionPrompt, PromptTuning, PTuning, PrefixTuning,
        GradientCheckpointing, ActivationOffload,
        Ddp, Fsdp, Zero1, Zero2, Zero3, Zeropp,
        OffloadOptimizer, OffloadParam,
        AdamwTorch, AdamwTorchFused, AdamwTorch8bit, AdamwTorch4bit, Adamw8bit, PagedAdamw32bit, PagedAdamw8bit,
        Adafactor, GaloreAdamw, ApolloAdamw, Muon,
        OptimizerInBackward,
        TorchCompile,
        Packing,
    )
}  # fmt: skip
"""Every technique by its name."""

ORDER: tuple[str, ...] = get_args(Kind)
"""Kinds in the order of application."""

NAMES_OF_RANK = ("r", "rank", "init_r")
"""Of the one thing, in the spellings of the libraries."""

Techniques = dict[str, Technique]
"""A recipe, parsed: technique by name, in the order of application."""


def parse(recipe: Mapping[str, Mapping[str, Any]]) -> Techniques:
    """The techniques of a recipe in their order of application.

    Raises:
        ConfigError: for an unknown technique or setting, two techniques of one kind, or one that lacks what it needs.
    """
    parsed: Techniques = {}
    for name, settings in recipe.items():
        if name not in ALL:
            close = difflib.get_close_matches(name, ALL, n=2, cutoff=0.5)
            raise ConfigError(
                f"unknown technique `{name}`" + (f" (did you mean {' or '.join(close)}?)" if close else ""),
                allowed=", ".join(sorted(ALL)),
            )
        try:
            parsed[name] = ALL[name].model_validate(dict(settings))
        except ValidationError as error:
            problems = "; ".join(_explain(problem, list(ALL[name].model_fields)) for problem in error.errors())
            raise ConfigError(
                f"settings of `{name}`: {problems}",
                given=dict(settings),
                allowed=", ".join(ALL[name].model_fields) or "no settings",
            ) from None
    by_kind: dict[str, str] = {}
    for name, technique in parsed.items():
        other = by_kind.setdefault(technique.kind, name)
        if other != name and other not in technique.beside:
            why = WHY_ONE[technique.kind]
            raise ConfigError(
                f"`{other}` and `{name}` contradict each other: both are {technique.kind}, and {why}; choose one"
            )
        if without := missing(name, parsed):
            raise ConfigError(without)
    return dict(sorted(parsed.items(), key=lambda item: ORDER.index(item[1].kind)))


def missing(name: str, recipe: Collection[str]) -> str | None:
    """Why a technique means nothing in a recipe of these names; None where it has what it needs."""
    needs = ALL[name].needs
    if not needs or not needs.isdisjoint(recipe):
        return None
    return f"`{name}` means nothing without one of {', '.join(sorted(needs))}"


def _explain(problem: Any, settings: list[str]) -> str:
    place = ".".join(map(str, problem["loc"]))
    if problem["type"] != "extra_forbidden":
        return ": ".join(filter(None, (place, problem["msg"])))
    synonyms = [name for name in NAMES_OF_RANK if name in settings] if place in NAMES_OF_RANK else []
    close = synonyms or difflib.get_close_matches(place, settings, n=2, cutoff=0.5)
    return f"{place}: unknown setting" + (f" (did you mean {' or '.join(close)}?)" if close else "")


def complete(recipe: Mapping[str, Mapping[str, Any]], hardware: "Hardware", num_gpus: int) -> Techniques:
    """A recipe with the stated defaults for what it leaves open.

    Precision: bf16 where the hardware has it, else fp16; fp32 on a CPU. Attention: sdpa. Optimizer: adamw_torch.
    Several devices: ddp.
    """
    given = parse(recipe)
    capability = hardware.compute_capability
    if hardware.device == "cpu":
        precision = "fp32"
    else:
        precision = "bf16" if capability is None or capability >= BF16_COMPUTE_CAPABILITY else "fp16"
    defaults = {"precision": precision, "attention": "sdpa", "optimizer": "adamw_torch"}
    if num_gpus > 1:
        defaults["sharding"] = "ddp"
    taken = {technique.kind for technique in given.values()}
    missing: dict[str, dict[str, Any]] = {name: {} for kind, name in defaults.items() if kind not in taken}
    return parse({**missing, **recipe})


def why_not(recipe: Techniques, hardware: "Hardware") -> str | None:
    """Why a recipe can't run on some hardware; None when nothing speaks against it."""
    return next(reasons(recipe, hardware), None)


def reasons(recipe: Techniques, hardware: "Hardware") -> Iterator[str]:
    """All that speaks against a recipe on some hardware: the first reason of each technique."""
    for technique in recipe.values():
        reason = technique.why_not(hardware, recipe) or next(
            (technique.excludes[other] for other in recipe if other in technique.excludes), None
        )
        if reason:
            yield reason


def chosen_settings(recipe: Techniques) -> dict[str, dict[str, Any]]:
    """Of each technique the settings that are not at their defaults, as JSON holds them; most have none."""
    chosen = {name: technique.model_dump(mode="json", exclude_defaults=True) for name, technique in recipe.items()}
    return {name: settings for name, settings in chosen.items() if settings}


def shards(recipe: Techniques) -> bool:
    """Whether each device holds less of the model's states the more devices there are.

    Where weights are frozen, gradients and optimizer states are those of adapters: too little to count.
    """
    offloaded = {state for technique in recipe.values() for state in technique.offloads(recipe)}
    sharded = {state for technique in recipe.values() for state in technique.shards} - offloaded
    frozen = any(technique.freezes_weights for technique in recipe.values())
    return "weights" in sharded if frozen else bool(sharded)


def number_format(recipe: Techniques) -> str | None:
    """Of what is multiplied in a recipe's linear layers: that of its precision, unless quantised weights go before."""
    formats = (technique.number_format() for technique in reversed(recipe.values()))
    return next((found for found in formats if found), None)


def why_not_run(recipe: Techniques, run: "Run") -> str | None:
    """Why a run's techniques can't do this very run, whatever the hardware; None when nothing speaks against it."""
    reasons = (technique.why_not_run(run) for technique in recipe.values())
    return next((reason for reason in reasons if reason), None)
