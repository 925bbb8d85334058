"${CONDA_EXE:-conda}" run --no-capture-output -p '/envs/a b' python -m finetune_study.launch results/runs/a/run.yaml
