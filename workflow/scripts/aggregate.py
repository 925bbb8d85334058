"""Outcomes become comparisons and recommendations."""

from finetune_study import recommend
from finetune_study.scripting import opened
from finetune_study.study import as_planned

with opened(snakemake, as_planned) as study:
    recommend.aggregate(study.config, list(study.planned.values()), study.results)
