"""Writes the plan, the runs to be trained, and the records of those that can't run here."""

from finetune_study.scripting import opened
from finetune_study.study import write_plan

with opened(snakemake) as study:
    write_plan(study)
    print(study.summary())
