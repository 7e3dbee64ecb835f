"""Parameters of quantizations that round tokens beside weights. Imports no torch.

Weights are rounded to nearest; ``token_codes`` rounds what products read.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..contracts import Scheme


@dataclass(frozen=True)
class W8A8:
    """Weights of 8 bits with one symmetric scale a row, tokens of 8 bits with one a token: an integer product."""

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("rtn", 8.0, act_bits=8)


@dataclass(frozen=True)
class W4A4:
    """Weights of 4 bits, ``group`` input channels to a scale, and tokens of 4 bits with one scale each.

    No CPU kernel multiplies them: they run dequantized, tokens rounded.
    """

    group: int | None = 128
    symmetric: bool = True

    def scheme(self) -> Scheme:
        """Return the scheme."""
        return Scheme("rtn", 4.0, self.group, self.symmetric, act_bits=4)
