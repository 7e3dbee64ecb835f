"""Where leaving activations out breaks even, in words."""

from __future__ import annotations

from collections.abc import Sequence

from . import units
from .ratios import Ratio
from .saving_data import BreakEven, Curve, Saving, break_even


def saving_lines(found: Sequence[Saving]) -> list[str]:
    """Return a sentence for each curve of each sitting."""
    return [sentence(curve) for saving in found for curve in saving.curves]


def sentence(curve: Curve) -> str:
    """Return where a curve breaks even with its own dense case, and with the fastest dense backend."""
    own = _against(break_even(curve, "own"), f"dense {curve.backend}", bool(curve.own.flags))
    if curve.best is curve.own:
        return f"{curve.label} ({curve.executed}): {own}; no dense backend is faster."
    fastest = f"dense {curve.best.axes['backend']}, the fastest"
    best = _against(break_even(curve, "best"), fastest, bool(curve.best.flags))
    return f"{curve.label} ({curve.executed}): {own}; {best}."


def _against(found: BreakEven, dense: str, flagged: bool) -> str:
    if flagged:
        return f"not judged against {dense}, which carries a flag"
    if not found.judged:
        return f"not judged against {dense}, since every density carries a flag"
    if found.density is None or found.ratio is None:
        return f"break-even density none against {dense}: slower, or not known to be as fast, at the lowest already"
    return f"break-even density {units.digits(found.density, 2)} against {dense}: {told(found.ratio)} there"


def told(ratio: Ratio) -> str:
    """Return a ratio of times with its interval."""
    known = ratio.lo is not None and ratio.hi is not None
    bounds = f" [{units.digits(ratio.lo, 3)}, {units.digits(ratio.hi, 3)}]" if known else ""
    return f"{units.digits(ratio.ratio, 3)} of its time{bounds}"
