"""What a trace leaves: memory as a function of batch, context and rank, and the work that was counted. No torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Monomial = tuple[int, int, int]
"""Exponents of batch, context and rank."""

SAVED, POINTWISE, LOGITS, TEMPORARY, GRADIENT, NEW_GRADIENT = KINDS = (
    "saved",
    "pointwise",
    "logits",
    "temporary",
    "gradient",
    "new_gradient",
)
"""What memory of a step is for.

saved         activations that backward needs and that no cheap operation can compute again
pointwise     activations that a compiler would compute again instead
logits        scores over the vocabulary, in whatever copies
temporary     what an operation leaves to the next one
gradient      complete gradients of parameters
new_gradient  gradients that are computed and not yet added to the parameter's
"""

FORWARD, BACKWARD = 0, 1


def value(polynomial: Mapping[Monomial, float], batch: int, context: int, rank: int) -> float:
    """A sum of monomials at a point."""
    return sum(
        (c * float(batch) ** i * float(context) ** j * float(rank) ** k for (i, j, k), c in polynomial.items()), 0.0
    )


@dataclass(frozen=True)
class Parameters:
    """Weights of one sort: how many there are, as a polynomial of the rank."""

    trained: bool
    dtype: str
    quantized: bool
    role: str
    """`layers`, `embedding`, `head` or `other`."""
    matrix: bool
    """Two dimensions or more, and inside the layers: what Muon orthogonalises."""
    numbers: dict[Monomial, float]
    rows: dict[Monomial, float]
    """Length of the first and of the last dimension, summed over the tensors: what Adafactor keeps."""

    def count(self, rank: int) -> float:
        return value(self.numbers, 1, 1, rank)

    def narrow(self, rank: int, width: int) -> float:
        """The shorter side of its matrices: of LoRA's the rank, of others the model's width, as far as the sums of
        sides and of elements allow it. Matrices that are narrower, such as those of shared keys, are taken as wide."""
        of_rank = all(in_rank for _, _, in_rank in self.numbers)
        # A matrix has at most half as many elements as its shorter side times the sum of both
        return min(rank if of_rank else width, 2 * self.count(rank) / value(self.rows, 1, 1, rank))

    def newton_schulz(self, rank: int, width: int) -> float:
        """Operations of one Newton-Schulz iteration over its matrices, 4 m² n + 2 m³ each for m ≤ n (torch/optim/
        _muon.py, _zeropower_via_newtonschulz: X Xᵀ, its square, and their product with X)."""
        side, numbers = self.narrow(rank, width), self.count(rank)
        matrices = (value(self.rows, 1, 1, rank) - numbers / side) / side
        return 4 * side * numbers + 2 * min(max(matrices, 0.0), numbers / side**2) * side**3


@dataclass(frozen=True)
class Work:
    """Work of one kind in one phase."""

    phase: str
    """`forward`, `recompute` or `backward`."""
    kind: str
    """`matmul_<format>` and `attention_<format>` (fused kernels) in operations; `bytes_matmul` and `bytes_pointwise` in
    bytes read and written; `kernels`, that are launched."""
    amount: dict[Monomial, float]
    """As if attention had no window."""
    window: int | None = None
    """Positions that fused attention looks back, its own one included; None: all."""

    def at(self, batch: int, context: int, rank: int) -> float:
        """The amount at a point. A causal kernel with a window computes scores of w T - w²/2 pairs instead of T²/2."""
        share = 1.0 if self.window is None else min(self.window / context, 1.0)
        return value(self.amount, batch, context, rank) * (2 - share) * share


@dataclass(frozen=True)
class Profile:
    """The trace of a layout, ready to be evaluated."""

    model_class: str
    depth: int
    vocabulary: int
    hidden_size: int
    positions: int | None
    """That the model was made for; None where it has no such limit."""
    window: int | None
    """Positions beyond which some of its layers mask others; None where none do."""
    warnings: list[str]
    """What was assumed of the model, or has no effect on it."""
    parameters: list[Parameters]
    largest_layer: float
    """Elements of the largest layer's frozen and trained weights, adapters apart."""
    largest_trained: dict[Monomial, float]
    """Elements of the largest trained tensor."""
    phases: npt.NDArray[np.int64]
    """Of each moment: FORWARD or BACKWARD, plus 2 between the last layer's forward and its backward."""
    kinds: list[str]
    """Of each column."""
    monomials: npt.NDArray[np.int64]
    """Exponents of each column."""
    alive: npt.NDArray[np.float64]
    """Bytes that are alive: moments × columns."""
    work: list[Work]

    @cached_property
    def _columns_of(self) -> dict[str, npt.NDArray[np.bool_]]:
        return {kind: np.array([k == kind for k in self.kinds], dtype=bool) for kind in KINDS}

    def curves(self, batch: int, context: int, rank: int) -> dict[str, npt.NDArray[np.float64]]:
        """Bytes alive at each moment, by kind."""
        point = np.array([batch, context, rank], dtype=np.float64)
        factors = np.prod(point**self.monomials, axis=1)
        return {kind: self.alive[:, mask] @ factors[mask] for kind, mask in self._columns_of.items()}

    @cached_property
    def backward(self) -> npt.NDArray[np.bool_]:
        """Moments of the backward pass."""
        return np.asarray(self.phases % 2 == BACKWARD)

    @cached_property
    def turn(self) -> npt.NDArray[np.bool_]:
        """Moments between the last layer's forward and its backward, where the loss is."""
        return np.asarray(self.phases >= 2)

    def amount(self, phases: tuple[str, ...], kind: str, batch: int, context: int, rank: int) -> float:
        """Counted work of a kind."""
        return sum(w.at(batch, context, rank) for w in self.work if w.phase in phases and w.kind == kind)

    def save(self, path: Path) -> None:
        """Writes the profile as one file, at once."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{np.random.default_rng().integers(1 << 60):x}")
        partial.write_text(json.dumps(self.to_dict(), separators=(",", ":")), encoding="utf-8")
        partial.replace(path)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "model_class": self.model_class,
            "depth": self.depth,
            "vocabulary": self.vocabulary,
            "hidden_size": self.hidden_size,
            "positions": self.positions,
            "window": self.window,
            "warnings": self.warnings,
            "parameters": [
                {
                    "trained": p.trained,
                    "dtype": p.dtype,
                    "quantized": p.quantized,
                    "role": p.role,
                    "matrix": p.matrix,
                    "numbers": _dump(p.numbers),
                    "rows": _dump(p.rows),
                }
                for p in self.parameters
            ],
            "largest_layer": self.largest_layer,
            "largest_trained": _dump(self.largest_trained),
            "phases": self.phases.tolist(),
            "kinds": self.kinds,
            "monomials": self.monomials.tolist(),
            "alive": self.alive.tolist(),
            "work": [
                {"phase": w.phase, "kind": w.kind, "amount": _dump(w.amount), "window": w.window} for w in self.work
            ],
        }

    @classmethod
    def of_dict(cls, raw: Mapping[str, Any]) -> "Profile":
        """From JSON values."""
        arrays = {
            "phases": np.array(raw["phases"], dtype=np.int64),
            "monomials": np.array(raw["monomials"], dtype=np.int64).reshape(-1, 3),
            "alive": np.array(raw["alive"], dtype=np.float64),
        }
        parameters = [
            Parameters(**{**p, "numbers": _load(p["numbers"]), "rows": _load(p["rows"])}) for p in raw["parameters"]
        ]
        work = [Work(w["phase"], w["kind"], _load(w["amount"]), w["window"]) for w in raw["work"]]
        return cls(**{**raw, **arrays, "parameters": parameters, "work": work,
                      "largest_trained": _load(raw["largest_trained"])})  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "Profile":
        """Reads what `save` wrote."""
        return cls.of_dict(json.loads(path.read_text(encoding="utf-8")))


def _dump(polynomial: Mapping[Monomial, float]) -> list[list[float]]:
    return [[*monomial, coefficient] for monomial, coefficient in polynomial.items()]


def _load(items: list[list[float]]) -> dict[Monomial, float]:
    return {(int(i), int(j), int(k)): c for i, j, k, c in items}
