"""docs/techniques.md: technique × hardware × exclusions × what was really run, from modules and stored results."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from finetune_study import generated, techniques
from finetune_study.config import Hardware
from finetune_study.errors import StudyError

REPAIR = "finetune-study techniques-docs"

PLACES = {
    "CPU": Hardware(device="cpu", memory_gib=1),
    "V100": Hardware(memory_gib=1, compute_capability=7.0),
    "A100": Hardware(memory_gib=1, compute_capability=8.0),
    "L40S": Hardware(memory_gib=1, compute_capability=8.9),
    "H100": Hardware(memory_gib=1, compute_capability=9.0),
    "B200": Hardware(memory_gib=1, compute_capability=10.0),
}
"""Columns: one GPU for each compute capability that makes a difference (https://developer.nvidia.com/cuda-gpus)."""

NOT_OFFERED = {
    "LongLoRA's shifted sparse attention (arXiv 2309.12307)": "no maintained library has it: peft "
    "trains its LoRA part, but neither peft nor transformers has the attention",
    "LoRA together with prefix, prompt or P-tuning": "peft's mixed model takes LoRA, LoHa, LoKr and OFT together; of a "
    "prompt method it says that its `peft_type` is not compatible with the `PeftMixedModel`",
    "kernels from a hub": "a kernel is a program that somebody else compiled: none is fetched or loaded but one that a "
    "recipe names (`flash_attention_2: {hub_kernel: kernels-community/…}`). Runs are offline, so bitsandbytes can't "
    "fetch one for CPUs either, which it does on its own where the package kernels is installed",
}


@dataclass(frozen=True)
class Ran:
    """What one stored file says was run on one device."""

    device: str
    source: str
    completed: frozenset[tuple[frozenset[str], int]]
    """Recipes, each as the set of its techniques, and on how many devices."""

    @property
    def number_of_recipes(self) -> int:
        return len({recipe for recipe, _ in self.completed})

    def cell(self, name: str) -> str:
        """What was run of a technique there, and on how many devices."""
        runs = [(recipe, number) for recipe, number in self.completed if name in recipe]
        if not runs:
            return "never run"
        numbers = " and ".join(str(number) for number in sorted({number for _, number in runs}))
        others = len({other for recipe, _ in runs for other in recipe} - {name})
        return f"run on {numbers}" + (f", beside {others} other{'s' if others > 1 else ''}" if others else "")


def read(folder: Path) -> list[Ran]:
    """Stored results of techniques below a folder: of tests on the CPU, and of `make gpu-check` for each GPU, whose
    measured matrix counts as well.

    Raises:
        StudyError: where a file can't be read.
    """
    found = []
    for path in [*sorted(folder.glob("techniques-*.json")), *sorted(folder.glob("gpu/*.json"))]:
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            runs = [*stored["technique_runs"], *stored.get("matrix", ())]
            completed = frozenset(
                (frozenset(one["techniques"]), int(one["num_gpus"])) for one in runs if one["ended"] == "completed"
            )
            found.append(Ran(stored["device"], path.relative_to(folder).as_posix(), completed))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError("Stored results can't be read", where=str(path), given=repr(error)) from None
    return found


def _by_device(ran: list[Ran]) -> list[Ran]:
    """All that was run on each device, whatever file says it."""
    merged: dict[str, Ran] = {}
    for one in ran:
        before = merged.get(one.device, Ran(one.device, "", frozenset()))
        merged[one.device] = Ran(one.device, "", before.completed | one.completed)
    return list(merged.values())


def why_not(name: str, hardware: Hardware) -> str | None:
    """What speaks against a technique at its defaults, whatever the precision beside it; None when nothing does."""
    technique = techniques.ALL[name]
    recipe: dict[str, dict[str, Any]] = {name: {}, **{other: {} for other in sorted(technique.needs)[-1:]}}
    precisions = ([], ["fp32"], ["fp16"], ["bf16"]) if technique.kind != "precision" else ([],)
    reasons = []
    for precision in precisions:
        completed = techniques.complete(recipe | {one: {} for one in precision}, hardware, 1)
        reasons.append(techniques.why_not(completed, hardware))
    return None if None in reasons else reasons[0]


def _exclusions() -> Iterator[tuple[str, str, str]]:
    """Pairs of different kinds that run nowhere together, with the reason."""
    for first, second in combinations(techniques.ALL, 2):
        one, other = techniques.ALL[first], techniques.ALL[second]
        if one.kind == other.kind:
            continue
        reason = one.excludes.get(second) or other.excludes.get(first)
        if reason:
            yield first, second, reason


def page(results: Path) -> str:
    """The page.

    Args:
        results: folder of stored results (benchmarks/results).
    """
    ran = read(results)
    on_gpus = any("/" in one.source for one in ran)
    devices = _by_device(ran)
    headings = [f"seen on {one.device}" for one in devices] + ([] if on_gpus else ["seen on a GPU"])
    lines = [
        "# Techniques",
        "",
        f"Generated by `{REPAIR}` from `src/finetune_study/techniques/` and what is stored in `benchmarks/results/`.",
        "Settings of each are in [config/README.md](../config/README.md).",
        "",
        "`yes` says that nothing known speaks against it, at its default settings, not that anybody tried. What was",
        "really run is in the columns on the right, on how many devices and beside how many other techniques, from",
        "stored results alone; everything else was never run.",
        "",
        "| technique | kind | " + " | ".join(PLACES) + " | " + " | ".join(headings) + " |",
        "|---" * (2 + len(PLACES) + len(headings)) + "|",
    ]
    notes: dict[str, int] = {}
    for name, technique in techniques.ALL.items():
        cells = [_can(why_not(name, hardware), notes) for hardware in PLACES.values()]
        seen = [one.cell(name) for one in devices] + ([] if on_gpus else ["never run"])
        lines.append(f"| `{name}` | {technique.kind} | {' | '.join(cells)} | {' | '.join(seen)} |")
    lines += ["", *(f"{number}. {_cell(reason)}" for reason, number in notes.items()), ""]
    lines += ["## Where this was run", ""]
    lines += [
        f"- {one.device}: [{one.source}](../benchmarks/results/{one.source}), {one.number_of_recipes} recipes"
        for one in ran
    ]
    if not on_gpus:
        lines += [
            "- GPUs: none yet; `make gpu-check` on a machine with one writes `benchmarks/results/gpu/<gpu>.json`."
        ]
    lines += [
        "",
        "## What excludes what",
        "",
        "Two of one kind are alternatives: a recipe holds one of them, but for "
        + ", ".join(f"`{name}`" for name, t in techniques.ALL.items() if t.beside)
        + ", which peft trains together. Some need another one:",
        "",
        *(
            f"- `{name}` needs one of {', '.join(f'`{other}`' for other in sorted(t.needs))}"
            for name, t in techniques.ALL.items()
            if t.needs
        ),
        "",
        "Across kinds these run nowhere together:",
        "",
        "| technique | and | why not |",
        "|---|---|---|",
        *(f"| `{first}` | `{second}` | {_cell(reason)} |" for first, second, reason in _exclusions()),
        "",
        "## What each is expected to do",
        "",
        "| technique | effect | source | needs the package |",
        "|---|---|---|---|",
        *(
            f"| `{name}` | {_cell(t.effect)} | {t.source} | {', '.join(t.packages)} |"
            for name, t in techniques.ALL.items()
        ),
        "",
        "## What is not offered",
        "",
        *(f"- {what}: {why}." for what, why in NOT_OFFERED.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _can(reason: str | None, notes: dict[str, int]) -> str:
    return "yes" if reason is None else f"no ({notes.setdefault(reason, len(notes) + 1)})"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def generate(path: Path, results: Path, *, check: bool) -> None:
    """Writes the page, or compares it.

    Args:
        path: docs/techniques.md.
        results: folder of stored results.
        check: change nothing.

    Raises:
        StudyError: with `check`, where the page is out of step; it names the command that repairs it.
    """
    generated.put(path, page(results), check=check, source="techniques and stored results", repair=REPAIR)
