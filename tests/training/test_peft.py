"""What peft trains: counted by itself, by hand, and by what a run says."""

import json
import os
import re
import subprocess
import sys
from typing import Any

import pytest

from finetune_study import facts, model, model_source, techniques, variables
from finetune_study.errors import RunFailedError
from finetune_study.ranks import free_port
from finetune_study.techniques.adapters import Adalora
from finetune_study.techniques.peft_method import PeftMethod
from tests.tiny_study import TINY_STUDY
from tests.training.lab import LIMIT_SECONDS, Lab
from tests.training.pairs import Case, Trained

pytestmark = pytest.mark.training

METHODS = [name for name, technique in techniques.ALL.items() if issubclass(technique, PeftMethod)]

TRAINED = {
    "lora": 2 * 4 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + 3 * (64 + 128)),
    "qlora": 2 * 8 * ((64 + 64) + (64 + 32) + (64 + 32) + (64 + 64) + 3 * (64 + 128)),
    "ia3": 2 * (32 + 32 + 128),  # keys, values, and the input of the last layer of the feed-forward
    "prompt_tuning": 20 * 64,
    "prefix_tuning": 20 * 2 * 2 * 32,  # keys and values of two layers
    "adaption_prompt": 2 * (10 * 64 + 1),  # and a gate
}
"""Weights by hand, where a hand is enough."""


@pytest.mark.parametrize("name", METHODS)
def test_weights_are_counted_as_peft_counts_them(name: str, lab: Lab, trained: Trained) -> None:
    case = Case((name,))
    facts = trained(case, case.num_gpus).ranks[0]
    run = lab.plan(case.recipe, num_gpus=1).run
    lab.prepare(run)
    adapted = (
        techniques.ALL[name]
        .model_validate(case.recipe[name])
        .wrap(model.load(run, lab.results.model(run.model_key)), run)
    )
    assert (facts["trainable_parameters"], facts["total_parameters"]) == adapted.get_nb_trainable_parameters()
    assert facts["trainable_parameters"] == TRAINED.get(name, facts["trainable_parameters"])
    assert facts["trainable_parameters"] < 0.4 * facts["total_parameters"]


