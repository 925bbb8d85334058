"""What a study's runs will need: one row a run, the bill, and what was expected of a run before it was submitted."""

import json
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from finetune_study import micro_batch
from finetune_study.config import Hardware
from finetune_study.errors import ModelError, StudyError
from finetune_study.forecast import CATEGORIES, VERSION, predict, prior, recipe
from finetune_study.forecast import hardware as hardware_module
from finetune_study.forecast import time as time_module
from finetune_study.forecast.hardware import Device
from finetune_study.paths import Results, RunPaths
from finetune_study.prepared import read_manifest
from finetune_study.record import Ending, Record, write_atomically, write_record
from finetune_study.run import Run

if TYPE_CHECKING:
    from finetune_study.study import Study

STARTUP_SECONDS = 60.0
"""What a run takes beside its steps: processes, libraries, loading. An assumption, without a source: a large model from
a slow file system takes several times as long."""

TO_TRAIN, MEASURED, NOT_TRIED, UNSUPPORTED, GIVEN_UP = "to train", "measured", "not tried", "unsupported", "given up"
"""States of runs; of `not tried` another run or an earlier forecast says that it runs out of memory."""

BETWEEN_WARNINGS = " | "
"""A warning may hold any mark of punctuation."""

COLUMNS: dict[str, Any] = {
    "run_id": pl.String,
    "target": pl.String,
    "hardware": pl.String,
    "num_gpus": pl.Int64,
    "sequence_length": pl.Int64,
    "per_device_train_batch_size": pl.Int64,
    "gradient_accumulation_steps": pl.Int64,
    "recipe": pl.String,
    "repeat": pl.Int64,
    "state": pl.String,
    "predicted_peak_memory_allocated_gib": pl.Float64,
    "predicted_peak_memory_reserved_gib": pl.Float64,
    **dict.fromkeys((f"predicted_memory_{name}_gib" for name in CATEGORIES), pl.Float64),
    "memory_gib": pl.Float64,
    "margin_gib": pl.Float64,
    "fits": pl.String,
    "predicted_step_time_seconds": pl.Float64,
    "predicted_tokens_per_second": pl.Float64,
    "bottleneck": pl.String,
    "predicted_epoch_hours": pl.Float64,
    "predicted_cost_usd_per_epoch": pl.Float64,
    "predicted_gpu_hours": pl.Float64,
    "predicted_cost_usd": pl.Float64,
    "warnings": pl.String,
}
"""Columns of forecast.parquet.

`state` is one of those above; `predicted_gpu_hours` and `predicted_cost_usd` are those
of the run itself, the two before them those of a pass over the data."""


def device_of(name: str, entry: Hardware) -> Device:
    """The predictor's device for a hardware entry: by the driver's name of the GPU, or by the entry's own where it says
    none, with the entry's price and no more than its memory; what nobody knows of it stays null."""
    price = entry.price_usd_per_gpu_hour
    found = _shipped(name, entry.device, entry.gpu)
    if found is not None:
        own = {
            "price_usd_per_gpu_hour": found.price_usd_per_gpu_hour if price is None else price,
            "memory_gib": min(found.memory_gib or entry.memory_gib, entry.memory_gib),
        }
        return found.model_copy(update=own)
    return Device(
        name=name,
        device=entry.device,
        gpu=entry.gpu,
        memory_gib=entry.memory_gib,
        compute_capability=entry.compute_capability,
        price_usd_per_gpu_hour=price,
        maps_tensors=hardware_module.maps_tensors(entry.environment),
    )


def device_of_run(run: Run) -> Device:
    """The same from what a run itself knows: without a price, and without the memory of a GPU that is not shipped."""
    it = run.hardware
    found = _shipped(it.name, it.device, it.gpu)
    return found or Device(
        name=it.name,
        device=it.device,  # type: ignore[arg-type]
        gpu=it.gpu,
        memory_gib=it.memory_budget_gib,
        maps_tensors=hardware_module.maps_tensors(it.environment),
    )


def _shipped(name: str, device: str, gpu: str | None) -> Device | None:
    """A slice or another card of the family is none of those that are known, whatever its entry is called."""
    if device == "cpu":
        return None
    known = hardware_module.shipped()
    found = known.get(name) if gpu is None else next((d for d in known.values() if _card(d.gpu) == _card(gpu)), None)
    return found and found.model_copy(update={"name": name})


