# From the configuration to run.yaml of every run, one batch job; what is known not to run gets its record at once.
# Declared are plan.json and what was lost alone: Snakemake compares every file it looks for with every output of a
# rule. update(): nothing is deleted before the plan is written.


rule plan:
    output:
        plan=update(RESULTS.plan),
        lost=update(STUDY.lost_files),
    log:
        "logs/plan.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        digest=STUDY.plan_digest,
    script:
        "../scripts/plan.py"
