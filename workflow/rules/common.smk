# The study as Python sees it, and the named input functions of all rules.

import functools
import hashlib
import os
import shutil
import sys
import time
from pathlib import Path

from snakemake.exceptions import WorkflowError

from finetune_study import study as study_module
from finetune_study.compiled import PACKAGES
from finetune_study.errors import StudyError
from finetune_study.forecast import VERSION as FORECAST_VERSION
from finetune_study.outcome import METRICS_VERSION
from finetune_study.paths import RESULTS_FOLDER, Results

RESULTS = Results(RESULTS_FOLDER)
CONFIG_FILES = [
    study_module.CONFIG_FILE,
    *(os.path.relpath(path) for path in workflow.config_settings.configfiles),
]
STARTED = time.time()

try:
    STUDY = study_module.open_study(config, RESULTS, files=CONFIG_FILES)
except StudyError as error:
    raise WorkflowError(str(error)) from None


def get_records(wildcards):
    """Records of all runs but those that can't run here and those that failed too often."""
    return [RESULTS.run(run_id).record for run_id in STUDY.expected]


def get_model_of_run(wildcards):
    return RESULTS.model(STUDY.run(wildcards.run_id).model_key) / "manifest.json"


def get_data_of_run(wildcards):
    return RESULTS.data(STUDY.run(wildcards.run_id).data_key) / "manifest.json"


def get_prepared(wildcards):
    """Models, data, kernels of the hub and compiled ops of all runs that are to be trained."""
    runs = [STUDY.run(run_id) for run_id in STUDY.pending]
    folders = {RESULTS.model(run.model_key) for run in runs}
    folders |= {RESULTS.data(run.data_key) for run in runs}
    manifests = sorted(folder / "manifest.json" for folder in folders)
    kernels = {path for run_id in STUDY.pending for path in STUDY.kernels_of(run_id)}
    ops = [RESULTS.op(hardware, op) for hardware, op in STUDY.ops]
    return [*manifests, *sorted(kernels), *ops]


@functools.cache
def check_software(hardware):
    """Stops before a job starts whose Python is not there; a dry run goes on with a warning. Others need none of it."""
    missing = STUDY.missing_software.get(hardware)
    if missing is None:
        return
    if not workflow.output_settings.dryrun:
        raise WorkflowError(str(missing))
    print(f"warning, no run can start there yet: {missing}", file=sys.stderr)


def get_ops_of_run(wildcards):
    """What must be compiled; an input, so that a missing Python is seen before anything is done for the run."""
    check_software(STUDY.run(wildcards.run_id).hardware.name)
    return STUDY.ops_of(wildcards.run_id)


def run_that_needs(wildcards):
    """A run for which the op of a hardware entry is built: it says what is asked of SLURM."""
    return STUDY.ops[wildcards.hardware, wildcards.op]


def get_run_file_of_op(wildcards):
    check_software(wildcards.hardware)
    return RESULTS.run(run_that_needs(wildcards)).run_yaml


def get_interpreter_of_op(wildcards):
    return STUDY.python(run_that_needs(wildcards), sys.executable)


def get_places_of_op(wildcards):
    return STUDY.places(run_that_needs(wildcards))


def get_minutes_of_op(wildcards):
    """One of DeepSpeed's ops takes minutes, flash-attn an hour or two."""
    return 240 if wildcards.op in PACKAGES else 30


def op_resource(name):
    """What building an op asks of SLURM: what the smallest run that needs it does, on one node."""

    def get(wildcards):
        return STUDY.slurm_resources(run_that_needs(wildcards))[name]

    return get


def get_tokenizer_of_data(wildcards):
    return (
        RESULTS.model(STUDY.data_run(wildcards.data_key).tokenizer_key)
        / "manifest.json"
    )


def get_data_file(wildcards):
    """The data set, where it is a file of the user's."""
    return STUDY.data_files


def get_run_file(wildcards):
    return RESULTS.run(wildcards.run_id).run_yaml


def get_interpreter(wildcards):
    """How to call the Python of the hardware that the run asks for; default: the one that runs Snakemake."""
    return STUDY.interpreter(wildcards.run_id, sys.executable)


def get_allocation(wildcards):
    """What the node must offer beside what run.yaml says."""
    return STUDY.allocation(wildcards.run_id).model_dump_json(exclude_none=True)


def get_places(wildcards):
    """Where caches and temporary files go, as options of the command."""
    return STUDY.places(wildcards.run_id)


def get_priority(wildcards):
    """Repeat after repeat, so that time does to all recipes alike; among equals in an order drawn by lot."""
    return STUDY.priority(wildcards.run_id)


