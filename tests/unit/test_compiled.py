import io
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

from finetune_study import compiled, places, study
from finetune_study.config import Places
from finetune_study.errors import RunFailedError
from finetune_study.paths import Results
from finetune_study.study import Study

Raw = dict[str, Any]
OFFLOAD: Raw = {"zero2": {}, "offload_optimizer": {}}


def opened(raw: Raw, results: Results, device: str) -> Study:
    """Recipes with and without offloading, on one and on two devices."""
    more = {"compute_capability": 8.0} if device == "cuda" else {}
    raw["hardware"] = {"here": {"device": device, "memory_gib": 2, "max_gpus": 2, **more}}
    raw["recipes"] = {"zero2": {"zero2": {}}, "offload": OFFLOAD}
    raw["grid"][0] |= {"hardware": "here", "recipes": ["zero2", "offload"], "num_gpus": [2, 1]}
    return study.open_study(raw, results)


@pytest.fixture
def results(tmp_path: Any) -> Results:
    return Results(tmp_path / "results")


def test_offloaded_states_on_a_gpu_need_a_compiled_optimizer(raw: Raw, results: Results) -> None:
    found = opened(raw, results, "cuda")
    needed = {found.run(run_id).recipe: compiled.ops_of(found.run(run_id)) for run_id in found.planned}
    assert needed == {"zero2": [], "offload": ["cpu_adam"]}
    ((place, run_id),) = found.ops.items()
    assert place == ("here", "cpu_adam")
    assert (found.run(run_id).recipe, found.run(run_id).num_gpus) == ("offload", 1), "the smallest that needs it"
    waits = {run_id: found.ops_of(run_id) for run_id in found.planned}
    assert {found.run(one).recipe for one, files in waits.items() if files} == {"offload"}


def test_a_cpu_needs_none(raw: Raw, results: Results) -> None:
    assert opened(raw, results, "cpu").ops == {}


@pytest.mark.parametrize(
    ("settings", "ops"),
    [
        ({}, ["quantizer"]),
        ({"zero_quantized_weights": False}, ["quantizer"]),
        ({"zero_quantized_gradients": False}, ["quantizer"]),
        ({"zero_quantized_weights": False, "zero_quantized_gradients": False, "zero_hpz_partition_size": 2}, []),
    ],
)
def test_what_travels_quantised_needs_a_compiled_quantiser(
    raw: Raw, results: Results, settings: Raw, ops: list[str]
) -> None:
    raw["hardware"] = {"here": {"memory_gib": 80, "max_gpus": 2, "compute_capability": 8.0}}
    raw["recipes"] = {"full": {"zero3": {}, "zeropp": settings}}
    raw["grid"][0] |= {"hardware": "here", "recipes": "full", "num_gpus": 2}
    found = study.open_study(raw, results)
    assert [op for _, op in found.ops] == ops


def test_every_op_is_one_of_deepspeeds() -> None:
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator  # ops as they are on a machine with a GPU

    of_gpus = CUDA_Accelerator()
    assert {name: of_gpus.get_op_builder(builder).NAME for name, builder in compiled.BUILDERS.items()} == {
        name: name for name in compiled.BUILDERS
    }


# --- flash-attn, with a stand-in of the same name: CUDA's compiler can't be had here ----------------------------------

SETUP = """
import os
from setuptools import setup
assert os.environ["FLASH_ATTENTION_FORCE_BUILD"] == "TRUE" and int(os.environ["MAX_JOBS"]) > 0
setup(name={name!r}, version={version!r}, packages=[{package!r}], install_requires=["no-such-package"])
"""


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip looks for packages in, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def offer(index: Path, name: str, version: str, module: str = "") -> None:
    """Puts a package's source there."""
    package = name.replace("-", "_")
    files = {f"{package}/__init__.py": module, f"{package}/bert_padding.py": "import einops"}
    files["setup.py"] = SETUP.format(name=name, version=version, package=package)
    files["PKG-INFO"] = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with tarfile.open(index / f"{package}-{version}.tar.gz", "w:gz") as archive:
        for path, text in files.items():
            entry = tarfile.TarInfo(f"{package}-{version}/{path}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))


def flash(raw: Raw, results: Results) -> Study:
    raw["hardware"] = {"here": {"memory_gib": 80, "compute_capability": 8.0}}
    kernel = {"flash_attention_2": {"hub_kernel": "kernels-community/flash-attn"}}
    raw["recipes"] = {
        "sdpa": {"bf16": {}}, "flash": {"bf16": {}, "flash_attention_2": {}}, "hub": {"bf16": {}} | kernel
    }  # fmt: skip
    raw["grid"][0] |= {"hardware": "here", "recipes": [*raw["recipes"]]}
    return study.open_study(raw, results)


def test_flash_attention_waits_for_its_package_and_a_hub_kernel_does_not(raw: Raw, results: Results) -> None:
    found = flash(raw, results)
    assert [*found.ops] == [("here", "flash_attn")]
    needed = {found.run(run_id).recipe: compiled.ops_of(found.run(run_id)) for run_id in found.planned}
    assert needed == {"sdpa": [], "flash": ["flash_attn"], "hub": []}


def test_flash_attn_is_built_once_from_source_and_found_by_the_runs(raw: Raw, results: Results, index: Path) -> None:
    offer(index, "flash-attn", "2.7.4")
    offer(index, "flash-attn", "2.8.3")
    offer(index, "flash-attn", "3.0.0")
    offer(index, "einops", "0.8.1")
    run = next(iter(flash(raw, results).planned.values())).run
    compiled.build(run, "flash_attn", results, Places())
    for path in index.iterdir():
        path.unlink()
    shutil.rmtree(results.cache)  # as docs/clusters.md allows
    compiled.build(run, "flash_attn", results, Places())
    said = "import flash_attn.bert_padding, importlib.metadata as m; print(m.version('flash-attn'))"
    with places.opened(Places(), run, results) as where:
        printed = subprocess.run([sys.executable, "-c", said], env=os.environ | where, capture_output=True, text=True)
    assert printed.stdout == "2.8.3\n", printed.stderr
    other = run.model_copy(update={"hardware": run.hardware.model_copy(update={"name": "other"})})
    with places.opened(Places(), other, results) as where:
        assert "PYTHONPATH" not in where


def test_flash_attn_that_can_not_be_built_says_why_and_leaves_nothing(raw: Raw, results: Results, index: Path) -> None:
    run = next(iter(flash(raw, results).planned.values())).run
    with pytest.raises(RunFailedError) as caught:
        compiled.build(run, "flash_attn", results, Places())
    assert "The package flash-attn is not there, and can't be compiled" in str(caught.value)
    assert "No matching distribution found for flash-attn" in str(caught.value)
    assert "nvcc" in str(caught.value)
    offer(index, "flash-attn", "2.8.3")
    offer(index, "einops", "0.8.1", module="raise ImportError('not this one')")
    with pytest.raises(RunFailedError, match="not this one"):
        compiled.build(run, "flash_attn", results, Places())
    with places.opened(Places(), run, results) as where:
        assert "PYTHONPATH" not in where