def test_loftq_takes_what_four_bits_leave_into_the_update(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a GPU, which peft asks for by name: `cuda` is the CPU, where bitsandbytes quantises as well."""
    import torch

    run = lab.plan({"lora": {"init_lora_weights": "loftq", "r": 16}}).run
    lab.prepare(run)
    net = model.load(run, lab.results.model(run.model_key))
    plain = net.model.layers[0].mlp.up_proj.weight.detach().clone()
    to = torch.Tensor.to

    def to_cpu(tensor: torch.Tensor, *places: Any, **more: Any) -> torch.Tensor:
        there = {name: "cpu" if str(value) == "cuda" else value for name, value in more.items()}
        return to(tensor, *("cpu" if str(place) == "cuda" else place for place in places), **there)

    monkeypatch.setattr(torch.Tensor, "to", to_cpu)
    layer = run.parsed_techniques["lora"].wrap(net, run).base_model.model.model.layers[0].mlp.up_proj
    four_bits = (layer.get_base_layer().weight - plain).norm() / plain.norm()
    with_update = (layer.get_base_layer().weight + layer.get_delta_weight("default") - plain).norm() / plain.norm()
    assert 0.02 < float(four_bits) < 0.3
    assert float(with_update) < 0.9 * float(four_bits)


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}, {"bnb_4bit_quant_type": "fp4"}], ids=str)
def test_quantised_weights_are_small_and_close(settings: dict[str, Any], lab: Lab) -> None:
    """NF4 takes half a byte for a weight, and a maximum for each block of 64; int8 one, and a maximum for each row."""
    import torch

    run = lab.run({"qlora": settings})
    lab.prepare(run)
    folder = lab.results.model(run.model_key)
    net = model.load(run, folder)
    linear = net.model.layers[0].mlp.up_proj
    plain = model.load(lab.run(), folder).model.layers[0].mlp.up_proj.weight
    bits = 8 if settings.get("load_in_8bit") else 4
    assert linear.weight.numel() * linear.weight.element_size() == plain.numel() * bits // 8
    inputs = torch.ones(1, 64)
    error = (linear(inputs) - plain @ inputs[0]).norm() / (plain @ inputs[0]).norm()
    assert 0 < float(error) < (0.05 if bits == 8 else 0.3)


@pytest.mark.parametrize("is_tied", [True, False])
def test_random_weights_are_those_of_the_plain_model(is_tied: bool, lab: Lab) -> None:
    """Drawn one module at a time: what is not quantised is equal to the bit, what is comes as close as NF4 does."""
    from bitsandbytes.functional import dequantize_4bit

    architecture = {"tie_word_embeddings": is_tied}
    run, plain = lab.run({"qlora": {}}, architecture=architecture), lab.run(architecture=architecture)
    lab.prepare(run)
    quantised, whole = (
        dict(model.load(one, lab.results.model(run.model_key)).named_parameters()) for one in (run, plain)
    )
    assert quantised.keys() == whole.keys()
    assert ("lm_head.weight" in whole) is not is_tied
    for name, weight in whole.items():
        if hasattr(found := quantised[name], "quant_state"):
            error = (dequantize_4bit(found.data, found.quant_state) - weight).norm() / weight.norm()
            assert 0 < float(error) < 0.15, name
        else:
            assert found.equal(weight), name


def of_type(**architecture: Any) -> dict[str, Any]:
    """A tiny model of another type, with the tiny Llama's tokenizer."""
    llama = TINY_STUDY["models"]["tiny"]
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    sizes = {name: llama["architecture"][name] for name in names}
    other = {"weights": "random", "tokenizer": "llama", "architecture": {**sizes, **architecture}}
    return {"models": {"tiny": other, "llama": llama}}


def test_a_model_of_which_nothing_would_be_quantised_is_not_trained(lab: Lab) -> None:
    planned = lab.plan({"qlora": {}}, **of_type(model_type="falcon"))
    assert "no layer of a falcon is" in str(planned.unsupported)
    folder = lab.results.model(planned.run.model_key)
    model_source.prepare(planned.run.model, folder)
    with pytest.raises(RunFailedError, match=r"(?s)None of the model's layers.*a falcon.*use lora, or another model"):
        model.load(planned.run, folder)


@pytest.mark.long
def test_a_model_of_which_little_is_quantised_says_so_in_its_log(lab: Lab) -> None:
    mixtral = of_type(model_type="mixtral", intermediate_size=128, num_key_value_heads=2, num_local_experts=4)
    run = lab.run({"qlora": {}}, **mixtral)
    model_source.prepare(run.tokenizer, lab.results.model(run.tokenizer_key))
    logs = []
    for ended in (lab.train({"qlora": {}}, **mixtral), lab.train({"qlora": {}})):
        assert ended.record.ending.status == "completed", ended.output
        logs.append(ended.paths.log.read_text(encoding="utf-8"))
    of_mixtral, of_llama = (re.findall("^warning: .*are quantised; not .*", log, re.MULTILINE) for log in logs)
    assert of_llama == []
    assert len(of_mixtral) == 1
    assert of_mixtral[0].startswith("warning: only 11.")
    assert "; not MixtralExperts (88." in of_mixtral[0]


def test_quantised_lora_learns_as_lora_does(trained: Trained) -> None:
    lora = trained.run({"lora": {"r": 4, "lora_alpha": 16}})
    for settings, tolerance in (({"load_in_8bit": True}, 5e-3), ({}, 2e-2)):
        quantised = trained.run({"qlora": {"r": 4, "lora_alpha": 16, **settings}})
        assert quantised.losses == pytest.approx(lora.losses, rel=tolerance)
        assert quantised.losses != lora.losses


def test_quantised_weights_train_alike_in_pieces(trained: Trained) -> None:
    """Evaluation comes before training: what it does to the weights must not reach the steps."""
    whole, pieces = (trained.run({"qlora": {"r": 4}, name: {}}, num_gpus=2) for name in ("ddp", "zero3"))
    assert pieces.losses == pytest.approx(whole.losses, rel=1e-4)
    assert pieces.eval_losses == pytest.approx(whole.eval_losses, rel=1e-4)


@pytest.mark.long
@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_16"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "gaussian"},
    ],
    ids=str,
)
def test_variants_of_lora_begin_where_it_does_and_go_their_own_way(settings: dict[str, Any], trained: Trained) -> None:
    lora = trained.run({"lora": {"r": 4, "lora_alpha": 16}})
    variant = trained.run({"lora": {"r": 4, "lora_alpha": 16, **settings}})
    assert variant.losses[0] == pytest.approx(lora.losses[0], rel=1e-4)
    assert variant.losses[-1] < variant.losses[0]
    assert variant.losses[1:] != pytest.approx(lora.losses[1:], rel=1e-6)


