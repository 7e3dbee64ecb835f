"""What the figures share: names of groups, marks of backends, whiskers, and what a mark says when pointed at."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from . import units
from .chart import Style, safe
from .data import IN_LABEL, Case, labels

GROUP_AXES = tuple(
    axis for axis in IN_LABEL if axis not in ("structure", "routing", "quantization", "sparsity", "backend")
)
"""Axes on which all cases of a group agree."""

METHOD_AXES = ("structure", "routing", "quantization", "sparsity")

LEGEND = {"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0}


def group_names(members: Sequence[Case]) -> list[str]:
    """Return one name per group, from one case of each: what its cases share, its evidence, and a number if needed."""
    shared = labels([case.axes for case in members], GROUP_AXES) if len(members) > 1 else ["all cases"] * len(members)
    names = [f"{name} ({case.row['evidence']})" for name, case in zip(shared, members, strict=True)]
    return numbered(names)


def numbered(names: Sequence[str]) -> list[str]:
    """Make names unique by numbering those that occur again."""
    seen: dict[str, int] = defaultdict(int)
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}, sitting {seen[name]}")
    return result


def markers(cases: Sequence[Case], backend: str, style: Style) -> dict[str, Any]:
    """Return the marks of one backend: its colour and shape, hollow where flagged."""
    symbols = [style.symbol(backend, bool(case.flags)) for case in cases]
    color = style.color(backend)
    return {"color": color, "symbol": symbols, "size": 9, "line": {"width": 1.5, "color": color}}


def whiskers(points: Iterable[tuple[float | None, float | None, float | None]], size: float) -> dict[str, Any]:
    """Return asymmetric error bars from (middle, lo, hi); none where the interval is unknown."""
    above, below = [], []
    for middle, lo, hi in points:
        known = middle is not None and lo is not None and hi is not None
        above.append((hi - middle) / size if known else None)  # type: ignore[operator]
        below.append((middle - lo) / size if known else None)  # type: ignore[operator]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 2, "width": 4}


def hover(case: Case, label: str) -> str:
    """Return what a mark says when pointed at."""
    unit = units.time_unit(case.median_ns)
    lines = [label, f"{units.time(case.median_ns)} {units.interval(case.bounds_ns, unit)}"]
    lines += [f"flags: {', '.join(case.flags)}"] if case.flags else []
    return "<br>".join(safe(line) for line in lines)
