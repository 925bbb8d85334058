import pytest

from finetune_study.forecast.hardware import shipped
from finetune_study.measure.peaks import PEAK_TFLOPS, peak_tflops


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", "bfloat16", 312.0),
        ("NVIDIA A100-SXM4-40GB", "float16", 312.0),
        ("NVIDIA A100-PCIE-40GB", "float32", 19.5),
        ("NVIDIA A100-SXM4-80GB", "tf32", 156.0),
        ("NVIDIA H100 80GB HBM3", "float8", 1979.0),
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
        ("NVIDIA A100-SXM4-80GB", "float8"),  # it has no units for it
        ("NVIDIA A100-SXM4-80GB", "int8"),
        ("NVIDIA H100 80GB HBM3", "float64"),
        ("NVIDIA H100 80GB HBM3", None),
        (None, "bfloat16"),
    ],
)
def test_what_is_not_known_has_no_peak(name: str | None, dtype: str | None) -> None:
    assert peak_tflops(name, dtype) is None


@pytest.mark.parametrize(
    "gpu", [name for name, device in shipped().items() if peak_tflops(device.gpu, "float16") is not None]
)
def test_measurement_and_forecast_know_the_same_rates(gpu: str) -> None:
    names = {"fp32": "float32", "tf32": "tf32", "fp16": "float16", "bf16": "bfloat16", "fp8": "float8"}
    device = shipped()[gpu]
    rates = {short: peak_tflops(device.gpu, long) for short, long in names.items()}
    known = {short: rate for short, rate in rates.items() if rate is not None}
    assert known == pytest.approx(device.tflops, rel=0.01)


def test_half_precision_is_never_slower_than_single() -> None:
    assert all(rates["float16"] > rates["float32"] for rates in PEAK_TFLOPS.values())
