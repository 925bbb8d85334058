"""Activations go to the host, weights stay, and gradients are the plain ones."""

from typing import Any

import peft
import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, LlamaConfig

from finetune_study.techniques.activation_offload import ActivationOffload

SIZES = {"hidden_size": 80, "intermediate_size": 144, "num_hidden_layers": 2, "num_attention_heads": 4}
TOKENS = torch.arange(64).reshape(2, 32)


def model_of(adapted: bool) -> Any:
    torch.manual_seed(0)
    net = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES, vocab_size=384, use_cache=False)).train()
    lora = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(net, lora) if adapted else net


def backward(net: Any) -> dict[str, Any]:
    net(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: weight.grad for name, weight in net.named_parameters() if weight.requires_grad}


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every tensor that torch is given to move."""
    seen: list[Any] = []

    class Seen(torch.autograd.graph.save_on_cpu):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            pack: Any = vars(self)["pack_hook"]

            def see(tensor: torch.Tensor) -> Any:
                seen.append(tensor)
                return pack(tensor)

            self.pack_hook = see

    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", Seen)
    return seen


@pytest.mark.parametrize(
    ("checkpointed", "is_compiled"),
    [(False, False), (True, False), (False, True), pytest.param(True, True, marks=pytest.mark.long)],
)
@pytest.mark.parametrize("adapted", [False, True], ids=["fp32", "lora"])
def test_no_weight_is_moved(moved: list[Any], adapted: bool, checkpointed: bool, is_compiled: bool) -> None:
    plain = backward(model_of(adapted))
    net = model_of(adapted)
    if checkpointed:
        net.gradient_checkpointing_enable({"use_reentrant": False})
        net.enable_input_require_grads()
    net = ActivationOffload().wrap(net, None)  # type: ignore[arg-type]
    if is_compiled:
        torch.compiler.reset()
        net.compile(backend="aot_eager")
    offloaded = backward(net)
    assert offloaded.keys() == plain.keys()
    for name, gradient in plain.items():
        torch.testing.assert_close(offloaded[name], gradient)
    held = {tensor.untyped_storage().data_ptr() for tensor in (*net.parameters(), *net.buffers())}
    assert moved
    assert not [tensor.shape for tensor in moved if tensor.untyped_storage().data_ptr() in held]


def test_copies_that_autocast_makes_are_moved(moved: list[Any]) -> None:
    """As the docstring says; the forecast counts them."""
    net = ActivationOffload().wrap(model_of(adapted=False), None)  # type: ignore[arg-type]
    with torch.autocast("cpu", torch.bfloat16):
        net(input_ids=TOKENS, labels=TOKENS)
    linear = [layer for layer in net.modules() if isinstance(layer, torch.nn.Linear)]
    assert {(layer.in_features, layer.out_features) for layer in linear} <= {
        tuple(tensor.shape) for tensor in moved if tensor.dtype == torch.bfloat16
    }


def test_weights_can_be_taken_away_until_backward() -> None:
    """As ZeRO-3 does it: nothing keeps a weight's values alive, and those that are there in the backward pass count."""
    plain = backward(model_of(adapted=False))
    net = ActivationOffload().wrap(model_of(adapted=False), None)  # type: ignore[arg-type]
    loss = net(input_ids=TOKENS, labels=TOKENS).loss
    values = [weight.detach().clone() for weight in net.parameters()]
    gathered = [StorageWeakRef(weight.untyped_storage()) for weight in net.parameters()]
    for weight in net.parameters():
        weight.data = torch.empty(0)
    assert all(storage.expired() for storage in gathered)
    for weight, value in zip(net.parameters(), values, strict=True):
        weight.data = value
    loss.backward()
    for name, weight in net.named_parameters():
        torch.testing.assert_close(weight.grad, plain[name])
