"""implied_oom: a run that is not trained, because an easier one of the same kind ran out of the device's memory.

A **witness** decides about a run when all that defines the two is equal but what only adds memory on a rank: the run
has at least the witness's sequence_length and per_device_train_batch_size, and at most its num_gpus where the recipe
shards; and more, or fewer GPUs, in one of them. The repeat may differ, but a repeat alone is never implied: whether it
ends as another did is what repeats are for.

gradient_accumulation_steps follows from the effective batch: fewer GPUs with the same micro-batch accumulate more
often. While a rank accumulates, gradients lie beside the activations of the next micro-batch. So a run that accumulates
needs at least what one needs that does not, and a larger micro-batch in a single pass may need less than a smaller one
in two: a witness that accumulates decides only about runs that do.

On **fewer GPUs** each rank holds a larger share of the states that are sharded (`techniques.shards`), and buffers for
weights and gradients under way are no smaller: DeepSpeed's have a set size (reduce_bucket_size,
stage3_prefetch_bucket_size, stage3_max_live_parameters), FSDP2's that of a layer. Nothing is concluded

- about one GPU: it gathers nothing. Under ZeRO-3 the weights of two GPUs are half as large on each, but beside them lie
  those that are gathered, up to all of them; where weights are frozen and no states make up for it, one GPU needs less;
- where nothing is sharded on the device (DDP, states on the host, ZeRO-1 and 2 with adapters): what is left is what
  communication takes, and that grows with the number of GPUs;
- across numbers of nodes, for the same reason;
- across recipes, models or hardware: neither more nor less memory follows from those alone.

A run of `per_device_train_batch_size: max` (finetune_study.micro_batch) runs out of memory only when every size does
that the effective batch can be made of. So it is the easiest of its kind: it decides about every size at its context
and beyond, accumulating or not, and about longer contexts of its own; no run at one size decides about it. On fewer
GPUs, too: of their sizes those that accumulate need what one sequence needs that may accumulate, and the one that does
not is larger than the one that does not on more.

A witness ran out in training: evaluation, host memory and an unknown phase prove nothing of it, nor does memory of a
GPU that was free but in pieces, or of which that is not known. One is not believed when a run that needs at least as
much completed.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self

from finetune_study import record, techniques
from finetune_study import run as run_module
from finetune_study.errors import StudyError
from finetune_study.paths import Results, RunPaths
from finetune_study.record import Ending, Record
from finetune_study.run import Run

NOT_OF_THE_KIND = {
    "run_id", "repeat", "sequence_length", "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip
"""What may differ between a run and its witness, whatever the recipe."""

TRAINING = ("load", "forward", "backward", "optimizer")
"""Phases whose memory a harder run of the kind needs as well."""


@dataclass(frozen=True)
class Rung:
    """A run among those of its kind; harder ones are above."""

    run_id: str
    kind: str
    """Digest of all that is equal between a run and its witness."""
    sequence_length: int
    per_device_train_batch_size: int | Literal["max"]
    num_gpus: int
    """Equal within a kind, but where they share the model states."""
    gradient_accumulation_steps: int | None

    @classmethod
    def of(cls, run: Run) -> Self:
        shares = run.num_gpus > 1 and techniques.shards(run.parsed_techniques)
        same = run.model_dump(mode="json", exclude=NOT_OF_THE_KIND | ({"num_gpus"} if shares else set()))
        return cls._of_kind(run, run_module.digest(same, 12))

    @classmethod
    def _of_kind(cls, run: Run, kind: str) -> Self:
        return cls(kind=kind, **{field.name: getattr(run, field.name) for field in fields(cls) if field.name != "kind"})

    def needs_as_much_as(self, other: "Rung") -> bool:
        """Whether each rank of this run needs at least the memory of the other's."""
        return (
            self.kind == other.kind
            and all(mine >= theirs for mine, theirs in zip(self._place, other._place, strict=True))
            and (other.is_searched or self._accumulates or not other._accumulates)
        )

    @property
    def is_searched(self) -> bool:
        """Its micro-batch is the largest that fits."""
        return self.per_device_train_batch_size == "max"

    @property
    def _accumulates(self) -> bool:
        return (self.gradient_accumulation_steps or 0) > 1

    def is_harder_than(self, other: "Rung") -> bool:
        """The same, and it is no mere repeat."""
        return self.needs_as_much_as(other) and self._place != other._place

    @property
    def _place(self) -> tuple[int, int, int]:
        """More of each is harder. The largest micro-batch that fits is below every other: nothing fits more easily."""
        size = self.per_device_train_batch_size
        return self.sequence_length, 0 if size == "max" else size, -self.num_gpus


