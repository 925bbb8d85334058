"""Who may know whom."""

import subprocess
import sys

import pytest

TORCH = ("torch", "transformers", "peft", "deepspeed", "datasets")
WORKFLOW = ("snakemake", "submitit", "snakemake_executor_plugin_submitit")


@pytest.mark.parametrize(
    ("modules", "strangers"),
    [
        ("launch, allocation, places, after_kill, before_submit, implied", (*TORCH, *WORKFLOW, "polars", "vl_convert")),
        ("train, model, data, variables, measure.steps, measure.memory, measure.flops, measure.environment", WORKFLOW),
        ("report, table, recommend, cells, outcome, ratio, claims, changes, status, export", (*TORCH, *WORKFLOW)),
        ("doctor.node, doctor.command", (*TORCH, *WORKFLOW, "polars", "vl_convert")),
        ("forecast.predict, forecast.study, forecast.hardware", (*TORCH, *WORKFLOW, "vl_convert")),
        ("forecast.trace", ("deepspeed", "datasets", *WORKFLOW)),
        ("config, plan, study, slurm, software, techniques", (*TORCH, *WORKFLOW, "vl_convert")),
    ],
)
def test_modules_do_not_know(modules: str, strangers: tuple[str, ...]) -> None:
    names = ", ".join(f"finetune_study.{name.strip()}" for name in modules.split(","))
    code = f"import {names}, sys; print([name for name in {strangers!r} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
