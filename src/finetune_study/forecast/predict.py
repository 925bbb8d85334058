"""Rows in, rows out: what `finetune-study predict` answers to a line."""

import contextlib
import dataclasses
import difflib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from finetune_study.errors import ConfigError, ModelError, StudyError
from finetune_study.forecast import hardware as hardware_module
from finetune_study.forecast import memory, recipe
from finetune_study.forecast import time as time_module
from finetune_study.forecast.layout import CODE, Layout
from finetune_study.forecast.profile import Profile
from finetune_study.forecast.quiet import quiet
from finetune_study.techniques.optimizer_in_backward import OptimizerInBackward, why_not_accumulate

INPUT = (
    "model_config",
    "model",
    "hardware",
    "num_gpus",
    "sequence_length",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "techniques",
    "lengths_vary",
)
"""Keys of a row; any other key that begins with `x_`, and `id`, is passed through."""

MOST = {
    "num_gpus": 65_536,
    "sequence_length": 16_777_216,
    "per_device_train_batch_size": 1_048_576,
    "gradient_accumulation_steps": 1_048_576,
}
"""What is still believed; more is a slip of the pen."""


def default_cache() -> Path:
    """Folder of the traces: $XDG_CACHE_HOME/finetune-study/traces."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finetune-study" / "traces"


@cache
def architectures() -> Mapping[str, dict[str, Any]]:
    """Shapes of published models by hub id."""
    text = resources.files("finetune_study.forecast").joinpath("architectures.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


class Traces:
    """Profiles of layouts: in memory, on disk, or traced now."""

    def __init__(self, folder: Path | None = None) -> None:
        """
        Args:
            folder: where traces are kept; None: in memory alone.
        """
        self.folder = folder
        self._known: dict[Layout, Profile | StudyError] = {}

    def get(self, layout: Layout) -> Profile:
        """The profile of a layout.

        Raises:
            ModelError: where it can't be traced; asked again, it is not tried again.
        """
        found = self._known.get(layout)
        if found is None:
            try:
                found = self._read(layout) or self._trace(layout)
            except StudyError as error:
                found = error
            self._known[layout] = found
        if isinstance(found, StudyError):
            raise found
        return found

    def of(self, question: "Question") -> Profile:
        """The profile of what is asked.

        A window may stand in a part of the configuration, or be transformers' default: then the trace says so first.

        Raises:
            ModelError: where it can't be traced.
        """
        return self.get(self._windowed(question))

    def _windowed(self, question: "Question") -> Layout:
        """What is to be traced, after the trace that tells of a window."""
        layout = question.recipe.layout(question.config, question.context)
        window = self.get(layout).window if layout.masks else None
        is_windowed = window is not None and question.context > window
        return dataclasses.replace(layout, windowed=True) if is_windowed else layout

    def prepare(self, questions: Iterable["Question"]) -> None:
        """Traces what is not there yet, on all cores where that is worth their start."""
        asked = [*questions]
        self._prepare({one.recipe.layout(one.config, one.context) for one in asked})
        with_windows = set()
        for one in asked:
            with contextlib.suppress(StudyError):  # `of` raises it
                with_windows.add(self._windowed(one))
        self._prepare(with_windows)

    def _prepare(self, layouts: Iterable[Layout]) -> None:
        missing = [one for one in layouts if one not in self._known and not self._is_kept(one)]
        workers = min(len(os.sched_getaffinity(0)), len(missing) // TRACES_WORTH_A_PROCESS, _processes_in_memory())
        if self.folder is None or workers < 2:
            return
        _trace_apart(missing, self.folder, workers)

    def _is_kept(self, layout: Layout) -> bool:
        path = self._path(layout)
        return path is not None and path.exists()

    def _path(self, layout: Layout) -> Path | None:
        return self.folder / f"{layout.key}.json" if self.folder else None

    def _read(self, layout: Layout) -> Profile | None:
        path = self._path(layout)
        try:
            return Profile.load(path) if path and path.exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None  # cut off, or of another version: it is traced anew

    def _trace(self, layout: Layout) -> Profile:
        with quiet():
            from finetune_study.forecast import trace

            profile = trace.trace(layout)
        path = self._path(layout)
        if path:
            try:
                profile.save(path)
            except OSError:
                self.folder = None  # a cache that can't be written is none
        return profile


TRACES_WORTH_A_PROCESS = 8
"""Half a second each; a process imports torch for four."""
BYTES_OF_A_PROCESS = 2**30
"""A tracing process holds 0.8 GB."""


def _processes_in_memory() -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024 // BYTES_OF_A_PROCESS
    return 1


def _trace_apart(layouts: list[Layout], folder: Path, workers: int) -> None:
    """Traces layouts in processes of their own; what can't be traced is told when it is asked for.

    They are commands, since multiprocessing would run the caller's main script again, Snakemake's for example.
    """
    command = [sys.executable, "-m", "finetune_study.forecast.worker", str(folder)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, text=True) for _ in range(workers)]
    for number, process in enumerate(processes):
        assert process.stdin is not None
        for layout in layouts[number::workers]:
            process.stdin.write(json.dumps(dataclasses.asdict(layout)) + "\n")
        process.stdin.close()
    for process in processes:
        process.wait()


@dataclass(frozen=True)
class Question:
    """A row, checked."""

    config: dict[str, Any]
    device: hardware_module.Device
    num_gpus: int
    context: int
    batch: int
    accumulation: int
    recipe: recipe.Recipe
    lengths_vary: bool = False
    warnings: list[str] = field(default_factory=list)


def read_question(row: Mapping[str, Any], own_code: Container[str] = ()) -> Question:
    """Checks a row.

    Args:
        row: keys and values as they were given.
        own_code: models, named as in the row, whose own code may be run.

    Raises:
        StudyError: for what is missing, unknown or impossible.
    """
    unknown = [key for key in row if key not in INPUT and key != "id" and not str(key).startswith("x_")]
    if unknown:
        close = difflib.get_close_matches(str(unknown[0]), INPUT, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise ConfigError(
            "The key is not known", where=str(unknown[0]), allowed=hint + ", ".join(INPUT) + ", id, x_..."
        )
    for key in ("hardware", "sequence_length"):
        if row.get(key) is None:
            raise ConfigError(
                "A key is missing", where=key, allowed="every row needs hardware, sequence_length and a model"
            )
    numbers = {key: _whole(row, key) for key in MOST}
    device = hardware_module.find(row["hardware"])
    resolved = recipe.resolve(
        row.get("techniques"), num_gpus=numbers["num_gpus"], device=device.device, has_bf16=device.has_bf16
    )
    varying = row.get("lengths_vary", False)
    if not isinstance(varying, bool):
        raise ConfigError("This is not understood", where="lengths_vary", given=repr(varying), allowed="true or false")
    config = model_config(row, own_code)
    warnings = taken_as(str(row["model"])) if row.get("model") is not None else []
    if method := quantized_as(config):
        warnings.append(f"the model's own quantization_config ({method}) is left out: as if its weights were not")
    return Question(
        config, device, numbers["num_gpus"], numbers["sequence_length"], numbers["per_device_train_batch_size"],
        numbers["gradient_accumulation_steps"], resolved, varying, warnings,
    )  # fmt: skip


def quantized_as(config: Mapping[str, Any]) -> str | None:
    """How a model's file says that its weights are quantised, if they are."""
    given = config.get("quantization_config")
    if not given:
        return None
    return str(given.get("quant_method", "of a kind not named")) if isinstance(given, Mapping) else "not understood"


