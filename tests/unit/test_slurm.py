import subprocess
from pathlib import Path
from typing import Any

import pytest

from finetune_study import slurm, study
from finetune_study.config import Hardware, Protocol, Slurm, Software
from finetune_study.errors import ConfigError
from finetune_study.paths import Results
from finetune_study.run import Run
from snakemake_executor_plugin_submitit.resources import sbatch_options
from tests.unit import handmade


def a_run(num_gpus: int = 1, nodes: int = 1, **hardware: Any) -> Run:
    entry = {"memory_gib": 80, "max_gpus": 8, **hardware}
    block = {"targets": "tiny", "hardware": "it", "recipes": "full", "sequence_length": 128}
    block |= {"num_gpus": num_gpus, "nodes": nodes}
    return handmade.planned(handmade.study(hardware={"it": entry}, grid=[block]))[0].run


def resources(num_gpus: int = 1, nodes: int = 1, minutes: float = 30.0, **hardware: Any) -> dict[str, Any]:
    """What a run on this hardware entry asks for; what it leaves to the cluster is left out."""
    entry = {"memory_gib": 80, "max_gpus": 8, **hardware}
    run = a_run(num_gpus, nodes, **hardware)
    asked = slurm.resources(run, Hardware.model_validate(entry), Protocol(time_limit_minutes=minutes), "it-abc")
    assert (asked.pop("job_name"), asked.pop("submit_kind"), asked.pop("unfit_node_status")) == (
        run.run_id,
        "it-abc",
        69,
    )
    return {name: value for name, value in asked.items() if value is not None}


def test_an_entry_that_says_nothing_leaves_all_to_the_cluster() -> None:
    assert resources() == {"nodes": 1, "gres": "gpu:1", "cpus_per_task": 8, "runtime": 45}


def test_all_that_can_be_asked_for() -> None:
    asked = {
        "partition": "a100",
        "account": "lab",
        "qos": "long",
        "constraint": "nvlink&80gb",
        "gpu_model": "a100",
        "cpus_per_gpu": 6,
        "mem_gib_per_gpu": 62.5,
        "startup_minutes": 1,
        "max_job_minutes": 480,
        "extra": "--reservation='gpu week'",
    }
    assert resources(4, slurm=asked) == {
        "slurm_partition": "a100",
        "slurm_account": "lab",
        "qos": "long",
        "constraint": "nvlink&80gb",
        "nodes": 1,
        "gres": "gpu:a100:4",
        "cpus_per_task": 24,
        "mem": 256_000,
        "runtime": 36,
        "slurm_extra": "--reservation='gpu week'",
        "max_job_minutes": 480,
    }


def test_a_cpu_asks_for_no_gpu_but_a_stand_in_does() -> None:
    assert "gres" not in resources(device="cpu")
    assert resources(2, device="cpu", slurm={"gpu_model": "v100", "stand_in": True})["gres"] == "gpu:v100:2"


@pytest.mark.parametrize(("limit", "startup", "minutes"), [(5, 0, 10), (0.1, 0.2, 6), (4.5, 0.5, 10), (4.5, 0.6, 11)])
def test_slurms_limit_comes_after_the_runs_own(limit: float, startup: float, minutes: int) -> None:
    assert resources(minutes=limit, slurm={"startup_minutes": startup})["runtime"] == minutes
    assert minutes >= limit + startup + slurm.MARGIN_MINUTES


def test_a_job_that_packs_runs_must_hold_one(raw: dict[str, Any], tmp_path: Path) -> None:
    """30 minutes of a run, 10 of start-up and the margin of 5 are 45."""
    raw["protocol"]["time_limit_minutes"] = 30
    raw["hardware"]["cpu"]["slurm"] = {"max_job_minutes": 44}
    with pytest.raises(ConfigError) as caught:
        study.open_study(raw, Results(tmp_path))
    for words in (
        "A job of 44 minutes",
        "may take 45",
        "hardware.cpu.slurm.max_job_minutes",
        "at least 45",
        "raise it",
    ):
        assert words in str(caught.value)
    raw["hardware"]["cpu"]["slurm"] = {"max_job_minutes": 45}
    study.open_study(raw, Results(tmp_path))
    raw["hardware"]["spare"] = {"memory_gib": 80, "slurm": {"max_job_minutes": 1}}
    study.open_study(raw, Results(tmp_path))


