# Records become rows; a change here runs no GPU job.


rule extract_metrics:
    input:
        plan=RESULTS.plan,
        records=get_records,
    output:
        parquet=RESULTS.outcomes_parquet,
        csv=RESULTS.outcomes_csv,
    log:
        "logs/extract_metrics.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        version=METRICS_VERSION,
        prices=STUDY.prices,
    script:
        "../scripts/extract_metrics.py"
