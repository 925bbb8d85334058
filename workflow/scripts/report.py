"""Builds the page and its figures."""

from finetune_study import report
from finetune_study.scripting import opened

with opened(snakemake) as study:
    report.build(study.config, list(study.planned.values()), study.results)
