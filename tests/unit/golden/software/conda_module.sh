. <load_modules.sh> miniconda && "${CONDA_EXE:-conda}" run --no-capture-output -n gpu python -m finetune_study.launch results/runs/a/run.yaml
