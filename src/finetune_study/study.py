"""A study as it stands: its configuration, its runs, and what became of them so far."""

import fnmatch
import json
import os
import re
import shlex
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune_study import compiled, hub_kernel, implied, places, record, slurm, software
from finetune_study import config as config_module
from finetune_study import plan as plan_module
from finetune_study import run as run_module
from finetune_study.allocation import Asked
from finetune_study.config import Config, Hardware, Model
from finetune_study.errors import ConfigError, RecordError, StudyError
from finetune_study.forecast import prior
from finetune_study.implied import Kin, Rung
from finetune_study.paths import MANIFEST, RESULTS_FOLDER, Results, RunPaths
from finetune_study.plan import PlannedRun
from finetune_study.prepared import read_manifest
from finetune_study.record import Ending, Record
from finetune_study.run import Run

EARLIER = "earlier"
"""Key of `snakemake --config`: outcomes.parquet of the study that `snakemake compare` compares with."""
REMEASURE = "remeasure"
"""Key of `snakemake --config`: patterns of run_ids whose records are set aside and measured again."""
WITHOUT_TRAINING = {
    "unsupported": "unsupported", "implied_oom": "implied out of memory", "predicted_oom": "predicted out of memory",
}  # fmt: skip
"""Outcomes of runs that were not tried, in words."""
CONFIG_FILE = "config/config.yaml"
"""Where a study lies, unless it is said otherwise."""
LOTS = 1000
"""To draw an order from; two runs with the same lot go in the order of the plan."""
SNAKEMAKE_CONFIG = "config/config.yaml, with what --configfile and --config add"


