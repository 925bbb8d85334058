"""docs/techniques.md: technique × hardware × exclusions × what was really run, from modules and stored results."""

import inspect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from finetune_study import generated, techniques
from finetune_study.config import Hardware
from finetune_study.errors import ConfigError, StudyError
from finetune_study.techniques.base import WHY_ONE, Technique

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


Recipe = frozenset[tuple[str, str]]
"""Techniques, each with the settings it had where these were not the defaults, as the page shows them."""


@dataclass(frozen=True)
class Ran:
    """What one stored file says was run on one device."""

    device: str
    source: str
    completed: frozenset[tuple[Recipe, int]]
    """What completed, and on how many devices."""
    has_settings: bool = False
    """Whether it says with which settings."""
    commit: str = ""
    """Of this project, as it was run."""

    @property
    def number_of_recipes(self) -> int:
        return len({frozenset(name for name, _ in recipe) for recipe, _ in self.completed})

    def cell(self, name: str) -> str:
        """What was run of a technique there, on how many devices, and with what where never at the defaults."""
        runs = [(dict(recipe), number) for recipe, number in self.completed if name in dict(recipe)]
        if not runs:
            return "never run"
        others = sorted({recipe[name] for recipe, _ in runs} - {""})
        at_defaults = [(recipe, number) for recipe, number in runs if not recipe[name]]
        otherwise = [(recipe, number) for recipe, number in runs if recipe[name]]
        if not others:
            return f"run {_beside(name, runs)}"
        settings = f"with {' or '.join(others)}"
        if not at_defaults:
            return f"run {_beside(name, runs)}, never but {settings}"
        return f"run {_beside(name, at_defaults)}; {settings}, too, {_beside(name, otherwise)}"

    @property
    def settings(self) -> list[str]:
        """Techniques with the settings they had, where these were not the defaults."""
        return sorted({f"`{name}` with {text}" for recipe, _ in self.completed for name, text in recipe if text})