def get_threads(wildcards):
    """Here all cores, since runs that share a machine would measure each other; a scheduler gives each job its own."""
    if workflow.local_exec:
        return workflow.cores
    return STUDY.slurm_resources(wildcards.run_id)["cpus_per_task"]


def slurm_resource(name):
    """What a run asks of SLURM under this name; None leaves it to the cluster."""

    def get(wildcards):
        return STUDY.slurm_resources(wildcards.run_id)[name]

    return get


def calibration_resource(name):
    """What a calibration asks of SLURM: what the largest run on that hardware does."""

    def get(wildcards):
        return STUDY.slurm_resources(STUDY.largest_runs[wildcards.hardware])[name]

    return get


def get_calibration_threads(wildcards):
    if workflow.local_exec:
        return workflow.cores
    return STUDY.slurm_resources(STUDY.largest_runs[wildcards.hardware])[
        "cpus_per_task"
    ]


def get_calibration_interpreter(wildcards):
    check_software(wildcards.hardware)
    return STUDY.interpreter(STUDY.largest_runs[wildcards.hardware], sys.executable)


def get_calibration_device(wildcards):
    return STUDY.config.hardware[wildcards.hardware].device


def get_calibration_gpus(wildcards):
    """Devices of one node, whose link is measured; between nodes the data sheet counts."""
    return STUDY.run(STUDY.largest_runs[wildcards.hardware]).gpus_per_node


def get_calibrations(wildcards):
    """Rates that were measured; a forecast does without."""
    paths = [RESULTS.calibration(name) for name in STUDY.largest_runs]
    return [path for path in paths if path.exists()]


def get_request(wildcards):
    """The request to measure this run again, if there is one."""
    if wildcards.run_id not in STUDY.remeasured:
        return []
    paths = RESULTS.run(wildcards.run_id)
    return paths.request(study_module.request_number(paths))


def get_plan(wildcards):
    """The plan; a new one is a reason to run only where it takes away a record that said that the run can't run."""
    plan = str(RESULTS.plan)
    return plan if wildcards.run_id in STUDY.outdated else ancient(plan)


def get_infer_oom(wildcards):
    """Whether an easier run may decide about this one; not where somebody asked to measure it."""
    asked_for = wildcards.run_id in STUDY.remeasured
    return "--infer-oom" if STUDY.config.protocol.infer_oom and not asked_for else ""


def get_remeasured(wildcards):
    if not STUDY.remeasured:
        raise WorkflowError(
            "Which runs are to be measured again?\n"
            "  do: snakemake --cores all remeasure --config remeasure='<run_id or pattern>'"
        )
    return [RESULTS.run(run_id).record for run_id in STUDY.remeasured]


def get_earlier_outcomes(wildcards):
    """Outcomes of the study that the report compares with, if the configuration names one."""
    return STUDY.earlier_outcomes


def get_earlier_for_compare(wildcards):
    """The same, or what the command line names."""
    earlier = STUDY.compared_with or STUDY.config.report.earlier_outcomes
    if not earlier:
        raise WorkflowError(
            "Compared with what?\n"
            "  do: snakemake --cores all compare --config earlier=<outcomes.parquet of another study>"
        )
    if not Path(earlier).expanduser().is_file():
        raise WorkflowError(
            f"The earlier study's outcomes can't be read\n  given: {earlier}, which is no file\n"
            "  do: snakemake --cores all compare --config earlier=<outcomes.parquet of another study>"
        )
    return str(Path(earlier).expanduser())


def get_outcomes_there(wildcards):
    """The study's outcomes as they lie there; runs that are missing are not asked for."""
    if not RESULTS.outcomes_parquet.exists():
        raise WorkflowError(
            f"There are no outcomes to compare: {RESULTS.outcomes_parquet} is not there\n"
            "  do: snakemake --cores all, which writes it, also where runs failed; or finetune-study report"
        )
    return str(RESULTS.outcomes_parquet)


def get_digest_of_outcomes(wildcards):
    """Other outcomes are a reason to compare anew."""
    return hashlib.sha256(Path(get_outcomes_there(wildcards)).read_bytes()).hexdigest()


def say_the_answer():
    """After a call that made the report: what it answers."""
    width = shutil.get_terminal_size((120, 24)).columns
    text = study_module.answer_since(
        STUDY, STARTED, max(120, width), colour=sys.stderr.isatty()
    )
    if text:
        print(text, file=sys.stderr)


def report_what_there_is():
    """After failures: the report of what there is, and which runs have no outcome."""
    study_module.report_what_there_is(STUDY)
    print(study_module.describe_failures(STUDY), file=sys.stderr)
