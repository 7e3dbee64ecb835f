"""Parameters of quantization ``mixed``. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import ClassVar, Literal

from ...contracts import MIXED, Scheme
from ..codecs.integer_params import Gptq, Hqq, Rtn
from .params import Allocation

CODECS = {"rtn": Rtn, "gptq": Gptq, "hqq": Hqq}


@dataclass(frozen=True)
class Mixed:
    """Experts of one layer in different numbers of ``bits``, ``budget`` stored bits per weight on average.

    The budget includes scales and offsets, and is spent in each layer. ``by`` is the rule: PMQ's integer program
    (MC-MoE, arXiv 2410.06270); the error per bit (``greedy``); the busiest experts or those with outliers first
    (QuantMoE-Bench, arXiv 2406.08155); ``random`` or ``uniform``, which these are held against. ``alpha``, ``beta`` and
    ``gamma`` are PMQ's exponents of frequency, routing weight and error (the released code never uses its gamma: that
    is 1); ``one_of_each`` wants it to use the two widest choices at least once. Errors are those of rounding to
    nearest; the weights are then in ``codec``, ``group`` input channels to a scale. One bit is a sign (in ``hqq``,
    which only seeks offsets, that of rounding to nearest).
    """

    calibrated: ClassVar[bool] = True

    budget: float = 2.5
    by: Literal["pmq", "greedy", "frequency", "outlier", "random", "uniform"] = "pmq"
    bits: tuple[int, ...] = (1, 2, 3)
    codec: Literal["rtn", "gptq", "hqq"] = "gptq"
    group: int | None = 128
    symmetric: bool = False
    alpha: float = 1.0
    beta: float = 1.5
    gamma: float = 2.0
    one_of_each: bool = True

    def __post_init__(self) -> None:
        self.allocation()
        for bits in self.bits:
            self.at(bits)

    def scheme(self) -> Scheme:
        """Return the scheme of the layer as a whole, whose experts have schemes of their own."""
        return Scheme(MIXED, self.budget, self.group, self.symmetric)

    def at(self, bits: int) -> Rtn:
        """Return the codec's parameters at ``bits`` bits; one bit is a sign, whose two levels are symmetric.

        The two levels of one asymmetric bit would be the least and the largest weight of a group, which few are near.
        """
        if bits == 1:
            return (Rtn if self.codec == "hqq" else CODECS[self.codec])(bits, self.group, True)
        return CODECS[self.codec](bits, self.group, self.symmetric)

    def allocation(self) -> Allocation:
        """Return the parameters of the rule."""
        shared = {field.name for field in fields(self)} & {field.name for field in fields(Allocation)}
        return Allocation(**{name: getattr(self, name) for name in shared})
