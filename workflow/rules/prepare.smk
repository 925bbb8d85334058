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


rule prepare_kernel:
    output:
        RESULTS.kernel("{kernel}"),
    log:
        "logs/prepare_kernel/{kernel}.log",
    priority: 10
    localrule: True
    conda:
        "../../envs/controller.yaml"
    script:
        "../scripts/prepare_kernel.py"


# On a node of the hardware entry: an op depends on its processor and on the software there.
rule prepare_op:
    input:
        plan=ancient(RESULTS.plan),
    output:
        RESULTS.op("{hardware}", "{op}"),
    log:
        "logs/prepare_op/{hardware}-{op}.log",
    priority: 10
    conda:
        "../../envs/training.yaml"
    resources:
        slurm_partition=op_resource("slurm_partition"),
        slurm_account=op_resource("slurm_account"),
        qos=op_resource("qos"),
        constraint=op_resource("constraint"),
        nodes=1,
        gres=op_resource("gres"),
        cpus_per_task=op_resource("cpus_per_task"),
        mem=op_resource("mem"),
        runtime=get_minutes_of_op,
        slurm_extra=op_resource("slurm_extra"),
    params:
        interpreter=get_interpreter_of_op,
        run=get_run_file_of_op,
        places=get_places_of_op,
    shell:
        "{params.interpreter} -m finetune_study.compiled {params.run:q} {wildcards.op:q} {output:q} {params.places}"
        " > {log:q} 2>&1"


rule prepare:
    input:
        RESULTS.plan,
        STUDY.lost_files,
        get_prepared,
