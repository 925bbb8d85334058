"""Fetches or draws up one model."""

from finetune_study import model_source
from finetune_study.scripting import opened

with opened(snakemake) as study:
    key = snakemake.wildcards.model_key
    model_source.prepare(study.model(key), study.results.model(key))
