# From the configuration to run.yaml, one batch job; runs that can't run here get their record at once.


rule plan:
    output:
        plan=RESULTS.plan,
        runs=[RESULTS.run(run_id).run_yaml for run_id in STUDY.pending],
        unsupported=[RESULTS.run(run_id).record for run_id in STUDY.unsupported],
    params:
        digest=STUDY.plan_digest,
    log:
        "logs/plan.log",
    localrule: True
    script:
        "../scripts/plan.py"
