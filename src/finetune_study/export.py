"""A recommended recipe for data of one's own: settings in the spelling of their libraries, and a job that goes on."""

import json
import math
import sys
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import polars as pl

from finetune_study import micro_batch, slurm, table, train
from finetune_study.errors import StudyError
from finetune_study.recommend import Recommendation, defaults, no_such_pair, of_cells
from finetune_study.record import read_record, write_atomically
from finetune_study.run import Run
from finetune_study.study import Study
from finetune_study.table import show
from finetune_study.techniques.peft_method import PeftMethod, format_of_training

MEASURING = (
    "output_dir",
    "max_steps",
    "save_strategy",
    "logging_steps",
    "report_to",
    "disable_tqdm",
    "ddp_timeout",
    "ddp_backend",
)
"""Arguments that serve the measurement, and nobody's training."""
FULL_TRAINING: dict[str, Any] = {
    "num_train_epochs": 1,
    "save_strategy": "steps",
    "save_total_limit": 2,
    "logging_steps": 10,
    "report_to": [],
}
"""In their place: one epoch, with checkpoints to go on from."""
SAVED_WHOLE = {"stage3_gather_16bit_weights_on_model_save": True}
"""Else ZeRO-3 saves no model, but DeepSpeed's own pieces of one; a run that is measured saves nothing."""
MARGIN = 1.5
"""Of the job's time over the promised hours: loading, checkpoints, a slower node."""
MIN_MINUTES = 60
CHECKPOINT_SECONDS = 600
"""Between two checkpoints, about: what a preemption may cost; at most `MAX_SAVE_STEPS` steps."""
MAX_SAVE_STEPS = 100


def choose(
    study: Study,
    cells: pl.DataFrame,
    target: str,
    hardware: str,
    num_gpus: int | None,
    sequence_length: int | None,
    nodes: int | None = None,
    recipe: str | None = None,
) -> Recommendation:
    """The recommendation that is asked for; where number and context are left open, that of the default.

    Args:
        study: its configuration names targets and hardware.
        cells: one row per planned run (`cells.SCHEMA`).
        target: of the study.
        hardware: of the study.
        num_gpus: devices; None: the default's.
        sequence_length: context; None: the default's.
        nodes: that the devices are on; None: the default's, or one where another number of devices is asked for.
        recipe: one that fits there, instead of the recommended one.

    Raises:
        StudyError: for a setting that the study does not have, or a recipe that does not fit there.
    """
    _, every = of_cells(cells, study.config)
    pairs = {(one.target, one.hardware): one.recommendation for one in defaults(every)}
    if (target, hardware) not in pairs:
        raise no_such_pair(target, hardware, pairs)
    default = pairs[target, hardware]
    if nodes is None:
        nodes = default.nodes if num_gpus in (None, default.num_gpus) else 1
    wanted = (
        default.num_gpus if num_gpus is None else num_gpus,
        nodes,
        default.sequence_length if sequence_length is None else sequence_length,
    )
    here = [one for one in every if (one.target, one.hardware) == (target, hardware)]
    settings = {(one.num_gpus, one.nodes, one.sequence_length): one for one in here}
    if wanted not in settings:
        raise StudyError(
            "The study has no such setting",
            given=_setting(*wanted),
            allowed="; ".join(_setting(*there) for there in settings),
        )
    return settings[wanted] if recipe is None else _instead(settings[wanted], recipe)


class ByHand(Recommendation):
    """A recipe that fits and was asked for by name, instead of the recommended one."""


def _verdict(one: Recommendation) -> str:
    return "chosen_by_hand" if isinstance(one, ByHand) else one.verdict


def _instead(one: Recommendation, recipe: str) -> Recommendation:
    """The recommendation with another recipe that fits in its setting."""
    found = one.evidence_of(recipe)
    if found is None or not found.fits:
        raise StudyError(
            "The recipe does not fit there, or is not known to",
            where=f"{one.target} on {one.hardware}, {_setting(one.num_gpus, one.nodes, one.sequence_length)}",
            given=recipe,
            allowed=", ".join(other.recipe for other in one.evidence if other.fits) or "none fits",
        )
    if recipe == one.recipe:
        return one
    chosen: dict[str, Any] = {
        "recipe": recipe,
        "per_device_train_batch_size": found.per_device_train_batch_size,
        "tied_with": [],
        "not_told_apart": [],
        "reason": f"{recipe} was chosen by hand. {one.recipe or 'Nothing'} is recommended there: {one.reason}",
    }
    return ByHand(**one.model_dump() | chosen)


def _setting(num_gpus: int, nodes: int, sequence_length: int) -> str:
    return f"{num_gpus} GPUs{table.on_nodes(nodes)} at context {sequence_length}"


