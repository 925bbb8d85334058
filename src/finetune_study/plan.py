"""From the configuration to the runs of the study; pure, so that the DAG and the plan can't differ."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from typing import Any

from finetune_study import mig, techniques
from finetune_study import run as run_module
from finetune_study.config import Config, GridBlock, Hardware
from finetune_study.run import Run, RunHardware, RunProtocol
from finetune_study.section import Section


class PlannedRun(Section):
    """A run of the study, and why it can't run, if that is known beforehand."""

    run: Run
    unsupported: str | None = None
    """Reason for a record at once, without training."""


def plan(config: Config) -> list[PlannedRun]:
    """Every run of the study, once, in the order of the grid; repeats outermost so that they spread over time."""
    planned: dict[str, PlannedRun] = {}
    shared = _Shared(config)
    repeats = [block.repeats or config.protocol.repeats for block in config.grid]
    for repeat in range(1, max(repeats, default=0) + 1):
        for block, last in zip(config.grid, repeats, strict=True):
            for one in _block(shared, block, repeat) if repeat <= last else ():
                planned.setdefault(one.run.run_id, one)
    return list(planned.values())


@dataclass(frozen=True)
class _Recipe:
    """A recipe on some hardware."""

    techniques: techniques.Techniques
    dumped: dict[str, dict[str, Any]]
    unsupported: str | None


class _Shared:
    """What many runs have in common, made once."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.parts = run_module.Parts()
        self.recipe = cache(self._recipe)
        self.hardware = cache(self._hardware)
        self.protocol = cache(self._protocol)

    def _recipe(self, name: str, hardware_name: str, num_gpus: int) -> _Recipe:
        hardware = self.config.hardware[hardware_name]
        recipe = techniques.complete(self.config.recipes[name], hardware, num_gpus)
        dumped = {name: technique.model_dump(mode="json") for name, technique in recipe.items()}
        return _Recipe(recipe, dumped, techniques.why_not(recipe, hardware))

    def _hardware(self, name: str) -> RunHardware:
        return RunHardware.of(name, self.config.hardware[name])

    def _protocol(self, weights: str) -> RunProtocol:
        protocol = self.config.protocol
        return RunProtocol(
            num_untimed_steps=protocol.num_untimed_steps,
            num_timed_steps=protocol.num_timed_steps,
            rouge_samples=protocol.rouge_samples if weights == "pretrained" else 0,
        )


def _block(shared: _Shared, block: GridBlock, repeat: int) -> Iterator[PlannedRun]:
    axes = product(
        block.targets,
        block.hardware,
        block.num_gpus,
        block.nodes,
        block.sequence_length,
        block.per_device_train_batch_size,
        block.recipes,
    )
    config = shared.config
    for target, hardware_name, num_gpus, nodes, sequence_length, micro_batch, recipe_name in axes:
        model = config.models[target]
        hardware = config.hardware[hardware_name]
        recipe = shared.recipe(recipe_name, hardware_name, num_gpus)
        searched = micro_batch == "max"
        sequences_at_once = num_gpus * (1 if micro_batch == "max" else micro_batch)
        accumulation = max(1, config.training.effective_batch_size // sequences_at_once)
        run = run_module.make(
            shared.parts,
            target=target,
            recipe=recipe_name,
            repeat=repeat,
            model=model,
            tokenizer=config.models[model.tokenizer] if model.tokenizer else model,
            hardware=shared.hardware(hardware_name),
            num_gpus=num_gpus,
            nodes=nodes,
            sequence_length=sequence_length,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=None if searched else accumulation,
            techniques=recipe.dumped,
            data=config.data,
            training=config.training,
            protocol=shared.protocol(model.weights),
        )
        reason = _why_not(hardware, num_gpus, nodes, sequences_at_once, config.training.effective_batch_size)
        reason = reason or recipe.unsupported or techniques.why_not_run(recipe.techniques, run)
        yield PlannedRun(run=run, unsupported=reason)


def _why_not(
    hardware: Hardware, num_gpus: int, nodes: int, sequences_at_once: int, effective_batch_size: int
) -> str | None:
    if num_gpus > 1 and hardware.is_mig:
        return f"{num_gpus} GPUs asked for; {mig.ONE_FOR_A_RUN}"
    if num_gpus % nodes:
        return f"{num_gpus} GPUs can't be shared out equally over {nodes} nodes"
    if num_gpus > hardware.max_gpus * nodes:
        each = f" on each of {nodes} nodes" if nodes > 1 else ""
        return f"{num_gpus} GPUs asked for; this hardware has {hardware.max_gpus} for a run{each}"
    if effective_batch_size % sequences_at_once:
        return (
            f"an effective batch of {effective_batch_size} can't be made of steps of {sequences_at_once} sequences "
            f"({num_gpus} GPUs, micro-batch {sequences_at_once // num_gpus})"
        )
    return None