JSON_KINDS = {
    str: "text", float: "a fraction", bool: "true or false", list: "an array", dict: "an object", type(None): "null"
}  # fmt: skip
"""Values of JSON, in words."""


def _kind(value: object) -> str:
    return JSON_KINDS.get(type(value), "a number")


def _whole(row: Mapping[str, Any], key: str) -> int:
    value = row.get(key, 1)
    allowed = f"a whole number from 1 to {MOST[key]}"
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        what = f"This must be a whole number, not {_kind(value)}"
        raise ConfigError(what, where=key, given=repr(value), allowed=allowed)
    if not 1 <= value <= MOST[key]:
        raise ConfigError("A number is out of range", where=key, given=value, allowed=allowed)
    return value


def model_config(row: Mapping[str, Any], own_code: Container[str] = ()) -> dict[str, Any]:
    """The model's configuration, from the row itself, a folder, or the known shapes.

    Raises:
        StudyError: where there is none, or it needs code of its own.
    """
    given, model = row.get("model_config"), row.get("model")
    if (given is None) == (model is None):
        raise ConfigError(
            "Give either model_config or model", where="model_config, model", given="both" if model else "neither"
        )
    if given is None:
        return _config_of(str(model), str(model) in own_code)
    if not isinstance(given, Mapping):
        raise ConfigError("The model's configuration is not an object", where="model_config", given=_kind(given))
    return _check_code(dict(given), "model_config")


