"""A job gets of SLURM what its resources say, in options of sbatch that can be read here, and on the cluster."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.resources import OURS, extra_options, sbatch_options
from snakemake_executor_plugin_submitit.script import NODES_TMPDIR, batch_script, job_script
from snakemake_executor_plugin_submitit.slurm import submission_text
from tests.slurm.cluster import queue, wait_for
from tests.slurm.place import UNTIL_GO, Place

GOLDEN = Path(__file__).parent / "golden"
RENEW = "RENEW_GOLDEN"
"""This environment variable lets the golden files be written."""

ONE_TASK = {"ntasks": 1, "nodes": 1}
ONE_CPU = {"cpus-per-task": 1}


# --- resources become options ----------------------------------------------------------------------------------------


def test_job_without_resources_asks_for_one_task_on_one_node() -> None:
    assert sbatch_options({}, 1) == {**ONE_TASK, **ONE_CPU}


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({"slurm_partition": "v100"}, {"partition": "v100"}),
        ({"slurm_account": "lab"}, {"account": "lab"}),
        ({"qos": "short"}, {"qos": "short"}),
        ({"constraint": "nvlink&ib"}, {"constraint": "nvlink&ib"}),
        ({"clusters": "one,two"}, {"clusters": "one,two"}),
        ({"cluster": "one"}, {"clusters": "one"}),
        ({"slurm_cluster": "one"}, {"clusters": "one"}),
        ({"runtime": 90}, {"time": 90}),
        ({"mem_mb": 2000}, {"mem": "2000M"}),
        ({"mem_mb": 0}, {"mem": "0M"}),  # all that the node has
        ({"mem_mb_per_cpu": 500}, {"mem-per-cpu": "500M"}),
        ({"mem_mb_per_cpu": 500, "mem_mb": 2000}, {"mem-per-cpu": "500M"}),
        ({"gres": "gpu:2"}, {"gres": "gpu:2"}),
        ({"gres": "gpu"}, {"gres": "gpu"}),
        ({"gres": "gpu:a100:2"}, {"gres": "gpu:a100:2"}),
        ({"gres": "gpu:a100:2,tmp:20G"}, {"gres": "gpu:a100:2,tmp:20G"}),
        ({"gpu": 2}, {"gpus": "2"}),
        ({"gpu": 0}, {}),
        ({"gpu_model": "a100"}, {"gpus": "a100:1"}),
        ({"gpu": 4, "gpu_model": "a100"}, {"gpus": "a100:4"}),
        ({"gpu": 4, "gpu_model": "nvidia_a100_1g.5gb"}, {"gpus": "nvidia_a100_1g.5gb:4"}),
        ({"disk_mb": 1000, "tmpdir": "/tmp", "mem_mib": 100, "anything": "else"}, {}),
        ({"slurm_partition": None, "mem_mb": None, "gpu": None, "gres": None, "nodes": None}, {}),
    ],
)  # fmt: skip
def test_resource_is_an_option(resources: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    assert sbatch_options(resources, 1) == {**options, **ONE_TASK, **ONE_CPU}


@pytest.mark.parametrize(
    ("resources", "options"),
    [
        ({"tasks": 4}, {"ntasks": 4}),
        ({"tasks": 4, "mpi": "srun"}, {"ntasks": 4}),
        ({"tasks": 4, "nodes": 2}, {"ntasks": 4, "nodes": 2}),
        ({"nodes": 2}, {"ntasks": 1, "nodes": 2}),
        ({"tasks_per_node": 8, "nodes": 2, "mpi": "srun"}, {"ntasks-per-node": 8, "nodes": 2}),
        ({"tasks_per_node": 8}, {"ntasks-per-node": 8}),
        ({"tasks_per_gpu": 1, "gpu": 4}, {"gpus": "4", "ntasks-per-gpu": 1}),
        ({"tasks_per_gpu": 1, "gres": "gpu:4"}, {"gres": "gpu:4", "ntasks-per-gpu": 1}),
        ({"tasks_per_gpu": 1}, {}),  # without a GPU it says nothing
        ({"gpu": 12}, {"gpus": "12", **ONE_TASK}),
        ({"gpu": 12, "nodes": 2}, {"gpus": "12", "ntasks": 1, "nodes": 2}),
    ],
)
def test_tasks_and_nodes(resources: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    assert sbatch_options(resources, 1) == {**options, **ONE_CPU}


@pytest.mark.parametrize(
    ("resources", "threads", "options"),
    [
        ({}, 4, {"cpus-per-task": 4}),
        ({"cpus_per_task": 6}, 4, {"cpus-per-task": 6}),
        ({"cpus_per_task": 0}, 4, {"cpus-per-task": 1}),
        ({"cpus_per_task": -1}, 4, {}),
        ({"cpus_per_gpu": 8}, 4, {"cpus-per-task": 4}),  # no GPU
    ],
)
def test_cpus_are_the_threads_unless_said_otherwise(
    resources: Mapping[str, Any], threads: int, options: Mapping[str, Any]
) -> None:
    assert sbatch_options(resources, threads) == {**ONE_TASK, **options}


def test_cpus_per_gpu_takes_the_place_of_threads() -> None:
    assert sbatch_options({"gpu": 2, "cpus_per_gpu": 8}, 4) == {"gpus": "2", "cpus-per-gpu": 8, **ONE_TASK}
    assert sbatch_options({"gres": "gpu:2", "cpus_per_gpu": -1}, 4) == {"gres": "gpu:2", **ONE_TASK}
    assert sbatch_options({"gpu": 2, "cpus_per_gpu": 8, "cpus_per_task": 3}, 4)["cpus-per-task"] == 3


WHOLE = "it must be a whole number of at least"
GRES = "it must look like `gpu`, `gpu:2` or `gpu:a100:2`"


@pytest.mark.parametrize(
    ("resources", "message"),
    [
        ({"mem_mb": "lots"}, f"The resource `mem_mb` is 'lots'; {WHOLE} 0."),
        ({"mem_mb": -1}, f"The resource `mem_mb` is -1; {WHOLE} 0."),
        ({"mem_mb_per_cpu": -5}, f"The resource `mem_mb_per_cpu` is -5; {WHOLE} 1."),
        ({"nodes": 0}, f"The resource `nodes` is 0; {WHOLE} 1."),
        ({"nodes": True}, f"The resource `nodes` is True; {WHOLE} 1."),
        ({"tasks": 0}, f"The resource `tasks` is 0; {WHOLE} 1."),
        ({"tasks_per_node": 1.5}, f"The resource `tasks_per_node` is 1.5; {WHOLE} 1."),
        ({"tasks_per_gpu": 0, "gpu": 1}, f"The resource `tasks_per_gpu` is 0; {WHOLE} 1."),
        ({"gpu": -1}, f"The resource `gpu` is -1; {WHOLE} 0."),
        ({"gpu": "two"}, f"The resource `gpu` is 'two'; {WHOLE} 0."),
        ({"cpus_per_task": "many"}, "The resource `cpus_per_task` is 'many'; it must be a whole number."),
        ({"cpus_per_gpu": "many", "gpu": 1}, "The resource `cpus_per_gpu` is 'many'; it must be a whole number."),
        ({"gres": "gpu:"}, f"The resource `gres` is 'gpu:'; {GRES} (a number may end in T, G or M)."),
        ({"gres": "--gpus=2"}, f"The resource `gres` is '--gpus=2'; {GRES} (a number may end in T, G or M)."),
        ({"gpu_model": "a100:2"},
         "The resource `gpu_model` is 'a100:2'; it must be a name as in `sinfo -o %G`, as `a100`."),
        ({"tasks": 2, "tasks_per_node": 2}, "Give either the resource `tasks` or `tasks_per_node`, not both."),
        ({"mpi": "srun"}, "The resource `mpi` needs `tasks` or `tasks_per_node`."),
    ],
)  # fmt: skip
def test_impossible_value_is_refused_with_what_is_allowed(resources: Mapping[str, Any], message: str) -> None:
    with pytest.raises(WorkflowError) as refused:
        sbatch_options(resources, 1)
    assert str(refused.value) == message


# --- slurm_extra -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (None, []),
        ("", []),
        ("--exclusive", ["--exclusive"]),
        ("--mail-type=END --mail-user 'me@lab'", ["--mail-type=END", "--mail-user", "me@lab"]),
        ("--comment='two words' --nice=100", ["--comment=two words", "--nice=100"]),
        ("--gpus-per-node=2 --gpus-per-task=1", ["--gpus-per-node=2", "--gpus-per-task=1"]),
        ("--mem-bind=local --nodelist=a100-1", ["--mem-bind=local", "--nodelist=a100-1"]),
        ("-H", ["-H"]),
    ],
)
def test_slurm_extra_is_split_as_a_shell_does(extra: str | None, words: list[str]) -> None:
    assert extra_options({"slurm_extra": extra}) == words


@pytest.mark.parametrize("option", sorted(OURS))
def test_slurm_extra_may_not_hold_what_has_a_resource(option: str) -> None:
    dashed = f"-{option}" if len(option) == 1 else f"--{option}"
    resource = OURS[option]
    instead = f"use the resource `{resource}` instead." if resource else "the executor sets it itself."
    for words in (dashed, f"{dashed}=1", f"--exclusive {dashed} 1"):
        with pytest.raises(WorkflowError, match="slurm_extra") as refused:
            extra_options({"slurm_extra": words})
        assert str(refused.value).endswith(instead)


# --- what is written -------------------------------------------------------------------------------------------------

JOBS: Mapping[str, tuple[Mapping[str, Any], int]] = {
    "cpu": ({"slurm_partition": "cpu", "runtime": 30, "mem_mb": 2000}, 4),
    "gres": ({"slurm_partition": "a100", "runtime": 120, "mem_mb": 32000, "gres": "gpu:a100:2", "cpus_per_gpu": 8}, 1),
    "gpu_model": ({"slurm_account": "lab", "runtime": 120, "gpu": 4, "gpu_model": "a100", "cpus_per_task": 16}, 1),
    "mpi": ({"runtime": 600, "nodes": 2, "tasks_per_node": 16, "mpi": "srun", "mem_mb_per_cpu": 500}, 1),
    "array": ({"slurm_partition": "a100", "runtime": 120, "gres": "gpu:a100:2"}, 1),
    "all_options": ({"slurm_partition": "a100,v100", "slurm_account": "lab", "qos": "short", "clusters": "one",
                     "constraint": "nvlink&(ib|roce)", "nodes": 1, "gres": "gpu:1,tmp:20G", "cpus_per_task": -1}, 1),
}  # fmt: skip
"""Resources and threads of typical jobs."""

LEDGER = Path("/study/.snakemake/auxiliary/submitit")
SUBMISSION, BATCH = LEDGER / "jobs" / "0123456789abcdef", LEDGER / "batches" / "fedcba9876543210"


def _is_golden(name: str, text: str) -> None:
    path = GOLDEN / name
    if os.environ.get(RENEW):
        GOLDEN.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.exists(), f"{path} is not there; if {name} is meant to be new: {RENEW}=1 pytest {__file__}"
    assert text == path.read_text(encoding="utf-8"), (
        f"{path} differs; if it is meant to, renew it: {RENEW}=1 pytest {__file__}"
    )


@pytest.mark.parametrize("job", JOBS)
def test_submission_file_is_the_golden_one(job: str) -> None:
    resources, threads = JOBS[job]
    options = {**sbatch_options(resources, threads), "job-name": f"train_{job}"}
    if job == "array":
        options["array"] = "0-19"
    _is_golden(f"{job}.sbatch.sh", submission_text(BATCH, options, f"exec bash {BATCH}/batch.sh"))


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("direct", {"inputs": ["data/a b.txt", "it's.txt"], "removed": ["results/model", "-odd"],
                    "shell": "/usr/bin/bash", "exports": {"OMP_NUM_THREADS": "4", "MKL_NUM_THREADS": "4"},
                    "tmpdir": NODES_TMPDIR}),
        ("tmpdir", {"inputs": [], "removed": [], "shell": "/bin/sh", "exports": {}, "tmpdir": "/scratch/it's mine"}),
        ("shared", {"inputs": [], "removed": [], "shell": "/bin/bash", "exports": {}, "tmpdir": NODES_TMPDIR,
                    "is_alone": False, "limit_minutes": 20}),
        ("snakemake_in_job", {"inputs": [], "removed": [], "shell": "/bin/bash", "exports": {}}),
    ],
)  # fmt: skip
def test_job_script_is_the_golden_one(name: str, arguments: Mapping[str, Any]) -> None:
    text = job_script(
        name="train_a100",
        folder=SUBMISSION,
        ended=LEDGER / "ended" / SUBMISSION.name,
        workdir=Path("/study"),
        latency_wait=5,
        restart_limit=3,
        **arguments,
    )
    _is_golden(f"{name}.job.sh", text)
    _is_bash(text)


@pytest.mark.parametrize(
    ("name", "places"),
    [("alone", [["0123456789abcdef"]]), ("array", [["00"], ["10"]]), ("shared", [["00", "01"], ["10", "11"]])],
)
def test_batch_script_is_the_golden_one(name: str, places: list[list[str]]) -> None:
    text = batch_script(places, LEDGER)
    _is_golden(f"{name}.batch.sh", text)
    _is_bash(text)


def _is_bash(text: str) -> None:
    checked = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True)
    assert (checked.returncode, checked.stderr) == (0, "")


def test_folder_with_a_percent_sign_is_not_a_pattern_of_slurm() -> None:
    """Or the job's log would be somewhere else."""
    text = submission_text(Path("/study/100%j/it's"), {}, "true")
    assert """#SBATCH --output='/study/100%%j/it'"'"'s/0.log'""" in text.splitlines()


