# One job per run. A record that exists is a source file: STUDY.pending_pattern keeps this rule from making it again.


rule finetune:
    input:
        plan=get_plan,
        model=ancient(get_model_of_run),
        data=ancient(get_data_of_run),
        request=get_request,
    output:
        # update(): a record that came by another way since the start is not deleted, and launch leaves it as it is.
        update(RESULTS.run("{run_id}").record),
    log:
        RESULTS.run("{run_id}").log,
    wildcard_constraints:
        run_id=STUDY.pending_pattern,
    conda:
        "../../envs/training.yaml"
    # Runs that share a machine would measure each other.
    threads: workflow.cores
    params:
        python=get_python,
        run=get_run_file,
        time_limit_minutes=STUDY.config.protocol.time_limit_minutes,
        memory_snapshot=(
            "--memory-snapshot" if STUDY.config.protocol.memory_snapshot else ""
        ),
    shell:
        "rm -f {input.request:q};"
        " {params.python:q} -m finetune_study.launch {params.run:q} --if-needed"
        " --time-limit-minutes {params.time_limit_minutes} {params.memory_snapshot}"
