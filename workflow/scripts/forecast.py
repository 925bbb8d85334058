"""What every run will need, and the bill."""

import shutil

from finetune_study.forecast import show
from finetune_study.forecast import study as forecast
from finetune_study.scripting import opened

with opened(snakemake) as study:
    print(show.table(forecast.write(study), shutil.get_terminal_size((160, 24)).columns))
