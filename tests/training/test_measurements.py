"""What a record says of a run, against what can be counted by hand."""

import os
import re

import pytest

from tests.training.lab import EFFECTIVE_BATCH, STEPS, WIDE, Ended, Lab
from tests.training.pairs import Trained
from tests.training.pool import Answer

pytestmark = [pytest.mark.training, pytest.mark.long]

LENGTH = 256
LORA = {"lora": {"r": 4, "lora_alpha": 16}}
LAYER = 64 * 64 + 64 * 32 + 64 * 32 + 64 * 64 + 3 * 64 * 128
"""Weights of a layer's linear modules."""
HEAD = 384 * 64
ATTENTION = 2 * 2 * (4 * 16) * LENGTH * 2
"""Operations for a token, forward: two products, two operations each, four heads of 16, two layers."""
TOKENS = LENGTH * EFFECTIVE_BATCH


def test_steps_are_all_told_and_the_first_is_not_timed(lab: Lab) -> None:
    steps = lab.train().first_rank["steps"]
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    assert [step["timed"] for step in steps] == [False] + [True] * (STEPS - 1)
    assert all(step["stepped"] and step["seconds"] > 0 for step in steps)
    row = lab.train().row
    assert row["untimed_step_time_seconds_samples"] == [steps[0]["seconds"]]
    assert row["step_time_seconds_samples"] == [step["seconds"] for step in steps[1:]]
    assert sum(step["seconds"] for step in steps) < row["duration_seconds"]