def rungs(runs: Iterable[Run]) -> list[Rung]:
    """Of the runs of one study, in which these names stand for all else that defines a run."""
    kinds: dict[tuple[str, str, int, int, str], str] = {}
    found = []
    for run in runs:
        names = (run.target, run.hardware.name, run.num_gpus, run.nodes, run.recipe)
        if names not in kinds:
            kinds[names] = Rung.of(run).kind
        found.append(Rung._of_kind(run, kinds[names]))
    return found


class Kin:
    """The runs of a study by their kinds, and what their records say; a record is read once, when it is asked for."""

    def __init__(self, results: Results, of_the_study: Iterable[Rung]) -> None:
        self._results = results
        self._rungs = {rung.run_id: rung for rung in of_the_study}
        self._kinds: dict[str, list[Rung]] = {}
        for rung in self._rungs.values():
            self._kinds.setdefault(rung.kind, []).append(rung)
        self._endings: dict[str, Mapping[str, Any]] = {}

    def witness(self, run_id: str) -> str | None:
        """run_id of the easiest run that proves that this one runs out of memory; None when nothing does."""
        proofs = (rung for rung in self.easier(run_id) if self._proves(rung))
        return next((rung.run_id for rung in proofs), None)

    def stands(self, run_id: str) -> bool:
        """Whether a run's record as implied_oom still has a witness; its own may have left the study since."""
        if self.witness(run_id) is not None:
            return True
        witness = self.ending(run_id).get("witness")
        if witness is None or witness in self._rungs:
            return False
        try:
            found = record.read_record(self._results.run(witness).record)
            rung = Rung.of(found.run)
        except StudyError:  # it is damaged, or of a recipe that is not known any more
            return False
        return ran_out(found.ending.model_dump(), found.run.hardware.device) and self._rungs[run_id].is_harder_than(
            rung
        )

    def easier(self, run_id: str) -> list[Rung]:
        """Runs that could be a witness, the easiest first."""
        rung = self._rungs.get(run_id)
        kin = self._kinds[rung.kind] if rung else []
        return sorted(
            (one for one in kin if rung and rung.is_harder_than(one)), key=lambda one: (one._place, one.run_id)
        )

    def fits(self, run_id: str) -> bool:
        """Whether a run that needs at least as much completed."""
        rung = self._rungs.get(run_id)
        return rung is not None and any(
            self.ending(one.run_id).get("status") == "completed"
            for one in self._kinds[rung.kind]
            if one.needs_as_much_as(rung)
        )

    def ending(self, run_id: str) -> Mapping[str, Any]:
        """How a run ended and on which `device`, as its record says; empty without one that can be read."""
        if run_id not in self._endings:
            self._endings[run_id] = _read_ending(self._results.run(run_id))
        return self._endings[run_id]

    def _proves(self, rung: Rung) -> bool:
        ending = self.ending(rung.run_id)
        return bool(ending) and ran_out(ending, ending["device"]) and not self.fits(rung.run_id)


def _read_ending(paths: RunPaths) -> dict[str, Any]:
    """As it lies there: it is not worth the time to check all that a record says."""
    try:
        found = json.loads(paths.record.read_text(encoding="utf-8"))
        return dict(found["ending"]) | {"device": found["run"]["hardware"]["device"]}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def ran_out(ending: Mapping[str, Any], device: str) -> bool:
    """Whether an ending proves that harder runs of the kind run out of memory.

    On a CPU nothing is known of pieces: what counts there is memory that was asked of the system.
    """
    return (
        ending.get("status") == "device_oom"
        and ending.get("phase") in TRAINING
        and (device == "cpu" or ending.get("fragmented") is False)
    )


def write(paths: RunPaths, run: Run, witness: str) -> None:
    """Gives a run its outcome; a record that came first stays."""
    if not paths.record.exists():
        reason = f"not trained: an easier run of the same kind, {witness}, ran out of the device's memory"
        record.write_record(paths, Record(run=run, ending=Ending(status="implied_oom", reason=reason, witness=witness)))


def kin(results: Results) -> Kin:
    """The runs of the plan that was written last; none where it has this switched off, or does not say enough."""
    try:
        plan = json.loads(results.plan.read_text(encoding="utf-8"))
        written = plan["runs"] if plan["infer_oom"] else []
        names = [field.name for field in fields(Rung)]
        return Kin(results, [Rung(**{name: one[name] for name in names}) for one in written])
    except (OSError, ValueError, KeyError, TypeError):
        return Kin(results, [])
