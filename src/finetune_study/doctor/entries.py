"""Hardware entries as the doctor sees them: what the study asks of each, and a pretended run on it."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from finetune_study import places, slurm
from finetune_study import plan as plan_module
from finetune_study.config import Config, GridBlock, Hardware, Model, Places, Protocol
from finetune_study.run import Run

PROBE_MINUTES = 5.0
"""What a pretended run may take: its parts give up by themselves before that."""

MAX_RANKS = 2
"""GPUs of a probe: enough for ranks to talk to each other, and few enough for a short wait."""

ARCHITECTURE = {"model_type": "llama"}


@dataclass(frozen=True)
class Entry:
    """A hardware entry, and what the study wants to do there."""

    name: str
    hardware: Hardware
    runs: tuple[Run, ...] = ()
    """Of the study, as far as they can run there."""
    protocol: Protocol = field(default_factory=Protocol)
    is_used: bool = True
    """Whether the grid names it."""
    places: Places = field(default_factory=Places)
    """Its folders of caches and temporary files."""
    is_draft: bool = False
    """Made of SLURM's word alone, for GPUs that no entry of the config describes: only its GPU is looked at."""

    @property
    def largest(self) -> Run:
        """The run that asks SLURM for most; where the study has none, one on a single device."""
        return max(self.runs, key=lambda run: run.num_gpus) if self.runs else pretended(self, 1)

    @property
    def resources(self) -> dict[str, str | int | None]:
        """What the largest run asks of SLURM."""
        return slurm.resources(self.largest, self.hardware, self.protocol, self.kind)

    @property
    def kind(self) -> str:
        """As runs say it to the executor."""
        return slurm.submit_kind(self.name, self.hardware)

    @property
    def asks_for_gpus(self) -> bool:
        return self.resources["gres"] is not None

    @property
    def uses_offload(self) -> bool:
        """Whether a run of the study needs DeepSpeed's compiled optimizer."""
        return self.hardware.device == "cuda" and any("offload_optimizer" in run.techniques for run in self.runs)

    @property
    def packages_needed(self) -> dict[str, str]:
        """What the study's techniques import there beside what all training uses, and one that does."""
        techniques = {name: each for run in self.runs for name, each in run.parsed_techniques.items()}
        return {package: name for name, each in techniques.items() for package in each.packages_needed()}


def pretended(entry: Entry, num_gpus: int) -> Run:
    """A run on a hardware entry that is no part of any study."""
    config = Config(
        models={"doctor": Model(weights="random", architecture=ARCHITECTURE)},
        hardware={entry.name: entry.hardware},
        recipes={"full": {}},
        grid=[
            GridBlock(
                targets=["doctor"],
                hardware=[entry.name],
                recipes=["full"],
                num_gpus=[num_gpus],
                sequence_length=[128],
            )
        ],
    )
    return plan_module.plan(config)[0].run


def probe_resources(entry: Entry, run: Run, longest_minutes: float) -> dict[str, str | int | None]:
    """What the entry's probe asks of SLURM: what a run would, but for minutes.

    Args:
        entry: of the config.
        run: the pretended one.
        longest_minutes: that the partition allows; that a real run needs more is found by another check.
    """
    asked = slurm.resources(run, entry.hardware, Protocol(time_limit_minutes=PROBE_MINUTES), entry.kind)
    runtime = int(min(float(asked["runtime"] or PROBE_MINUTES), max(1.0, longest_minutes)))
    return {**asked, "job_name": f"doctor_{entry.name}", "runtime": runtime}


def of_study(config: Config) -> list[Entry]:
    """All hardware entries of a config."""
    planned = [one.run for one in plan_module.plan(config) if one.unsupported is None]
    used = {name for block in config.grid for name in block.hardware}
    return [
        Entry(
            name=name,
            hardware=hardware,
            runs=tuple(run for run in planned if run.hardware.name == name),
            protocol=config.protocol,
            is_used=name in used,
            places=places.of(config.places, hardware.places),
        )
        for name, hardware in config.hardware.items()
    ]


def groups(entries: Iterable[Entry]) -> list[list[Entry]]:
    """Entries that one job can answer for: the same software, asked of the same place in the same way."""
    found: dict[str, list[Entry]] = {}
    for entry in entries:
        # What the entries say of the GPU and its price may differ: the node is asked about each.
        same = entry.hardware.model_dump_json(include={"device", "environment", "software", "slurm"}) + str(
            entry.is_draft
        )
        found.setdefault(same, []).append(entry)
    return list(found.values())
