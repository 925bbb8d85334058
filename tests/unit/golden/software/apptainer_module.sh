. <load_modules.sh> apptainer/1.3 && apptainer exec --nv --bind "$PWD" --pwd "$PWD" /images/gpu.sif python -m finetune_study.launch results/runs/a/run.yaml