@pytest.mark.parametrize("num_gpus", [1, 2])
def test_tokens_are_those_of_the_data(lab: Lab, num_gpus: int) -> None:
    """The run sees every training sequence once, so that its steps add up to the whole of them."""
    done = lab.train(num_gpus=num_gpus)
    manifest = done.record.environment["data"]
    assert manifest["num_train_available"] == STEPS * EFFECTIVE_BATCH
    steps = [step for rank in done.record.ranks for step in rank["steps"]]
    assert sum(step["real_tokens"] for step in steps) == manifest["train"]["real_tokens"]
    assert sum(step["loss_tokens"] for step in steps) == manifest["train"]["loss_tokens"]
    # The first token of an example is predicted by nothing.
    assert all(s["real_tokens"] - s["loss_tokens"] == EFFECTIVE_BATCH // num_gpus for s in steps)
    assert done.row["tokens_per_second"] == pytest.approx(TOKENS / done.row["step_time_seconds_median"])
    assert done.row["tokens_per_second_per_gpu"] == pytest.approx(done.row["tokens_per_second"] / num_gpus)
    assert done.row["real_tokens_per_second"] < 0.6 * TOKENS * (STEPS - 1) / sum(done.row["step_time_seconds_samples"])


def flops(ended: Answer) -> int:
    """Of all ranks."""
    return sum(rank["model_flops_per_step"] for rank in ended.ranks)


def test_model_flops_of_full_fine_tuning(lab: Lab, trained: Trained) -> None:
    expected = (3 * 2 * (2 * LAYER + HEAD) + 3 * ATTENTION) * TOKENS
    assert lab.train().row["model_flops_per_step"] == expected
    assert flops(trained.run(num_gpus=2)) == expected
    assert flops(trained.run(micro_batch=1)) == expected
    assert flops(trained.run({"zero3": {}}, num_gpus=2)) == expected


def test_model_flops_do_not_count_recomputation(trained: Trained) -> None:
    assert flops(trained.run({"gradient_checkpointing": {}})) == flops(trained.run())


def test_model_flops_of_lora_leave_out_gradients_of_frozen_weights(trained: Trained) -> None:
    adapters = trained.run(LORA).ranks[0]["trainable_parameters"]
    expected = (2 * 2 * (2 * LAYER + HEAD) + 3 * 2 * adapters + 3 * ATTENTION) * TOKENS
    assert flops(trained.run(LORA)) == expected


def test_what_a_cpu_does_not_say_is_null(lab: Lab) -> None:
    row = lab.train().row
    assert lab.train().first_rank["energy_joules"] is None
    assert row["energy_joules_per_step"] is None
    assert row["mfu_percent"] is None
    assert row["peak_memory_allocated_gib"] is None
    assert row["peak_memory_reserved_gib"] is None
    assert row["cost_usd_per_epoch"] is None


def test_the_environment_is_told(lab: Lab) -> None:
    done = lab.train()
    environment = done.record.environment
    assert set(environment["versions"]) >= {"python", "torch", "transformers", "peft", "deepspeed", "datasets"}
    assert re.fullmatch(r"[0-9a-f]{64}", environment["software_sha256"])
    assert environment["host"] == os.uname().nodename
    assert environment["model"]["source"] == "random"
    assert environment["model"]["parameters"] == done.row["total_parameters"]
    assert re.fullmatch(r"[0-9a-f]{64}", environment["data"]["sha256"])
    assert environment["variables"]["DS_ACCELERATOR"] == "cpu"
    assert environment.keys() >= {"commit", "lock_sha256", "packages", "processor", "host_memory_bytes", "command"}
    assert environment["command"][1:3] == ["-m", "finetune_study.launch"]
    assert done.first_rank["affinity"] == sorted(os.sched_getaffinity(0))
    assert done.first_rank["optimizer_class"] == "torch.optim.adamw.AdamW"


def test_two_ranks_share_the_cores(lab: Lab) -> None:
    cores = sorted(os.sched_getaffinity(0))
    told = [rank["affinity"] for rank in lab.train(num_gpus=2).record.ranks]
    half = len(cores) // 2
    assert told == ([cores[:half], cores[half : 2 * half]] if half else [cores, cores])


def test_start_and_load_take_time(lab: Lab) -> None:
    row = lab.train().row
    assert row["startup_seconds"] > 0.5  # torch is imported
    assert row["load_seconds"] > 0
    assert row["startup_seconds"] + row["load_seconds"] < row["duration_seconds"]


# --- memory, of a model that dwarfs what libraries take --------------------------------------------------------------


def wide(lab: Lab, *techniques: str, **settings: object) -> Ended:
    recipe = {name: {"r": 4} if name == "lora" else {} for name in techniques}
    return lab.train(recipe, architecture=WIDE, micro_batch=1, sequence_length=64, **settings)


def test_peak_memory_of_full_fine_tuning_is_above_its_floor_and_below_its_budget(lab: Lab) -> None:
    done = wide(lab)
    floor = 4 * 4 * done.row["total_parameters"]  # weights, gradients, two states of Adam
    assert floor < done.peak() < floor + 200 * 2**20
    assert done.peak() < 4 * 2**30
    assert done.row["peak_device_used_gib"] == pytest.approx(done.peak() / 2**30)
    assert done.row["peak_host_rss_gib"] > done.row["peak_device_used_gib"]
    by_phase = done.first_rank["memory"]["peak_device_used_bytes_by_phase"]
    assert set(by_phase) == {"load", "evaluate", "forward", "backward", "optimizer"}
    assert by_phase["optimizer"] > floor > by_phase["load"]


def test_lora_needs_less_than_full_fine_tuning(lab: Lab) -> None:
    """It saves gradients and states of the frozen weights: 12 bytes each."""
    lora, full = wide(lab, "lora"), wide(lab)
    saved = 12 * (full.row["trainable_parameters"] - lora.row["trainable_parameters"])
    assert full.peak() - lora.peak() == pytest.approx(saved, rel=0.25)


def test_gradient_checkpointing_needs_less_where_activations_dominate(lab: Lab) -> None:
    settings = {"architecture": {"num_hidden_layers": 8}, "sequence_length": 512, "micro_batch": 4}
    plain = lab.train({"eager": {}}, **settings)
    checkpointed = lab.train({"eager": {}, "gradient_checkpointing": {}}, **settings)
    assert checkpointed.losses == pytest.approx(plain.losses, rel=1e-4)
    scores = 4 * 4 * 512 * 512 * 4  # bytes: sequences, heads, positions squared
    assert plain.peak() - checkpointed.peak() > 5 * scores


def test_the_kernel_of_attention_is_that_of_training(trained: Trained) -> None:
    """With dropout a CPU has no fused kernel; the evaluation before training knows no dropout."""
    found = [
        trained.run({"bf16": {}}, architecture={"attention_dropout": dropout}).ranks[0]["attention_kernel"]
        for dropout in (0.1, 0.0)
    ]
    assert found == ["math", "flash_attention"]
