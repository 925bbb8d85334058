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


# One label each: Snakemake's page makes a switch of a second one that has two values, and breaks where not every result
# has both.
rule report:
    input:
        outcomes=RESULTS.outcomes_parquet,
        comparisons=RESULTS.comparisons,
        recommendations=RESULTS.recommendations,
        earlier=get_earlier_outcomes,
    output:
        page=report(
            RESULTS.report,
            caption="../report/page.rst",
            category="Report",
            labels={"part": "the page (HTML)"},
        ),
        summary=report(
            RESULTS.summary,
            caption="../report/summary.rst",
            category="Report",
            labels={"part": "summary to paste (Markdown)"},
        ),
        figures=report(
            directory(RESULTS.figures),
            patterns=["{kind,[a-z]+}_{of}.svg"],
            caption="../report/figures.rst",
            category="Figures",
            subcategory="{kind}",
            labels={"figure": "{kind} of {of}"},
        ),
        tables=report(
            directory(RESULTS.tables),
            patterns=["{table}.csv"],
            caption="../report/tables.rst",
            category="Tables",
            labels={"table": "{table}"},
        ),
    log:
        "logs/report.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        report=STUDY.config.report.model_dump(),
        config_files=CONFIG_FILES,
    script:
        "../scripts/report.py"


# snakemake compare --config earlier=<outcomes.parquet of another study>
# It reads two files as they lie there, and trains nothing: as an input, the study's own would ask for every record.
rule compare:
    input:
        earlier=get_earlier_for_compare,
    output:
        report(
            RESULTS.changes,
            caption="../report/changes.rst",
            category="Tables",
            labels={"table": "changes"},
        ),
    log:
        "logs/compare.log",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    params:
        now=get_outcomes_there,
        digest=get_digest_of_outcomes,
    script:
        "../scripts/compare.py"
