import pytest

from finetune_study.measure.peaks import PEAK_TFLOPS, peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-SXM4-40GB", "float16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA A100 80GB PCIe", "bfloat16", 312.0),
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.5),
        ("NVIDIA H100 PCIe", "bfloat16", 756.5),
        ("NVIDIA H200", "bfloat16", 989.5),
        ("Tesla V100-SXM2-32GB", "float16", 125.0),
        ("Tesla V100-PCIE-16GB", "float16", 112.0),
        ("Tesla T4", "float16", 65.0),
        ("NVIDIA L4", "bfloat16", 121.0),
        ("NVIDIA L40S", "bfloat16", 362.05),
    ],
)
def test_names_as_drivers_write_them(name: str, dtype: str, peak: float) -> None:
    assert peak_tflops(name, dtype) == peak


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("NVIDIA H100 NVL", "bfloat16"),  # another clock, another rate
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", "bfloat16"),  # a slice
        ("NVIDIA L40", "bfloat16"),  # neither an L4 nor an L40S
        ("NVIDIA A10", "bfloat16"),
        ("NVIDIA A1000", "bfloat16"),
        ("AMD EPYC 7763 64-Core Processor", "float32"),
        ("Tesla V100-SXM2-32GB", "bfloat16"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("NVIDIA H100 80GB HBM3", None),
        (None, "bfloat16"),
    ],
)
def test_what_is_not_known_has_no_peak(name: str | None, dtype: str | None) -> None:
    assert peak_tflops(name, dtype) is None


def test_half_precision_is_never_slower_than_single() -> None:
    assert all(rates["float16"] > rates["float32"] for rates in PEAK_TFLOPS.values())
