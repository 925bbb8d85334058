"""What the literature claims, checked on this study's own numbers, and the decision tree walked with them."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal, Self

from finetune_study import techniques as registry
from finetune_study.ratio import Repeat, ratio
from finetune_study.states import OPEN
from finetune_study.table import (
    SETTING,
    Row,
    completed_everywhere,
    devices,
    joined,
    micro_batch,
    micro_batch_order,
    one_kind,
    padded,
    ratio_of,
    show,
    show_ratio,
)

Answer = Literal["holds", "does not hold", "not enough data"]

SUPPORT = 0.75
"""A claim holds where at least this share of the comparisons that could decide did speak for it."""
VERY_LARGE = 20e9
"""Parameters from which on a model is very large here: "tens of billions" (arXiv 2406.02290)."""
LONG, SHORT = 2048, 1024
"""Tokens: FlashAttention is said to matter from the first on, and little up to the second."""
LITTLE = 0.10
"""A difference below 10 % is little."""
MODEST = 1.4
"""Gradient checkpointing is said to cost about 30 % on one GPU; up to 40 % passes for modest."""
RAN_OUT = frozenset({"device_oom", "implied_oom"})
"""Endings by the device's memory, its own or an easier run's; a forecast is not one."""
PAPER = "arXiv 2406.02290"
LECTURE = "lectures on memory-efficient fine-tuning"


@dataclass(frozen=True)
class Comparison:
    """One comparison that speaks for or against a claim."""

    where: str
    what: str
    """The numbers, in words."""
    speaks_for: bool | None
    """None: it decides nothing, for example because the interval holds both answers."""
    run_ids: tuple[str, ...] = ()
    against: str = ""
    """Which of several things speaks against the claim here."""
    target: str = ""
    hardware: str = ""
    """Empty: it is of every hardware."""

    @classmethod
    def at(cls, row: Row, what: str, speaks_for: bool | None, run_ids: tuple[str, ...], against: str = "") -> Self:
        """One in the setting of a configuration."""
        return cls(where(row), what, speaks_for, run_ids, against, row["target"], row["hardware"])


@dataclass(frozen=True)
class Claim:
    """A claim, and what this study says to it."""

    name: str
    statement: str
    source: str
    criterion: str
    """When a comparison speaks for the claim."""
    comparisons: list[Comparison] = field(default_factory=list)

    @cached_property
    def deciding(self) -> list[Comparison]:
        return [one for one in self.comparisons if one.speaks_for is not None]

    @cached_property
    def number_for(self) -> int:
        return sum(one.speaks_for is True for one in self.deciding)

    @cached_property
    def tally(self) -> str:
        """How many comparisons speak for it; of those against it, by what, where that has kinds."""
        kinds = Counter(one.against for one in self.deciding if one.speaks_for is False and one.against)
        against = f"; against it: {joined(f'{number} where {kind}' for kind, number in kinds.items())}" if kinds else ""
        return f"{self.number_for} of {len(self.deciding)} for it{against}"

    @cached_property
    def answer(self) -> Answer:
        if not self.deciding:
            return "not enough data"
        return "holds" if self.number_for >= SUPPORT * len(self.deciding) else "does not hold"


def techniques(row: Row) -> frozenset[str]:
    return frozenset((row["techniques"] or "").split("+")) - {""}


def where(row: Row) -> str:
    place = devices(row["hardware"], row["num_gpus"], row["nodes"])
    return f"{row['target']}, {place}, context {row['sequence_length']}{micro_batch(row)}"


def _settings(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows that may be compared: one setting and one micro-batch."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in (*SETTING, "micro_batch"))
        found.setdefault(key, []).append(row)
    return [*found.values()]


def exchanged(rows: Iterable[Row], without: frozenset[str], with_: frozenset[str]) -> Iterator[tuple[Row, Row]]:
    """Pairs in one setting and at one micro-batch that differ in these techniques alone.

    Args:
        rows: configurations (`table.SCHEMA`).
        without: what the first of a pair has in place of the other's, one of them; empty: nothing.
        with_: what the second has, one of them.
    """
    for group in _settings(rows):
        by_rest: dict[tuple[frozenset[str], ...], list[Row]] = {}
        for row in group:
            used = techniques(row)
            if not used & with_ and (used & without or not without):
                by_rest.setdefault((used - without,), []).append(row)
        for row in group:
            used = techniques(row)
            if used & with_:
                yield from ((other, row) for other in by_rest.get((used - with_,), []))


def _same_kind(first: Row, second: Row) -> bool:
    """Whether two configurations completed and may be compared: never across software, weights, data, batch."""
    return (
        completed_everywhere(first)
        and completed_everywhere(second)
        and len(first["provenance"]) == 1
        and first["provenance"] == second["provenance"]
    )


def measured(first: Row, second: Row, column: str) -> tuple[float, float | None, float | None] | None:
    """Ratio of the second to the first in a column with its interval; None where one is missing."""
    found = ratio_of(second, first, column)
    return None if found is None else (found.value, found.low, found.high)


def _side(found: tuple[float, float | None, float | None] | None, low: float | None, high: float | None) -> bool | None:
    """Whether a ratio lies between two limits; None where its interval lies on both sides of one, or is unknown.

    Memory hardly varies: where there is no interval (one repeat, one node), nothing is decided either.
    """
    if found is None or found[1] is None or found[2] is None:
        return None
    inside = (low is None or found[1] >= low) and (high is None or found[2] <= high)
    outside = (low is not None and found[2] < low) or (high is not None and found[1] > high)
    return True if inside else False if outside else None


def _all(*sides: bool | None) -> bool | None:
    return False if False in sides else None if None in sides else True


def _text(name: str, found: tuple[float, float | None, float | None] | None) -> str:
    if found is None:
        return f"{name}: no number"
    value, low, high = show_ratio(*found)
    return f"{name} × {value} ({low} to {high})" if low else f"{name} × {value} (no interval)"


def _pair_text(first: Row, second: Row, *parts: str) -> str:
    return f"{second['recipe']} against {first['recipe']}: {', '.join(parts)}"


def _ids(*rows: Row) -> tuple[str, ...]:
    return tuple(row["run_ids"][0] for row in rows)


def check(rows: list[Row]) -> list[Claim]:
    """Every claim with the comparisons of this study.

    Args:
        rows: configurations (`table.SCHEMA`).
    """
    return [claim(rows) for claim in CLAIMS]


def _best_balance(rows: list[Row]) -> Claim:
    claim = Claim(
        "balance",
        "ZeRO-2 with LoRA is the best balance of memory and runtime.",
        PAPER,
        "On several GPUs its product of step time and peak memory is within 10 % of the smallest of all other recipes "
        "that fit, at least two of them, without FlashAttention on either side; with the interval over repeats.",
    )
    for group in _settings(rows):
        fitting = [
            r
            for r in padded(group)
            if completed_everywhere(r)
            and r["step_time_seconds_median"]
            and r["peak_memory_gib_median"]
            and not any("flash" in name for name in techniques(r))
        ]
        ours = [
            r for r in fitting if {"zero2", "lora"} <= techniques(r) and "gradient_checkpointing" not in techniques(r)
        ]
        others = [r for r in fitting if r not in ours]
        if group[0]["num_gpus"] < 2 or not ours or len(others) < 2 or not one_kind(fitting):
            continue
        own, best = min(ours, key=_product), min(others, key=_product)
        found = ratio(_products(own), _products(best))
        interval = found.value, found.low, found.high
        what = f"{_text('time and memory', interval)} of the smallest of {len(others)} other recipes"
        claim.comparisons.append(
            Comparison.at(group[0], _pair_text(best, own, what), _side(interval, None, 1 + LITTLE), _ids(own, best))
        )
    return claim


def _product(row: Row) -> float:
    return float(row["step_time_seconds_median"] * row["peak_memory_gib_median"])


def _products(row: Row) -> list[Repeat]:
    """Step time by peak memory of each repeat, with its node."""
    columns = ("nodes_of_repeats", "step_time_seconds_repeats", "peak_memory_gib_repeats")
    values = zip(*(row[name] for name in columns), strict=True)
    return [Repeat(node, seconds * gib) for node, seconds, gib in values if seconds and gib]


def _pairs_claim(
    claim: Claim,
    rows: Iterable[Row],
    without: set[str],
    with_: set[str],
    judge: Callable[[Row, Row], tuple[str, bool | None] | None],
) -> Claim:
    for first, second in exchanged(rows, frozenset(without), frozenset(with_)):
        judged = judge(first, second) if _same_kind(first, second) else None
        if judged is not None:
            claim.comparisons.append(
                Comparison.at(first, _pair_text(first, second, judged[0]), judged[1], _ids(first, second))
            )
    return claim


def _memory_of_zero(rows: list[Row]) -> Claim:
    claim = Claim(
        "zero-memory",
        "ZeRO shards model states: 2 to 4 times less memory.",
        PAPER,
        "At least half of the peak memory is saved on several GPUs, the recipe being the same otherwise; the peak "
        "holds activations, too, which ZeRO does not shard, so that less is saved of it than of model states.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        memory = measured(first, second, "peak_memory_gib")
        return _text("memory", memory), _side(memory, None, 0.5)

    several = [row for row in rows if row["num_gpus"] > 1]
    return _pairs_claim(claim, several, {"ddp"}, {"zero2", "zero3"}, judge)


_THREE = frozenset({"zero3", "lora", "gradient_checkpointing"})
_LESSER_SHARDING = frozenset({"ddp", "zero1", "zero2"})


def _very_large(rows: list[Row]) -> Claim:
    claim = Claim(
        "very-large",
        "For models of tens of billions of parameters ZeRO-3, LoRA and gradient checkpointing together avoid running "
        "out of memory where lesser mixes do not.",
        PAPER,
        "On several GPUs, since ZeRO-3 shards nothing on one: the mix completes, every recipe that has fewer of the "
        "three and is the same otherwise (the host's memory used, or not) has an outcome, none of them completes "
        "and at least one ran out of memory. Against it speaks that one of them completes, or that the mix "
        "ran out itself.",
    )
    large = {row["target"] for row in rows if (row["total_parameters"] or 0) >= VERY_LARGE}
    for group in _settings(row for row in rows if row["target"] in large and row["num_gpus"] > 1):
        by_rest: dict[frozenset[str], list[Row]] = {}
        for row in group:
            by_rest.setdefault(techniques(row) - _THREE - _LESSER_SHARDING, []).append(row)
        claim.comparisons.extend(filter(None, map(_mix_against_lesser, by_rest.values())))
    return claim


def _mix_against_lesser(rows: list[Row]) -> Comparison | None:
    """Recipes that differ in the three alone, and in what shards in place of ZeRO-3."""
    mixes, lesser = ([r for r in rows if (techniques(r) >= _THREE) is whole] for whole in (True, False))
    if not mixes or not lesser:
        return None
    mix_fits = any(completed_everywhere(r) for r in mixes)
    ran_out = [r for r in lesser if RAN_OUT & {*r["states"]}]
    fitting = [r for r in lesser if completed_everywhere(r)]
    unanswered = [r for r in lesser if {*r["states"]} <= OPEN]
    mix_ran_out = all(RAN_OUT & {*r["states"]} for r in mixes)
    # A lesser one that completes suffices against it: then the mix is one way, not what it takes.
    speaks = False if fitting or mix_ran_out else True if mix_fits and ran_out and not unanswered else None
    own = "completes" if mix_fits else "ran out of memory itself" if mix_ran_out else "is not known to fit"
    what = f"{mixes[0]['recipe']} {own}; of {len(lesser)} lesser mixes {len(ran_out)} ran out of memory"
    what += f", {len(fitting)} fit"
    what += f" ({', '.join(r['recipe'] for r in fitting)})" if fitting else ""
    what += f", {len(unanswered)} have no outcome" if unanswered else ""
    against = "" if speaks is not False else "a lesser mix fits" if fitting else "the mix ran out of memory itself"
    return Comparison.at(mixes[0], what, speaks, _ids(mixes[0]), against)


def _flash_long(rows: list[Row]) -> Claim:
    claim = Claim(
        "flash-long",
        f"FlashAttention-2 saves memory and time at long context (from {LONG} tokens on).",
        PAPER,
        "Both step time and peak memory are smaller than with the attention it replaces.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        memory, time = (measured(first, second, c) for c in ("peak_memory_gib", "step_time_seconds"))
        return f"{_text('memory', memory)}, {_text('time', time)}", _all(_side(memory, None, 1), _side(time, None, 1))

    return _pairs_claim(
        claim, [r for r in rows if r["sequence_length"] >= LONG], {"eager", "sdpa"}, {"flash_attention_2"}, judge
    )


def _flash_short(rows: list[Row]) -> Claim:
    claim = Claim(
        "flash-short",
        f"FlashAttention-2 changes little below about {SHORT} tokens.",
        PAPER,
        "Step time and peak memory differ by less than 10 %.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        memory, time = (measured(first, second, c) for c in ("peak_memory_gib", "step_time_seconds"))
        sides = (_side(one, 1 - LITTLE, 1 + LITTLE) for one in (memory, time))
        return f"{_text('memory', memory)}, {_text('time', time)}", _all(*sides)

    return _pairs_claim(
        claim, [r for r in rows if r["sequence_length"] < SHORT], {"eager", "sdpa"}, {"flash_attention_2"}, judge
    )


def _flash_linear(rows: list[Row]) -> Claim:
    claim = Claim(
        "flash-linear",
        "With FlashAttention-2 memory grows linearly with the context, not with its square.",
        PAPER,
        "Of the two curves through the peaks of two contexts, the straight line comes nearer to the peak of a third, "
        "longer one than the parabola does, for the largest and the smallest of at least two repeats at each.",
    )
    curves: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if "flash_attention_2" in techniques(row) and completed_everywhere(row) and row["num_completed"] >= 2:
            key = [row[name] for name in (*SETTING, "recipe", "micro_batch") if name != "sequence_length"]
            curves.setdefault(tuple(key), []).append(row)
    for found in curves.values():
        longest = sorted(found, key=lambda row: int(row["sequence_length"]))[-3:]
        if len(longest) == 3 and one_kind(longest) and all(row["peak_memory_gib_median"] for row in longest):
            share, low, high = (_towards_parabola(longest, *which) for which in _ENDS)
            numbers = ", ".join(
                f"{show(r['peak_memory_gib_median'], 'GiB')} at {r['sequence_length']}" for r in longest
            )
            what = f"{longest[0]['recipe']}: {numbers}"
            if share is None or low is None or high is None:
                what += "; memory does not grow between the first two"
                speaks = None
            else:
                what += f"; 0 is a line and 1 a parabola: {show(share)} ({show(low)} to {show(high)})"
                speaks = _side((share, low, high), None, 0.5)
            claim.comparisons.append(Comparison.at(longest[-1], what, speaks, _ids(*longest)))
    return claim


_ENDS = (("median", "median", "median"), ("min", "max", "min"), ("max", "min", "max"))
"""Which of the repeats counts at each of three contexts: the usual ones, and those that bend a curve least and most."""


def _towards_parabola(rows: list[Row], *which: str) -> float | None:
    """Where the last of three peaks lies between a line (0) and a parabola c + a s² (1) through the first two.

    None where memory does not grow between those: something else than activations is the peak there.
    """
    (s1, m1), (s2, m2), (s3, m3) = (
        (float(row["sequence_length"]), float(row[f"peak_memory_gib_{end}"]))
        for row, end in zip(rows, which, strict=True)
    )
    if m2 <= m1:
        return None
    line = m2 + (m2 - m1) * (s3 - s2) / (s2 - s1)
    parabola = m2 + (m2 - m1) * (s3**2 - s2**2) / (s2**2 - s1**2)
    return (m3 - line) / (parabola - line)


def _checkpointing(rows: list[Row]) -> Claim:
    claim = Claim(
        "checkpointing",
        "Gradient checkpointing saves memory at a modest slow-down (about 30 % on one GPU).",
        f"{PAPER}; {LECTURE}",
        f"Less peak memory, and a step takes at most × {MODEST} the time.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        memory, time = (measured(first, second, c) for c in ("peak_memory_gib", "step_time_seconds"))
        return f"{_text('time', time)}, {_text('memory', memory)}", _all(
            _side(memory, None, 1), _side(time, None, MODEST)
        )

    return _pairs_claim(claim, rows, set(), {"gradient_checkpointing"}, judge)


def _checkpointing_fits(rows: list[Row]) -> Claim:
    claim = Claim(
        "checkpointing-fits",
        "Gradient checkpointing lets larger models or longer contexts fit.",
        PAPER,
        "For a target on some hardware it completes somewhere where the same recipe without it ran out of memory.",
    )
    tried: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for first, second in exchanged(rows, frozenset(), frozenset({"gradient_checkpointing"})):
        ended = completed_everywhere(second) or RAN_OUT & {*second["states"]}
        if RAN_OUT & {*first["states"]} and ended:
            tried.setdefault((first["target"], first["hardware"]), []).append((first, second))
    for (target, hardware), found in tried.items():
        rescued = [(first, second) for first, second in found if completed_everywhere(second)]
        what = f"completes in {len(rescued)} of {len(found)} configurations that ran out of memory without it"
        if rescued:
            what += f", for example {rescued[0][1]['recipe']} at {where(rescued[0][1]).partition(', ')[2]}"
        runs = _ids(*(rescued or found)[0])
        claim.comparisons.append(
            Comparison(f"{target}, {hardware}", what, bool(rescued), runs, target=target, hardware=hardware)
        )
    return claim


def _lora_parameters(rows: list[Row]) -> Claim:
    claim = Claim(
        "lora-parameters",
        "LoRA trains orders of magnitude fewer parameters (131 million of Llama 2's 70 billion).",
        PAPER,
        "At most 1 % of the weights are trained.",
    )
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if "lora" in techniques(row) and row["trainable_parameters"] and (row["target"], row["recipe"]) not in seen:
            seen.add((row["target"], row["recipe"]))
            share = row["trainable_parameters"] / row["total_parameters"]
            numbers = f"{row['trainable_parameters']:,} of {row['total_parameters']:,} weights"
            what = f"{row['recipe']}: {numbers}, {show(100 * share)} %"
            claim.comparisons.append(Comparison(row["target"], what, share <= 0.01, _ids(row), target=row["target"]))
    return claim


def _lora_memory(rows: list[Row]) -> Claim:
    claim = Claim(
        "lora-memory",
        "LoRA saves up to two thirds of the memory.",
        f"{PAPER}; {LECTURE}",
        "The largest saving among the pairs of one target on one hardware is 60 % or more, by its interval: more than "
        "was promised speaks for it, too.",
    )
    best: dict[tuple[str, str], tuple[tuple[float, float | None, float | None], Row, Row]] = {}
    for first, second in exchanged(rows, frozenset(), frozenset({"lora"})):
        found = measured(first, second, "peak_memory_gib") if _same_kind(first, second) else None
        key = first["target"], first["hardware"]
        if found and (key not in best or found[0] < best[key][0][0]):
            best[key] = found, first, second
    for found, first, second in best.values():
        what = _pair_text(first, second, _text("memory", found), f"a saving of {show(100 * (1 - found[0]))} %")
        claim.comparisons.append(Comparison.at(first, what, _side(found, None, 0.4), _ids(first, second)))
    return claim


def _zero3_costs(rows: list[Row]) -> Claim:
    claim = Claim(
        "zero3-costs",
        "Over-optimization costs time: ZeRO-3 without need is slower.",
        PAPER,
        "On several GPUs a step takes longer with ZeRO-3 than with ZeRO-2 where both fit.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        time = measured(first, second, "step_time_seconds")
        return _text("time", time), _side(time, 1, None)

    return _pairs_claim(claim, [r for r in rows if r["num_gpus"] > 1], {"zero2"}, {"zero3"}, judge)


def _quantization_costs(rows: list[Row]) -> Claim:
    claim = Claim(
        "quantization-costs",
        "Quantization costs throughput (about 30 % on one GPU).",
        LECTURE,
        "A step takes longer with QLoRA than with LoRA, and at most × 1.6.",
    )

    def judge(first: Row, second: Row) -> tuple[str, bool | None]:
        time = measured(first, second, "step_time_seconds")
        return _text("time", time), _side(time, 1, 1.6)

    return _pairs_claim(claim, rows, {"lora"}, {"qlora"}, judge)


CLAIMS: tuple[Callable[[list[Row]], Claim], ...] = (
    _best_balance,
    _memory_of_zero,
    _very_large,
    _flash_long,
    _flash_short,
    _flash_linear,
    _checkpointing,
    _checkpointing_fits,
    _lora_parameters,
    _lora_memory,
    _zero3_costs,
    _quantization_costs,
)


@dataclass(frozen=True)
class Step:
    """One question of the decision tree, answered by a configuration."""

    question: str
    row: Row | None
    """The configuration that answers; None: no run of the study does."""
    room: float | None
    """Memory of the device less the peak of all that was in use on it, GiB; of what tensors held where that is all
    that is known."""
    taken: bool
    """The walk stops here: this is enough."""

    @property
    def fits(self) -> bool:
        return self.row is not None and completed_everywhere(self.row)


@dataclass(frozen=True)
class Walk:
    """The tree for one target on one hardware."""

    target: str
    hardware: str
    num_gpus: int
    nodes: int
    first: list[Step]
    """Weights, gradients, optimizer states, at the shortest context and the smallest micro-batch."""
    second: list[Step]
    """Activations: on to the longest context, then to the largest micro-batch."""


_LADDER: tuple[tuple[str, frozenset[str]], ...] = (
    ("All weights trained, nothing sharded", frozenset()),
    ("LoRA: gradients and optimizer states of few weights", frozenset({"lora"})),
    ("LoRA, ZeRO-2: gradients and optimizer states sharded", frozenset({"lora", "zero2"})),
    ("LoRA, ZeRO-3: weights sharded, too", frozenset({"lora", "zero3"})),
    ("LoRA, ZeRO-3, and states on the host", frozenset({"lora", "zero3", "offload_optimizer"})),
    ("Quantized weights (costs throughput: only where it must be)", frozenset({"qlora"})),
)
"""What each rung adds to save memory of weights, gradients and optimizer states, from the fastest on."""
_NAMED = "Of all recipes that fit there, the one that is recommended"
"""The last rung, where it is not what the ladder stopped at."""


def _of_kinds(*kinds: str) -> frozenset[str]:
    return frozenset(name for name, technique in registry.ALL.items() if technique.kind in kinds)


_STATES = _of_kinds("peft", "sharding", "communication", "offload", "parameter offload") - {"ddp"}
_ACTIVATIONS = _of_kinds("activations", "activation offload") | {
    name for name in registry.ALL if name.startswith("flash_attention")
}


def walk(
    rows: list[Row],
    num_gpus: int,
    nodes: int,
    limit: float,
    shortest: int | None = None,
    named: Mapping[int, tuple[str, str]] | None = None,
) -> Walk:
    """The decision tree of the lectures: first weights, gradients, optimizer; then activations.

    Each rung is answered by every recipe that shards, offloads and trains as it says, whatever else it has; the walk
    ends in what is recommended there.

    Args:
        rows: each configuration of one target on one hardware (`table.SCHEMA`).
        num_gpus: how many devices there are.
        nodes: that they are on.
        limit: memory of a device, GiB.
        shortest: the context to start at; default: the shortest that is planned there.
        named: recipe and micro-batch that are recommended at each context; default: the fastest that fits.
    """
    here = [row for row in rows if (row["num_gpus"], row["nodes"]) == (num_gpus, nodes)]
    contexts = sorted({row["sequence_length"] for row in here})
    start = contexts[0] if shortest is None else shortest
    short = [row for row in here if row["sequence_length"] == start]
    smallest = min(map(micro_batch_order, short))
    first: list[Step] = []
    for question, rung in _LADDER:
        if num_gpus == 1 and rung & {"zero2", "zero3"} and "offload_optimizer" not in rung:
            continue
        there = [r for r in short if micro_batch_order(r) == smallest and techniques(r) & _STATES == rung]
        first.append(_step(question, _answer(there), limit))
        if first[-1].taken:
            break
    named = named or {}
    chosen = _finished(first, short, limit, named.get(start))
    second = [] if chosen is None else _activations(here, contexts[-1], start, chosen, limit, named.get(contexts[-1]))
    return Walk(here[0]["target"], here[0]["hardware"], num_gpus, nodes, first, second)


def _step(question: str, row: Row | None, limit: float) -> Step:
    return Step(question, row, _room(row, limit), row is not None and completed_everywhere(row))


def _finished(steps: list[Step], rows: list[Row], limit: float, named: tuple[str, str] | None) -> Row | None:
    """Ends a walk in what is recommended of the rows, with one more step where it stopped at another or at none."""
    chosen = next((row for row in rows if (row["recipe"], row["micro_batch"]) == named), None) or _fastest(rows)
    last = steps[-1] if steps else None
    if chosen is not None and (last is None or not last.taken or last.row is not chosen):
        steps[:] = [replace(step, taken=False) for step in steps]
        steps.append(_step(_NAMED, chosen, limit))
    return chosen or (last.row if last is not None and last.taken else None)


def _fastest(rows: list[Row]) -> Row | None:
    """None where nothing fits, or where those that fit may not be compared."""
    fitting = [row for row in padded(rows) if completed_everywhere(row)]
    timed = [row for row in fitting if row["step_time_seconds_median"] is not None]
    return min(timed, key=lambda row: row["step_time_seconds_median"], default=None) if one_kind(fitting) else None


def _answer(rows: list[Row]) -> Row | None:
    """The fastest of a rung that fits; else one of those that do not: an outcome tells more than a missing run."""
    fitting = [row for row in rows if completed_everywhere(row)]
    if fitting:
        return _fastest(fitting) or fitting[0]
    return min(rows, key=lambda row: {*row["states"]} <= OPEN, default=None)


def _activations(
    here: list[Row], longest: int, start: int, chosen: Row, limit: float, named: tuple[str, str] | None
) -> list[Step]:
    states = techniques(chosen) & _STATES
    same = [row for row in here if techniques(row) & _STATES == states]
    at_longest = [row for row in here if row["sequence_length"] == longest]
    smallest = min(map(micro_batch_order, at_longest))
    there = [row for row in same if row["sequence_length"] == longest and micro_batch_order(row) == smallest]
    steps: list[Step] = []
    for words, used in (
        ("nothing more", frozenset[str]()),
        ("FlashAttention-2", frozenset({"flash_attention_2"})),
        ("gradient checkpointing", frozenset({"gradient_checkpointing"})),
        ("both", frozenset({"flash_attention_2", "gradient_checkpointing"})),
    ):
        answer = _answer([row for row in there if techniques(row) & _ACTIVATIONS == used])
        steps.append(_step(f"Context {longest}: {words}", answer, limit))
        if steps[-1].taken:
            break
    _finished(steps, at_longest, limit, named)
    larger = sorted(
        (r for r in same if r["recipe"] == chosen["recipe"] and r["sequence_length"] == start),
        key=micro_batch_order,
    )
    question = f"More sequences at once, at context {start}"
    steps += [replace(_step(question, row, limit), taken=row is chosen) for row in larger[1:]]
    return steps


def _room(row: Row | None, limit: float) -> float | None:
    """What a device has left, GiB: beside all that was in use on it, where that was measured, else beside tensors."""
    if row is None:
        return None
    used = [row[name] for name in ("peak_device_used_gib_median", "peak_memory_gib_median") if row[name] is not None]
    return limit - float(used[0]) if used else None
