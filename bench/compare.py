"""``moebench.compare``: two functions on the same inputs, interleaved in this process, with a verdict.

The second function must give what the first gives, within the rounding of the dtype, or there is no time to compare.
"""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ..contracts import MoebenchError
from ..results.statistics import Ratio, paired_log_ratio
from ..results.verdict import Verdict, verdict
from .sampling import MAX_CALLS, TURN_NS
from .sketch import BOUNDS


@dataclass(frozen=True)
class Comparison:
    """What ``compare`` found. ``ratio`` is time of b over time of a, of turn minima, with its 95 % interval."""

    a_ns: float
    b_ns: float
    ratio: Ratio
    verdict: Verdict
    error: float

    def __str__(self) -> str:
        lo, hi = self.ratio.lo, self.ratio.hi
        interval = "no interval: too few turns" if lo is None or hi is None else f"[{lo:.3f}, {hi:.3f}]"
        return (
            f"a {self.a_ns / 1e3:.1f} us, b {self.b_ns / 1e3:.1f} us, b/a {self.ratio.ratio:.3f} {interval}: "
            f"{self.verdict} (outputs agree to {self.error:.1e})"
        )


def compare(
    fn_a: Callable[..., Any],
    fn_b: Callable[..., Any],
    inputs: Sequence[Any],
    *,
    seconds: float = 2.0,
    margin: float = 0.05,
    seed: int = 0,
) -> Comparison:
    """Compare ``fn_b(*inputs)`` with ``fn_a(*inputs)``; both return a tensor or an array.

    Turns of at least 100 us alternate in random order for ``seconds``; the ratio is the median over paired turns of
    their minima. ``improved`` and ``regressed`` need the whole interval beyond 1 -/+ ``margin``. One process alone
    cannot see differences between processes of 1-2 %: use ``moebench run`` for those. Raises MoebenchError where the
    outputs differ.
    """
    _agreement(fn_a(*inputs), fn_b(*inputs))
    calls = [_calls_per_turn(fn, inputs) for fn in (fn_a, fn_b)]
    minima: tuple[list[int], list[int]] = ([], [])
    last: list[Any] = [None, None]
    rng = random.Random(seed)
    functions = (fn_a, fn_b)
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        deadline = time.perf_counter() + seconds
        while time.perf_counter() < deadline or len(minima[0]) < 10:
            for side in rng.sample((0, 1), 2):
                best, last[side] = _turn(functions[side], inputs, calls[side])
                minima[side].append(best)
    finally:
        if enabled:
            gc.enable()
    error = _agreement(*last)
    ratio = paired_log_ratio(minima[1], minima[0])
    return Comparison(
        statistics.median(minima[0]), statistics.median(minima[1]), ratio, verdict(ratio.lo, ratio.hi, margin), error
    )


def _turn(function: Callable[..., Any], inputs: Sequence[Any], calls: int) -> tuple[int, Any]:
    """Return (the fastest of ``calls`` calls in ns, the output of the last one)."""
    times = []
    output: Any = None
    for _ in range(calls):
        start = time.perf_counter_ns()
        output = function(*inputs)
        times.append(time.perf_counter_ns() - start)
    return min(times), output


def _calls_per_turn(function: Callable[..., Any], inputs: Sequence[Any]) -> int:
    fastest = min(_turn(function, inputs, 1)[0] for _ in range(3))
    return min(MAX_CALLS, max(1, math.ceil(TURN_NS / max(1, fastest))))


def _agreement(a: Any, b: Any) -> float:
    """Return the relative error of b against a, or raise the sentence that says how they differ."""
    import torch

    first, second = torch.as_tensor(a).detach(), torch.as_tensor(b).detach()
    if first.shape != second.shape:
        raise MoebenchError(f"the outputs have shapes {tuple(first.shape)} and {tuple(second.shape)}; make them equal.")
    if not bool(torch.isfinite(second).all()):
        raise MoebenchError("the second function's output is not finite; mend it before you time it.")
    name = str(second.dtype).removeprefix("torch.")
    bound = BOUNDS.get(name, 0.0)
    scale = float(first.double().norm()) or 1.0
    error = float((first.double() - second.double()).norm()) / scale
    if not error <= bound:
        raise MoebenchError(
            f"the outputs differ by {error:.1e} of their norm ({name} allows {bound:g}); mend it first."
        )
    return error