@dataclass(frozen=True)
class Study:
    """Configuration, plan and results of a study."""

    config: Config
    results: Results
    planned: dict[str, PlannedRun]
    """Every run of the study by its run_id, in the order of the plan."""
    remeasured: tuple[str, ...] = ()
    """Runs with an outcome that are to be measured again."""
    untrained: frozenset[str] = frozenset()
    """Runs whose record was given without training."""
    compared_with: str | None = None
    """Outcomes of another study, named on the command line."""
    files: tuple[str, ...] = (CONFIG_FILE,)
    """The configuration, where it came from files."""

    @property
    def options(self) -> str:
        """What a command `finetune-study` needs to find this study, with a space before it; empty for the defaults."""
        files = () if self.files == (CONFIG_FILE,) else self.files
        folder = [] if self.results.root == RESULTS_FOLDER else [f"-r {shlex.quote(str(self.results.root))}"]
        return "".join(f" {option}" for option in [*(f"-c {shlex.quote(file)}" for file in files), *folder])

    @cached_property
    def recorded(self) -> frozenset[str]:
        """Runs that have an outcome and keep it."""
        asked_again = {*self.remeasured, *self.outdated}
        return frozenset(i for i in self.planned if i not in asked_again and self.results.run(i).record.exists())

    @cached_property
    def _last_plan(self) -> dict[str, str | None]:
        """What plan.json says: why each run could not run here, None for those that could."""
        try:
            written = json.loads(self.results.plan.read_text(encoding="utf-8"))["runs"]
            return {one["run_id"]: one["unsupported"] for one in written}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    @cached_property
    def outdated(self) -> frozenset[str]:
        """Runs whose record was given without training, for a reason that no longer holds."""
        return frozenset(i for i in self.untrained if i not in self.remeasured and not self._still_holds(i))

    def _still_holds(self, run_id: str) -> bool:
        match self._kin.ending(run_id).get("status"):
            case "unsupported":
                return self.planned[run_id].unsupported is not None
            case "implied_oom":
                return self.config.protocol.infer_oom and self._kin.stands(run_id)
            case "predicted_oom":
                return prior.still_hopeless(self.results.run(run_id), self.config.protocol.skip_predicted_oom)
        return True

    @cached_property
    def without_training(self) -> dict[str, str]:
        """Runs that have an outcome without having been tried, and its status."""
        endings = ((i, self._kin.ending(i).get("status")) for i in self.untrained & self.recorded)
        return {run_id: str(status) for run_id, status in endings if status in WITHOUT_TRAINING}

    @cached_property
    def implied(self) -> dict[str, str]:
        """Runs without an outcome that the record of an easier one decides, and which one that is."""
        if not self.config.protocol.infer_oom:
            return {}
        without = (i for i in self.planned if i not in self.recorded and i not in self.remeasured)
        witnesses = ((i, self._kin.witness(i)) for i in without if self.planned[i].unsupported is None)
        return {run_id: witness for run_id, witness in witnesses if witness is not None}

    @cached_property
    def _kin(self) -> Kin:
        return Kin(self.results, self._rungs)

    @cached_property
    def _rungs(self) -> list[Rung]:
        return implied.rungs(planned.run for planned in self.planned.values())

    def number_of_easier(self, run_id: str) -> int:
        """How many runs of the study could show that this one runs out of memory."""
        return len(self._kin.easier(run_id))

    def priority(self, run_id: str) -> int:
        """Of a run's job; the highest goes first.

        Repeat after repeat, so that the recipes' runs mix in time, as a ranking needs it. In a repeat the easy runs go
        first: one that runs out of memory decides about the harder ones of its kind. Among equals the order is random,
        drawn from the run_id, so that it is the same in every call.
        """
        rank = (self.run(run_id).repeat - 1) * len(self.planned) + self.number_of_easier(run_id)
        return -(rank * LOTS + zlib.crc32(run_id.encode()) % LOTS)

    @cached_property
    def _last_forecast(self) -> dict[str, Any]:
        try:
            found = json.loads(self.results.forecast.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @cached_property
    def given_up(self) -> frozenset[str]:
        """Runs that failed as often as the protocol allows; deleting failure.json, or `remeasure`, tries them again."""
        decided = {*self.recorded, *self.implied, *self.remeasured}
        return frozenset(i for i in self.planned if i not in decided and self._failed_too_often(i))

    def _failed_too_often(self, run_id: str) -> bool:
        path = self.results.run(run_id).failure
        try:
            return path.exists() and self.config.protocol.gives_up(record.read_failure(path).attempt)
        except RecordError:
            return False

    @cached_property
    def pending(self) -> tuple[str, ...]:
        """Runs that are to be trained now."""
        decided = {*self.recorded, *self.implied, *self.given_up}
        return tuple(i for i, planned in self.planned.items() if planned.unsupported is None and i not in decided)

    @cached_property
    def unsupported(self) -> tuple[str, ...]:
        """Runs that can't run here and have no record of it yet."""
        return tuple(i for i, planned in self.planned.items() if planned.unsupported and i not in self.recorded)

    @property
    def expected(self) -> list[str]:
        """Runs that training gives an outcome when everything goes well; the plan sees to those it can't."""
        return [i for i, planned in self.planned.items() if planned.unsupported is None and i not in self.given_up]

    @property
    def pending_pattern(self) -> str:
        """Regular expression of the runs without an outcome: a record that exists is a source file, made by no rule.

        Where Snakemake starts anew in a job, an easier run may have decided about that job's run in the meantime.
        """
        return "|".join(map(re.escape, (*self.pending, *self.implied))) or "(?!)"

    def run(self, run_id: str) -> Run:
        return self.planned[run_id].run

    @cached_property
    def _models(self) -> dict[str, Run]:
        models = {planned.run.model_key: planned.run for planned in self.planned.values()}
        return models | {p.run.tokenizer_key: p.run for p in self.planned.values() if p.run.tokenizer_key not in models}

    def model(self, model_key: str) -> Model:
        """The model that is prepared under a key."""
        run = self._models[model_key]
        return run.model if run.model_key == model_key else run.tokenizer

    @cached_property
    def _data(self) -> dict[str, list[Run]]:
        by_key: dict[str, list[Run]] = {}
        for planned in self.planned.values():
            by_key.setdefault(planned.run.data_key, []).append(planned.run)
        return by_key

    def data_run(self, data_key: str) -> Run:
        """A run that reads this data: of all that do, the one that needs most sequences."""
        return max(self._data[data_key], key=lambda run: run.num_train_samples)

    def hardware(self, run_id: str) -> Hardware:
        """The hardware entry of a run, with what is not part of its identity."""
        return self.config.hardware[self.run(run_id).hardware.name]

    def interpreter(self, run_id: str, default: str) -> str:
        """The part of a shell command that calls the Python that trains this run; `default` runs Snakemake."""
        return slurm.on_each_node(self.run(run_id), self.hardware(run_id), self.python(run_id, default))

    def python(self, run_id: str, default: str, *, from_anywhere: bool = False) -> str:
        """The same on one node; for a job that may start in another folder, too."""
        hardware = self.hardware(run_id)
        cache = places.of(self.config.places, hardware.places).cache or str(self.results.cache.absolute())
        entry = software.absolute(hardware.software) if from_anywhere else hardware.software
        return software.interpreter(entry, default, cache)

    @cached_property
    def missing_software(self) -> dict[str, ConfigError]:
        """By hardware entry that has runs to train: what it names and is not there. Planning needs none of it."""
        found: dict[str, ConfigError] = {}
        for name in sorted({self.run(run_id).hardware.name for run_id in self.pending}):
            for key, path in software.missing(self.config.hardware[name].software).items():
                what, allowed = MISSING_SOFTWARE[key]
                found[name] = ConfigError(what, where=f"hardware.{name}.software.{key}", given=path, allowed=allowed)
        return found

    def slurm_resources(self, run_id: str) -> dict[str, str | int | None]:
        """What a run asks of SLURM, by the names of Snakemake's executors; None is the cluster's default."""
        run = self.run(run_id)
        kind = self._submit_kinds[run.hardware.name]
        return slurm.resources(run, self.hardware(run_id), self.config.protocol, kind)

    @cached_property
    def _submit_kinds(self) -> dict[str, str]:
        return {name: slurm.submit_kind(name, hardware) for name, hardware in self.config.hardware.items()}

    def allocation(self, run_id: str) -> Asked:
        """What the node must offer to a run, as far as its run.yaml does not say it."""
        return Asked.of(self.hardware(run_id), self.run(run_id).nodes)

    def places(self, run_id: str) -> str:
        """Options of `launch` that name the folders of a run's caches and temporary files, for a shell."""
        return places.options(places.of(self.config.places, self.hardware(run_id).places))

    @property
    def data_files(self) -> list[str]:
        """The data set, where it is a file."""
        path = Path(self.config.data.dataset).expanduser()
        return [str(path)] if path.is_file() else []

    @property
    def earlier_outcomes(self) -> list[str]:
        """Outcomes of the study that the report compares with, if the configuration names one."""
        path = self.config.report.earlier_outcomes
        return [] if path is None else [str(Path(path).expanduser())]

    @property
    def plan_digest(self) -> str:
        """Changes when a run is added or taken away, or when it becomes known why one can or can't run here."""
        return run_module.digest([self.plan_json, self.config.protocol.skip_predicted_oom], 16)

    @cached_property
    def plan_json(self) -> dict[str, Any]:
        """What plan.json holds."""
        planned = self.planned.values()
        runs = [asdict(rung) | {"unsupported": one.unsupported} for rung, one in zip(self._rungs, planned, strict=True)]
        return {"infer_oom": self.config.protocol.infer_oom, "runs": runs}

    @property
    def lost_files(self) -> list[Path]:
        """What the plan must write although it may not have changed.

        What it wrote last and is gone, run.yaml of runs to train and records of those that can't run here; records that
        easier runs imply by now; and, to have it made at all, where the first record goes that it will set aside.
        """
        lost = [self.results.run(i).run_yaml for i in self.pending if i in self._last_plan]
        lost += [self.results.run(i).record for i in self.unsupported if i in self._last_plan]
        lost += [self.results.run(i).record for i in self.implied]
        lost += [
            paths.superseded_record(request_number(paths)) for paths in map(self.results.run, self._first_outdated)
        ]
        return [path for path in lost if not path.exists()]

    @cached_property
    def largest_runs(self) -> dict[str, str]:
        """Of each hardware entry that the study uses, the run with most devices."""
        largest: dict[str, str] = {}
        for run_id, planned in self.planned.items():
            name = planned.run.hardware.name
            if name not in largest or planned.run.num_gpus > self.run(largest[name]).num_gpus:
                largest[name] = run_id
        return largest

    @cached_property
    def ops(self) -> dict[tuple[str, str], str]:
        """By hardware entry and op that DeepSpeed compiles for a run to train there: of those runs the smallest."""
        found: dict[tuple[str, str], str] = {}
        for run_id in sorted(self.pending, key=lambda one: self.run(one).num_gpus):
            for op in compiled.ops_of(self.run(run_id)):
                found.setdefault((self.run(run_id).hardware.name, op), run_id)
        return found

    def ops_of(self, run_id: str) -> list[Path]:
        """What says that the ops of a run are built, and that the kernels of the hub that it names are fetched."""
        run = self.run(run_id)
        return [self.results.op(run.hardware.name, op) for op in compiled.ops_of(run)] + self.kernels_of(run_id)

    def kernels_of(self, run_id: str) -> list[Path]:
        """What says that the kernels of the hub that a run names are fetched."""
        return [self.results.kernel(name) for name in hub_kernel.kernels_of(self.run(run_id))]

    @property
    def _first_outdated(self) -> list[str]:
        return sorted(self.outdated)[:1]

    @property
    def prices(self) -> dict[str, float | None]:
        """US dollars per GPU-hour by hardware entry."""
        return {name: hardware.price_usd_per_gpu_hour for name, hardware in self.config.hardware.items()}

    def summary(self) -> str:
        """What there is to do, in a line."""
        counts = Counter(self.without_training.values())
        measured = len(self.recorded) - counts.total()
        counts.update(unsupported=len(self.unsupported), implied_oom=len(self.implied))
        parts = [f"{len(self.planned)} runs", f"{measured} measured", f"{len(self.pending)} to train"]
        parts += [f"{counts[status]} {words}" for status, words in WITHOUT_TRAINING.items() if counts[status]]
        if self.given_up:
            parts.append(f"{len(self.given_up)} given up after {self.config.protocol.max_attempts} failures")
        return ", ".join(parts) + self._bill()

    def predicted_cost(self, run_id: str) -> tuple[float | None, float | None]:
        """GPU-hours and US dollars that its last forecast expects of a run; None where it knows none."""
        hours, dollars, _ = self._expected.get(run_id, (None, None, True))
        return hours, dollars

    @cached_property
    def _expected(self) -> dict[str, tuple[float | None, float | None, bool]]:
        """GPU-hours, US dollars, and whether it may fit, of each run to train of which there is a forecast.

        That of the folder is the last study's; a run that is in none of its rows has one of its own."""
        of_folder, too_large = self._last_forecast.get("runs", {}), set(self._last_forecast.get("do_not_fit", []))
        found: dict[str, tuple[float | None, float | None, bool]] = {}
        for run_id in self.pending:
            if run_id in of_folder:
                hours, dollars = of_folder[run_id]
                found[run_id] = hours, dollars, run_id not in too_large
            elif row := prior.expected(self.results.run(run_id)):
                margin = row.get("margin_gib")
                may_fit = margin is None or margin >= 0
                found[run_id] = row.get("predicted_gpu_hours"), row.get("predicted_cost_usd"), may_fit
        return found

    def _bill(self) -> str:
        """What the runs to train are predicted to take, and of how many of them that is known.

        Runs that are predicted not to fit end before their first step: they are counted, and not charged."""
        if not self.pending:
            return ""
        if not self._expected:
            return "; no forecast yet (snakemake --cores all forecast)"
        too_large = {run_id for run_id, (_, _, may_fit) in self._expected.items() if not may_fit}
        expected = [self.predicted_cost(run_id) for run_id in self.pending if run_id not in too_large]
        hours = [gpu_hours for gpu_hours, _ in expected if gpu_hours is not None]
        dollars = [cost for _, cost in expected if cost is not None]
        if expected and not hours:
            return f"; predicted: no time of {len(expected)} runs"
        cost = f", {sum(dollars):.2f} US dollars" if len(dollars) == len(hours) else ""
        part = f" of {len(hours)} of {len(expected)} runs" if len(hours) < len(expected) else ""
        without = f" without {len(too_large)} that do not fit" if too_large else ""
        return f"; predicted: {sum(hours):.1f} GPU-hours{cost}{part}{without}"


def as_planned(
    raw: Mapping[str, Any], results: Results, where: str = SNAKEMAKE_CONFIG, files: Sequence[str] = (CONFIG_FILE,)
) -> Study:
    """The study of a configuration and its plan; nothing of its results is looked at.

    Args:
        raw: the configuration as YAML or Snakemake gives it.
        results: its results folder.
        where: what to call the configuration in a message.
        files: that it came from, for commands that are shown.

    Raises:
        ConfigError: for a configuration that does not hold together.
    """
    settings = {name: value for name, value in raw.items() if name not in (REMEASURE, EARLIER)}
    config = config_module.parse(settings, where)
    planned = {one.run.run_id: one for one in plan_module.plan(config)}
    return Study(config, results, planned, compared_with=str(raw.get(EARLIER) or "") or None, files=tuple(files))


def open_study(
    raw: Mapping[str, Any], results: Results, where: str = SNAKEMAKE_CONFIG, files: Sequence[str] = (CONFIG_FILE,)
) -> Study:
    """The same, checked as far as it can be before anything runs.

    Raises:
        ConfigError: for a configuration that does not hold together.
        RecordError: for records that are cut off.
    """
    study = as_planned(raw, results, where, files)
    _check_writable(results)
    untrained = _check_records(results, study.planned)
    _check_files(study.config)
    slurm.check(study.config)
    remeasured = _select(str(raw.get(REMEASURE) or ""), study.planned)
    study = replace(study, remeasured=remeasured, untrained=untrained)
    _forget_purged(study)
    return study


def _forget_purged(study: Study) -> None:
    """What a purge left of a prepared folder that a run still needs counts as nothing: without its manifest it is made
    again. Weights may be links into a cache on another file system."""
    pending = [study.run(run_id) for run_id in study.pending]
    keys = {key for run in pending for key in (run.model_key, run.tokenizer_key)}
    folders = {study.results.model(key) for key in keys} | {study.results.data(run.data_key) for run in pending}
    for folder in folders:
        if (folder / MANIFEST).exists() and read_manifest(folder) is None:
            with suppress(OSError):
                (folder / MANIFEST).unlink()


def _select(patterns: str, planned: Mapping[str, PlannedRun]) -> tuple[str, ...]:
    chosen: list[str] = []
    for pattern in filter(None, (part.strip() for part in patterns.split(","))):
        trainable = [run_id for run_id, one in planned.items() if one.unsupported is None]
        matched = fnmatch.filter(trainable, pattern)
        if not matched:
            raise ConfigError(
                "No run of the study fits what is to be measured again",
                where=f"--config {REMEASURE}=",
                given=pattern,
                allowed="run_ids and patterns of them (`*` stands for anything), separated by commas; "
                f"for example {next(iter(planned))}",
                do="`finetune-study plan` lists the runs",
            )
        chosen += [run_id for run_id in matched if run_id not in chosen]
    return tuple(chosen)


def _check_writable(results: Results) -> None:
    for folder in (results.root, results.runs):
        if folder.exists() and not os.access(folder, os.W_OK | os.X_OK):
            raise StudyError(
                "The results folder can't be written to",
                where=str(folder.absolute()),
                given="read-only",
                do="make it writable for you, or start Snakemake in another folder with `--directory`",
            )


def _check_records(results: Results, planned: Mapping[str, PlannedRun]) -> frozenset[str]:
    """Runs whose record was given without training."""
    paths = {run_id: path for run_id in planned if (path := results.run(run_id).record).exists()}
    seen = {run_id: record.glance(path) for run_id, path in paths.items()}
    damaged = [paths[run_id] for run_id, one in seen.items() if not one.is_whole]
    if damaged:
        raise RecordError(
            f"{len(damaged)} record(s) are cut off; nothing was changed",
            where=", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else ""),
            allowed="a whole JSON document, as finetune_study.launch writes it at once",
            do="restore the file from a backup, or delete it: then that run is measured again",
        )
    return frozenset(run_id for run_id, one in seen.items() if not one.is_trained)


def _check_files(config: Config) -> None:
    """What is plainly a path must be there; a hub id is prepare's to fetch."""
    used = {name for block in config.grid for name in block.targets}
    for name in sorted(used):
        path = config.models[name].name_or_path
        if path is not None and _is_path(path) and not (Path(path).expanduser() / "config.json").exists():
            raise ConfigError(
                "A model's folder is missing or holds no config.json",
                where=f"models.{name}.name_or_path",
                given=path,
                allowed="a folder with config.json, or a hub id such as `HuggingFaceTB/SmolLM2-135M-Instruct`",
            )
    dataset = config.data.dataset
    if (_is_path(dataset) or Path(dataset).suffix in DATA_SUFFIXES) and not Path(dataset).expanduser().is_file():
        raise ConfigError(
            "The data file is missing",
            where="data.dataset",
            given=dataset,
            allowed=f"an existing {', '.join(DATA_SUFFIXES)} file, a hub id, or `generated`",
        )


MISSING_SOFTWARE = {
    "python": (
        "There is no such interpreter",
        "the path of a Python in which finetune-study is installed (`make gpu-env` makes .venv-gpu/bin/python, see "
        "envs/README.md); null: the one that runs Snakemake",
    ),
    "apptainer": ("There is no such image", "an image file of Apptainer, or an address such as `docker://...`"),
}

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")


def _is_path(name: str) -> bool:
    return name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).is_dir()


