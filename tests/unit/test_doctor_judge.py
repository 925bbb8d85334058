"""What a node may say, and what is made of it. Facts about GPUs are made up, as there is none here."""

import copy
import importlib.metadata
from pathlib import Path
from typing import Any

import pytest

from finetune_study.config import Hardware
from finetune_study.doctor import node
from finetune_study.doctor.entries import Entry, pretended
from finetune_study.doctor.findings import Finding, Findings
from finetune_study.doctor.judge import judge, judge_draft
from finetune_study.doctor.probe import Probe, parse_gpus
from finetune_study.doctor.rank import PACKAGES

Raw = dict[str, Any]

GPU = {"name": "NVIDIA A100-SXM4-80GB", "memory_bytes": 85_029_158_912, "compute_capability": "8.0", "sum": 1000.0}
ALLOCATION = {"entry": "a100", "asked": {}, "found": {"nodes": 1, "gpus": [GPU]}, "by": "nvml"}
NODE: dict[str, Any] = {
    "host": "gpu-7",
    "python": "3.11.7",
    "executable": "/envs/gpu/bin/python",
    "version": importlib.metadata.version("finetune-study"),
    "sources": node.sources_digest(),
    "package": "/envs/gpu/finetune_study",
    "startup_seconds": 2.0,
    "seen_after_seconds": 0.5,
    "lock": "held",
    "temporary": {"path": "/tmp", "free_gib": 60.0},
    "home": {"path": "/home/user", "free_gib": 9.0},
    "cores": 16,
    "memory_limit_bytes": 128 * 2**30,
    "allocation": [ALLOCATION],
    "ranks": ["ended", "ended"],
    "network": {"host": "huggingface.co", "error": "timed out"},
    "ended": {"how": "completed"},
}
RANK: dict[str, Any] = {
    "torch": {"version": "2.13.0+cu126", "cuda": "12.6", "architectures": ["sm_70", "sm_80"], "import_seconds": 4.0},
    "gpu": GPU,
    "all_reduce": {"backend": "nccl", "version": "2.27.5", "ranks": 2, "gigabytes_per_second": 180.0},
    **{name: {"version": importlib.metadata.version(name), "import_seconds": 1.0} for name in PACKAGES},
    "ops": {"compatible": True, "why_not": None, "tools": {"c++": "/usr/bin/c++", "ninja": "/x", "nvcc": "/x"}},
    "at": "ops",
}


def entry(techniques: Raw | None = None) -> Entry:
    """A hardware entry, on which the study runs these techniques."""
    found = Entry("a100", Hardware(gpu=GPU["name"], memory_gib=80, compute_capability=8.0))  # type: ignore[arg-type]
    if techniques is None:
        return found
    run = pretended(found, 2).model_copy(update={"techniques": techniques})
    return Entry(found.name, found.hardware, (run,))


def probe(rank: dict[str, Any] | None = None, tmp_path: Path = Path("/nowhere"), **facts: Any) -> Probe:
    """A job whose node said all of NODE, with changes; None takes a fact away."""
    said = {name: value for name, value in {**copy.deepcopy(NODE), **facts}.items() if value is not None}
    ranks = [{name: value for name, value in {**RANK, **(rank or {})}.items() if value is not None} for _ in range(2)]
    return Probe([entry()], 2, tmp_path, {}, "7", facts=said, ranks=ranks)


def judged(one: Probe, techniques: Raw | None = None) -> dict[str, Finding]:
    findings = Findings("a100")
    judge(one, entry(techniques), findings)
    assert all(found.mend for found in findings.all if found.verdict != "ok")
    return {found.check: found for found in findings.all}


def test_a_node_on_which_all_is_well() -> None:
    said = judged(probe())
    assert {one.verdict for one in said.values()} == {"ok"}, said
    assert said["gpu"].found.startswith("NVIDIA A100-SXM4-80GB, 79.2 GiB, 8.0")
    assert said["ranks"].found == "2 ranks, NCCL 2.27.5, all_reduce at 180 GB/s (bus bandwidth)"
    assert "memory limit 128.0 GiB" in said["allocation"].found
    assert "can't be reached from the node; runs do not need it" in said["network"].found


