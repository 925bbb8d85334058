"""Runs on nodes that have no network, and whose home folder can't be written to."""

import copy
import sys
from pathlib import Path

import pytest

from finetune_study import record
from tests import debian
from tests.slurm.test_study import statuses, submit
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

NODE = """#!/bin/bash
# The Python of a node: a network of its own with the loopback alone, and an empty home that is read-only.
export HOME={home}
exec unshare --net --mount bash -c '
    ip link set lo up && mount -t tmpfs -o ro tmpfs "$HOME" || exit
    {{ cat /proc/net/dev; ip route show table all type unicast; }} > {seen}.$SLURM_JOB_ID
    touch "$HOME/x" 2> /dev/null || echo "home is read-only" >> {seen}.$SLURM_JOB_ID
    exec {python} "$@"' node "$@"
"""


@pytest.mark.long
def test_runs_need_neither_network_nor_home(workplace: Workplace) -> None:
    debian.need("ip", "iproute2")
    home, seen, node = workplace.folder / "home", workplace.folder / "seen", workplace.folder / "node-python"
    home.mkdir()
    node.write_text(NODE.format(home=home, seen=seen, python=sys.executable), encoding="utf-8")
    node.chmod(0o755)
    raw = copy.deepcopy(TINY_STUDY)
    # No stand-in: its check asks SLURM's controller, which is beyond the loopback of such a node.
    raw["hardware"] = {
        "node": {
            "device": "cpu",
            "memory_gib": 2,
            "max_gpus": 2,
            "threads_per_gpu": 1,
            "software": {"python": str(node)},
            "places": {"temporary": f"{workplace.folder}/tmp-$SLURM_JOB_ID"},
            "slurm": {"partition": "a100", "cpus_per_gpu": 1, "mem_gib_per_gpu": 3, "startup_minutes": 0},
        }
    }
    raw["recipes"]["zero2-lora"] = {"zero2": {}, "lora": {"r": 4}}
    raw["grid"] = [
        raw["grid"][0] | {"hardware": "node", "recipes": "full"},
        raw["grid"][0] | {"hardware": "node", "recipes": "zero2-lora", "num_gpus": 2},
    ]
    workplace.write(raw)
    answer = submit(workplace)
    assert answer.returncode == 0, answer.stdout
    assert set(statuses(workplace).values()) == {"completed"}
    for folder in workplace.run_folders():
        written = record.read_record(folder / "record.json")
        told = Path(f"{seen}.{written.slurm_job_id}").read_text(encoding="utf-8").splitlines()
        interfaces = [line.split(":")[0].strip() for line in told if ":" in line]
        assert interfaces == ["lo"]
        assert not any(line.startswith("default") for line in told)
        assert told[-1] == "home is read-only"
        variables = written.environment["variables"]
        temporary = workplace.folder / f"tmp-{written.slurm_job_id}"
        assert Path(variables["TMPDIR"]).parent == temporary
        assert list(temporary.iterdir()) == []
        assert variables["XDG_CACHE_HOME"] == str(workplace.results / "cache")
    assert list(home.iterdir()) == []