def write_plan(study: Study) -> None:
    """Writes plan.json, run.yaml of every run to be trained, and the record of every run that is known not to run."""
    for run_id, planned in study.planned.items():
        paths = study.results.run(run_id)
        if run_id in study.outdated:
            set_aside(paths, request_number(paths))
        if planned.unsupported:
            _write_unsupported(paths, planned)
        elif run_id not in study.recorded:
            _write_run_yaml(paths, planned.run)
            if run_id in study.implied:
                implied.write(paths, planned.run, study.implied[run_id])
    record.write_atomically(study.results.plan, json.dumps(study.plan_json, indent=1) + "\n")


def _write_run_yaml(paths: RunPaths, run: Run) -> None:
    text = run_module.dump(run)
    if not paths.run_yaml.exists() or paths.run_yaml.read_text(encoding="utf-8") != text:
        record.write_atomically(paths.run_yaml, text)


def _write_unsupported(paths: RunPaths, planned: PlannedRun) -> None:
    """Says why a run can't run here; what was measured when it could is kept."""
    if paths.record.exists() and not _is_unsupported(paths):
        return
    _write_run_yaml(paths, planned.run)
    ending = Ending(status="unsupported", reason=planned.unsupported)
    record.write_record(paths, Record(run=planned.run, ending=ending))