def _beside(name: str, runs: list[tuple[dict[str, str], int]]) -> str:
    """On how many devices a technique was run, and beside how many others."""
    numbers = " and ".join(str(number) for number in sorted({number for _, number in runs}))
    others = len({other for recipe, _ in runs for other in recipe} - {name})
    return f"on {numbers}" + (f", beside {others} other{'s' if others > 1 else ''}" if others else "")


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
            completed = [one for one in runs if one["ended"] == "completed" and _is_still_run(one, stored["device"])]
            found.append(
                Ran(
                    stored["device"],
                    path.relative_to(folder).as_posix(),
                    frozenset((_recipe(one), int(one["num_gpus"])) for one in completed),
                    all("settings" in one for one in completed),
                    str(stored.get("commit") or "")[:8],
                )
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StudyError("Stored results can't be read", where=str(path), given=repr(error)) from None
    return found


def _is_still_run(run: dict[str, Any], device: str) -> bool:
    """Whether nothing has been found since that speaks against a recipe; what was run of it shows nothing then."""
    if device not in PLACES:
        return True
    try:
        recipe = techniques.parse({name: run.get("settings", {}).get(name, {}) for name in run["techniques"]})
    except ConfigError:
        return False
    return techniques.why_not(recipe, PLACES[device]) is None


def _recipe(run: dict[str, Any]) -> Recipe:
    chosen = run.get("settings", {})
    return frozenset((name, _in_words(chosen.get(name, {}))) for name in run["techniques"])


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(f"`{setting}: {json.dumps(value)}`" for setting, value in settings.items())


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


def _exclusions() -> Iterator[tuple[str, str, str, str]]:
    """Pairs of different kinds that do not run together, at their default settings: where, and why."""
    for first, second in combinations(techniques.ALL, 2):
        reasons = {place: _why_not_together(first, second, hardware) for place, hardware in PLACES.items()}
        for reason in dict.fromkeys(reason for reason in reasons.values() if reason):
            refused = [place for place, found in reasons.items() if found == reason]
            runs = any(found is None and _can_both(first, second, place) for place, found in reasons.items())
            on_all_gpus = set(refused) == PLACES.keys() - {"CPU"}
            yield first, second, ("GPUs" if on_all_gpus else ", ".join(refused)) if runs else "everywhere", reason


def _can_both(first: str, second: str, place: str) -> bool:
    return not any(why_not(name, PLACES[place]) for name in (first, second))


def _why_not_together(first: str, second: str, hardware: Hardware) -> str | None:
    """What speaks against two techniques that speaks against neither of them without the other."""
    names = {first, second}
    if any(names & techniques.ALL[name].needs for name in names):  # what speaks against it speaks against it alone
        return None
    for name in (first, second):
        needs = techniques.ALL[name].needs
        names |= set() if needs & names else set(sorted(needs)[-1:])
    together, *apart = (_reasons(names - without, hardware) for without in (set(), {first}, {second}))
    return next((reason for reason in together if not any(reason in one for one in apart)), None)


def _reasons(names: set[str], hardware: Hardware) -> list[str]:
    """All that speaks against a recipe; nothing where it is none: of two of one kind, or without what one needs."""
    try:
        return list(techniques.reasons(techniques.parse({name: {} for name in names}), hardware))
    except ConfigError:
        return []


def _what(technique: type[Technique]) -> str:
    """The first paragraph of its docstring."""
    return _cell(inspect.cleandoc(technique.__doc__ or "").split("\n\n")[0])


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
        "stored results alone; everything else was never run. On the CPU torchao's optimizers ran uncompiled, and what",
        "is offloaded there moved nowhere: device and host are one memory.",
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
    lines += ["What was found since to do nothing, or to fail, is left out of the cells, whatever a file says.", ""]
    lines += [
        f"- {one.device}: [{one.source}](../benchmarks/results/{one.source})"
        + (f" at commit {one.commit}" if one.commit else "")
        + f", {one.number_of_recipes} recipes, {_with_what(one)}"
        for one in ran
    ]
    if not on_gpus:
        lines += ["- GPUs: none yet; `make gpu-check` where there is one writes `benchmarks/results/gpu/<gpu>.json`."]
    lines += [
        "",
        "## What excludes what",
        "",
        "Two of one kind are alternatives: a recipe holds one of them, but for "
        + ", ".join(f"`{name}`" for name, t in techniques.ALL.items() if t.beside)
        + ", which peft trains together:",
        "",
        *(f"- {kind}: {why}" for kind, why in WHY_ONE.items()),
        "",
        "Some need another one:",
        "",
        *(
            f"- `{name}` needs one of {', '.join(f'`{other}`' for other in sorted(t.needs))}"
            for name, t in techniques.ALL.items()
            if t.needs
        ),
        "",
        "Across kinds these do not run together, at their default settings; what depends on a setting is said",
        "beside it in [config/README.md](../config/README.md):",
        "",
        "| technique | and | where | why not |",
        "|---|---|---|---|",
        *(f"| `{first}` | `{second}` | {where} | {_cell(why)} |" for first, second, where, why in _exclusions()),
        "",
        "## What each changes, and what it is expected to do",
        "",
        "They are applied in the order of their kinds, which is that of the table above.",
        "",
        "| technique | what it changes | effect | source | needs the package |",
        "|---|---|---|---|---|",
        *(
            f"| `{name}` | {_what(t)} | {_cell(t.effect)} | {t.source} | {', '.join(t.packages)} |"
            for name, t in techniques.ALL.items()
        ),
        "",
        "## What is not offered",
        "",
        *(f"- {what}: {why}." for what, why in NOT_OFFERED.items()),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _with_what(ran: Ran) -> str:
    if not ran.has_settings:
        return "whose settings were not stored"
    return f"at default settings, but for {'; '.join(ran.settings)}" if ran.settings else "all at default settings"


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
