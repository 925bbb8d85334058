# Fetches model and data where there is a network, before any GPU is held. `snakemake prepare` does that alone, for where
# jobs are submitted from a place without one.


rule prepare_model:
    output:
        RESULTS.model("{model_key}") / "manifest.json",
    log:
        "logs/prepare_model/{model_key}.log",
    # Bad data are found before a device is held.
    priority: 10
    localrule: True
    conda:
        "../../envs/controller.yaml"
    script:
        "../scripts/prepare_model.py"


rule prepare_data:
    input:
        tokenizer=ancient(get_tokenizer_of_data),
        file=get_data_file,
    output:
        RESULTS.data("{data_key}") / "manifest.json",
    log:
        "logs/prepare_data/{data_key}.log",
    # Bad data are found before a device is held.
    priority: 10
    localrule: True
    conda:
        "../../envs/controller.yaml"
    script:
        "../scripts/prepare_data.py"


rule prepare:
    input:
        RESULTS.plan,
        STUDY.lost_files,
        get_prepared,