@lru_cache(maxsize=256)
def _config_of(model: str, own_code: bool) -> dict[str, Any]:
    file = _config_file(model)
    if file:
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError("The model's configuration can't be read", where=str(file), given=error) from None
        if not isinstance(found, dict):
            raise ModelError("The model's configuration is not an object", where=str(file), given=type(found).__name__)
        if own_code and found.get("auto_map"):
            return found | {CODE: [str(file.parent.absolute()), _digest(file.parent)]}
        return _check_code(found, str(file))
    known = architectures()
    name = known_name(model)
    if name is None:
        close = difflib.get_close_matches(model.rsplit("/", 1)[-1].lower(), by_tail := _by_tail(), 3)
        hint = f"did you mean {', '.join(by_tail[c] for c in close)}? " if close else ""
        raise ModelError(
            "The model is not known",
            where="model",
            given=model,
            allowed=f"{hint}a folder with config.json that is there; a target: {', '.join(TARGETS)}; or a hub id of "
            f"these shapes: {', '.join(known)}",
            do="give model_config: the contents of its config.json",
        )
    return dict(known[name])


TARGETS = {
    "smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "llama2-7b": "meta-llama/Llama-2-7b-hf",
    "llama2-13b": "meta-llama/Llama-2-13b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "falcon-180b": "tiiuae/falcon-180B",
}
"""Targets of the configurations that come with the study, by the shape that they have there."""

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
"""What the hub takes for the name of a model: an owner and a name. An absolute or a deeper path is none."""


def _by_tail() -> dict[str, str]:
    return {name.rsplit("/", 1)[-1].lower(): name for name in architectures()}


def known_name(model: str) -> str | None:
    """The hub id of the known shape that a name stands for: its own, a target's, or that of another owner's copy."""
    if model in architectures() or model in TARGETS:
        return TARGETS.get(model, model)
    return _by_tail().get(model.rsplit("/", 1)[-1].lower()) if HUB_ID.fullmatch(model) else None


def taken_as(model: str) -> list[str]:
    """The warning where a name that is no file here is taken for another one's shape; else none."""
    name = known_name(model)
    if name in (None, model) or model in TARGETS or _config_file(model):
        return []
    return [f"{model} is not here, and is taken to have the shape of {name}"]


def _config_file(model: str) -> Path | None:
    """The config.json that a model's name points at; None where it is no path of one."""
    try:
        path = Path(model).expanduser()
        file = path / "config.json" if path.is_dir() else path
        return file if file.is_file() and file.suffix == ".json" else None
    except (OSError, ValueError, RuntimeError):  # too long, with a zero byte, of a user that is not there
        return None


def _check_code(config: dict[str, Any], where: str) -> dict[str, Any]:
    if config.get("auto_map") or CODE in config:
        raise ModelError(
            "The model brings code of its own, which is not run unasked", where=where, given="auto_map",
            allowed="an architecture of transformers, or a folder that is allowed by name",
            do="leave out auto_map if transformers knows its model_type; or, if you trust the code, give the folder as "
            "`model` and allow it: finetune-study predict --allow-code <folder>",
        )  # fmt: skip
    return config


