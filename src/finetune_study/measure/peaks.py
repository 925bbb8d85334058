"""Dense peak rates of GPUs; an unknown GPU has none, and so no MFU."""

from finetune_study import mig

PEAK_TFLOPS: dict[str, dict[str, float]] = {
    # NVIDIA V100 Tensor Core GPU data sheet (SXM2)
    "V100-SXM2": {"float16": 125.0, "float32": 15.7},
    # NVIDIA V100 Tensor Core GPU data sheet (PCIe)
    "V100-PCIE": {"float16": 112.0, "float32": 14.0},
    # NVIDIA T4 data sheet
    "T4": {"float16": 65.0, "float32": 8.1},
    # NVIDIA A100 Tensor Core GPU data sheet
    "A100": {"float16": 312.0, "bfloat16": 312.0, "tf32": 156.0, "float32": 19.5},
    # NVIDIA L4 data sheet, half of the figure with sparsity
    "L4": {"float8": 242.5, "float16": 121.0, "bfloat16": 121.0, "tf32": 60.0, "float32": 30.3},
    # NVIDIA L40S data sheet, half of the figure with sparsity
    "L40S": {"float8": 733.0, "float16": 362.05, "bfloat16": 362.05, "tf32": 183.0, "float32": 91.6},
    # NVIDIA H100 data sheet (PCIe), half of the figure with sparsity
    "H100 PCIe": {"float8": 1513.0, "float16": 756.5, "bfloat16": 756.5, "tf32": 378.0, "float32": 51.0},
    # NVIDIA H100 data sheet (SXM), half of the figure with sparsity
    "H100": {"float8": 1979.0, "float16": 989.5, "bfloat16": 989.5, "tf32": 494.5, "float32": 67.0},
    # NVIDIA H200 data sheet (SXM), half of the figure with sparsity
    "H200": {"float8": 1979.0, "float16": 989.5, "bfloat16": 989.5, "tf32": 494.5, "float32": 67.0},
}
"""TFLOP/s by a part of the driver's name for the GPU, then by number format (float32 without TF32); the first part that
fits decides."""


def peak_tflops(device_name: str | None, number_format: str | None) -> float | None:
    """Dense peak of one device in TFLOP/s; None when the device or its rate for the format is not known."""
    if device_name is None or number_format is None:
        return None
    if mig.is_slice_name(device_name) or "NVL" in device_name:
        return None  # a slice of a GPU, or a variant whose rates are not in the table
    words = device_name.replace("Tesla ", "").removeprefix("NVIDIA ")
    for part, rates in PEAK_TFLOPS.items():
        if words == part or words.startswith((f"{part}-", f"{part} ")):
            return rates.get(number_format)
    return None
