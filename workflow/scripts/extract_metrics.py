"""Records become outcomes."""

from finetune_study import outcome
from finetune_study.scripting import opened

with opened(snakemake) as study:
    outcome.write(study.results, study.planned, study.config.hardware)
