"""Every technique, and every pair of them, runs on a CPU or is excluded with a reason.

What ran is written to the file that the variable TECHNIQUES_RAN names (`make techniques-ran`), for docs/techniques.md.

torchao's optimizers compile their step, for a minute in each run; here they run it uncompiled, and
tests/training/test_optimizers.py has them compiled.
"""

import math
from pathlib import Path

import pytest

from finetune_study import techniques, techniques_docs
from finetune_study.run import Run
from tests.training.lab import STEPS, Lab
from tests.training.pairs import ROUNDING, Case, Trained, at_defaults, pairs, singles
from tests.training.pool import Answer

FP32_TOLERANCE = 1e-4
"""Relative: the same sums in another order."""
ROUNDED_TOLERANCE = 2e-2
"""Relative: 8 bits of mantissa, and DeepSpeed rounds elsewhere than autocast does."""
FP8_TOLERANCE = 5e-2
"""Relative, after steps: products keep 3 bits of mantissa (torch.float8_e4m3fn), a sixteenth of what bf16 keeps."""


def check(case: Case, lab: Lab, trained: Trained) -> None:
    """Runs a case, and compares it with what it must not differ from."""
    planned = case.plan(lab)
    if not isinstance(planned, Run):
        assert len(planned) > 20, "a reason says something"
        return
    answer = trained(case, case.num_gpus)
    trained.tell(case, answer, case.num_gpus)
    assert answer.error is None, answer.trace
    stepped = [step["loss"] for step in answer.ranks[0]["steps"] if step["stepped"]]
    assert len(stepped) == STEPS
    assert all(math.isfinite(loss) for loss in stepped)
    reference = case.reference
    if reference is None or "fp16" in case.names:
        return
    expected = trained(reference, case.num_gpus)
    tolerance = ROUNDED_TOLERANCE if ROUNDING & set(case.names) else FP32_TOLERANCE
    assert answer.losses[0] == pytest.approx(expected.losses[0], rel=tolerance)
    tolerance = FP8_TOLERANCE if "fp8" in case.names else tolerance
    assert answer.losses == pytest.approx(expected.losses, rel=tolerance)
    assert answer.eval_losses == pytest.approx(expected.eval_losses, rel=tolerance)


@pytest.mark.training
@pytest.mark.parametrize("case", singles(), ids=str)
def test_a_technique_alone(case: Case, lab: Lab, trained: Trained) -> None:
    check(case, lab, trained)


@pytest.mark.training
@pytest.mark.long
@pytest.mark.parametrize("case", at_defaults(), ids=str)
def test_a_technique_at_its_defaults(case: Case, lab: Lab, trained: Trained) -> None:
    check(case, lab, trained)


@pytest.mark.exhaustive
@pytest.mark.parametrize("case", pairs(), ids=str)
def test_a_pair(case: Case, lab: Lab, trained: Trained) -> None:
    check(case, lab, trained)


def test_what_does_not_run_on_a_cpu_is_known(lab: Lab) -> None:
    """A reason that comes or goes is seen here."""
    excluded = {str(case) for case in singles() if isinstance(case.plan(lab), str)}
    gpus_alone = {"tf32", "fp16", "flash_attention_2", "flash_attention_3", "flash_attention_4", "liger", "fsdp"}
    gpus_alone |= {"paged_adamw_32bit", "paged_adamw_8bit"}
    assert excluded == gpus_alone
    assert excluded < set(techniques.ALL)


def test_what_ran_is_stored_with_its_settings(lab: Lab, tmp_path: Path) -> None:
    ran = Trained(lab, tmp_path)
    for case in (Case(("fp8",)), Case(("lora", "torch_compile"))):
        ran.tell(case, Answer(None, "", [{}]), case.num_gpus)
    ran.write(tmp_path / "techniques-cpu.json", device="CPU")
    (stored,) = techniques_docs.read(tmp_path)
    lora, compiled = "`lora` with `r: 4`, `lora_alpha: 16`", '`torch_compile` with `torch_compile_backend: "aot_eager"`'
    assert stored.settings == [lora, compiled], "and fp8 is not emulated"