@pytest.mark.parametrize(
    ("facts", "check", "verdict", "words"),
    [
        ({"version": "0.0.9"}, "software", "wrong", "not the code that is here"),
        ({"sources": "0" * 64}, "software", "wrong", "but that of /envs/gpu/finetune_study"),
        ({"startup_seconds": 700.0}, "software", "warning", "took 700 s to start"),
        ({"seen_after_seconds": 45.0}, "study folder", "warning", "only after 45 s"),
        ({"lock": "free"}, "locks", "warning", "locks are kept on each machine alone"),
        ({"lock": "No locks available"}, "locks", "wrong", "No locks available"),
        ({"temporary": {"path": "/t", "error": "Read-only file system"}}, "temporary folder", "wrong", "Read-only"),
        ({"temporary": {"path": "/t", "free_gib": 0.2}}, "temporary folder", "warning", "0.2 GiB"),
        ({"home": {"path": "/home/user", "error": "Permission denied"}}, "home", "ok", "Permission denied"),
        ({"allocation": [{"entry": "a100", "error": "Not so\n  do:      mend it"}]}, "allocation", "wrong", "Not so"),
        ({"ended": None}, "node", "wrong", "the job broke off"),
    ],
)
def test_facts_about_the_node(facts: dict[str, Any], check: str, verdict: str, words: str) -> None:
    found = judged(probe(**facts))[check]
    assert found.verdict == verdict
    assert words in found.found


def test_a_file_that_is_never_seen() -> None:
    one = probe()
    one.facts["seen_after_seconds"] = None
    assert judged(one)["study folder"].verdict == "wrong"


@pytest.mark.parametrize(
    ("rank", "check", "verdict", "words"),
    [
        ({"peft": None, "peft_error": "ImportError: no"}, "packages", "wrong", "peft: ImportError: no"),
        ({"deepspeed": None, "at": "deepspeed"}, "packages", "wrong", "rank 0 came as far as `deepspeed`"),
        ({"datasets": {"version": "1.0", "import_seconds": 1.0}}, "packages", "warning", "datasets 1.0 ("),
        (
            {"gpu": None, "gpu_error": "AcceleratorError: no kernel image is available", "all_reduce": None},
            "gpu", "wrong", "no kernel image is available",
        ),
        ({"gpu": GPU | {"compute_capability": "9.0"}}, "gpu", "wrong", "compute capability 9.0"),
        ({"all_reduce": None, "all_reduce_error": "DistBackendError: x"}, "ranks", "wrong", "DistBackendError: x"),
        ({"all_reduce": None, "at": "all_reduce"}, "ranks", "wrong", "rank 0: no end"),
    ],
)  # fmt: skip
def test_facts_about_the_ranks(rank: dict[str, Any], check: str, verdict: str, words: str) -> None:
    found = judged(probe(rank))[check]
    assert found.verdict == verdict
    assert words in found.found


NO_COMPILER = {"compatible": True, "why_not": None, "tools": {"c++": "/usr/bin/c++", "ninja": "/x", "nvcc": None}}


def test_too_little_host_memory() -> None:
    one = probe({"transformers": None, "at": "transformers"}, ranks=["killed by SIGKILL", "ended"], oom_kills=1)
    said = judged(one)
    assert said["host memory"].verdict == "wrong"
    assert "packages" not in said
    assert judged(probe(ranks=["killed by SIGKILL", "ended"], oom_kills=0))["packages"].verdict == "ok"


def test_gpu_that_the_config_leaves_open() -> None:
    findings = Findings("a100")
    judge(probe(), Entry("a100", Hardware(memory_gib=80)), findings)
    (found,) = [one for one in findings.all if one.check == "gpu"]
    assert found.verdict == "warning"
    assert found.mend.endswith("gpu: NVIDIA A100-SXM4-80GB, compute_capability: 8.0")