def export(study: Study, one: Recommendation, folder: Path) -> list[Path]:
    """Writes the recommendation of a setting into a folder.

    Args:
        study: its configuration says what the hardware asks of SLURM.
        one: a recommendation that names a recipe.
        folder: where to; made if need be.

    Returns:
        The files.

    Raises:
        StudyError: when no recipe is recommended there.
    """
    best = one.best
    if best is None:
        place = table.devices(one.hardware, one.num_gpus, one.nodes)
        raise StudyError(
            "Nothing is recommended here, so there is nothing to export",
            where=f"{one.target} on {place}, context {one.sequence_length}",
            given=one.verdict,
            do=f"measure more: {'; '.join(one.settled_by[:5])}"
            if one.settled_by
            else "add more GPUs, a shorter context or a recipe that saves more to the grid; finetune-study predict "
            "says beforehand what fits",
        )
    run = study.run(best.run_ids[0])
    _check_exported(run)
    found = best.per_device_train_batch_size
    settled = micro_batch.at(run, found) if micro_batch.is_searched(run) and found else run
    arguments = train.arguments_of(settled, "output")
    deepspeed = arguments.pop("deepspeed", None)
    if deepspeed is not None:
        deepspeed["zero_optimization"] |= SAVED_WHOLE
    kept = {name: value for name, value in arguments.items() if name not in MEASURING}
    files: dict[str, Any] = {
        "training_arguments.json": kept | FULL_TRAINING | {"save_steps": _save_steps(best.step_time_seconds_median)},
        "deepspeed.json": deepspeed,
        "peft.json": _peft(run),
        "recipe.json": _about(run, one) | {"versions": _versions(study, run), "notice": study.config.report.notice},
    }
    written = [folder / "train.py", folder / "job.sbatch", folder / "README.md"]
    _check_free(folder, [*(path.name for path in written), *files])
    write_atomically(written[0], _resource("train.py.txt").replace("{torchrun}", _torchrun(run)))
    write_atomically(written[1], _job(study, run, best.epoch_hours_median, is_deepspeed=deepspeed is not None))
    there = [name for name, value in files.items() if value is not None]
    write_atomically(written[2], _readme(run, one, there, study.config.report.notice))
    for name, value in files.items():
        (folder / name).unlink(missing_ok=True)  # of an earlier export
        if value is not None:
            write_atomically(folder / name, json.dumps(value, indent=1, ensure_ascii=False) + "\n")
            written.append(folder / name)
    return written


