from typing import Any

from finetune_study import config, plan

Raw = dict[str, Any]


def planned(raw: Raw) -> list[plan.PlannedRun]:
    return plan.plan(config.parse(raw))


def gpu(raw: Raw, capability: float, **more: object) -> Raw:
    raw["hardware"]["gpu"] = {"memory_gib": 32, "compute_capability": capability, **more}
    raw["grid"][0]["hardware"] = "gpu"
    return raw


def test_study_is_the_cross_product_of_its_axes(raw: Raw) -> None:
    raw["grid"][0] |= {"sequence_length": [64, 128], "num_gpus": [1, 2], "per_device_train_batch_size": [1]}
    assert len(planned(raw)) == 2 * 2 * 2


def test_blocks_that_overlap_give_each_run_once(raw: Raw) -> None:
    raw["grid"].append(dict(raw["grid"][0]))
    assert len(planned(raw)) == 2


def test_a_block_may_ask_for_repeats_of_its_own(raw: Raw) -> None:
    """More of them for a close comparison; what two blocks have in common is one run."""
    raw["protocol"]["repeats"] = 2
    raw["grid"] = [raw["grid"][0], raw["grid"][0] | {"recipes": ["full"], "repeats": 4}]
    recipes = raw["grid"][0]["recipes"]
    assert len(recipes) > 1
    runs = [one.run for one in planned(raw)]
    before = [run.run_id for run in runs if run.repeat <= 2]
    assert {run.recipe for run in runs if run.repeat > 2} == {"full"}
    assert {run.repeat for run in runs} == {1, 2, 3, 4}
    del raw["grid"][1]
    assert [one.run.run_id for one in planned(raw)] == before


def test_repeats_are_outermost(raw: Raw) -> None:
    raw["protocol"]["repeats"] = 2
    assert [one.run.repeat for one in planned(raw)] == [1, 1, 2, 2]


def test_accumulation_follows_from_effective_batch_micro_batch_and_devices(raw: Raw) -> None:
    raw["training"]["effective_batch_size"] = 8
    raw["grid"][0] |= {"num_gpus": [1, 2], "per_device_train_batch_size": [1, 2], "recipes": "full"}
    steps = {
        (one.run.num_gpus, one.run.per_device_train_batch_size): one.run.gradient_accumulation_steps
        for one in planned(raw)
    }
    assert steps == {(1, 1): 8, (1, 2): 4, (2, 1): 4, (2, 2): 2}


def test_effective_batch_that_cannot_be_made_is_unsupported(raw: Raw) -> None:
    raw["grid"][0] |= {"per_device_train_batch_size": 3, "recipes": "full"}
    assert "effective batch of 2 can't be made of steps of 3" in str(planned(raw)[0].unsupported)


def test_more_gpus_than_there_are_is_unsupported(raw: Raw) -> None:
    raw["training"]["effective_batch_size"] = 4
    raw["grid"][0] |= {"num_gpus": 4, "recipes": "full"}
    assert planned(raw)[0].unsupported == "4 GPUs asked for; this hardware has 2 for a run"


def test_defaults_follow_the_hardware(raw: Raw) -> None:
    raw["grid"][0] |= {"recipes": "full", "num_gpus": 2}
    assert list(planned(raw)[0].run.techniques) == ["fp32", "sdpa", "ddp", "adamw_torch"]
    assert list(planned(gpu(raw, 8.0))[0].run.techniques) == ["bf16", "sdpa", "ddp", "adamw_torch"]
    assert list(planned(gpu(raw, 7.0))[0].run.techniques) == ["fp16", "sdpa", "ddp", "adamw_torch"]


def test_what_a_v100_can_not_do_is_unsupported_with_the_reason(raw: Raw) -> None:
    raw["recipes"] = {"bf16": {"bf16": {}}, "flash": {"flash_attention_2": {}}, "fp16": {"fp16": {}}}
    raw["grid"][0]["recipes"] = ["bf16", "flash", "fp16"]
    reasons = [one.unsupported for one in planned(gpu(raw, 7.0))]
    assert "bf16 needs compute capability 8.0; this GPU has 7.0" in str(reasons[0])
    assert "FlashAttention-2 needs compute capability 8.0" in str(reasons[1])
    assert reasons[2] is None


def test_what_a_cpu_can_not_do_is_unsupported_with_the_reason(raw: Raw) -> None:
    raw["recipes"] = {"fp16": {"fp16": {}}, "flash": {"flash_attention_2": {}}, "bf16": {"bf16": {}}}
    raw["grid"][0]["recipes"] = ["fp16", "flash", "bf16"]
    reasons = [one.unsupported for one in planned(raw)]
    assert "silently left out" in str(reasons[0])
    assert "CUDA kernels alone" in str(reasons[1])
    assert reasons[2] is None


def test_flash_attention_with_fp32_is_unsupported(raw: Raw) -> None:
    raw["recipes"] = {"x": ["flash_attention_2", "fp32"]}
    raw["grid"][0]["recipes"] = "x"
    assert "takes fp16 and bf16 alone" in str(planned(gpu(raw, 8.0))[0].unsupported)


def test_gpus_of_a_run_are_shared_out_over_its_nodes(raw: Raw) -> None:
    raw["training"]["effective_batch_size"] = 12
    raw["grid"][0] |= {"recipes": "full", "num_gpus": [1, 3, 4, 6], "nodes": [1, 2]}
    reasons = {(one.run.num_gpus, one.run.nodes): one.unsupported for one in planned(raw)}
    assert {key for key, reason in reasons.items() if reason is None} == {(1, 1), (4, 2)}
    assert reasons[3, 2] == "3 GPUs can't be shared out equally over 2 nodes"
    assert reasons[4, 1] == "4 GPUs asked for; this hardware has 2 for a run"
    assert reasons[6, 2] == "6 GPUs asked for; this hardware has 2 for a run on each of 2 nodes"
