# Comparisons, recommendations, and the page.


rule aggregate:
    input:
        RESULTS.outcomes_parquet,
    output:
        comparisons=RESULTS.comparisons,
        recommendations=RESULTS.recommendations,
    log:
        "logs/aggregate.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        baseline=STUDY.config.report.baseline,
    script:
        "../scripts/aggregate.py"


rule report:
    input:
        outcomes=RESULTS.outcomes_parquet,
        comparisons=RESULTS.comparisons,
        recommendations=RESULTS.recommendations,
    output:
        RESULTS.report,
    log:
        "logs/report.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        report=STUDY.config.report.model_dump(),
    script:
        "../scripts/report.py"