def _digest(folder: Path) -> str:
    """Of a model's code: a trace of other code is another trace."""
    texts = [path.name.encode() + path.read_bytes() for path in sorted(folder.glob("*.py"))]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def answer(row: Mapping[str, Any], traces: Traces, own_code: Container[str] = ()) -> dict[str, Any]:
    """The row with its predictions.

    Args:
        row: keys and values as they were given.
        traces: where traces are kept.
        own_code: models, named as in the row, whose own code may be run.

    Raises:
        StudyError: for a row that can't be answered.
    """
    question = read_question(row, own_code)
    profile = traces.of(question)
    return dict(row) | outputs(question, profile)


def outputs(question: Question, profile: Profile, calibration: Mapping[str, float] | None = None) -> dict[str, Any]:
    """What is predicted.

    Args:
        question: a row, checked.
        profile: the trace of its layout.
        calibration: rates that were measured, instead of the data sheet's.
    """
    device, resolved, at = question.device, question.recipe, _situation(question)
    found = memory.predict(profile, resolved, at)
    took = time_module.predict(profile, resolved, at, time_module.rates_of(device, question.num_gpus, calibration))
    warnings = [
        *question.warnings,
        *profile.warnings,
        *resolved.why_not(device),
        *resolved.why_not_model(question.config.get("model_type")),
        *resolved.not_modelled,
        *_can_not_accumulate(question),
        *_may_run_as_math(question),
        *took.warnings,
    ]
    if profile.positions is not None and question.context > profile.positions:
        warnings.append(
            f"sequence_length is above the model's {profile.positions} positions: where they are learned, it fails"
        )
    if resolved.rank > profile.hidden_size:
        warnings.append(f"rank {resolved.rank} is above the model's width of {profile.hidden_size}: nothing is saved")
    side = _narrowest(profile, resolved)
    if side is not None and resolved.projection_rank >= side:
        warnings.append(
            f"rank {resolved.projection_rank} of {resolved.optimizer} is not below the shorter side of matrices that "
            f"it projects, about {side:.0f}: it saves nothing of their states"
        )
    if found.paged:
        warnings.append(
            f"{found.paged / memory.GIB:.2f} GiB of paged optimizer states move to the host when memory is short"
        )
    # On a CPU what is measured and limited is the process, with all that it holds.
    outside = found.context if device.device == "cpu" else 0.0
    margin = None if device.memory_gib is None else device.memory_gib - found.needed / memory.GIB
    if margin is None:
        warnings.append("the hardware's memory is not known: whether it fits is not, either")
    positions = question.batch * question.context * question.accumulation * question.num_gpus
    return {
        "predicted_peak_memory_allocated_gib": (found.allocated + outside) / memory.GIB,
        "predicted_peak_memory_reserved_gib": (found.reserved + outside) / memory.GIB,
        "predicted_memory_gib": {
            "by_category": memory.as_gib(found.categories),
            "by_phase": memory.as_gib(found.phases),
        },
        "fits": None if margin is None else margin >= 0,
        "fits_word": _word(found, device.memory_gib),
        "margin_gib": margin,
        "predicted_step_time_seconds": took.seconds,
        "predicted_tokens_per_second": None if not took.seconds else positions / took.seconds,
        "bottleneck": took.bottleneck,
        "warnings": warnings,
    }


def _can_not_accumulate(question: Question) -> list[str]:
    if not question.recipe.has(OptimizerInBackward.name):
        return []
    why_not = why_not_accumulate(question.accumulation)
    return [why_not] if why_not else []


def _narrowest(profile: Profile, resolved: recipe.Recipe) -> float | None:
    """Shorter side of the narrowest sort of the layers' trained matrices."""
    sorts = [part for part in profile.parameters if part.trained and part.matrix]
    return min((part.narrow(resolved.rank, profile.hidden_size) for part in sorts), default=None)


