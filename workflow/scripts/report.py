"""Builds the page and its figures."""

from finetune_study import cells, report
from finetune_study.scripting import opened

with opened(snakemake) as study:
    frame = cells.of_outcomes(list(study.planned.values()), study.results)
    report.build(study.config, frame, study.results, study.options)