def test_runs_are_of_one_kind_where_they_fail_alike(raw: dict[str, Any], tmp_path: Path) -> None:
    """One kind for all runs of an entry; another for another entry, another software, or a mended one."""
    raw["hardware"]["other"] = raw["hardware"]["cpu"] | {"price_usd_per_gpu_hour": 1.0}
    raw["grid"][0]["hardware"] = ["cpu", "other"]
    opened = study.open_study(raw, Results(tmp_path))
    kinds = {run_id: str(opened.slurm_resources(run_id)["submit_kind"]) for run_id in opened.planned}
    assert len(kinds) == 4
    assert len(set(kinds.values())) == 2
    assert all(kind.startswith("cpu-" if "_cpux" in run_id else "other-") for run_id, kind in kinds.items())

    python = tmp_path / "venv" / "bin" / "python"
    entry = Hardware(memory_gib=80, software=Software(python=str(python)))
    before = slurm.submit_kind("it", entry)
    assert before == slurm.submit_kind("it", entry.model_copy(update={"price_usd_per_gpu_hour": 2.0}))
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "finetune-study.lock").write_text("torch==2.13.0\n")
    assert slurm.submit_kind("it", entry) != before


def test_several_nodes_are_asked_for_node_by_node() -> None:
    asked = {"gpu_model": "a100", "cpus_per_gpu": 6, "mem_gib_per_gpu": 62.5}
    one, two = resources(4, slurm=asked), resources(8, 2, slurm=asked)
    assert two == one | {"nodes": 2, "tasks_per_node": 1}
    assert "tasks_per_node" not in one
    options = sbatch_options({**two, "mem_mb": two["mem"]}, threads=1)
    assert {name: options[name] for name in ("nodes", "ntasks-per-node", "cpus-per-task", "gres", "mem")} == {
        "nodes": 2,
        "ntasks-per-node": 1,
        "cpus-per-task": 24,
        "gres": "gpu:a100:4",
        "mem": "256000M",
    }


def command(run: Run, python: str, folder: Path, **variables: str) -> list[str]:
    """Words that reach `srun`, or Python, when the shell runs a launcher's command so."""
    words = folder / "words"
    for name in ("srun", "python"):
        path = folder / name
        path.write_text(f'#!/bin/bash\nprintf "%s\\n" "$0" "$@" > {words}\n[ "$1" != --fail ] || exit 7\n')
        path.chmod(0o755)
    shell = slurm.on_each_node(run, Hardware(memory_gib=80, slurm=Slurm(cpus_per_gpu=3)), python)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", **variables}
    subprocess.run(["bash", "-euc", f"{shell} -m launch \"it's here\" '$HOME'"], env=environment, check=True)
    return words.read_text().splitlines()


def test_a_launcher_is_called_on_each_node_in_a_job_and_here_otherwise(tmp_path: Path) -> None:
    modules = tmp_path / "load.sh"
    modules.write_text("set +eu\nset --\n")  # as load_modules.sh does
    two, python = a_run(4, 2), f". {modules} a b && python"
    arguments = ["-m", "launch", "it's here", "$HOME"]
    assert command(two, python, tmp_path) == [str(tmp_path / "python"), *arguments]
    name, *words = command(two, python, tmp_path, SLURM_JOB_ID="7")
    assert name == str(tmp_path / "srun")
    assert words[:3] == ["--nodes=2", "--ntasks=2", "--ntasks-per-node=1"]
    assert "--cpus-per-task=6" in words
    assert words[-7:] == ["bash", str(slurm.ON_NODE), python, *arguments]
    assert slurm.on_each_node(a_run(4), Hardware(memory_gib=80), python) == python


def test_what_is_called_on_a_node_gets_its_signals_and_gives_its_status(tmp_path: Path) -> None:
    """SLURM signals the first process of a step alone."""
    waits = tmp_path / "waits.sh"
    waits.write_text("trap 'echo ended; exit 3' TERM; echo ready; while :; do sleep 0.05; done\n")
    process = subprocess.Popen(
        ["bash", str(slurm.ON_NODE), f"true && bash {waits}"], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.terminate()
    assert process.communicate(timeout=30)[0] == "ended\n"
    assert subprocess.run(["bash", str(slurm.ON_NODE), "bash -c", "exit 7"]).returncode == 7
