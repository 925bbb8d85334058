APPTAINER_CACHEDIR="${APPTAINER_CACHEDIR:-$HOME/scratch/$USER/apptainer}" apptainer exec --nv --bind "$PWD" --pwd "$PWD" docker://site/image:1 python -m finetune_study.launch results/runs/a/run.yaml