def test_penalty_of_adalora_is_in_training_alone(trained: Trained) -> None:
    ended, plain = trained.run({"adalora": {}}), trained.run()
    assert ended.losses[0] > plain.losses[0] + 1
    assert ended.eval_losses[0] == pytest.approx(plain.eval_losses[0], rel=1e-4)


@pytest.mark.parametrize("first_scale", [1.0, 2.0**127], ids=["no step is skipped", "the first are skipped"])
def test_adalora_takes_ranks_away(first_scale: float, lab: Lab) -> None:
    """With torch's loss scaling: of a large scale gradients overflow float32, and steps are skipped until they fit."""
    import peft
    import torch
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    run = lab.run({"adalora": {"init_r": 12, "target_r": 2}})
    lab.prepare(run)
    technique = run.parsed_techniques["adalora"]
    net = technique.wrap(model.load(run, lab.results.model(run.model_key)), run)
    assert isinstance(net, peft.PeftModel)
    (callback,) = technique.callbacks(net)
    Accelerator(cpu=True)  # its optimizer asks for the state that this leaves
    scaler = torch.amp.GradScaler("cpu", init_scale=first_scale)
    trained = [p for p in net.parameters() if p.requires_grad]
    optimizer = AcceleratedOptimizer(torch.optim.AdamW(trained, lr=1e-3), device_placement=False, scaler=scaler)
    skipped: list[bool] = []
    net.train()
    while skipped.count(False) < run.num_steps:
        tokens = torch.arange(16)[None] % 7
        scaler.scale(net(input_ids=tokens, labels=tokens).loss).backward()
        optimizer.step()
        callback.on_optimizer_step(None, None, None, optimizer=optimizer)
        optimizer.zero_grad()
        skipped.append(optimizer.step_was_skipped)
    assert skipped[0] == (first_scale > 1)
    assert all(bool(importance.isfinite().all()) for importance in net.base_model.rankallocator.exp_avg_ipt.values())
    scales = [p for name, p in net.named_parameters() if "lora_E" in name]
    assert all(p.shape[0] == 12 for p in scales)
    left = sum(int((p != 0).sum()) for p in scales)
    assert left == len(scales) * 2 + int(len(scales) * (12 - 2) / run.num_steps**3)  # of the cube, one step is left


RANKS_LEFT = """
import json, sys
from pathlib import Path
from finetune_study import run
from finetune_study.facts import Facts
from finetune_study.paths import Results
from finetune_study.techniques.adapters import Adalora
from finetune_study.train import Rank
made, wrap = [], Adalora.wrap
Adalora.wrap = lambda *arguments: made.append(wrap(*arguments)) or made[-1]
run_yaml, results, facts = map(Path, sys.argv[1:])
Rank(run.load(run_yaml), Facts(facts)).train(Results(results))
importances = made[0].base_model.rankallocator.exp_avg_ipt.values()
scales = [p for name, p in made[0].named_parameters() if "lora_E" in name]
left = sum(int((p != 0).sum()) for p in scales)
finite = [bool(one.isfinite().all()) for one in importances]
print(json.dumps([finite, left / len(scales)]))
"""
"""A rank that says at its end which of AdaLoRA's importances are finite, and how many ranks a matrix has on average."""


