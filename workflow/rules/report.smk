# Comparisons, recommendations, and the page.


rule aggregate:
    input:
        RESULTS.outcomes_parquet,
    output:
        comparisons=RESULTS.comparisons,
        recommendations=RESULTS.recommendations,
    params:
        baseline=STUDY.config.report.baseline,
    log:
        "logs/aggregate.log",
    localrule: True
    script:
        "../scripts/aggregate.py"


rule report:
    input:
        outcomes=RESULTS.outcomes_parquet,
        comparisons=RESULTS.comparisons,
        recommendations=RESULTS.recommendations,
    output:
        RESULTS.report,
    params:
        report=STUDY.config.report.model_dump(),
    log:
        "logs/report.log",
    localrule: True
    script:
        "../scripts/report.py"
