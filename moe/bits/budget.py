"""Budgets in stored bits: what experts cost at each number of bits, scales and zeros included. Imports no torch.

A unit is what gets one number of bits: an expert of a layer, a shared expert, or the matrices of an attention.
Shape letters: U units, B choices of bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from ...contracts import Scheme

SCALE_BITS = 16
"""Scales, and the zeros of asymmetric codes, are stored in bfloat16."""


def stored_bits(scheme: Scheme, shapes: Iterable[tuple[int, int]]) -> int:
    """Return the bits that matrices of ``shapes`` (out, in) take under ``scheme``: codes, scales and zeros.

    A row of codes fills whole bytes, as in ``moe.quantization``; each row has a scale (and a zero where the scheme is
    asymmetric) for every group of input channels.
    """
    total = 0
    for rows, width in shapes:
        if scheme.group is not None and width % scheme.group:
            raise ValueError(f"group={scheme.group} does not divide the input width {width}; choose one that does.")
        groups = 1 if scheme.group is None else width // scheme.group
        row = 8 * math.ceil(width * scheme.bits / 8) + groups * SCALE_BITS * (1 if scheme.symmetric else 2)
        total += rows * row
    return total


@dataclass(frozen=True)
class Costs:
    """What each unit may cost. ``stored_UB`` are stored bits at each of the rising ``choices``, ``weights_U`` sizes.

    All numbers are whole, so that a budget is kept exactly and not within a rounding.
    """

    choices: tuple[int, ...]
    stored_UB: tuple[tuple[int, ...], ...]
    weights_U: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.choices or list(self.choices) != sorted(set(self.choices)):
            raise ValueError(f"choices of bits must rise, not {self.choices}; sort them and give each once.")
        if not self.stored_UB or len(self.stored_UB) != len(self.weights_U) or min(self.weights_U) < 1:
            raise ValueError("give every unit its number of weights, and at least one unit.")
        for row in self.stored_UB:
            if len(row) != len(self.choices) or any(a >= b for a, b in pairwise(row)):
                raise ValueError(f"stored bits {row} must rise with the choices {self.choices}; give one for each.")

    @classmethod
    def of(cls, schemes: Sequence[Scheme], shapes_U: Sequence[Sequence[tuple[int, int]]]) -> Costs:
        """Return the costs of units whose matrices have ``shapes_U``, with one scheme for each number of bits."""
        return cls(
            tuple(int(scheme.bits) for scheme in schemes),
            tuple(tuple(stored_bits(scheme, shapes) for scheme in schemes) for shapes in shapes_U),
            tuple(sum(rows * width for rows, width in shapes) for shapes in shapes_U),
        )

    def __len__(self) -> int:
        return len(self.weights_U)

    def cost(self, unit: int, bits: int) -> int:
        """Return the stored bits of ``unit`` at ``bits``."""
        return self.stored_UB[unit][self.choices.index(bits)]

    def total(self, bits_U: Sequence[int]) -> int:
        """Return the stored bits of an allocation."""
        return sum(self.cost(unit, bits) for unit, bits in enumerate(bits_U))

    def average(self, bits_U: Sequence[int]) -> float:
        """Return the stored bits per weight of an allocation, scales included."""
        return self.total(bits_U) / sum(self.weights_U)

    def allowed(self, budget: float) -> int:
        """Return how many bits may be stored at ``budget`` bits per weight, or refuse what the cheapest choice exceeds.

        ``budget`` is taken as the decimal number that it is written as: 4.35 bits of 100 weights are 435 bits.
        """
        if not math.isfinite(budget):
            raise ValueError(f"a budget of {budget} bits per weight is no number; give one such as 2.5.")
        bits = math.floor(Fraction(repr(float(budget))) * sum(self.weights_U))
        least = sum(row[0] for row in self.stored_UB)
        if bits < least:
            raise ValueError(
                f"a budget of {budget:g} bits per weight is impossible: {self.choices[0]} bits with their scales take "
                f"{least / sum(self.weights_U):.4g}; raise the budget, widen the group or allow fewer bits."
            )
        return bits

    def subset(self, units: Sequence[int]) -> Costs:
        """Return the costs of some units."""
        return Costs(
            self.choices, tuple(self.stored_UB[unit] for unit in units), tuple(self.weights_U[unit] for unit in units)
        )
