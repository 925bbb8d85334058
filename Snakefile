# finetune-study: which optimizations fit your GPUs, how fast is each, what does it cost?
#
# results/
#   plan.json                       every run of the study
#   forecast.json, .parquet, .csv   what every run is expected to need, and the bill
#   calibration/<hardware>.json     rates that a hardware entry really reaches (snakemake calibrate)
#   prepared/models, prepared/data  what training reads; may be deleted, is made again when a run needs it
#   cache                           downloads, caches, compiled ops, unless `places` names another folder; may be deleted
#   runs/<run_id>/run.yaml          everything that defines the run
#   runs/<run_id>/forecast.json     what is predicted of it as long as it waits
#   runs/<run_id>/prior.json        the same when it was submitted; never changed
#   runs/<run_id>/record.json       how it ended, and what was seen (failure.json: no outcome, tried again)
#   outcomes.parquet, outcomes.csv  one row per run
#   accounting.json                 what SLURM's accounting says of the runs' jobs
#   comparisons.parquet             spread over repeats, against the baseline recipe
#   recommendations.json            which recipe, where, and how sure
#   report/index.html               the page; beside it summary.md, figures/, tables/
#   changes.csv                     against an earlier study, by `snakemake compare`

from snakemake.utils import min_version

min_version("9.0")


configfile: "config/config.yaml"


include: "workflow/rules/common.smk"
include: "workflow/rules/plan.smk"
include: "workflow/rules/calibrate.smk"
include: "workflow/rules/forecast.smk"
include: "workflow/rules/prepare.smk"
include: "workflow/rules/finetune.smk"
include: "workflow/rules/metrics.smk"
include: "workflow/rules/report.smk"
include: "workflow/rules/remeasure.smk"


rule all:
    default_target: True
    input:
        RESULTS.report,
        # Asked for by name: a record that somebody deleted would not be missed by a report that is newer.
        get_records,
        STUDY.lost_files,


if workflow.output_settings.dryrun:  # `onstart` is for what really starts
    print(STUDY.summary(), file=sys.stderr)


onstart:
    print(STUDY.summary(), file=sys.stderr)


onsuccess:
    say_the_answer()


onerror:
    report_what_there_is()
