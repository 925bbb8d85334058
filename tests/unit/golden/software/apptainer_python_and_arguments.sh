apptainer exec --nv --bind "$PWD" --pwd "$PWD" --bind '/scratch $USER' /images/gpu.sif /opt/env/bin/python -m finetune_study.launch results/runs/a/run.yaml
