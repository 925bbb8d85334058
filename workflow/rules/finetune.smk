# One job per run. A record that exists is a source file: STUDY.pending_pattern keeps this rule from making it again.


# The plan gives a run that an easier one decides its record.
ruleorder: plan > finetune


rule finetune:
    input:
        plan=get_plan,
        model=ancient(get_model_of_run),
        data=ancient(get_data_of_run),
        ops=ancient(get_ops_of_run),
        request=get_request,
    output:
        # update(): a record that came by another way since the start is not deleted, and launch leaves it as it is.
        update(RESULTS.run("{run_id}").record),
    log:
        RESULTS.run("{run_id}").log,
    wildcard_constraints:
        run_id=STUDY.pending_pattern,
    priority: get_priority
    conda:
        "../../envs/training.yaml"
    threads: get_threads
    # Read where jobs are submitted; each comes from the run's hardware entry (src/finetune_study/slurm.py).
    resources:
        job_name=slurm_resource("job_name"),
        slurm_partition=slurm_resource("slurm_partition"),
        slurm_account=slurm_resource("slurm_account"),
        qos=slurm_resource("qos"),
        constraint=slurm_resource("constraint"),
        nodes=slurm_resource("nodes"),
        tasks_per_node=slurm_resource("tasks_per_node"),
        gres=slurm_resource("gres"),
        cpus_per_task=slurm_resource("cpus_per_task"),
        mem=slurm_resource("mem"),
        runtime=slurm_resource("runtime"),
        slurm_extra=slurm_resource("slurm_extra"),
        max_job_minutes=slurm_resource("max_job_minutes"),
        submit_kind=slurm_resource("submit_kind"),
        unfit_node_status=slurm_resource("unfit_node_status"),
    params:
        interpreter=get_interpreter,
        run=get_run_file,
        allocation=get_allocation,
        places=get_places,
        time_limit_minutes=STUDY.config.protocol.time_limit_minutes,
        infer_oom=get_infer_oom,
        memory_snapshot=(
            "--memory-snapshot" if STUDY.config.protocol.memory_snapshot else ""
        ),
    shell:
        "rm -f {input.request:q};"
        " {params.interpreter} -m finetune_study.launch {params.run:q} --if-needed"
        " --time-limit-minutes {params.time_limit_minutes} --allocation {params.allocation:q}"
        " {params.infer_oom} {params.memory_snapshot} {params.places}"
