"""What an expert does to single numbers: its activation, and leaving out channels by a threshold. All in float32."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def activated(value, ACTIVATION: tl.constexpr):
    """Return act(value): silu, gelu (by the error function) or relu, of float32."""
    if ACTIVATION == "silu":
        result = value * tl.sigmoid(value)
    elif ACTIVATION == "gelu":
        result = 0.5 * value * (1.0 + tl.erf(value * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "relu")
        result = tl.maximum(value, 0.0)
    return result


@triton.jit
def used(value, weight_ptr, channel, inside, threshold, RULE: tl.constexpr):
    """Return which channels are used: |value| times the channel's weight above the threshold (TEAL, arXiv 2408.14690).

    RULE is "all", "threshold" (all weights are one) or "weighted"; ``value`` float32 and ``channel`` have one shape, or
    broadcast to one.
    """
    if RULE == "all":
        result = inside
    elif RULE == "threshold":
        result = inside & (tl.abs(value) > threshold)
    else:
        tl.static_assert(RULE == "weighted")
        result = inside & (tl.abs(value) * tl.load(weight_ptr + channel, mask=inside, other=0.0) > threshold)
    return result