def _check_free(folder: Path, names: list[str]) -> None:
    """
    Raises:
        StudyError: where files of the same names are there that no export has written.
    """
    if folder.exists() and not folder.is_dir():
        raise StudyError("An export is a folder", where="--output", given=f"{folder}, a file", do="name a folder")
    there = [name for name in names if (folder / name).exists()]
    try:
        earlier = "format_of_trained_weights" in json.loads((folder / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError):
        earlier = False
    if there and not earlier:
        raise StudyError(
            "The folder holds files that the export would overwrite",
            where=f"--output {folder}",
            given=table.joined(there),
            allowed="a new folder, or that of an earlier export",
            do="name another folder",
        )


def _check_exported(run: Run) -> None:
    """
    Raises:
        StudyError: where the exported script could not do what was measured.
    """
    own = [name for name, technique in run.parsed_techniques.items() if not technique.is_exported()]
    if len(_methods(run)) > 1:  # peft does not save its mixed model
        own += [method.name for method in _methods(run)]
    if own:
        raise StudyError(
            "The script that would be exported can't do what was measured",
            where=f"recipe {run.recipe}",
            given=f"{', '.join(own)}: applied by finetune-study itself",
            do="export another one that fits: --recipe",
        )


def _methods(run: Run) -> list[PeftMethod]:
    return [technique for technique in run.parsed_techniques.values() if isinstance(technique, PeftMethod)]


def _peft(run: Run) -> dict[str, Any] | None:
    """Fields of the `PeftConfig` of the method."""
    for method in _methods(run):
        return {"peft_type": method.method, "task_type": "CAUSAL_LM", **method.peft_settings(run)}
    return None


def _about(run: Run, one: Recommendation) -> dict[str, Any]:
    best = one.best
    load: dict[str, Any] = {}
    for technique in run.parsed_techniques.values():
        load |= technique.load_arguments(run.parsed_techniques)
    if run.model.revision and run.model.name_or_path:
        load["revision"] = run.model.revision
    return {
        "model": run.model.name_or_path if run.model.weights == "pretrained" else None,
        "recipe": run.recipe,
        "techniques": list(run.parsed_techniques),
        "verdict": _verdict(one),
        "tied_with": one.tied_with,
        "sequence_length": run.sequence_length,
        "num_gpus": run.num_gpus,
        "nodes": run.nodes,
        "effective_batch_size": run.training.effective_batch_size,
        "load_arguments": load,
        "format_of_trained_weights": format_of_training(run.parsed_techniques) if _methods(run) else None,
        "step_seconds": best.step_time_seconds_median if best else None,
        "peak_memory_gib": best.peak_memory_gib_median if best else None,
        "epoch_hours_of_the_study": best.epoch_hours_median if best else None,
        "measured_by": best.run_ids if best else [],
    }


def _versions(study: Study, run: Run) -> dict[str, str]:
    """Of the packages that the run was measured with, as its record has them."""
    found = read_record(study.results.run(run.run_id).record).environment.get("versions", {})
    return {name: version for name, version in found.items() if version is not None}


def _save_steps(step_seconds: float | None) -> int:
    """Optimizer steps between checkpoints; a job that gets no checkpoint done would begin again for ever."""
    return max(1, min(MAX_SAVE_STEPS, int(CHECKPOINT_SECONDS / step_seconds))) if step_seconds else MAX_SAVE_STEPS


def _job(study: Study, run: Run, epoch_hours: float | None, *, is_deepspeed: bool) -> str:
    asked = study.slurm_resources(run.run_id)
    minutes = max(MIN_MINUTES, math.ceil(60 * MARGIN * (epoch_hours or 0)))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    return template.from_string(_resource("job.sbatch.j2")).render(
        name=slurm.job_name(f"{run.target}-{run.recipe}"),
        own_model=_own_model(run),
        deepspeed=is_deepspeed,
        nodes=run.nodes,
        gres=asked["gres"],
        cpus_per_task=asked["cpus_per_task"],
        minutes=minutes,
        options=[
            ("partition", asked["slurm_partition"]),
            ("account", asked["slurm_account"]),
            ("qos", asked["qos"]),
            ("constraint", asked["constraint"]),
            ("mem", asked["mem"]),
        ],
        extra=asked["slurm_extra"],
        interpreter=study.python(run.run_id, sys.executable, from_anywhere=True),
        srun=" ".join(slurm.srun(run)),
        gpus_per_node=run.gpus_per_node,
    )


def _own_model(run: Run) -> str:
    """What a call has to name where the study measured random weights."""
    return " --model FOLDER_OR_HUB_ID" if run.model.weights == "random" else ""


def _torchrun(run: Run) -> str:
    if run.nodes == 1:
        return f"torchrun --standalone --nproc-per-node {run.num_gpus}"
    meeting = "--rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500"
    return f"torchrun --nnodes {run.nodes} --nproc-per-node {run.gpus_per_node} {meeting}"


def _readme(run: Run, one: Recommendation, files: list[str], notice: str | None) -> str:
    best = one.best
    hours = best.epoch_hours_median if best else None
    words = {
        "training_arguments.json": "fields of transformers' TrainingArguments",
        "deepspeed.json": "DeepSpeed's configuration",
        "peft.json": "fields of peft's `PeftConfig`",
        "recipe.json": "what was measured, with which versions, and how the model is loaded",
    }
    lines = [
        f"# {run.recipe} for {run.target} on {table.devices(run.hardware.name, run.num_gpus, run.nodes)}, "
        f"context {run.sequence_length}",
        "",
        *([f"**{notice}**", ""] if notice else []),
        one.reason,
        "",
        f"Verdict: {_verdict(one).replace('_', ' ')}. "
        f"Measured: {show(best.step_time_seconds_median if best else None, 's')} "
        f"for an optimizer step of {run.training.effective_batch_size} sequences, "
        f"{show(best.peak_memory_gib_median if best else None, 'GiB')} peak memory"
        + (f", {show(hours)} hours for an epoch of the study's data." if hours is not None else "."),
        "",
        f"    sbatch job.sbatch my.jsonl{_own_model(run)}",
        "",
        "or without SLURM" + (", on each of the nodes" if run.nodes > 1 else ""),
        "",
        f"    {_torchrun(run)} train.py --data my.jsonl{_own_model(run)}",
        "",
        "`job.sbatch` calls the Python that the study trained with. `train.py` says what my.jsonl holds; it goes on "
        "from its last checkpoint, and its `promised.json` compares hours and memory of one epoch with what is "
        "promised here. It needs torch, transformers, datasets, accelerate"
        + (", peft" if "peft.json" in files else "")
        + (", deepspeed" if "deepspeed.json" in files else "")
        + ", in the versions that were measured: `recipe.json` names them.",
        "",
        *(f"- `{name}`: {words[name]}" for name in files),
        "",
    ]
    return "\n".join(lines)


def _resource(name: str) -> str:
    return (resources.files("finetune_study.exported") / name).read_text(encoding="utf-8")
