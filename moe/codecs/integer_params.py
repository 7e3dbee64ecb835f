"""Parameters of the integer codecs. Imports no torch.

``scheme()`` says how the weights come to lie in memory; ``of`` takes parameters as they are, or a Scheme (which an
allocator chose) and the defaults for what it does not say.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from ...contracts import Scheme


@dataclass(frozen=True)
class Rtn:
    """Round to nearest with ``bits`` bits; ``group`` input channels share a scale, None = one scale per output row.

    Asymmetric groups have an offset besides. One symmetric bit is mean|w| times the sign.
    """

    codec: ClassVar[str] = "rtn"

    bits: int = 4
    group: int | None = 128
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in range(1, 9):
            raise ValueError(f"bits={self.bits} must be a whole number from 1 to 8")
        if self.group is not None and self.group < 1:
            raise ValueError(f"group={self.group} must be at least 1, or None for whole rows")

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme(self.codec, float(self.bits), self.group, self.symmetric)

    @classmethod
    def of(cls, how: Self | Scheme) -> Self:
        """Return the parameters themselves, or the defaults at a Scheme of this codec.

        Raises:
            ValueError: it is a scheme of another codec, of broken bits, or one that quantizes activations.
        """
        if not isinstance(how, Scheme):
            return how
        if how.codec != cls.codec:
            raise ValueError(f"the scheme is one of {how.codec}; encode it with that codec, not with {cls.codec}")
        if how.act_bits is not None:
            raise ValueError(f"{cls.codec} quantizes weights alone; leave act_bits={how.act_bits} out of the scheme")
        if how.bits != int(how.bits):
            raise ValueError(f"bits={how.bits:g} must be a whole number from 1 to 8")
        return cls(int(how.bits), how.group, how.symmetric)


@dataclass(frozen=True)
class Gptq(Rtn):
    """GPTQ (arXiv 2210.17323): column by column, the error of a column made good by those that follow it.

    ``damp`` times the mean of the Hessian's diagonal is added to that diagonal. With ``desc_act`` columns of large
    inputs go first; the scales of all groups are then those of the weights as they were, so that groups stay neighbours
    in memory and nothing else is stored. Without it a group's scales are those of the weights as compensated so far.
    """

    codec: ClassVar[str] = "gptq"
    calibrated: ClassVar[bool] = True

    damp: float = 0.01
    desc_act: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.damp < 0:
            raise ValueError(f"damp={self.damp} must be at least 0")


@dataclass(frozen=True)
class Awq(Rtn):
    """AWQ (arXiv 2306.00978): input channels of large activations are scaled up before rounding, then outliers clipped.

    The scale of a channel is (mean|x|)^r, with the best of ``grid`` exponents r = 0, 1 / grid, ... A group's range is
    then cut by up to ``clip`` in steps of 1 / grid (0 = not at all) where that helps.
    """

    codec: ClassVar[str] = "awq"
    calibrated: ClassVar[bool] = True

    grid: int = 20
    clip: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid < 1:
            raise ValueError(f"grid={self.grid} must be at least 1")
        if not 0 <= self.clip < 1:
            raise ValueError(f"clip={self.clip} must lie in [0, 1)")


@dataclass(frozen=True)
class Hqq(Rtn):
    """HQQ (Badri and Shaji 2023): offsets that make the ``p``-norm of the weights' error small, with no data.

    ``iterations`` half-quadratic steps, each with the error beyond a shrinkage taken for outliers; ``beta`` is how
    little is shrunk in the first step, and grows by ``kappa`` in each.
    """

    codec: ClassVar[str] = "hqq"

    group: int | None = 64
    p: float = 0.7
    iterations: int = 20
    beta: float = 10.0
    kappa: float = 1.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric:
            raise ValueError("hqq looks for offsets, which symmetric codes have not; use symmetric=false")
        if not 0 < self.p <= 1:
            raise ValueError(f"p={self.p} must lie in (0, 1]")
        if self.iterations < 0 or self.beta <= 0 or self.kappa <= 0:
            raise ValueError("iterations must be at least 0, beta and kappa above 0")
