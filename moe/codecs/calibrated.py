"""What a codec that reads statistics asks of them, and the error of a layer's outputs that they tell.

Shape letters: O output rows, I input channels.
"""

from __future__ import annotations

from torch import Tensor

from ..channel_stats import ChannelStats

NOT_FINITE = "the statistics contain NaN or infinity; calibrate anew with inputs that are finite."


def require(codec: str, weight_OI: Tensor, stats: ChannelStats | None) -> ChannelStats:
    """Return the statistics of the inputs of ``weight_OI``.

    Raises:
        ValueError: there are none, they are those of another width, or they are not finite.
    """
    if stats is None:
        raise ValueError(
            f"{codec} needs statistics of what the weights multiply; calibrate first, or use rtn or hqq without any."
        )
    columns, width = weight_OI.shape[1], len(stats.mean_abs_I)
    if width != columns:
        raise ValueError(
            f"the statistics are of {width} input channels and the weights have {columns}; give each matrix its own."
        )
    if not bool(stats.mean_abs_I.isfinite().all()):
        raise ValueError(NOT_FINITE)
    return stats


def second_moment(codec: str, weight_OI: Tensor, stats: ChannelStats | None) -> Tensor:
    """Return the sum of x x^T of the inputs of ``weight_OI``, [I, I] float64; raises what ``require`` raises, too.

    Raises:
        ValueError: the statistics were taken without it.
    """
    moment_II = require(codec, weight_OI, stats).second_moment_II
    if moment_II is None:
        raise ValueError(f"{codec} needs the second moment of its inputs; calibrate with moments=True.")
    if not bool(moment_II.isfinite().all()):
        raise ValueError(NOT_FINITE)
    return moment_II.double()


def check_finite(weight_OI: Tensor) -> None:
    """Refuse weights that are not finite."""
    if not bool(weight_OI.isfinite().all()):
        raise ValueError("the weights contain NaN or infinity and cannot be quantized; repair the checkpoint.")


def row_errors(difference_OI: Tensor, second_moment_II: Tensor) -> Tensor:
    """Return, for each row d of a difference of weights, the sum of (d x)^2 over the tokens: d X X^T d^T."""
    difference_OI = difference_OI.double()
    return ((difference_OI @ second_moment_II) * difference_OI).sum(1)
