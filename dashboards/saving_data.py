"""What leaving activations out buys: measured beside theoretical speed-ups, and the density at which it breaks even."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .data import Case, labels, sitting_groups
from .query import parse_json
from .ratios import Ratio

Compare = Callable[[Case, Case], Ratio | None]

METHOD = ("structure", "routing", "quantization")
"""On these a sparse case and the dense one that it is compared with agree."""

EXECUTIONS = ("skip", "mask")


@dataclass(frozen=True)
class Point:
    """A sparse case: its density, its time over that of a dense one, and what counting says it could save.

    ``density`` is the share of its experts' weights that the tokens need. Savings are dense over sparse, in bytes moved
    and in floating point operations of the execution: 1 where a mask saves nothing.
    """

    case: Case
    density: float
    own: Ratio | None
    best: Ratio | None
    bytes_saving: float | None
    flops_saving: float | None


@dataclass(frozen=True)
class Curve:
    """One method on one backend over its levels, by rising density; beside it its dense case and the fastest one."""

    label: str
    backend: str
    executed: str
    own: Case
    best: Case
    points: tuple[Point, ...]


@dataclass(frozen=True)
class BreakEven:
    """The highest density up to which no judged point is slower than a dense case, and the ratio there.

    ``density`` None: already the lowest is slower, or might be. A point is not slower where the whole interval of its
    ratio lies at or below 1; cases with a flag are not judged.
    """

    density: float | None
    ratio: Ratio | None
    judged: int


@dataclass(frozen=True)
class Saving:
    """The curves of cases that were measured together."""

    members: tuple[Case, ...]
    curves: tuple[Curve, ...]


def savings(cases: Sequence[Case], ratio: Compare) -> list[Saving]:
    """Return a Saving for each sitting that has a backend with skipped or masked activations beside its dense case."""
    found = []
    for members in sitting_groups(cases):
        curves = _curves(members, ratio)
        if curves:
            found.append(Saving(tuple(members), tuple(curves)))
    return sorted(found, key=lambda one: -len(one.members))


def break_even(curve: Curve, against: str) -> BreakEven:
    """Return where a curve breaks even with its ``own`` dense case or with the ``best`` one."""
    reached: tuple[float, Ratio] | None = None
    base = curve.own if against == "own" else curve.best
    judged = [] if base.flags else [point for point in curve.points if not point.case.flags]
    for point in judged:
        ratio = point.own if against == "own" else point.best
        if ratio is None or ratio.hi is None or ratio.hi > 1:
            break
        reached = point.density, ratio
    density, ratio = reached or (None, None)
    return BreakEven(density, ratio, len(judged))


def _curves(members: Sequence[Case], ratio: Compare) -> list[Curve]:
    dense: dict[tuple[str, ...], dict[str, Case]] = defaultdict(dict)
    for case in members:
        if case.row["sparsity"] == "none":
            dense[_method(case)].setdefault(case.axes["backend"], case)
    sparse: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in members:
        backend = case.axes["backend"]
        known = case.row["sparse"] in EXECUTIONS and _metric(case, "weight_density") is not None
        if known and backend in dense[_method(case)]:
            sparse[(*_method(case), str(case.row["sparsity"]), _settings(case), backend)].append(case)
    named = labels([{**own[0].axes, "sparsity": own[0].row["sparsity"]} for own in sparse.values()], NAMED)
    curves = []
    for label, own in zip(_apart(named), sparse.values(), strict=True):
        beside = dense[_method(own[0])]
        base, best = beside[own[0].axes["backend"]], fastest(beside.values())
        points = sorted((_point(case, base, best, ratio) for case in own), key=lambda point: point.density)
        curves.append(Curve(label, own[0].axes["backend"], str(own[0].row["sparse"]), base, best, tuple(points)))
    return curves


NAMED = ("backend", "sparsity", *METHOD)
"""What a curve is called by, where it differs between curves."""


def fastest(dense: Iterable[Case]) -> Case:
    """Return the dense case of the least median, one without a flag where there is any."""
    return min(dense, key=lambda case: (bool(case.flags), case.median_ns or 0.0))


def _method(case: Case) -> tuple[str, ...]:
    return tuple(case.axes[axis] for axis in METHOD)


def _settings(case: Case) -> str:
    """Return the parameters of a case's sparsity that are no level: a curve goes over levels alone."""
    params = parse_json(case.row["params"])
    own = params.get("sparsity") if isinstance(params, dict) else None
    return json.dumps({name: value for name, value in (own or {}).items() if name != "level"}, sort_keys=True)


def _apart(names: Sequence[str]) -> list[str]:
    counts = [names[: at + 1].count(name) for at, name in enumerate(names)]
    return [name if names.count(name) == 1 else f"{name} #{number}" for name, number in zip(names, counts, strict=True)]


def _metric(case: Case, name: str) -> float | None:
    return next((metric["value"] for metric in case.metrics if metric["name"] == name), None)


def _point(case: Case, own: Case, best: Case, ratio: Compare) -> Point:
    return Point(
        case,
        float(_metric(case, "weight_density") or 0.0),
        ratio(own, case),
        ratio(best, case),
        _saved(case, own, "bytes"),
        _saved(case, own, "flops"),
    )


def _saved(case: Case, own: Case, name: str) -> float | None:
    mine, dense = _metric(case, name), _metric(own, name)
    return dense / mine if mine and dense else None
