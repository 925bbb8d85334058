from typing import Any

import pytest
import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from finetune_study.measure.steps import StepMeter, collate, flattens
from finetune_study.sequences import IGNORED


class Trainer:
    """Calls a meter as transformers' Trainer does; a step takes a second of its own clock, the rest half a second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, untimed: int, timed: int, skipped: set[int] | None = None):
        self.now, self.step = 0.0, 0
        self.skipped = skipped or set()
        self.told: list[dict[str, Any]] = []
        self.timing: list[tuple[bool, int]] = []
        self.drained = 0
        monkeypatch.setattr("finetune_study.measure.steps.time.perf_counter", lambda: self.now)
        self.meter = StepMeter(untimed, timed, self._drain, lambda: self.step in self.skipped, self.told.append)
        self.meter.on_timing = lambda begins: self.timing.append((begins, self.step))

    def _drain(self) -> None:
        self.drained += 1

    def train(self, micro_batches: int = 1, most: int = 50) -> None:
        arguments: Any = TrainingArguments.__new__(TrainingArguments)
        state, control = TrainerState(), TrainerControl()
        row = {
            "input_ids": torch.tensor([1, 2, 3, 0]),
            "attention_mask": torch.tensor([1, 1, 1, 0]),
            "labels": torch.tensor([IGNORED, 2, 3, IGNORED]),
        }
        ahead = self.meter.collate([row])  # as the Trainer does, one batch is fetched before it is needed
        while not control.should_training_stop and self.step < most:
            self.step += 1
            self.meter.on_step_begin(arguments, state, control)
            for _ in range(micro_batches):
                batch, ahead = ahead, self.meter.collate([row])
                assert set(batch) == {"input_ids", "attention_mask", "labels"}
                self.meter.count()
            self.now += 1.0
            state.global_step = self.step
            self.meter.on_step_end(arguments, state, control)
            self.meter.on_log(arguments, state, control, {"loss": 5.0 - self.step})
            self.now += 0.5


def test_untimed_steps_come_first_and_then_it_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=2, timed=3)
    trainer.train()
    assert [entry["timed"] for entry in trainer.told] == [False, False, True, True, True]
    assert [entry["step"] for entry in trainer.told] == [1, 2, 3, 4, 5]
    assert [entry["loss"] for entry in trainer.told] == [4.0, 3.0, 2.0, 1.0, 0.0]
    assert trainer.timing == [(True, 2), (False, 5)]
    assert trainer.drained >= 5


def test_a_step_lasts_from_the_end_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fetching data between steps counts."""
    trainer = Trainer(monkeypatch, untimed=1, timed=2)
    trainer.train()
    assert [entry["seconds"] for entry in trainer.told] == [1.0, 1.5, 1.5]


def test_skipped_steps_are_told_but_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=1, timed=2, skipped={1, 2, 4})
    trainer.train()
    assert [entry["stepped"] for entry in trainer.told] == [False, False, True, False, True, True]
    assert [entry["timed"] for entry in trainer.told] == [False, False, False, False, True, True]
    assert trainer.timing == [(True, 3), (False, 6)]


def test_a_run_of_skipped_steps_alone_times_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=0, timed=1, skipped=set(range(1, 100)))
    trainer.train(most=5)
    assert len(trainer.told) == 5
    assert not any(entry["timed"] for entry in trainer.told)


def test_without_untimed_steps_timing_starts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=0, timed=2)
    trainer.train()
    assert [entry["timed"] for entry in trainer.told] == [True, True]
    assert trainer.timing == [(True, 1), (False, 2)]


def test_tokens_count_in_the_step_that_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=1, timed=2)
    trainer.train(micro_batches=3)
    assert [(entry["real_tokens"], entry["loss_tokens"]) for entry in trainer.told] == [(9, 6)] * 3


def test_evaluation_before_training_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(monkeypatch, untimed=0, timed=1)
    trainer.meter.count()
    trainer.train()
    assert trainer.told[0]["real_tokens"] == 3


def test_packed_sequences_go_without_a_mask() -> None:
    ones = torch.ones(4, dtype=torch.int64)
    row = {"input_ids": ones, "attention_mask": ones, "labels": ones}
    assert set(collate([row, row])) == {"input_ids", "attention_mask", "labels"}
    packed = collate([row | {"position_ids": torch.tensor([0, 1, 0, 1])}])
    assert set(packed) == {"input_ids", "labels", "position_ids"}


def test_packed_sequences_become_one_where_flash_attention_tells_examples_apart_in_one_alone() -> None:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_flash_attention_utils import _is_packed_sequence

    torch.manual_seed(0)
    settings = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model("llama", vocab_size=64, attn_implementation="eager", **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.config.use_cache = False  # as in training
    positions = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4])
    rows = [
        {"input_ids": ids, "attention_mask": torch.ones(8, dtype=torch.int64), "position_ids": positions,
         "labels": ids.masked_fill(positions == 0, -100)}
        for ids in torch.randint(0, 64, (3, 8))
    ]  # fmt: skip
    apart, flat = collate(rows), collate(rows, flattens=True)
    assert flat["input_ids"].shape == (1, 24)
    assert not _is_packed_sequence(apart["position_ids"], batch_size=3)
    assert _is_packed_sequence(flat["position_ids"], batch_size=1)
    with torch.no_grad():
        assert float(model(**flat).loss) == pytest.approx(float(model(**apart).loss), rel=1e-5)
    assert not flattens(model)
    model.config._attn_implementation = "flash_attention_2"
    assert flattens(model)
