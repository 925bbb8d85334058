"""Run: everything that defines one job, its identity, and its run.yaml."""

import hashlib
import json
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, PositiveInt, ValidationError

from finetune_study.config import Data, Hardware, Model, Training
from finetune_study.errors import ConfigError, RecordError
from finetune_study.section import LATER, Section
from finetune_study.techniques import Techniques, parse

LONGEST_ID = 255
"""Bytes of a folder's name on Linux (NAME_MAX of linux/limits.h)."""
IDENTITY_VERSION = 1
"""Raise it only when old runs must not be taken for new ones of the same settings: every run is measured again then."""

_canonical = json.JSONEncoder(sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode


def digest(value: object, length: int = 6) -> str:
    """Hexadecimal digest of a JSON value, the same everywhere and always."""
    return _digest(_canonical(value), length)


_of_scalar = lru_cache(maxsize=None, typed=True)(_canonical)  # True is no 1.0
"""Of names and numbers, few of which occur in a study, and each in thousands of runs."""


def _digest(canonical: str, length: int) -> str:
    return hashlib.sha256(canonical.encode()).hexdigest()[:length]


class Parts:
    """JSON of what many runs have in common, each written once: it is most of a run, and a study may have 100,000."""

    def __init__(self) -> None:
        self._texts: dict[int, tuple[object, str]] = {}

    def text(self, part: Section | dict[str, Any]) -> str:
        """Canonical JSON of an object that nobody changes."""
        if id(part) not in self._texts:
            value = part.model_dump(mode="json") if isinstance(part, Section) else part
            self._texts[id(part)] = part, _canonical(value)  # kept, so that no other object gets its id
        return self._texts[id(part)][1]


class RunHardware(Section):
    """The part of a hardware entry that changes a measurement; prices and paths of software do not."""

    name: str
    device: str
    gpu: str | None
    memory_budget_gib: float | None
    """What the operating system enforces on each rank of a CPU study; a GPU's memory is what it is."""
    threads_per_gpu: int | None
    environment: dict[str, str]

    @classmethod
    def of(cls, name: str, hardware: Hardware) -> Self:
        return cls(
            name=name,
            device=hardware.device,
            gpu=hardware.gpu,
            memory_budget_gib=hardware.memory_gib if hardware.device == "cpu" else None,
            threads_per_gpu=hardware.threads_per_gpu,
            environment=hardware.environment,
        )


class RunProtocol(Section):
    """The part of the protocol that changes a measurement."""

    num_untimed_steps: int
    num_timed_steps: int
    evaluates: bool = Field(default=True, json_schema_extra=LATER)
    """False only in the short runs that look for the largest micro-batch."""
    rouge_samples: int = Field(default=0, json_schema_extra=LATER)


class Run(Section):
    """One job: a target on some hardware with a recipe at one context length, micro-batch and repeat."""

    run_id: str
    """Readable head and digest of everything below; people read it, code never parses it."""
    target: str
    recipe: str
    repeat: PositiveInt
    model: Model
    tokenizer: Model
    """The model whose tokenizer prepares the data."""
    hardware: RunHardware
    num_gpus: PositiveInt
    """Over all nodes."""
    nodes: PositiveInt = Field(default=1, json_schema_extra=LATER)
    sequence_length: PositiveInt
    per_device_train_batch_size: PositiveInt | Literal["max"]
    """`max` is part of the run's identity; which size that was is part of its record (finetune_study.micro_batch)."""
    gradient_accumulation_steps: PositiveInt | None
    """Follows from the effective batch; null as long as the micro-batch is `max`."""
    techniques: dict[str, dict[str, Any]]
    """Complete: what the recipe leaves open is filled in; settings include their defaults."""
    data: Data
    training: Training
    protocol: RunProtocol

    @cached_property
    def parsed_techniques(self) -> Techniques:
        """The techniques in their order of application."""
        return parse(self.techniques)

    @property
    def seed(self) -> int:
        """Seed of the random number generators: the study's, moved on by each repeat."""
        return self.training.seed + self.repeat - 1

    @property
    def micro_batch(self) -> int:
        """Sequences per device and forward pass; of a run of `max` it has to be asked `at` a size."""
        assert isinstance(self.per_device_train_batch_size, int)
        return self.per_device_train_batch_size

    @property
    def gpus_per_node(self) -> int:
        """Devices that the run takes of each node; ranks there, too."""
        return self.num_gpus // self.nodes

    @property
    def num_steps(self) -> int:
        """Optimizer steps, skipped ones apart."""
        return self.protocol.num_untimed_steps + self.protocol.num_timed_steps

    @property
    def num_train_samples(self) -> int:
        """Sequences needed so that no sample is seen twice, with room for skipped steps."""
        return (self.num_steps + self.max_skipped_steps) * self.training.effective_batch_size

    @property
    def max_skipped_steps(self) -> int:
        """Steps that fp16 may lose while its loss scale settles (from 2^16, halved each time: 16 to reach 1)."""
        return 16 if "fp16" in self.techniques else 0

    @property
    def model_key(self) -> str:
        """Folder of the prepared model."""
        return digest(self.model.model_dump(mode="json"), 12)

    @property
    def tokenizer_key(self) -> str:
        """Folder of the prepared model whose tokenizer is used."""
        return digest(self.tokenizer.model_dump(mode="json"), 12)

    @property
    def data_key(self) -> str:
        """Folder of the prepared data: it depends on tokenizer and context, not on what is trained."""
        return digest(self._data_identity, 12)

    @property
    def _data_identity(self) -> dict[str, Any]:
        return {
            "tokenizer": self.tokenizer.model_dump(mode="json"),
            "sequence_length": self.sequence_length,
            "packing": "packing" in self.techniques,
            "data": self.data.model_dump(mode="json"),
        }


_SHARED = ("model", "tokenizer", "hardware", "techniques", "data", "training", "protocol")
"""Fields that many runs have in common; the others are names and numbers."""


def make(parts: Parts | None = None, **settings: Any) -> Run:
    """A run from all its fields but the run_id, which follows from them.

    Args:
        parts: shared by all calls whose runs have sections in common.
        settings: the fields.

    Raises:
        ConfigError: when the run_id is too long for a folder's name.
    """
    run = Run(run_id="", **settings)
    identity = _identity(run, settings, parts or Parts())
    nodes = f"n{run.nodes}" if run.nodes > 1 else ""
    head = (
        f"{run.target}_{run.hardware.name}x{run.num_gpus}{nodes}_s{run.sequence_length}"
        f"_b{run.per_device_train_batch_size}_{run.recipe}_r{run.repeat}"
    )
    run_id = f"{head}-{_digest(identity, 6)}"
    if len(run_id.encode()) > LONGEST_ID:
        raise ConfigError(
            "The names of model, hardware and recipe are together too long for a folder's name",
            given=f"{run_id}: {len(run_id.encode())} bytes",
            allowed=f"at most {LONGEST_ID} bytes; a letter takes one in ASCII, up to four in other scripts",
            do="shorten the names",
        )
    return run.model_copy(update={"run_id": run_id})


def _identity(run: Run, settings: dict[str, Any], parts: Parts) -> str:
    """Canonical JSON of all fields but the run_id, put together from that of each."""
    texts = {name: parts.text(settings[name]) for name in _SHARED}
    others = run.model_dump(mode="json", exclude={"run_id", *texts}) | {"version": IDENTITY_VERSION}
    texts |= {name: _of_scalar(value) for name, value in others.items()}
    return "{" + ",".join(f'"{name}":{texts[name]}' for name in sorted(texts)) + "}"


def dump(run: Run) -> str:
    """The bytes of run.yaml: a function of the run alone."""
    return yaml.safe_dump(run.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def load(path: Path) -> Run:
    """The run of a run.yaml.

    Raises:
        RecordError: when the file is missing or does not hold a run.
    """
    try:
        run = Run.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RecordError("The run can't be read", where=str(path), given=error.strerror) from None
    except (yaml.YAMLError, ValidationError) as error:
        raise RecordError(
            "The file does not hold a run", where=str(path), given=error, do="delete it: the plan writes it anew"
        ) from None
    expected = make(**{name: getattr(run, name) for name in Run.model_fields if name != "run_id"}).run_id
    if expected != run.run_id:
        raise RecordError(
            "The settings of this run are not those of its run_id",
            where=str(path),
            given=f"settings of {expected} under the name {run.run_id}",
            do="delete this file, the plan writes it anew; other settings in the config make another run",
        )
    return run
