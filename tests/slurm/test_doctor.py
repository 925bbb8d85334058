"""`finetune-study doctor` on the cluster, as a user calls it: what is well, and everything that can be wrong."""

import copy
import importlib.metadata
import importlib.util
import json
import os
import signal
import subprocess
import sys
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from finetune_study import config as config_module
from tests.slurm.cluster import Cluster, Queued, ask, queue, wait_for
from tests.slurm.test_study import stand_in
from tests.tiny_study import TINY_STUDY
from tests.workflow.workplace import Workplace

QOS = "doctor-test"


@pytest.fixture
def place(cluster: Cluster, tmp_path: Path) -> Iterator[Workplace]:
    """An empty folder; its jobs are gone when the test is."""
    yield Workplace(tmp_path)
    cluster.mend()
    cluster.clear(tmp_path)


@pytest.fixture
def small_qos(cluster: Cluster) -> Iterator[str]:
    """A QOS of root's that allows one GPU and five minutes; gone when the test is."""

    def sacctmgr(*words: str) -> None:
        subprocess.run(["sacctmgr", "--immediate", "--quiet", *words], check=True, stdout=subprocess.DEVNULL)

    try:
        sacctmgr("add", "qos", QOS, "set", "MaxTRESPerJob=gres/gpu=1", "MaxWall=5")
        sacctmgr("modify", "user", "root", "where", "account=lab", "set", f"qos+={QOS}")
        wait_for(lambda: QOS in ask("scontrol", "show", "assoc_mgr", f"qos={QOS}", "flags=qos"), "SLURM knows the QOS")
        yield QOS
    finally:
        sacctmgr("modify", "user", "root", "where", "account=lab", "set", f"qos-={QOS}")
        sacctmgr("delete", "qos", QOS)


@dataclass(frozen=True)
class Said:
    """A call of the doctor that is over."""

    status: int
    document: dict[str, Any]
    progress: str

    def verdict(self, where: str, check: str) -> str:
        return str(self._one(where, check)["verdict"])

    def found(self, where: str, check: str) -> str:
        return str(self._one(where, check)["found"])

    def _one(self, where: str, check: str) -> dict[str, Any]:
        lines = [one for one in self.document["findings"] if (one["where"], one["check"]) == (where, check)]
        assert len(lines) == 1, self.document["findings"]
        return dict(lines[0])

    def wrong(self, where: str) -> set[str]:
        """Checks that found something wrong at a place; each says how to mend it."""
        lines = [one for one in self.document["findings"] if one["where"] == where and one["verdict"] == "wrong"]
        assert all(one["mend"] for one in lines), lines
        return {one["check"] for one in lines}


def write(place: Workplace, hardware: dict[str, dict[str, Any]], **more: Any) -> None:
    """A study that runs on one and on two GPUs of each of these hardware entries."""
    raw = copy.deepcopy(TINY_STUDY)
    raw["hardware"] = hardware
    raw["grid"] = [raw["grid"][0] | {"hardware": list(hardware), "num_gpus": [1, 2]}]
    place.write(raw | more)


