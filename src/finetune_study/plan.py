"""From the configuration to the runs of the study; pure, so that the DAG and the plan can't differ."""

from collections.abc import Iterator
from itertools import product

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
    for repeat in range(1, config.protocol.repeats + 1):
        for block in config.grid:
            for one in _block(config, block, repeat):
                planned.setdefault(one.run.run_id, one)
    return list(planned.values())


def _block(config: Config, block: GridBlock, repeat: int) -> Iterator[PlannedRun]:
    axes = product(
        block.targets,
        block.hardware,
        block.num_gpus,
        block.nodes,
        block.sequence_length,
        block.per_device_train_batch_size,
        block.recipes,
    )
    for target, hardware_name, num_gpus, nodes, sequence_length, micro_batch, recipe_name in axes:
        model = config.models[target]
        hardware = config.hardware[hardware_name]
        recipe = techniques.complete(config.recipes[recipe_name], hardware, num_gpus)
        searched = micro_batch == "max"
        sequences_at_once = num_gpus * (1 if micro_batch == "max" else micro_batch)
        accumulation = max(1, config.training.effective_batch_size // sequences_at_once)
        run = run_module.make(
            target=target,
            recipe=recipe_name,
            repeat=repeat,
            model=model,
            tokenizer=config.models[model.tokenizer] if model.tokenizer else model,
            hardware=RunHardware.of(hardware_name, hardware),
            num_gpus=num_gpus,
            nodes=nodes,
            sequence_length=sequence_length,
            per_device_train_batch_size=micro_batch,
            gradient_accumulation_steps=None if searched else accumulation,
            techniques={name: technique.model_dump(mode="json") for name, technique in recipe.items()},
            data=config.data,
            training=config.training,
            protocol=RunProtocol(
                num_untimed_steps=config.protocol.num_untimed_steps,
                num_timed_steps=config.protocol.num_timed_steps,
                rouge_samples=config.protocol.rouge_samples if model.weights == "pretrained" else 0,
            ),
        )
        reason = _why_not(hardware, num_gpus, nodes, sequences_at_once, config.training.effective_batch_size)
        reason = reason or techniques.why_not(recipe, hardware) or techniques.why_not_run(run)
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