def test_adalora_does_not_learn_from_steps_that_deepspeeds_loss_scaling_skips(lab: Lab) -> None:
    run = lab.run(
        {"fp16": {}, "zero2": {}, "offload_optimizer": {}, "adalora": {"init_r": 12, "target_r": 2}},
        data={"dataset": lab.plenty},
    )
    paths = lab.prepare(run)
    told = paths.rank_facts(0)
    told.parent.mkdir(parents=True)
    ended = subprocess.run(
        [sys.executable, "-c", RANKS_LEFT, paths.run_yaml, lab.results.root, told],
        env={**os.environ, **variables.for_rank(0, 1, 1, ("127.0.0.1", free_port()))},
        capture_output=True, text=True, check=False, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert not all(step["stepped"] for step in facts.read(told)["steps"])
    finite, ranks = json.loads(ended.stdout.splitlines()[-1])
    assert set(finite) == {True}
    assert 2 <= ranks < 3


def test_merged_lora_computes_the_same(lab: Lab) -> None:
    import torch

    run = lab.run({"lora": {"r": 4, "init_lora_weights": False}})
    lab.prepare(run)
    net = run.parsed_techniques["lora"].wrap(model.load(run, lab.results.model(run.model_key)), run).eval()
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        adapted = net(input_ids=tokens).logits
        merged = net.merge_and_unload()
        assert not any("lora" in name for name, _ in merged.named_parameters())
        torch.testing.assert_close(merged(input_ids=tokens).logits, adapted, rtol=1e-4, atol=1e-4)


def test_lora_beside_another_method(lab: Lab, trained: Trained) -> None:
    alone, other, both = (trained(Case(names), 2) for names in (("lora",), ("loha",), ("lora", "loha")))
    counts = [answer.ranks[0]["trainable_parameters"] for answer in (alone, other, both)]
    assert counts[2] == counts[0] + counts[1]
    assert both.losses[0] == pytest.approx(alone.losses[0], rel=1e-4)
    assert both.losses[-1] < min(alone.losses[-1], other.losses[-1])


def test_three_methods_side_by_side(lab: Lab, trained: Trained) -> None:
    names = ("lora", "loha", "oft")
    alone = [trained(Case((name,)), 2).ranks[0]["trainable_parameters"] for name in names]
    together = trained(Case(names), 2)
    assert together.ranks[0]["trainable_parameters"] == sum(alone)
    assert together.losses[-1] < together.losses[0]


@pytest.mark.parametrize("target_r", [12, 14])
def test_peft_only_takes_ranks_away(target_r: int, lab: Lab) -> None:
    import torch

    run = lab.run({"adalora": {}})
    lab.prepare(run)
    technique = Adalora.model_construct(init_r=12, target_r=target_r)
    net = technique.wrap(model.load(run, lab.results.model(run.model_key)), run)
    net(input_ids=(tokens := torch.arange(16)[None]), labels=tokens).loss.backward()
    net.base_model.update_and_allocate(0)
    with pytest.raises(RuntimeError, match="selected number k out of range"):
        net.base_model.update_and_allocate(1)


def test_peft_has_no_more_adapter_layers_than_the_model(lab: Lab) -> None:
    assert lab.plan({"adaption_prompt": {"adapter_layers": 2}}).unsupported is None
    planned = lab.plan({"adaption_prompt": {"adapter_layers": 3}})
    words = "Config specifies more adapter layers '3' than the model has '2'"
    assert words in str(planned.unsupported)
    lab.prepare(planned.run)
    net = model.load(planned.run, lab.results.model(planned.run.model_key))
    with pytest.raises(ValueError, match=words):
        planned.run.parsed_techniques["adaption_prompt"].wrap(net, planned.run)


@pytest.mark.parametrize(
    ("recipe", "says", "planned"),
    [
        ({"lora": {"modules_to_save": ["nope"]}}, "lora.modules_to_save", None),
        ({"oft": {"oft_block_size": 48}}, "oft.oft_block_size", "peft: Invalid `oft_block_size` (48), it would take"),
        ({"oft": {"oft_block_size": 48, "target_modules": ["q_proj"]}}, "oft.oft_block_size", None),
    ],
)
def test_what_peft_would_pass_over_ends_the_run(
    recipe: dict[str, Any], says: str, planned: str | None, lab: Lab
) -> None:
    found = lab.plan(recipe)
    assert (found.unsupported is None) if planned is None else (planned in str(found.unsupported))
    run = found.run
    lab.prepare(run)
    net = model.load(run, lab.results.model(run.model_key))
    (technique,) = (one for name, one in run.parsed_techniques.items() if name in recipe)
    with pytest.raises(RunFailedError, match=says):
        technique.wrap(net, run)
