"""GPUs by name: memory that torch sees, rates, price. The numbers and their sources are in hardware.yaml."""

import difflib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any, Literal, Self

import yaml
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError, model_validator

from finetune_study.errors import ConfigError
from finetune_study.section import Section


class Device(Section):
    """A device as the predictor sees it; what is null is not known."""

    name: str = "given"
    device: Literal["cuda", "cpu"] = "cuda"
    gpu: str | None = None
    """Name as the driver reports it."""
    memory_gib: PositiveFloat | None = None
    """Memory that torch sees on one device; null: not known, and so neither is what fits."""
    compute_capability: PositiveFloat | None = None
    """CUDA compute capability."""
    tflops: dict[Literal["fp32", "tf32", "fp16", "bf16", "fp8"], PositiveFloat] = {}
    """Dense peak rate by number format, 10^12 operations per second."""
    memory_gb_per_s: PositiveFloat | None = None
    """Bandwidth of the device's memory, 10^9 bytes per second."""
    link_gb_per_s: PositiveFloat | None = None
    """To another device of the node, one direction."""
    linked_gpus: PositiveInt | None = None
    """So many devices the link joins, as a bridge of NVLink two; more of a node talk to each other over PCIe, whose
    bandwidth is then given, too. Null: all."""
    network_gb_per_s: PositiveFloat | None = None
    """To another node, for each device, one direction."""
    pcie_gb_per_s: PositiveFloat | None = None
    """To the host, one direction."""
    maps_tensors: bool = False
    """On a CPU: the C library maps every tensor by itself, and its heap holds nothing back."""
    gpus_per_node: PositiveInt = 8
    """Devices of a node."""
    price_usd_per_gpu_hour: NonNegativeFloat | None = None
    """US dollars."""

    @property
    def has_bf16(self) -> bool:
        """Matrix units for bf16 (Ampere and later)."""
        return self.device == "cpu" or self.compute_capability is None or self.compute_capability >= 8

    def link_between(self, num_gpus: int) -> float | None:
        """Bandwidth between so many devices of a node, 10^9 bytes per second; None: not known."""
        bridged = self.linked_gpus is None or num_gpus <= self.linked_gpus
        return self.link_gb_per_s if bridged else self.pcie_gb_per_s

    @model_validator(mode="after")
    def _bridges_end(self) -> Self:
        if self.linked_gpus is not None and self.pcie_gb_per_s is None:
            raise ValueError("linked_gpus needs pcie_gb_per_s: more GPUs than that talk to each other over PCIe")
        return self


MAPPED_BYTES = 128 * 2**10
"""Smallest block that glibc maps by itself unless it is told otherwise; it moves the limit up as blocks are freed."""


def maps_tensors(environment: Mapping[str, str]) -> bool:
    """Whether `MALLOC_MMAP_THRESHOLD_` keeps glibc from moving that limit up."""
    limit = environment.get("MALLOC_MMAP_THRESHOLD_", "")
    return limit.isdigit() and int(limit) <= MAPPED_BYTES


@cache
def shipped() -> Mapping[str, Device]:
    """The GPUs that are known by name."""
    text = resources.files("finetune_study.forecast").joinpath("hardware.yaml").read_text(encoding="utf-8")
    return {name: Device(name=name, **entry) for name, entry in yaml.safe_load(text).items()}


def find(given: Any) -> Device:
    """A device from its name, or from an object of its properties.

    Raises:
        ConfigError: for a name that is not known, or properties that make no sense.
    """
    if isinstance(given, str):
        known = shipped()
        if given not in known:
            close = [name for name in known if name.startswith(f"{given.lower()}-")]
            close = close or difflib.get_close_matches(given, known, 2)
            hint = f"did you mean {' or '.join(close)}? " if close else ""
            raise ConfigError(
                "The hardware is not known",
                where="hardware",
                given=given,
                allowed=hint + ", ".join(known) + "; or an object with memory_gib and rates",
            )
        return known[given]
    if not isinstance(given, Mapping):
        raise ConfigError(
            "The hardware is not understood", where="hardware", given=given, allowed="a name, or an object"
        )
    settings = dict(given)
    base = settings.get("name")
    if isinstance(base, str) and base in shipped():
        settings = shipped()[base].model_dump() | settings
    try:
        return Device(**settings)
    except (ValidationError, TypeError) as error:
        problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        raise ConfigError(
            "The hardware is not understood",
            where=".".join(("hardware", *map(str, problem["loc"]))),
            given=str(problem["msg"]),
            allowed=", ".join(Device.model_fields),
        ) from None
