"""Sets a run's record aside and asks for a new one."""

from pathlib import Path

from finetune_study.scripting import opened
from finetune_study.study import set_aside

with opened(snakemake) as study:
    set_aside(study.results.run(snakemake.wildcards.run_id), int(snakemake.wildcards.number))
    Path(snakemake.output[0]).touch()