# --- what SLURM gives ------------------------------------------------------------------------------------------------


def _given(place: Place, rule: str) -> dict[str, str]:
    """Partition and resources that accounting says the only job of a rule was given."""
    wait_for(lambda: all(one.tres for one in place.attempts(rule)) and place.attempts(rule), f"{rule} is accounted")
    (attempt,) = place.attempts(rule)
    tres = dict(word.split("=") for word in attempt.tres.split(","))
    return {"partition": attempt.partition, **{name: tres[name] for name in ("cpu", "mem", "gres/gpu") if name in tres}}


@pytest.mark.slurm
def test_mixed_jobs_of_one_call_each_get_their_own(place: Place) -> None:
    count = "echo $CUDA_VISIBLE_DEVICES | tr ',' '\\n' | grep -c . > gpus_of_{rule} || true"
    place.rule("a_cpu", count, runtime=3)
    place.rule("two_cpus", count, cpus_per_task=2, mem_mb_per_cpu=70)
    place.rule("two_a100", count, gres="gpu:a100:2", mem_mb=300)
    place.rule("all_a100", count, gpu=8, gpu_model="a100", cpus_per_gpu=2)
    place.rule("a_v100", count, slurm_partition="v100", gpu=1, mem_mb=200)
    place.rule("any_v100", count, slurm_partition="v100", gres="gpu:v100:3", slurm_account="other", cpus_per_task=3)
    place.rule("tasks", "srun hostname > {output}", makes=["hosts"], nodes=2, tasks=4, mpi="srun", mem_mb=200)
    place.rule("refused", "true", gpu=12)
    place.rule("no_partition", "true", slurm_partition="nosuch")
    place.rule("impossible", "true", slurm_extra="--exclusive --time=5")
    ended = place.snakemake()
    assert ended.failed == {"refused", "no_partition", "impossible"}

    assert _given(place, "a_cpu") == {"partition": "a100", "cpu": "1", "mem": "100M"}
    assert _given(place, "two_cpus") == {"partition": "a100", "cpu": "2", "mem": "140M"}
    assert _given(place, "two_a100") == {"partition": "a100", "cpu": "1", "mem": "300M", "gres/gpu": "2"}
    assert _given(place, "all_a100") == {"partition": "a100", "cpu": "16", "mem": "100M", "gres/gpu": "8"}
    assert _given(place, "a_v100") == {"partition": "v100", "cpu": "1", "mem": "200M", "gres/gpu": "1"}
    assert _given(place, "any_v100") == {"partition": "v100", "cpu": "3", "mem": "100M", "gres/gpu": "3"}
    assert _given(place, "tasks") == {"partition": "a100", "cpu": "4", "mem": "400M"}
    rules = ("a_cpu", "two_cpus", "two_a100", "all_a100", "a_v100", "any_v100")
    gpus = [place.path(f"gpus_of_{rule}").read_text().strip() for rule in rules]
    assert gpus == ["0", "0", "2", "8", "1", "3"]
    assert len(place.path("hosts").read_text().split()) == 4

    assert "SLURM did not take the job: " in ended.message("refused")
    assert "Requested node configuration is not available" in ended.message("refused")
    assert "Invalid partition name specified" in ended.message("no_partition")
    assert "slurm_extra can't set '--time=5': use the resource `runtime` instead." in ended.output
    assert not any(place.begun(rule) for rule in ended.failed)


@pytest.mark.slurm
def test_jobs_limits_what_is_in_the_queue_at_once(place: Place) -> None:
    rules = [f"job{number}" for number in range(6)]
    for rule in rules:
        place.rule(rule, UNTIL_GO)

    def in_queue() -> int:
        """A job that tidies up is over for the driver."""
        return sum(job.name.startswith(place.name) and job.state in ("PENDING", "RUNNING") for job in queue())

    driver = place.start(jobs=2)
    wait_for(lambda: sum(bool(place.begun(rule)) for rule in rules) == 2, "two of them run")
    seen = {in_queue()}
    place.go()
    while driver.process.poll() is None:
        seen.add(in_queue())
    ended = driver.wait()
    assert ended.status == 0, ended.output
    assert max(seen) == 2
    assert all(len(place.begun(rule)) == 1 for rule in rules)
