"""Snakemake's own tests of executors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from snakemake.common.tests import TestWorkflowsLocalStorageBase

from snakemake_executor_plugin_submitit import ExecutorSettings
from tests.slurm.cluster import Cluster

pytestmark = [pytest.mark.slurm, pytest.mark.filterwarnings("ignore::DeprecationWarning:pulp")]


@pytest.fixture(autouse=True)
def with_cluster(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """These tests run Snakemake in this very process, which changes its folder."""
    monkeypatch.chdir(tmp_path)
    yield
    cluster.mend()
    cluster.clear(tmp_path)


class TestSubmitit(TestWorkflowsLocalStorageBase):
    """A workflow, and one with a group; rules of theirs ask for 5 MB, which are too few for a Snakemake in the job."""

    __test__ = True

    def get_executor(self) -> str:
        return "submitit"

    def get_executor_settings(self) -> ExecutorSettings:
        return ExecutorSettings(status_interval=2)