def _card(gpu: str | None) -> str:
    """A GPU's name without the maker's, which older drivers left out."""
    return (gpu or "").removeprefix("NVIDIA ").casefold()


def config_of(run: Run, results: Results) -> dict[str, Any]:
    """The configuration of a run's model: written out, prepared already, a folder, or a shape that is known by its id.

    Raises:
        ModelError: where none of these is there; preparing the model brings it.
    """
    if run.model.architecture is not None:
        return dict(run.model.architecture)
    prepared = _prepared_config(run, results)
    if prepared.exists():
        return dict(predict.model_config({"model": str(prepared)}))
    try:
        return dict(predict.model_config({"model": run.model.name_or_path}))
    except ModelError:
        raise ModelError(
            "The model's configuration is not here yet",
            where=f"models.{run.target}",
            given=run.model.name_or_path,
            do="it is known when the model is prepared; until then it can be written out as `architecture`",
        ) from None


def _prepared_config(run: Run, results: Results) -> Path:
    return results.model(run.model_key) / "config.json"


def question_of(run: Run, device: Device, results: Results) -> predict.Question:
    """What is asked about a run.

    Raises:
        StudyError: where its model or its recipe is not known to the predictor.
    """
    if micro_batch.is_searched(run):
        run = micro_batch.at(run, 1)  # which size it will be follows from the trace
    resolved = recipe.resolve(run.techniques, num_gpus=run.num_gpus, device=device.device, has_bf16=device.has_bf16)
    name = run.model.name_or_path
    taken = name is not None and run.model.architecture is None and not _prepared_config(run, results).exists()
    return predict.Question(
        config_of(run, results), device, run.num_gpus, run.sequence_length, run.micro_batch,
        run.gradient_accumulation_steps or 1, resolved, False, predict.taken_as(str(name)) if taken else [],
    )  # fmt: skip


def forecast(study: "Study", traces: predict.Traces) -> list[dict[str, Any]]:
    """A row for each run of the study, in the order of the plan; what can't be predicted is null, with the reason."""
    rows: list[dict[str, Any]] = []
    questions: dict[str, predict.Question | StudyError] = {}
    for run_id, planned in study.planned.items():
        device = device_of(planned.run.hardware.name, study.hardware(run_id))
        try:
            questions[run_id] = question_of(planned.run, device, study.results)
        except StudyError as error:
            questions[run_id] = error
    asked = [q for q in questions.values() if isinstance(q, predict.Question)]
    traces.prepare(asked)
    for run_id, question in questions.items():
        rows.append(_row(study.run(run_id), _state(study, run_id), question, study.results, traces))
    return _refined(rows, study.results)


def row_of_run(run: Run, results: Results, traces: predict.Traces) -> dict[str, Any]:
    """The row of one run that is to be trained, from its run.yaml alone."""
    question: predict.Question | StudyError
    try:
        question = question_of(run, device_of_run(run), results)
    except StudyError as error:
        question = error
    return _row(run, TO_TRAIN, question, results, traces)


