# What every run will need, before a GPU is held: memory, time, cost. Traced on fake tensors, one batch job.


rule forecast:
    input:
        plan=RESULTS.plan,
        calibrations=get_calibrations,
    output:
        RESULTS.forecast,
        RESULTS.forecast_parquet,
        RESULTS.forecast_csv,
    log:
        "logs/forecast.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        version=FORECAST_VERSION,
        # Where Snakemake has forgotten what plan.json was made of, it takes another study's for this one's.
        plan=STUDY.plan_digest,
        prices=STUDY.prices,
        margin=STUDY.config.protocol.skip_predicted_oom,
        # Records that the plan gives without training say nothing that a forecast could learn from.
        measured=len(STUDY.recorded) - len(STUDY.without_training),
    script:
        "../scripts/forecast.py"
