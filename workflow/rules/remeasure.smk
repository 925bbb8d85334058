# The one way to measure a recorded run again: snakemake remeasure --config remeasure='<run_id or pattern>'


rule request_remeasure:
    output:
        RESULTS.run("{run_id}").request("{number}"),
    log:
        "logs/request_remeasure/{run_id}-{number}.log",
    wildcard_constraints:
        number=r"\d+",
    localrule: True
    conda:
        "../../envs/controller.yaml"
    script:
        "../scripts/request_remeasure.py"


rule remeasure:
    input:
        get_remeasured,
        RESULTS.report,
        STUDY.lost_files,
