# From the configuration to run.yaml, one batch job; runs that can't run here get their record at once.


rule plan:
    output:
        plan=RESULTS.plan,
        runs=[RESULTS.run(run_id).run_yaml for run_id in STUDY.pending],
        unsupported=[RESULTS.run(run_id).record for run_id in STUDY.unsupported],
    log:
        "logs/plan.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        digest=STUDY.plan_digest,
    script:
        "../scripts/plan.py"