def _may_run_as_math(question: Question) -> list[str]:
    """Where no fused kernel of SDPA is left: of torch's, those for grouped heads are FlashAttention's alone ("Grouped
    Query Attention", torch.nn.functional.scaled_dot_product_attention), and transformers leaves the heads grouped where
    there is no mask (sdpa_attention.py, use_gqa_in_sdpa)."""
    device, resolved = question.device, question.recipe
    is_fused = resolved.attention == "sdpa" and resolved.techniques.get("sdpa", {}).get("kernel") != "math"
    if not is_fused or device.device == "cpu":
        return []
    capability, in_fp32 = device.compute_capability, resolved.compute == "float32"
    config = question.config.get("text_config") or question.config
    heads, shared = (config.get(key) for key in ("num_attention_heads", "num_key_value_heads"))
    is_old = capability is not None and capability < 8
    if not (isinstance(heads, int) and isinstance(shared, int) and shared < heads and (in_fp32 or is_old)):
        return []
    where = "in fp32" if in_fp32 else f"on compute capability {capability}"
    return [
        f"no fused kernel may take {heads} heads that share {shared} {where}: SDPA may then run as `math`, whose "
        "scores are tensors; ask with sdpa: {kernel: math} what that takes"
    ]


def _situation(question: Question) -> memory.Situation:
    device = question.device
    return memory.Situation(
        batch=question.batch,
        context=question.context,
        num_gpus=question.num_gpus,
        gradient_accumulation_steps=question.accumulation,
        device=device.device,
        lengths_vary=question.lengths_vary,
        maps_tensors=device.maps_tensors,
        hopper=(device.compute_capability or 0) >= 9,
    )


def word(question: Question, profile: Profile) -> str | None:
    """`fits_word` of `outputs`, and nothing else of it."""
    found = memory.predict(profile, question.recipe, _situation(question))
    return _word(found, question.device.memory_gib)


DOES_NOT_FIT = "does not fit"


def _word(found: memory.Memory, available: float | None) -> str | None:
    """`fits` with all that the allocator may hold, `tight` where it must give something back, else `does not fit`."""
    if available is None:
        return None
    if (found.reserved + found.context) / memory.GIB <= available:
        return "fits"
    return "tight" if found.needed / memory.GIB <= available else DOES_NOT_FIT


BYTE_ORDER_MARK = "\ufeff"
"""What some editors begin a file with."""


def _parsed(line: str | bytes) -> Any:
    """The value of a line of JSON.

    Raises:
        ConfigError: where it is not UTF-8, or not JSON, which knows no NaN and no infinity.
    """
    try:
        line = line.decode("utf-8") if isinstance(line, bytes) else line
    except UnicodeDecodeError as error:
        raise ConfigError(f"The line is not UTF-8: {error.reason} at byte {error.start + 1}") from None
    try:
        return json.loads(line.removeprefix(BYTE_ORDER_MARK), parse_constant=_finite, parse_float=_finite)
    except ValueError as error:
        raise ConfigError(f"The line is not JSON: {error}") from None


def _finite(number: str) -> float:
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no number that it has")
    return float(number)


def answer_lines(lines: Iterable[str | bytes], traces: Traces, own_code: Container[str] = ()) -> Iterator[str]:
    """JSON lines to JSON lines; a line that can't be answered comes back with `error`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row: Any = None
        try:
            row = _parsed(line)
            if not isinstance(row, dict):
                raise ConfigError("The line is not a JSON object", where=f"line {number}", given=_kind(row))
            result = answer(row, traces, own_code)
        except RecursionError:
            result = {"line": number, "error": "The line's objects and arrays are nested too deeply"}
        except StudyError as error:
            result = (row if isinstance(row, dict) else {"line": number}) | {"error": str(error)}
        except Exception as error:  # ours, then: the other lines are still answered
            result = (
                {"line": number} | (row or {}) | {"error": f"A bug of the predictor: {type(error).__name__}: {error}"}
            )
        yield json.dumps(result)