def test_compiled_ops_are_needed_for_offload_alone() -> None:
    found = judged(probe({"ops": NO_COMPILER}))["compiled ops"]
    assert (found.verdict, "not on PATH: nvcc" in found.found) == ("warning", True)
    failed = probe({"ops": None, "ops_error": "RuntimeError: ninja is required"})
    assert judged(failed)["compiled ops"].verdict == "warning"
    offload: Raw = {"zero2": {}, "offload_optimizer": {}}
    assert judged(failed, offload)["compiled ops"].verdict == "wrong"
    loaded = probe({"ops": NO_COMPILER | {"load_seconds": 40.0}})
    assert judged(loaded, offload)["compiled ops"].verdict == "ok"


def test_packages_of_the_studys_techniques() -> None:
    recipe: Raw = {"flash_attention_2": {}, "qlora": {}, "galore_adamw": {}}
    assert sorted(entry(recipe).packages_needed) == ["bitsandbytes", "flash_attn", "galore_torch"]
    there = {"bitsandbytes": {"version": "0.50.2", "import_seconds": 1.0}, "galore_torch": {"version": None}}
    lacking = there | {"flash_attn_error": "ImportError: undefined symbol: _ZN3c105"}
    found = judged(probe(lacking | {"ops": NO_COMPILER}), recipe)["packages of techniques"]
    assert found.verdict == "wrong"
    assert found.found == "`flash_attention_2` needs `flash_attn`: ImportError: undefined symbol: _ZN3c105"
    compiled = judged(probe(lacking), recipe)["packages of techniques"]
    assert (compiled.verdict, compiled.found) == ("warning", found.found)
    assert "`prepare` compiles it" in compiled.mend
    other = judged(probe(lacking | {"bitsandbytes": None, "bitsandbytes_error": "no"}), recipe)
    assert other["packages of techniques"].verdict == "wrong", "nobody compiles that one"
    well = judged(probe(there | {"flash_attn": {"version": "2.8.3"}}), recipe)["packages of techniques"]
    assert well.verdict == "ok"
    assert set(well.found.split(", ")) == {"bitsandbytes 0.50.2", "galore_torch", "flash_attn 2.8.3"}
    assert "packages of techniques" not in judged(probe(), {"lora": {}}), "nothing is needed, nothing is said"


def test_a_job_without_an_answer_says_why(tmp_path: Path) -> None:
    one = probe(tmp_path=tmp_path)
    one.problem, one.mend = "job 7 will never start", "mend it"
    assert list(judged(one)) == ["job"]
    one = probe(tmp_path=tmp_path, host=None)
    one.log = "/usr/bin/python3: Error while finding module specification\nModuleNotFoundError: No module named 'yaml'"
    found = judged(one)["software"]
    assert found.found.endswith("ModuleNotFoundError: No module named 'yaml'")


def test_what_nvidia_smi_prints() -> None:
    text = "NVIDIA A100-SXM4-80GB, 81920, 560.35.03, 8.0\nTesla V100-SXM2-32GB, 32768, 450.80\nx, [N/A], 560.35, 9.0\n"
    assert parse_gpus(text) == [
        {"name": "NVIDIA A100-SXM4-80GB", "memory_mib": "81920", "driver": "560.35.03", "compute_capability": "8.0"},
        {"name": "Tesla V100-SXM2-32GB", "memory_mib": "32768", "driver": "450.80"},
        {"name": "x", "driver": "560.35", "compute_capability": "9.0"},
    ]
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.\n") == []


def test_gpus_that_no_entry_describes() -> None:
    findings = Findings("a100")
    one = probe()
    judge_draft(one, entry(), findings)
    one.gpus = parse_gpus("NVIDIA A100-SXM4-80GB, 81920, 560.35.03, 8.0")
    judge_draft(one, entry(), findings)
    assert [found.verdict for found in findings.all] == ["warning", "ok"]
