"""What else changed between two sides of a case that regressed: environment, routing, path, cost, phases, in this
order.

The order is that of causes: another torch explains another kernel, and not the other way round.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..sampling import Member
from .pairs import PairedMember

PHASE_FACTOR = 1.25
"""Preparing and warming up are timed once per process: below this they are called equal."""

ROUTING_SERIES = ("load", "requested_share", "tokens_per_expert")


def moved(members: Sequence[PairedMember], versions: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return one phrase for each thing that differs between the sides, first things first."""
    last = members[-1]
    base, candidate = last.members["base"], last.members["candidate"]
    return (
        *_versions(versions.get("base", {}), versions.get("candidate", {})),
        *_routing(base, candidate),
        *_path(base, candidate),
        *_cost(base, candidate),
        *_phases(members),
    )


def moved_once(member: PairedMember, versions: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    """Return the same of a case that ran once on each side: its wall time is no phase of anything."""
    base, candidate = member.members["base"], member.members["candidate"]
    return (
        *_versions(versions.get("base", {}), versions.get("candidate", {})),
        *_routing(base, candidate),
        *_path(base, candidate),
    )


def _versions(base: Mapping[str, Any], candidate: Mapping[str, Any]) -> Iterator[str]:
    one, other = dict(base.get("versions", {})), dict(candidate.get("versions", {}))
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"environment: {name} {one.get(name)} -> {other.get(name)}"
    for name in ("threads", "capability"):
        if base.get(name) != candidate.get(name):
            yield f"environment: {name} {base.get(name)} -> {candidate.get(name)}"


def _routing(base: Member, candidate: Member) -> Iterator[str]:
    one, other = (_series(member) for member in (base, candidate))
    for name in one.keys() & other.keys():
        if name.startswith(ROUTING_SERIES) and one[name] != other[name]:
            yield f"realised routing: {name} differs"


def _series(member: Member) -> dict[str, Any]:
    found = (member.facts or {}).get("series", ())
    return {_series_name(series): series["values"] for series in found}


def _series_name(series: Mapping[str, Any]) -> str:
    layer = series.get("layer")
    return str(series["name"]) if layer is None else f"{series['name']} of layer {layer}"


def _path(base: Member, candidate: Member) -> Iterator[str]:
    one = (base.facts or {}).get("executed") or base.executed or {}
    other = (candidate.facts or {}).get("executed") or candidate.executed or {}
    for name in sorted({*one, *other}):
        if one.get(name) != other.get(name):
            yield f"executed path: {name} {one.get(name)} -> {other.get(name)}"


def _cost(base: Member, candidate: Member) -> Iterator[str]:
    one, other = base.cost or {}, candidate.cost or {}
    for name in one.keys() & other.keys():
        if None not in (one[name], other[name]) and one[name] != other[name]:
            yield f"cost: {name} {one[name]:g} -> {other[name]:g}"
    if base.peak_rss and candidate.peak_rss and candidate.peak_rss > PHASE_FACTOR * base.peak_rss:
        yield f"memory: peak of the worker {base.peak_rss} -> {candidate.peak_rss} bytes"


def _phases(members: Sequence[PairedMember]) -> Iterator[str]:
    """Compare the times beside the calls: preparing, and involuntary switches."""
    for name, unit in (("seconds", "s of preparing"), ("switches", "involuntary context switches")):
        one, other = (
            statistics.median(getattr(member.members[side], name) for member in members)
            for side in ("base", "candidate")
        )
        if other > PHASE_FACTOR * one and other - one > (0.05 if name == "seconds" else 10):
            yield f"phases: {one:.3g} -> {other:.3g} {unit}"
