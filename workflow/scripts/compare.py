"""Two studies are compared: what got better or worse beyond the noise."""

from pathlib import Path

from finetune_study import changes
from finetune_study.scripting import opened

with opened(snakemake):
    found = changes.of_files(Path(snakemake.params.now), Path(snakemake.input.earlier))
    print(changes.text(found))
    changes.write(found, Path(snakemake.output[0]))
    print(f"every change: {Path(snakemake.output[0]).absolute()}")
