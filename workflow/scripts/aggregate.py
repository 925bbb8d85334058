"""Outcomes become comparisons and recommendations."""

from finetune_study import recommend
from finetune_study.scripting import opened

with opened(snakemake) as study:
    recommend.aggregate(study.config, list(study.planned.values()), study.results)
