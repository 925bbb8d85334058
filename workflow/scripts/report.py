"""Builds the page and its figures."""

from finetune_study import cells, report
from finetune_study.scripting import opened
from finetune_study.study import as_planned

with opened(snakemake, as_planned) as study:
    frame = cells.of_outcomes(list(study.planned.values()), study.results)
    report.build(study.config, frame, study.results, study.options)
