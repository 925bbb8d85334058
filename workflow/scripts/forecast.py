"""What every run will need, and the bill."""

from finetune_study.forecast import study as forecast
from finetune_study.scripting import opened

with opened(snakemake) as study:
    print(forecast.table(forecast.write(study)))
