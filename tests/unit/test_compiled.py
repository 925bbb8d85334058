from typing import Any

import pytest

from finetune_study import compiled, study
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
