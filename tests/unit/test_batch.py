"""Works that ask for the same become as few jobs as their time allows, and these arrays."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from snakemake_interface_common.exceptions import WorkflowError

from snakemake_executor_plugin_submitit.batch import Batch, excluding, form
from snakemake_executor_plugin_submitit.resources import check_countable, count_gpus, sbatch_options
from snakemake_executor_plugin_submitit.task import Task, Work


def make_task(number: int = 0, **more: Any) -> Task:
    """A task that asks for what `more` says."""
    fields: dict[str, Any] = {
        "key": f"key{number}", "digest": "", "asked": "", "name": f"run{number}", "rule": "train", "command": "true",
        "shell": "/bin/bash", "workdir": Path("/"), "options": {}, "extra": [], "is_direct": True, "inputs": [],
        "removed": [], "outputs": [], "exports": {}, "description": {"wildcards": {}}, "minutes": 10,
    }  # fmt: skip
    return Task(Work(**fields | more), None)


@given(st.integers(1, 60), st.integers(1, 100), st.integers(1, 20))
def test_every_task_has_one_place_and_no_job_is_too_long(count: int, max_job_minutes: int, most_jobs: int) -> None:
    tasks = [make_task(number, max_job_minutes=max_job_minutes) for number in range(count)]
    batches = list(form(tasks, most_jobs))
    assert sorted(task.work.name for batch in batches for task in batch.tasks) == sorted(t.work.name for t in tasks)
    for batch in batches:
        assert len(batch.jobs) <= most_jobs
        assert len({len(job) for job in batch.jobs}) == 1
        assert batch.options()["time"] <= max(10, max_job_minutes)
    lengths = [len(job) for batch in batches for job in batch.jobs]
    assert max(lengths) - min(lengths) <= 1


def test_one_job_has_its_works_name_and_several_their_rules() -> None:
    alone, array, shared = (
        [make_task(0)],
        [make_task(0), make_task(1)],
        [make_task(n, max_job_minutes=20) for n in (0, 1)],
    )
    assert [batch.options() for batch in form(alone, 9)] == [{"job-name": "run0", "time": 10}]
    assert [batch.options() for batch in form(array, 9)] == [{"job-name": "train", "time": 10, "array": "0-1"}]
    assert [batch.options() for batch in form(shared, 9)] == [{"job-name": "train", "time": 20}]


def test_time_that_is_not_asked_for_is_not_shared() -> None:
    tasks = [make_task(number, minutes=None, max_job_minutes=60) for number in range(3)]
    (batch,) = form(tasks, 9)
    assert [len(job) for job in batch.jobs] == [1, 1, 1]
    assert "time" not in Batch(batch.jobs[:1], "").options()


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ([], ["--exclude=a1,b2"]),
        (["--exclude=c3"], ["--exclude=a1,b2,c3"]),
        (["--exclude", "c[3-4]", "--nice=1"], ["--nice=1", "--exclude=a1,b2,c[3-4]"]),
        (["-x", "c3"], ["--exclude=a1,b2,c3"]),
        (["-xc3", "--exclusive"], ["--exclusive", "--exclude=a1,b2,c3"]),
    ],
)
def test_nodes_are_excluded_beside_those_of_the_user(extra: list[str], words: list[str]) -> None:
    assert excluding(extra, {"b2", "a1"}) == words
    assert excluding(extra, set()) == extra


@pytest.mark.parametrize(
    ("resources", "extra", "count"),
    [
        ({}, [], 0),
        ({"gres": "gpu:a100:2"}, [], 2),
        ({"gres": "gpu:2", "nodes": 3, "tasks_per_node": 1}, [], 6),
        ({"gres": "gpu,tmp:20G"}, [], 1),
        ({"gres": "tmp:20G"}, [], 0),
        ({"gpu": 4}, [], 4),
        ({"gpu": 4, "gpu_model": "a100", "nodes": 2}, [], 4),
        ({"nodes": 2, "tasks_per_node": 3}, ["--gpus-per-node=4"], 8),
        ({"nodes": 2, "tasks_per_node": 3}, ["--gpus-per-task", "a100:2"], 12),
    ],
)
def test_gpus_of_all_nodes_are_counted(resources: dict[str, Any], extra: list[str], count: int) -> None:
    assert count_gpus(sbatch_options(resources, 1), extra) == count


@pytest.mark.parametrize(
    "word", ["--gpus-per-socket=2", "--gpus-per-s=2", "--exclusive", "--excl=user", "--tres-per-task=gres/gpu:2"]
)
def test_gpus_that_can_not_be_counted_are_refused_where_they_have_to_be(word: str) -> None:
    with pytest.raises(WorkflowError, match="max-gpu-hours is to be kept to"):
        check_countable([word])
    check_countable(["--exclude=a100-1", "--gpus-per-node=2", "--ex=a100-1"])
