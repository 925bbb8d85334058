# Rates that each hardware entry really reaches, in one short job on as many devices as its largest run:
# snakemake calibrate. Forecasts made afterwards count with them.


rule calibrate_hardware:
    output:
        RESULTS.calibration("{hardware}"),
    log:
        "logs/calibrate/{hardware}.log",
    conda:
        "../../envs/training.yaml"
    threads: get_calibration_threads
    resources:
        slurm_partition=calibration_resource("slurm_partition"),
        slurm_account=calibration_resource("slurm_account"),
        qos=calibration_resource("qos"),
        constraint=calibration_resource("constraint"),
        nodes=calibration_resource("nodes"),
        gres=calibration_resource("gres"),
        cpus_per_task=calibration_resource("cpus_per_task"),
        mem=calibration_resource("mem"),
        runtime=15,
        slurm_extra=calibration_resource("slurm_extra"),
    params:
        interpreter=get_calibration_interpreter,
        device=get_calibration_device,
        num_gpus=get_calibration_gpus,
    shell:
        "{params.interpreter} -m finetune_study.calibrate --device {params.device} --num-gpus {params.num_gpus}"
        " {output:q} > {log:q} 2>&1"


rule calibrate:
    input:
        [RESULTS.calibration(name) for name in STUDY.largest_runs],
