# From the configuration to run.yaml of every run, one batch job; runs that can't run here get their record at once.
# plan.json is its only declared output: Snakemake compares every file it looks for with every output of a rule.


rule plan:
    output:
        RESULTS.plan,
    log:
        "logs/plan.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        digest=STUDY.plan_digest,
    script:
        "../scripts/plan.py"