def _row(
    run: Run, state: str, question: predict.Question | StudyError, results: Results, traces: predict.Traces
) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(COLUMNS) | {
        "run_id": run.run_id,
        "target": run.target,
        "hardware": run.hardware.name,
        "num_gpus": run.num_gpus,
        "sequence_length": run.sequence_length,
        "recipe": run.recipe,
        "repeat": run.repeat,
        "state": state,
    }
    if not micro_batch.is_searched(run):
        row |= {name: getattr(run, name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")}
    try:
        if isinstance(question, StudyError):
            raise question
        profile = traces.of(question)
        calibration = read_calibration(results, run.hardware.name)
        question = micro_batch.expected(run, question, profile)
        found = predict.outputs(question, profile, calibration)
    except StudyError as error:
        return row | {"warnings": " ".join(str(error).split())}
    seconds = found["predicted_step_time_seconds"]
    price = question.device.price_usd_per_gpu_hour
    sequences, unknown = _sequences(run, results)
    epoch = None
    if seconds and sequences:
        epoch = sequences / run.training.effective_batch_size * seconds / 3600
    hours = None if seconds is None else (run.num_steps * seconds + STARTUP_SECONDS) * run.num_gpus / 3600
    return row | {
        "per_device_train_batch_size": question.batch,
        "gradient_accumulation_steps": question.accumulation,
        "predicted_peak_memory_allocated_gib": found["predicted_peak_memory_allocated_gib"],
        "predicted_peak_memory_reserved_gib": found["predicted_peak_memory_reserved_gib"],
        **{f"predicted_memory_{k}_gib": v for k, v in found["predicted_memory_gib"]["by_category"].items()},
        "memory_gib": question.device.memory_gib,
        "margin_gib": found["margin_gib"],
        "fits": found["fits_word"],
        "predicted_step_time_seconds": seconds,
        "predicted_tokens_per_second": found["predicted_tokens_per_second"],
        "bottleneck": found["bottleneck"],
        "predicted_epoch_hours": epoch,
        "predicted_cost_usd_per_epoch": None if epoch is None or price is None else epoch * run.num_gpus * price,
        "predicted_gpu_hours": hours,
        "predicted_cost_usd": None if hours is None or price is None else hours * price,
        "warnings": BETWEEN_WARNINGS.join([*found["warnings"], *filter(None, [unknown])]),
    }


def _sequences(run: Run, results: Results) -> tuple[int | None, str]:
    """Sequences of a pass over the data, and what is not known of them: counted where it is prepared, else known of
    data that is made here, whose examples are a sequence each unless a recipe packs."""
    manifest = read_manifest(results.data(run.data_key))
    if manifest:
        return int(manifest["num_train_available"]), ""
    data = run.data
    if "packing" in run.techniques:
        return None, "how many packed sequences there are is known when the data is prepared: no epoch hours"
    if data.dataset != "generated":
        return None, f"how many examples {data.dataset} has is known when it is prepared: no epoch hours"
    at_most = "" if data.overlong != "drop" else "epoch hours are at most these: overlong examples will be dropped"
    return data.num_dialogues - data.num_eval_samples, at_most


def _state(study: "Study", run_id: str) -> str:
    if study.planned[run_id].unsupported:
        return UNSUPPORTED
    if run_id in study.implied or run_id in study.without_training:
        return NOT_TRIED
    if run_id in study.recorded:
        return MEASURED
    return GIVEN_UP if run_id in study.given_up else TO_TRAIN


def read_calibration(results: Results, hardware: str) -> dict[str, float] | None:
    """Rates that were measured on a hardware entry; None where none were."""
    path = results.calibration(hardware)
    try:
        return {k: float(v) for k, v in json.loads(path.read_text(encoding="utf-8"))["rates"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def totals(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the runs to train: how many, GPU-hours and US dollars for each hardware entry.

    What is not known of a run is left out of the sums, and counted; so are runs that will not fit, which end before
    their first step, those that are not supported there, which are not tried, and those that are measured already.
    Without a price the dollars are null."""
    sums: dict[str, dict[str, Any]] = {}
    for row in rows:
        total = sums.setdefault(
            row["hardware"], {"runs": 0, "gpu_hours": 0.0, "cost_usd": 0.0} | dict.fromkeys(_COUNTED, 0)
        )
        if row["state"] != TO_TRAIN:
            total[row["state"].replace(" ", "_")] += 1
            continue
        total["runs"] += 1
        if row["fits"] == predict.DOES_NOT_FIT:
            total["do_not_fit"] += 1
        elif row["predicted_gpu_hours"] is None:
            total["not_predicted"] += 1
        else:
            total["gpu_hours"] += row["predicted_gpu_hours"]
            priced = None not in (total["cost_usd"], row["predicted_cost_usd"])
            total["cost_usd"] = total["cost_usd"] + row["predicted_cost_usd"] if priced else None
    return sums


_COUNTED = ("not_predicted", "do_not_fit", "unsupported", "measured", "not_tried", "given_up")


def write(study: "Study") -> list[dict[str, Any]]:
    """Writes the forecast of the study, that of each run to be trained beside its run.yaml, and gives those runs their
    outcome that are not to be tried.

    Returns:
        The rows.
    """
    rows = forecast(study, predict.Traces(study.results.traces))
    margin = study.config.protocol.skip_predicted_oom
    skipped = [row["run_id"] for row in rows if row["state"] == TO_TRAIN and prior.is_hopeless(row, margin)]
    for row in rows:
        if row["state"] == TO_TRAIN:
            keep(study.results.run(row["run_id"]), row)
    for run_id in skipped:
        row = next(r for r in rows if r["run_id"] == run_id)
        reason = (
            f"predicted to need {row['memory_gib'] - row['margin_gib']:.1f} GiB of {row['memory_gib']:.1f} GiB; "
            f"skip_predicted_oom is {margin}"
        )
        paths = study.results.run(run_id)
        write_record(paths, Record(run=study.run(run_id), ending=Ending(status="predicted_oom", reason=reason)))
    table = pl.DataFrame(rows, schema=COLUMNS)
    study.results.root.mkdir(parents=True, exist_ok=True)
    table.write_parquet(study.results.forecast_parquet)
    table.write_csv(study.results.forecast_csv)
    document = {
        "version": VERSION,
        "totals": totals(rows),
        "runs": {r["run_id"]: [r["predicted_gpu_hours"], r["predicted_cost_usd"]] for r in rows},
        "do_not_fit": [r["run_id"] for r in rows if r["fits"] == predict.DOES_NOT_FIT],
    }
    write_atomically(study.results.forecast, json.dumps(document) + "\n")
    return rows


_KEPT = ("fits", "margin_gib", "memory_gib", "bottleneck")


def keep(paths: RunPaths, row: dict[str, Any]) -> None:
    """Writes what is expected of a run; `prior.freeze` copies it when the run is submitted."""
    if row["predicted_peak_memory_allocated_gib"] is None:
        paths.forecast.unlink(missing_ok=True)  # an earlier one was of other code
        return
    kept = {k: v for k, v in row.items() if k.startswith("predicted_") or k in _KEPT}
    text = json.dumps({"version": VERSION, **kept, "warnings": row["warnings"]}, indent=1) + "\n"
    with suppress(OSError, UnicodeDecodeError):
        if paths.forecast.read_text(encoding="utf-8") == text:
            return  # of a study of thousands, writing takes longest
    write_atomically(paths.forecast, text)


def _refined(rows: list[dict[str, Any]], results: Results) -> list[dict[str, Any]]:
    """The rows with step times that runs which were measured already on the same hardware teach.

    What is learnt is one factor for each hardware entry: the median of measured over predicted. It serves runs that are
    to be trained; the rows of measured ones stay as the model alone says.
    """
    measured = _measured_seconds(results)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        seconds = measured.get(row["run_id"])
        if row["state"] == MEASURED and seconds and row["predicted_step_time_seconds"]:
            pairs.setdefault(row["hardware"], []).append((row["predicted_step_time_seconds"], seconds))
    return [
        _scaled(row, time_module.learn(pairs[row["hardware"]]), len(pairs[row["hardware"]]))
        if row["state"] == TO_TRAIN and row["hardware"] in pairs and row["predicted_step_time_seconds"]
        else row
        for row in rows
    ]


def _scaled(row: dict[str, Any], factor: float, runs: int) -> dict[str, Any]:
    times = ("predicted_step_time_seconds", "predicted_epoch_hours", "predicted_cost_usd_per_epoch")
    scaled = {name: row[name] and row[name] * factor for name in times}
    overhead = STARTUP_SECONDS * row["num_gpus"] / 3600
    hours = overhead + (row["predicted_gpu_hours"] - overhead) * factor
    cost = row["predicted_cost_usd"] and row["predicted_cost_usd"] * hours / row["predicted_gpu_hours"]
    learnt = f"step time × {factor:.2f}, learnt from {runs} measured runs on this hardware"
    return row | scaled | {
        "predicted_tokens_per_second": row["predicted_tokens_per_second"] / factor,
        "predicted_gpu_hours": hours,
        "predicted_cost_usd": cost,
        "warnings": BETWEEN_WARNINGS.join(filter(None, (row["warnings"], learnt))),
    }  # fmt: skip


def _measured_seconds(results: Results) -> dict[str, float]:
    """Seconds of a step by run, from the table of outcomes as it was made last."""
    try:
        outcomes = pl.read_parquet(results.outcomes_parquet, columns=["run_id", "step_time_seconds_median"])
    except (OSError, pl.exceptions.PolarsError):
        return {}
    return {run_id: seconds for run_id, seconds in outcomes.iter_rows() if seconds}