def doctor(place: Workplace, *arguments: str, **environment: str) -> Said:
    answer = subprocess.run(
        [sys.executable, "-m", "finetune_study.cli", "doctor", "--json", *arguments],
        cwd=place.folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert answer.stdout, answer.stderr
    return Said(answer.returncode, json.loads(answer.stdout), answer.stderr)


def jobs_of(place: Workplace) -> list[str]:
    """Names of all jobs that were ever submitted from here."""
    answer = ask(
        *("sacct", "--noheader", "--parsable2", "--allocations", "--starttime", "now-1hour", "--endtime", "now+2days"),
        *("--format", "JobName,WorkDir"),
    )
    return sorted(line.split("|")[0] for line in answer.splitlines() if line.endswith(f"|{place.folder}"))


def start(place: Workplace) -> "subprocess.Popen[str]":
    """A doctor at work."""
    return subprocess.Popen(
        [sys.executable, "-m", "finetune_study.cli", "doctor", "--json"],
        cwd=place.folder,
        stdout=subprocess.PIPE,
        text=True,
        # As in a terminal, where these tests were not started in the background.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def waiting_jobs(place: Workplace) -> list[Queued]:
    """Jobs from here that are not over."""
    return [job for job in queue() if job.workdir == place.folder]


def test_all_is_well(place: Workplace) -> None:
    write(place, {"a100": stand_in("a100"), "v100": stand_in("v100"), "v100-small": stand_in("v100", memory_gib=1)})
    said = doctor(place)
    assert said.status == 0, said.document
    assert {one["verdict"] for one in said.document["findings"] if one["check"] != "hub"} == {"ok"}
    assert said.found("a100", "allocation").startswith("as asked, by slurm (stand-in): nodes 1, gpus a100+a100")
    assert "2 ranks, gloo, all_reduce at" in said.found("v100", "ranks")
    assert importlib.metadata.version("deepspeed") in said.found("v100-small", "packages")
    # Entries that differ in their memory budget alone share a job.
    assert wait_for(lambda: len(jobs := jobs_of(place)) == 2 and jobs, "accounting has both") == [
        "doctor_a100",
        "doctor_v100",
    ]
    assert not (place.results / "doctor").exists(), "nothing is left of jobs that found nothing wrong"


def test_what_is_wrong_is_seen_before_a_job_is_submitted(place: Workplace, small_qos: str) -> None:
    entries = {
        "no-partition": stand_in("a100") | {"slurm": {**stand_in("a100")["slurm"], "partition": "h100"}},
        "no-account": stand_in("a100", account="nobody"),
        "no-qos": stand_in("a100", qos="long"),
        "other-model": stand_in("a100") | {"slurm": {**stand_in("a100")["slurm"], "partition": "v100"}},
        "small-qos": stand_in("a100", qos=small_qos),
        "slow": stand_in("a100", startup_minutes=3000),
        "many-cpus": stand_in("v100", cpus_per_gpu=9),
        "much-memory": stand_in("v100", mem_gib_per_gpu=20),
        "no-feature": stand_in("v100", constraint="nvlink"),
        "no-python": stand_in("v100") | {"software": {"python": "/nowhere/bin/python"}},
        "well": stand_in("v100"),
    }
    write(place, entries)
    said = doctor(place, "--no-jobs")
    assert said.status == 1
    assert {name: said.wrong(name) for name in entries} == {
        "no-partition": {"partition"},
        "no-account": {"account"},
        "no-qos": {"qos"},
        "other-model": {"gpus"},
        "small-qos": {"limits", "time"},
        "slow": {"time"},
        "many-cpus": {"cpus"},
        "much-memory": {"memory"},
        "no-feature": {"sbatch"},
        "no-python": {"software"},
        "well": set(),
    }
    assert said.found("no-partition", "partition") == "there is no partition `h100`; there are a100, mixed, v100"
    assert "types there: v100" in said.found("other-model", "gpus")
    assert f"QOS `{small_qos}` allows gres/gpu=1 for a job, 2 are asked for" in said.found("small-qos", "limits")
    assert f"QOS `{small_qos}`, MaxWall is 5 min" in said.found("small-qos", "time")
    assert "partition `a100`, MaxTime is 2880 min" in said.found("slow", "time")
    assert "Requested node configuration is not available" in said.found("no-feature", "sbatch") or (
        "Invalid feature specification" in said.found("no-feature", "sbatch")
    )
    # What the grid does not name stops no study, unless it is asked about.
    raw = place.read()
    raw["grid"][0]["hardware"] = ["well"]
    place.write(raw)
    said = doctor(place, "--no-jobs")
    assert (said.status, said.verdict("no-partition", "partition")) == (0, "warning")
    assert doctor(place, "--no-jobs", "--hardware", "no-partition").status == 1
    assert jobs_of(place) == []


def bare_python(folder: Path, *packages: str) -> str:
    """An interpreter of its own that has only some of the packages that are installed here."""
    venv.create(folder)
    (site,) = folder.glob("lib/python*/site-packages")
    for name in packages:
        found = importlib.util.find_spec(name)
        assert found is not None
        origin = Path(str(found.origin))
        source = origin.parent if origin.name == "__init__.py" else origin
        (site / source.name).symlink_to(source)
    if packages:
        about = importlib.metadata.distribution("finetune-study")._path  # type: ignore[attr-defined]
        (site / about.name).symlink_to(about.absolute())
    return str(folder / "bin" / "python")


WITHOUT_TORCH = (
    "finetune_study", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection", "yaml",
)  # fmt: skip


def test_what_is_wrong_on_the_node_or_in_the_queue(place: Workplace, small_qos: str) -> None:
    bare, no_torch = place.folder / "bare", place.folder / "no-torch"
    gpu = {"memory_gib": 80, "max_gpus": 1, "slurm": {"gpu_model": "a100", "cpus_per_gpu": 1, "mem_gib_per_gpu": 3}}
    entries = {
        "bare": stand_in("a100") | {"software": {"python": bare_python(bare)}},
        "no-torch": stand_in("a100") | {"software": {"python": bare_python(no_torch, *WITHOUT_TORCH)}},
        "fewer": stand_in("v100", extra="--gres=gpu:v100:1"),
        "no-gpu": gpu,
        "small-memory": stand_in("a100", mem_gib_per_gpu=0.15),
        "quote": stand_in("v100", extra="--comment='x"),
        "never": stand_in("v100", qos=small_qos),
        "late": stand_in("v100", extra="--begin=now+1hour"),
    }
    write(place, entries)
    raw = place.read()
    raw["grid"].append(raw["grid"][0] | {"hardware": "no-gpu", "num_gpus": 1})
    raw["grid"][0]["hardware"].remove("no-gpu")
    place.write(raw)
    said = doctor(place, "--wait-minutes", "0.4")
    assert said.status == 1
    assert "this project is not installed in it" in said.found("bare", "software")
    assert "torch: ModuleNotFoundError: No module named 'torch'" in said.found("no-torch", "packages")
    assert "1 GPUs instead of 2" in said.found("fewer", "allocation")
    assert said.wrong("small-memory") == {"host memory"}, said.document
    assert "NVML does not answer" in said.found("no-gpu", "allocation")
    assert "torch can't use the GPU of rank 0" in said.found("no-gpu", "gpu")
    assert "quotes come in pairs" in said.found("quote", "job")
    assert "will never start, and was cancelled: QOSMax" in said.found("never", "job")
    assert "did not start in time, and was cancelled: BeginTime" in said.found("late", "job")
    assert waiting_jobs(place) == []
    left = {path.name.rsplit("-", 1)[0] for path in (place.results / "doctor").iterdir()}
    assert left == set(entries), "logs of what was wrong stay"


def test_gpus_that_no_entry_names_are_described(place: Workplace) -> None:
    """nvidia-smi is a stand-in here, as the GPUs of the cluster are."""
    tool = place.folder / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text(
        '#!/bin/sh\ncase $SLURM_JOB_PARTITION in a100) echo "NVIDIA A100-SXM4-80GB, 81920, 560.35, 8.0" ;;\n'
    )
    with tool.open("a") as file:
        file.write("*) exit 6 ;; esac\n")
    tool.chmod(0o755)
    path = f"{tool.parent}:{os.environ['PATH']}"
    said = doctor(place, "--describe", "cluster.yaml", PATH=path)
    assert said.status == 0, said.document
    assert said.document["description"] == "cluster.yaml"
    assert said.verdict("v100", "gpu") == "warning"
    text = (place.folder / "cluster.yaml").read_text(encoding="utf-8")
    assert "  # v100:\n" in text, "what is not known in full is a comment"
    write(place, {"v100": stand_in("v100")})
    raw = place.read() | config_module.read(place.folder / "cluster.yaml")
    raw["grid"][0]["hardware"] = "a100-80gb"
    entry = config_module.parse(raw).hardware["a100-80gb"]
    assert (entry.gpu, entry.memory_gib, entry.compute_capability) == ("NVIDIA A100-SXM4-80GB", 80, 8.0)
    assert (entry.max_gpus, entry.slurm.cpus_per_gpu, entry.slurm.mem_gib_per_gpu) == (8, 2, 3)
    assert (entry.slurm.partition, entry.slurm.account) == ("a100", "lab")
    # As Snakemake takes it, beside a config that has other entries.
    planned = place.snakemake("--dry-run", "--configfile", "cluster.yaml")
    assert planned.returncode == 0, planned.stdout
    # It replaces nothing without being told so.
    assert doctor(place, "--describe", "--no-jobs", "cluster.yaml").document["description"] == "cluster-2.yaml"
    assert (place.folder / "cluster.yaml").read_text(encoding="utf-8") == text
    assert doctor(place, "--describe", "--no-jobs", "--force", "cluster.yaml").document["description"] == "cluster.yaml"
    assert "stand_in: true" in (place.folder / "cluster.yaml").read_text(encoding="utf-8")


def test_folder_that_can_not_be_written_gets_no_job(place: Workplace) -> None:
    write(place, {"a100": stand_in("a100")})
    said = doctor(place, "--results", "/proc/doctor")
    assert said.status == 1
    assert said.wrong("here") == {"results"}
    assert said.found("a100", "job") == "none was submitted: results would have stopped it"
    assert jobs_of(place) == []


def test_job_that_somebody_cancels(place: Workplace) -> None:
    write(place, {"a100": stand_in("a100", extra="--begin=now+1hour")})
    process = start(place)
    (job,) = wait_for(lambda: waiting_jobs(place), "its job is in the queue")
    subprocess.run(["scancel", job.slurm_id], check=True)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"job {job.slurm_id} ended without a word seen here: CANCELLED" in " ".join(output.split()), output


def test_interrupted_doctor_leaves_no_job(place: Workplace) -> None:
    write(place, {"a100": stand_in("a100", extra="--begin=now+1hour")})
    process = start(place)
    wait_for(lambda: waiting_jobs(place), "its job is in the queue")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert waiting_jobs(place) == []


def test_table_names_what_to_mend(place: Workplace) -> None:
    write(place, {"a100": stand_in("a100", account="nobody")})
    answer = subprocess.run(
        [sys.executable, "-m", "finetune_study.cli", "doctor", "--no-jobs"],
        cwd=place.folder,
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 1
    assert "`nobody` is no account of root here" in answer.stdout
    assert "1 wrong: mend a100 before you submit runs" in answer.stdout
