"""What every technique says of itself, and what speaks against it where."""

import json
import re
from collections import Counter
from typing import Any

import pytest

from finetune_study import config, plan, techniques
from finetune_study.config import Hardware
from finetune_study.errors import ConfigError
from finetune_study.techniques import base
from finetune_study.techniques.base import Technique

Raw = dict[str, Any]

GPUS = {"V100": 7.0, "A100": 8.0, "L40S": 8.9, "H100": 9.0, "B200": 10.0}
"""Compute capabilities, of https://developer.nvidia.com/cuda-gpus."""

OF_HARDWARE = {
    "tf32": {"A100", "L40S", "H100", "B200"},
    "bf16": {"A100", "L40S", "H100", "B200", "cpu"},
    "bf16_pure": {"A100", "L40S", "H100", "B200", "cpu"},
    "fp16": {*GPUS},
    "fp8": {"L40S", "H100", "B200", "cpu"},
    "flash_attention_2": {"A100", "L40S", "H100", "B200"},
    "flash_attention_3": {"H100"},
    "flash_attention_4": {"H100", "B200"},
    "liger": {*GPUS},
    "fsdp": {*GPUS},
    "paged_adamw_32bit": {*GPUS},
    "paged_adamw_8bit": {*GPUS},
    "zeropp": {*GPUS},
    "optimizer_in_backward": {"A100", "L40S", "H100", "B200", "cpu"},  # a V100's default is fp16, with loss scaling
}
"""Where those run that do not run everywhere."""


def hardware(name: str) -> Hardware:
    if name == "cpu":
        return Hardware(device="cpu", memory_gib=4)
    return Hardware(memory_gib=80, compute_capability=GPUS[name])


def alone(name: str, settings: Raw | None = None) -> dict[str, Raw]:
    """The smallest recipe of a technique that means something."""
    needs = sorted(techniques.ALL[name].needs)
    return {name: settings or {}, **({needs[-1]: {}} if needs else {})}


def why_not(recipe: Raw, where: str, num_gpus: int = 2) -> str | None:
    on = hardware(where)
    return techniques.why_not(techniques.complete(recipe, on, num_gpus), on)


def test_each_kind_that_has_several_says_why_a_recipe_holds_one() -> None:
    counts = Counter(technique.kind for technique in techniques.ALL.values())
    assert {kind for kind, count in counts.items() if count > 1} == base.WHY_ONE.keys()
    for kind, why in base.WHY_ONE.items():
        first, second = [name for name, one in techniques.ALL.items() if one.kind == kind and name != "lora"][:2]
        with pytest.raises(
            ConfigError, match=re.escape(f"`{first}` and `{second}` contradict each other: both are")
        ) as raised:
            techniques.parse({first: {}, second: {}})
        assert why in str(raised.value)


@pytest.mark.parametrize("technique", techniques.ALL.values(), ids=lambda technique: technique.name)
def test_module_is_complete(technique: type[Technique]) -> None:
    assert technique.kind in techniques.ORDER
    assert (technique.__doc__ or "").splitlines()[0].endswith(".")
    assert technique.__doc__ != Technique.__doc__
    assert re.fullmatch("; ".join(f"{what}: [^;:\n]+" for what in ("memory", "speed", "quality")), technique.effect)
    assert "http" in technique.source or "arXiv" in technique.source or technique.name == "fp32"
    assert technique.needs <= techniques.ALL.keys()
    assert technique.beside <= techniques.ALL.keys() - {technique.name}
    assert technique.excludes.keys() <= techniques.ALL.keys() - {technique.name}
    assert all(len(reason) > 20 for reason in technique.excludes.values())
    assert all(field.default is not ... for field in technique.model_fields.values()), "every setting has a default"


@pytest.mark.parametrize("name", techniques.ALL)
def test_where_a_technique_runs(name: str) -> None:
    recipe, places = alone(name), {*GPUS, "cpu"}
    num_gpus = 1 if name == "optimizer_in_backward" else 2
    reasons = {place: why_not(recipe, place, num_gpus) for place in places}
    assert {place for place, reason in reasons.items() if reason is None} == OF_HARDWARE.get(name, places), reasons


def test_a_gpu_of_unknown_capability_is_tried() -> None:
    unknown = Hardware(memory_gib=80)
    for name in OF_HARDWARE.keys() - {"optimizer_in_backward"}:
        assert techniques.why_not(techniques.complete(alone(name), unknown, 2), unknown) is None


