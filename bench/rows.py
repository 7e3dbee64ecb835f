"""From measured members to the rows of a part."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..contracts import NAMED_AXES, Case, Check, Flag, Metric, Status, canonical_json, plain
from ..results.statistics import summary
from .flags import throttling
from .rundir import now
from .sampling import Member

Tables = dict[str, list[dict[str, Any]]]


def case_row(run_id: str, case: Case, status: Status, reason: str, flags: Sequence[Flag] = ()) -> dict[str, Any]:
    """Return the row of table ``cases`` without what only a measured case has."""
    row: dict[str, Any] = {axis: case.axis(axis) for axis in (*NAMED_AXES, "tokens", "dtype", "pass", "boundary")}
    choices = {axis: getattr(case, axis).params for axis in NAMED_AXES}
    row.update(
        run_id=run_id,
        case_key=case.case_key,
        method_key=case.method_key,
        group_key=case.group_key,
        suite=case.suite,
        suite_version=case.suite_version,
        protocol=case.protocol,
        layers=",".join(map(str, case.layers)),
        threads=case.threads,
        residency=case.residency,
        device=case.device,
        seed=case.seed,
        base=case.base or None,
        evidence=str(case.evidence),
        status=str(status),
        reason=reason or None,
        flags=[str(flag) for flag in flags],
        weights=case.execution.weights,
        sparse=case.execution.sparse,
        params=canonical_json({**choices, "workload": case.workload, "calibration": case.calibration}),
        finished_at=now(),
    )
    return row


def measured_rows(
    run_id: str, sittings: Sequence[Member], flags: Sequence[Flag], names: Sequence[str], first_process: int = 0
) -> Tables:
    """Return the rows of one case from its member in each sitting (one per process); ``names`` are the sittings' ids.

    Processes are numbered from ``first_process``: the anchor of a split group has some in each of its pieces. A case
    that failed in one sitting failed: it keeps that status and no samples.
    """
    worst = next((member for member in sittings if not member.alive), sittings[-1])
    told = (worst.facts or {}).get("notes", {}).get("reason", "") if worst.alive else ""
    throttled = throttling(sittings) if worst.alive else ""
    reason = "; ".join(filter(None, (worst.reason, told, throttled)))
    row = case_row(run_id, worst.case, worst.status, reason, flags if worst.alive else ())
    check = _worst_check(sittings) or Check(True)
    executed = worst.executed or (worst.facts or {}).get("executed")
    if worst.device is not None:
        executed = {**(executed or {}), "device": worst.device}
    row.update(
        executed=canonical_json(executed) if executed else None,
        error=check.error,
        error_bound=check.bound,
        flips=sum(member.flips for member in sittings),
        input_sha256=worst.input_sha256,
        elapsed_s=worst.seconds if worst.case.protocol == "once" else None,
    )
    tables: Tables = {"cases": [row]}
    if not worst.alive:
        return tables
    if worst.case.protocol == "timed":
        tables["timings"] = [
            timing
            for process, (member, name) in enumerate(zip(sittings, names, strict=True), first_process)
            for timing in _timing_rows(run_id, member, process, name)
        ]
    _add_facts(tables, run_id, worst, sittings)
    return tables


def _worst_check(sittings: Sequence[Member]) -> Check | None:
    checks = [member.check for member in sittings if member.check is not None]
    return max(checks, key=lambda check: (not check.ok, check.error or 0.0), default=None)


def _timing_rows(run_id: str, member: Member, process: int, sitting: str) -> list[dict[str, Any]]:
    shared = {
        "run_id": run_id,
        "case_key": member.case.case_key,
        "process": process,
        "sitting": sitting,
        "mode": member.mode,
        "turn": member.turns,
        "switches": member.switches,
    }
    clocks = {"wall": member.wall_ns, "cpu": member.cpu_ns}
    if member.device is not None:  # the host only launches: its wall time is not the time of a call
        clocks = {"device": member.device_ns, "cpu": member.cpu_ns}
    return [{**shared, "clock": clock, "ns": ns, **summary(ns)} for clock, ns in clocks.items()]


def _add_facts(tables: Tables, run_id: str, member: Member, sittings: Sequence[Member]) -> None:
    facts: Mapping[str, Any] = member.facts or {}
    key = {"run_id": run_id, "case_key": member.case.case_key}
    metrics = [*facts.get("metrics", []), *plain([*_engine_metrics(member), *_established_rate(sittings)])]
    tables["metrics"] = [{**key, **metric} for metric in metrics]
    tables["series"] = [{**key, **series} for series in facts.get("series", [])]
    tables["items"] = [{**key, **item} for item in facts.get("items", [])]


def _engine_metrics(member: Member) -> list[Metric]:
    cost = member.cost or {}
    metrics = [
        Metric("flops", cost.get("flops"), "flop"),
        Metric("bytes", cost.get("bytes"), "byte"),
        Metric("footprint", cost.get("footprint"), "byte"),
        Metric("distinct_experts", cost.get("distinct_experts"), "1"),
        Metric("assignments", cost.get("assignments"), "1"),
        Metric("prepare_seconds", member.seconds if member.case.protocol == "timed" else None, "s"),
        Metric("worker_peak_rss", member.peak_rss, "byte"),
    ]
    known = [metric for metric in metrics if metric.value is not None]
    if member.device is not None:
        known.append(Metric("host_launch_ns", statistics.median(member.wall_ns), "ns", n=len(member.wall_ns)))
    return [*known, *member.sitting]


def _established_rate(sittings: Sequence[Member]) -> list[Metric]:
    """Return the rate of the fastest call of all processes under the name that a probe gives it."""
    cost = sittings[-1].cost
    notes = (sittings[-1].facts or {}).get("notes", {})
    times = [ns for member in sittings for ns in member.call_ns]
    if "rate" not in notes or not times or not cost:
        return []
    amount, unit = cost[notes["per"]], {"flops": "flop/s", "bytes": "byte/s"}[notes["per"]]
    return [Metric(notes["rate"], amount / min(times) * 1e9, unit)]


def merge(tables: Tables, more: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Append the rows of ``more`` to ``tables``."""
    for name, rows in more.items():
        tables.setdefault(name, []).extend(dict(row) for row in rows)