def _is_unsupported(paths: RunPaths) -> bool:
    return paths.record.exists() and record.read_record(paths.record).ending.status in ("unsupported", "predicted_oom")


def request_number(paths: RunPaths) -> int:
    """Number of the request to measure a run again: of the one that is there, else one that never was."""
    waiting = [int(path.stem.split("-")[1]) for path in paths.folder.glob("remeasure-*.request")]
    replaced = [int(path.stem.split("-")[1]) for path in paths.superseded.glob("record-*.json")]
    return max(waiting, default=max(replaced, default=0) + 1)


def set_aside(paths: RunPaths, number: int) -> None:
    """Moves a run's record out of the way and forgets its failures; a record is never lost."""
    if paths.record.exists():
        paths.superseded.mkdir(parents=True, exist_ok=True)
        paths.record.rename(paths.superseded_record(number))
    paths.failure.unlink(missing_ok=True)


def report_what_there_is(study: Study) -> None:
    """Outcomes, comparisons and report from the records that exist, for when runs failed.

    What the page is made of gets a modification time in the past, so that the next `snakemake` makes it properly, and
    then the page: it did not see which records these were made of.
    """
    from finetune_study import cells, outcome, recommend, report

    planned, results = list(study.planned.values()), study.results
    readable = [run_id for run_id in study.planned if _is_readable(results.run(run_id))]
    outcome.write(results, readable, study.config.hardware)
    recommend.aggregate(study.config, planned, results)
    report.build(study.config, cells.of_outcomes(planned, results), results, study.options)
    for path in (
        results.outcomes_parquet,
        results.outcomes_csv,
        results.comparisons,
        results.recommendations,
    ):
        os.utime(path, (1, 1))


