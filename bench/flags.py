"""Doubts about an ok row: not steady, contended, or faster than this host can be."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contracts import Flag
from .sampling import Member

CONTENDED_CPU_SHARE = 0.85
"""A single-threaded case that got less of its core than this, over all its calls, was disturbed."""

IMPLAUSIBLE_FACTOR = 1.15


class Limits:
    """The best that a thread of this host ever showed in suite ``roofline``: flop/s by dtype, byte/s by level.

    ``levels`` maps a cache level or ``DRAM`` to (bytes it holds, byte/s).
    """

    def __init__(self, peak_flops: Mapping[str, float], levels: Mapping[str, tuple[float, float]]) -> None:
        self.peak_flops, self.levels = peak_flops, levels

    @classmethod
    def of_host(cls, store: Path, host_key: str, caches: Mapping[str, int]) -> Limits:
        """Read the probes of this host from the store; without probes nothing is implausible."""
        from ..results.database import connect_parts

        query = """
            SELECT m.name, c.dtype, max(m.value / c.threads) FROM metrics_raw m JOIN cases c USING (run_id, case_key)
            JOIN hosts h USING (run_id) WHERE c.suite = 'roofline' AND c.status = 'ok' AND h.host_key = ?
            GROUP BY m.name, c.dtype
        """
        connection = connect_parts(store)
        try:
            rows = connection.execute(query, [host_key]).fetchall()
        finally:
            connection.close()
        flops = {dtype: value for name, dtype, value in rows if name == "peak_flops"}
        speed = {name.removeprefix("bandwidth_"): value for name, _, value in rows if name.startswith("bandwidth_")}
        sizes = {**{level: float(size) for level, size in caches.items()}, "DRAM": float("inf")}
        return cls(flops, {level: (sizes[level], value) for level, value in speed.items() if level in sizes})

    def implausible(self, member: Member) -> bool:
        """Whether the fastest call beats 1.15 times the best rate of the smallest level that holds the footprint."""
        cost = member.cost or {}
        if not member.wall_ns or not cost or member.device is not None:  # the limits are those of this host's cores
            return False
        seconds = min(member.wall_ns) / 1e9
        peak = self.peak_flops.get(member.case.dtype)
        if peak and cost["flops"] / seconds > IMPLAUSIBLE_FACTOR * peak * member.case.threads:
            return True
        footprint = cost.get("footprint") or cost["bytes"]
        fitting = [entry for entry in sorted(self.levels.values()) if entry[0] >= footprint]
        return bool(fitting) and cost["bytes"] / seconds > IMPLAUSIBLE_FACTOR * fitting[0][1] * member.case.threads


def flags_of(sittings: Sequence[Member], limits: Limits) -> list[Flag]:
    """Return the flags of a case from its members in all sittings."""
    flags = []
    if not all(member.steady for member in sittings) or throttling(sittings):
        flags.append(Flag.NOT_STEADY)
    if any(contended(member) for member in sittings):
        flags.append(Flag.CONTENDED)
    if any(limits.implausible(member) for member in sittings):
        flags.append(Flag.IMPLAUSIBLE)
    return flags


def throttling(sittings: Sequence[Member]) -> str:
    """Return what held a GPU's clocks down beside sampled turns, in words for the row; nothing where nothing did.

    No sample is thrown away for it: the row keeps all of them, is flagged not_steady, and stays out of verdicts.
    """
    counts: dict[str, int] = {}
    for member in sittings:
        for reason, turns in member.throttled.items():
            counts[reason] = counts.get(reason, 0) + turns
    turns = sum(len(set(member.turns)) for member in sittings)
    told = ", ".join(f"{reason} in {count}" for reason, count in sorted(counts.items()))
    return f"clocks were held down: {told} of {turns} turns" if told else ""


def contended(member: Member) -> bool:
    """Whether a single-threaded member did not have its core to itself; a GPU's calls are not judged by the core."""
    if member.case.threads != 1 or not member.wall_ns or member.device is not None:
        return False
    shares = [cpu / wall for cpu, wall in zip(member.cpu_ns, member.wall_ns, strict=True) if wall > 0]
    return statistics.fmean(shares) < CONTENDED_CPU_SHARE


def phases_of(values: Mapping[str, float], wall: float) -> dict[str, Any]:
    """Return the phases of a run in seconds with the engine's own share of the wall time."""
    own = wall - sum(values.values())
    return {**values, "wall": wall, "engine": own, "engine_share": own / wall if wall > 0 else None}
