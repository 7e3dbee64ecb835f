"""What calibration says of the inputs of one weight matrix: shared by every codec, allocator and smoother.

Shape letters: I input channels, N tokens that reached the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ChannelStats:
    """Sums over the N tokens that a weight matrix [out, I] read in calibration.

    ``second_moment_II`` is the sum of x x^T in float64, None where no codec asked for it; ``absmax_I`` and
    ``mean_abs_I`` are the largest and the mean |x| of each channel in float32; ``tokens`` is N and ``weight`` the sum
    of the routing weights of these tokens.
    """

    second_moment_II: Tensor | None
    absmax_I: Tensor
    mean_abs_I: Tensor
    tokens: int
    weight: float
