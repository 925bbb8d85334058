"""What liger-kernel can't do is refused. Its registry is a stand-in here: the real one needs Triton, and so a GPU
(tests/gpu/test_exclusions.py)."""

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from finetune_study.config import Hardware
from finetune_study.doctor.entries import Entry, pretended
from finetune_study.errors import RunFailedError
from finetune_study.run import Run
from finetune_study.techniques.liger import Liger

REGISTRY = "liger_kernel.transformers.monkey_patch"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("liger_kernel", "liger_kernel.transformers", REGISTRY):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules[REGISTRY].MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": print, "gemma": print}  # type: ignore[attr-defined]


def model_of(kind: str) -> Any:
    return SimpleNamespace(config=SimpleNamespace(model_type=kind))


def pretended_run() -> Run:
    return pretended(Entry("a100", Hardware(memory_gib=80, compute_capability=8.0)), 1)


def test_a_model_type_without_kernels_is_refused() -> None:
    with pytest.raises(RunFailedError, match=r"no kernels for models of this type[\s\S]*falcon[\s\S]*gemma, llama"):
        Liger().wrap(model_of("falcon"), pretended_run())


def test_a_model_type_with_kernels_stays_as_it_is() -> None:
    model = model_of("llama")
    assert Liger().wrap(model, pretended_run()) is model
