"""What the measured matrix keeps of a run; measuring itself needs a GPU."""

from benchmarks import gpu

from finetune_study.outcome import COLUMNS


def test_what_is_kept_are_columns_of_outcomes() -> None:
    assert set(gpu.KEPT) <= COLUMNS.keys()
    assert {"optimizer_class", "attention_implementation", "attention_kernel", "compute_dtype"} <= set(gpu.KEPT)
