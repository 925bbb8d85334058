apptainer exec --nv --bind "$PWD" --pwd "$PWD" '/images/a b.sif' python -m finetune_study.launch results/runs/a/run.yaml