@pytest.mark.parametrize("name", techniques.ALL)
def test_exclusions_hold_in_both_orders(name: str) -> None:
    for other, reason in techniques.ALL[name].excludes.items():
        for first, second in ((name, other), (other, name)):
            try:
                found = why_not({**alone(first), **alone(second)}, "H100")
            except ConfigError as error:  # what one of them needs is of the other's kind
                found = str(error)
            of_default = techniques.ALL["optimizer_in_backward"].excludes["ddp"]  # where neither names a sharding
            assert found in (reason, of_default) or "contradict" in str(found)


def test_muon_under_zero_says_whose_muon_it_is() -> None:
    """DeepSpeed can shard one of its own."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for sharding in ("zero1", "zero2", "zero3"):
        reason = str(why_not({"muon": {}, sharding: {}}, "A100"))
        assert ("all would be AdamW's" if sharding == "zero3" else "torch.optim.Muon gets flat pieces") in reason
        assert f"the Muon that DeepSpeed brings for ZeRO ({MuonWithAuxAdam.__name__})" in reason


def test_methods_that_peft_trains_together() -> None:
    assert list(techniques.parse({"loha": {}, "lora": {}})) == ["loha", "lora"]
    apart: list[Raw] = [{"lora": {}, "prefix_tuning": {}}, {"lora": {}, "adalora": {}}, {"lora": {}, "qlora": {}}]
    for together in apart:
        with pytest.raises(ConfigError, match="contradict each other: both are peft"):
            techniques.parse(together)
    for name, technique in techniques.ALL.items():
        assert all(name in techniques.ALL[other].beside for other in technique.beside)


def test_what_means_nothing_alone() -> None:
    for name in ("zeropp", "offload_param", "offload_optimizer"):
        with pytest.raises(ConfigError, match="means nothing without one of"):
            techniques.parse({name: {}})


def test_order_of_application() -> None:
    recipe: Raw = {"packing": {}, "muon": {}, "gradient_checkpointing": {}, "lora": {}, "eager": {}, "bf16": {}}
    assert list(techniques.parse(recipe)) == ["bf16", "eager", "lora", "gradient_checkpointing", "muon", "packing"]


def test_settings_that_came_later_are_not_in_a_dump_at_their_defaults() -> None:
    """Else every run_id of their techniques would change."""
    dumped = {name: techniques.ALL[name]().model_dump() for name in ("gradient_checkpointing", "offload_optimizer")}
    assert dumped == {
        "gradient_checkpointing": {"use_reentrant": False},
        "offload_optimizer": {"device": "cpu", "pin_memory": False},
    }
    assert techniques.ALL["flash_attention_2"]().model_dump() == {}
    assert "init_lora_weights" not in techniques.ALL["lora"]().model_dump()


def test_offloaded_states_are_adamws_alone() -> None:
    """On a GPU DeepSpeed would put its own AdamW in the place of another optimizer, and say nothing."""
    offload: Raw = {"zero2": {}, "offload_optimizer": {}}
    assert why_not(offload | {"adamw_torch": {}}, "A100") is None
    assert "not by adamw_torch_fused" in str(why_not(offload | {"adamw_torch_fused": {}}, "A100"))
    assert "not by adamw_8bit" in str(why_not(offload | {"adamw_8bit": {}}, "A100"))
    assert why_not(offload | {"adamw_8bit": {}}, "cpu") is None


def test_loftq_quantises_by_itself() -> None:
    assert "LoftQ quantises the model itself" in str(why_not({"qlora": {"init_lora_weights": "loftq"}}, "A100"))


def test_nvme_needs_a_path_and_zero3() -> None:
    nvme = {"device": "nvme", "nvme_path": "/local"}
    assert why_not({"zero3": {}, "offload_param": nvme}, "A100") is None
    for name in ("offload_param", "offload_optimizer"):
        with pytest.raises(ConfigError, match=f"`{name}`: .*nvme_path"):
            techniques.parse({"zero3": {}, name: {"device": "nvme"}})
    assert "ZeRO-3 alone" in str(why_not({"zero2": {}, "offload_optimizer": nvme}, "A100"))
    assert "libaio" in str(why_not({"zero3": {}, "offload_param": nvme}, "cpu"))


def test_fsdp_sums_over_hosts_where_weights_are_offloaded() -> None:
    offloaded, plain = (
        parsed["fsdp"].training_arguments(parsed)
        for parsed in (techniques.parse({"fsdp": {}, "offload_param": {}}), techniques.parse({"fsdp": {}}))
    )
    assert offloaded["ddp_backend"] == "cuda:nccl,cpu:gloo"
    assert "ddp_backend" not in plain


def test_groups_of_layers_and_fsdp() -> None:
    grouped = {"fsdp": {}, "gradient_checkpointing": {"every": "sqrt"}}
    assert "mixed torch.Tensor and DTensor" in str(why_not(grouped, "A100"))
    assert why_not(grouped | {"gradient_checkpointing": {"every": 2}}, "A100") is None


def test_loftq_needs_a_gpu() -> None:
    loftq = {"lora": {"init_lora_weights": "loftq"}}
    assert "LoftQ" in str(why_not(loftq, "cpu"))
    assert why_not(loftq, "V100") is None


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "it can't accumulate 2 of them"),
        ({"micro_batch": 2}, "set training.max_grad_norm: 0"),
        ({"micro_batch": 2, "max_grad_norm": 0}, None),
    ],
)
def test_optimizer_in_backward_and_the_run(raw: Raw, settings: Raw, words: str | None) -> None:
    raw["recipes"]["full"] = {"optimizer_in_backward": {}}
    raw["grid"][0] |= {"recipes": "full", "per_device_train_batch_size": settings.pop("micro_batch", 1)}
    raw["training"] |= settings
    (planned,) = plan.plan(config.parse(raw))
    if words is None:
        assert planned.unsupported is None
    else:
        assert words in str(planned.unsupported)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        pytest.param(
            {"bf16": {}, "qlora": {}},
            {
                "quant_method": "bitsandbytes",
                "load_in_4bit": True,
                "bnb_4bit_quant_type": "nf4",
                "bnb_4bit_use_double_quant": True,
                "bnb_4bit_compute_dtype": "bfloat16",
            },
            id="nf4",
        ),
        pytest.param(
            {"fp16": {}, "qlora": {"load_in_8bit": True}},
            {"quant_method": "bitsandbytes", "load_in_8bit": True},
            id="int8",
        ),
    ],
)
def test_quantisation_is_told_as_json(recipe: Raw, expected: Raw) -> None:
    parsed = techniques.parse(recipe)
    told = parsed["qlora"].load_arguments(parsed)["quantization_config"]
    assert json.loads(json.dumps(told)) == expected


def test_under_fsdp_weights_of_4_bit_are_held_as_floating_point() -> None:
    """As that which mixed precision casts to; else accelerate leaves them whole on each device, or casts bytes away."""
    wanted = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "bf16_pure": "bfloat16"}
    for precision, storage in wanted.items():
        parsed = techniques.parse({precision: {}, "qlora": {}, "fsdp": {}})
        told = parsed["qlora"].load_arguments(parsed)["quantization_config"]
        assert told["bnb_4bit_quant_storage"] == storage
    assert "no attribute 'CB'" in str(why_not({"qlora": {"load_in_8bit": True}, "fsdp": {}}, "A100"))


def test_a_kernel_of_the_hub_is_taken_only_when_it_is_named() -> None:
    """Without the package transformers would fetch one by itself: so the package is asked for."""
    usual = techniques.parse({"flash_attention_2": {}})["flash_attention_2"]
    assert (usual.packages_needed(), usual.load_arguments({})) == (
        ("flash_attn",),
        {"attn_implementation": "flash_attention_2"},
    )
    with pytest.raises(ConfigError, match="hub_kernel"):
        techniques.parse({"flash_attention_2": {"hub_kernel": "somebody/kernel"}})
    named = techniques.parse({"flash_attention_2": {"hub_kernel": "kernels-community/flash-attn2"}})[
        "flash_attention_2"
    ]
    assert (named.packages_needed(), named.load_arguments({})) == (
        ("kernels",),
        {"attn_implementation": "kernels-community/flash-attn2"},
    )


def test_only_deepspeed_runs_have_its_configuration(raw: Raw) -> None:
    from finetune_study import train

    raw["recipes"] = {"plain": {"bf16_pure": {}}, "sharded": {"bf16_pure": {}, "zero2": {}}}
    raw["grid"][0]["recipes"] = ["plain", "sharded"]
    plain, sharded = (train.arguments_of(one.run, "out") for one in plan.plan(config.parse(raw)))
    assert "deepspeed" not in plain
    assert "bf16" not in plain
    assert sharded["bf16"] is True
    expected = {"enabled": "auto", "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert sharded["deepspeed"]["bf16"] == expected


def reason_of(raw: Raw, recipe: Raw, num_gpus: int) -> str | None:
    """Why a run of the tiny study on H100s is not tried."""
    raw["hardware"] = {"h100": {"memory_gib": 80, "compute_capability": 9.0}}
    raw["recipes"] = {"it": recipe}
    raw["grid"] = [{**raw["grid"][0], "hardware": "h100", "recipes": "it", "num_gpus": num_gpus}]
    raw["training"] = {"effective_batch_size": 24}
    return next(iter(plan.plan(config.parse(raw)))).unsupported


@pytest.mark.parametrize(
    ("size", "num_gpus", "reason"),
    [(1, 3, None), (2, 2, None), (2, 4, None), (4, 2, "no more devices"), (2, 3, "3 is not divisible by 2")],
)
def test_second_copies_of_weights_are_those_of_whole_groups(
    raw: Raw, size: int, num_gpus: int, reason: str | None
) -> None:
    found = reason_of(raw, {"zero3": {}, "zeropp": {"zero_hpz_partition_size": size}}, num_gpus)
    assert (found is None) if reason is None else (reason in str(found))


@pytest.mark.parametrize(("settings", "fits"), [({}, True), ({"tinit": 3}, False), ({"tinit": 1, "tfinal": 2}, False)])
def test_adalora_has_steps_to_move_ranks_in(raw: Raw, settings: Raw, fits: bool) -> None:
    raw["protocol"] = {"num_untimed_steps": 1, "num_timed_steps": 2}
    found = reason_of(raw, {"adalora": settings}, 1)
    assert (found is None) if fits else ("budgeting phase" in str(found))


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "orthogonal"])
def test_starts_that_peft_makes_of_whole_weights_alone(start: str) -> None:
    assert "peft" in str(why_not({"qlora": {"init_lora_weights": start}}, "A100"))
    assert why_not({"lora": {"init_lora_weights": start}}, "A100") is None
    assert why_not({"qlora": {"init_lora_weights": "olora"}}, "A100") is None


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("p_tuning", {"encoder_dropout": 0.5}, "an LSTM's"),
        ("p_tuning", {"encoder_num_layers": 3}, "an LSTM's"),
        ("prefix_tuning", {"encoder_hidden_size": 64}, "prefix_projection, which is off"),
        ("qlora", {"load_in_8bit": True, "bnb_4bit_quant_type": "fp4"}, "of 4 bits"),
        ("qlora", {"load_in_8bit": True, "bnb_4bit_use_double_quant": False}, "of 4 bits"),
        ("torch_compile", {"torch_compile_mode": "fastest"}, "reduce-overhead"),
        ("torch_compile", {"torch_compile_backend": "nonsense"}, "inductor"),
        ("galore_adamw", {"adam_beta1": 0.5}, "unknown setting"),
        ("lora", {"rank": 8}, "rank: unknown setting .did you mean r\\?"),
        ("adalora", {"r": 8}, "r: unknown setting .did you mean init_r\\?"),
        ("apollo_adamw", {"r": 8}, "r: unknown setting .did you mean rank\\?"),
        ("adalora", {"init_r": 4, "target_r": 8}, "init_r 4 is not above target_r 8"),
        ("adalora", {"init_r": 8}, "init_r 8 is not above target_r 8"),
        *(
            ("torch_compile", {"torch_compile_backend": backend, "torch_compile_mode": mode}, "inductor's")
            for backend in ("aot_eager", "eager", "cudagraphs")
            for mode in ("default", "max-autotune")
        ),
        (
            "zeropp",
            {"zero_quantized_weights": False, "zero_quantized_gradients": False},
            "nothing of ZeRO\\+\\+ is left",
        ),
        *((name, {"nvme_path": "/local"}, "device is cpu") for name in ("offload_param", "offload_optimizer")),
    ],
)
def test_settings_that_mean_nothing_are_refused(name: str, settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        techniques.parse({name: settings})
