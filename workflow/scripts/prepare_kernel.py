"""Fetches one kernel of the hub that a recipe names."""

from finetune_study import hub_kernel
from finetune_study.scripting import opened

with opened(snakemake) as study:
    name = snakemake.wildcards.kernel
    hub_kernel.prepare(name, study.results.kernel(name))
