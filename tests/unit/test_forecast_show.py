"""The forecast as text: what each run is shown with, how wide it is, and the bill."""

from typing import Any

import pytest

from finetune_study.forecast import show
from finetune_study.forecast.study import COLUMNS


def row(number: int = 1, **changes: Any) -> dict[str, Any]:
    known = {
        "run_id": f"llama2-70b_a100x8_s4096_bmax_zero3-lora-gc-flash-offload_r{number}-0123ab",
        "hardware": "a100",
        "state": "to train",
        "fits": "does not fit",
        "predicted_peak_memory_allocated_gib": 76.54,
        "predicted_peak_memory_reserved_gib": 81.23,
        "predicted_step_time_seconds": 1.234,
        "predicted_epoch_hours": 2.5,
        "predicted_gpu_hours": 12.5,
        "predicted_cost_usd": 1064.0,
        "bottleneck": "memory bandwidth",
    }
    return dict.fromkeys(COLUMNS) | known | changes


def test_a_run_is_shown_with_memory_verdict_times_and_costs() -> None:
    heading, line, *_ = show.table([row()], 170).splitlines()
    assert heading.split() == [
        "run", "state", "peak", "memory", "fits", "step", "epoch", "GPU-hours", "dollars", "waits", "for"
    ]  # fmt: skip
    assert line.endswith(
        "to train  76.5 to 81.2 GiB  does not fit  1.23 s  2.50 h       12.5  1,064.00  memory bandwidth"
    )


@pytest.mark.parametrize("width", [100, 160])
def test_no_line_is_wider_than_the_terminal_and_none_is_cut(width: int) -> None:
    rows = [row(n, warnings="a warning of many words " * 12) for n in range(3)]
    lines = show.table(rows, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all(any(line.startswith(one["run_id"]) for line in lines) for one in rows)
    assert len([line for line in lines if "memory bandwidth" in line]) == 3


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (2.88, 2.88, "2.88 GiB"),
        (2.88, 2.8801, "2.88 GiB"),
        (2.88, 3.1, "2.88 to 3.10 GiB"),
        (None, None, "not predicted"),
    ],
)
def test_memory_is_an_interval_where_it_is_one(low: float | None, high: float | None, expected: str) -> None:
    assert show.memory(low, high) == expected


def test_columns_without_a_number_are_left_out_and_said_why() -> None:
    unknown = dict.fromkeys([name for name in COLUMNS if "hours" in name or "cost" in name or "time" in name])
    rows = [row(n, **unknown, bottleneck=None, fits="fits", warnings="rates | no step time") for n in (1, 2)]
    text = show.table(rows)
    assert "GPU-hours" not in text
    assert "2 runs: no step time\n" in text
    assert text.endswith("a100: 2 runs to train; 2 without a predicted time, and not in the sums")


def test_the_reason_why_a_run_is_not_predicted_is_whole() -> None:
    reason = "The model's configuration is not here yet; do: prepare"
    nothing: dict[str, Any] = dict.fromkeys(name for name in COLUMNS if name.startswith("predicted_"))
    assert f"1 run: {reason}" in show.table([row(**nothing, fits=None, warnings=reason)])


def test_the_bill_says_what_is_reused_and_what_is_not_charged() -> None:
    rows = [
        row(1, fits="fits"),
        row(2, fits="tight"),
        row(3),
        row(4, state="measured"),
        row(5, state="unsupported"),
        row(6, state="not tried"),
        row(7, state="given up"),
        row(8, hardware="v100", fits="fits", predicted_cost_usd=None),
    ]
    *_, a100, v100 = show.table(rows, 300).splitlines()
    assert a100 == (
        "a100: 3 runs to train; 25.0 GPU-hours, 2,128.00 US dollars; 1 do not fit, and are not in the sums; "
        "1 measured already, and reused; 1 not supported; 1 not tried, since they would not fit; 1 given up"
    )
    assert v100 == "v100: 1 run to train; 12.5 GPU-hours", "no price, no dollars"
