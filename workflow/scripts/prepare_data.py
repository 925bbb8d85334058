"""Tokenises the data for one tokenizer and context length."""

from finetune_study import data
from finetune_study.scripting import opened

with opened(snakemake) as study:
    key = snakemake.wildcards.data_key
    run = study.data_run(key)
    data.prepare(run, run.num_train_samples, study.results.model(run.tokenizer_key), study.results.data(key))