def answer_since(study: Study, start: float, width: int, *, colour: bool) -> str:
    """What the report answers, for a terminal; empty where no report was made since then.

    Args:
        study: its report is asked for.
        start: seconds since 1970.
        width: columns of the terminal.
        colour: write escape sequences.
    """
    page = study.results.report
    if not page.exists() or page.stat().st_mtime < start:
        return ""
    from finetune_study import cells, report
    from finetune_study.report import summary

    frame = cells.of_outcomes(list(study.planned.values()), study.results)
    text = summary.terminal(report.gather(study.config, frame), width, colour=colour)
    return f"{text}\nreport: {page.absolute()}"


def _is_readable(paths: RunPaths) -> bool:
    """Whether a run has a record that is not damaged; the page names those that are."""
    try:
        record.read_record(paths.record)
    except RecordError:
        return False
    return True


def describe_failures(study: Study) -> str:
    """Runs without an outcome after a call of Snakemake: cause, log, and what happens next."""
    lines: list[str] = []
    for run_id in study.planned:
        paths = study.results.run(run_id)
        if paths.failure.exists() and not paths.record.exists():
            try:
                failure = record.read_failure(paths.failure)
            except RecordError as error:
                lines.append(str(error))
                continue
            left = study.config.protocol.max_attempts - failure.attempt
            fate = f"tried again by the next call, {left} more at most" if left > 0 else "given up; see failure.json"
            lines.append(f"{run_id} failed ({fate})\n  cause: {failure.cause}\n  log:   {failure.log}")
    lines.append(f"The report shows what there is: {study.results.report}")
    return "\n".join(lines)
