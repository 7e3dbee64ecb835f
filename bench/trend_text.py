"""Histories as a terminal shows them: one line per run, and a mark where the level moved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

from ..dashboards import units
from ..dashboards.gate_text import percent, value_text
from ..dashboards.text import WIDTH, clean, fit, pad, width
from ..results.statistics import Change
from .trend import RUNS_NEEDED, TIME, History, Point

SHORT = 7
KEY = 12


def trend_table(histories: Sequence[History], metric: str) -> str:
    """Return every history below the host that it belongs to, and how many levels moved."""
    lines: list[str] = []
    for _, group in groupby(histories, key=lambda one: one.points[0].row["host_key"]):
        members = list(group)
        lines += [_host(members[0].points[-1].row), ""]
        for history in members:
            lines += [*_history(history, metric), ""]
    moved = sum(len(history.changes) for history in histories)
    few = sum(history.counted < RUNS_NEEDED for history in histories)
    lines.append(f"{_count(len(histories), 'history', 'histories')}, {_count(moved, 'change', 'changes')} of level")
    if few:
        lines[-1] += f"; {few} with fewer runs than the {RUNS_NEEDED} that a change needs"
    return "\n".join(lines)


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def _host(row: Mapping[str, Any]) -> str:
    key = "unknown" if row["host_key"] is None else row["host_key"][:KEY]
    cores = "" if row["cores"] is None else f", {row['cores']} cores"
    return clean(f"host {key}: {row['cpu'] or 'unknown CPU'}{cores}")


def _history(history: History, metric: str) -> list[str]:
    last = history.points[-1].row
    name = "median per call" if metric == TIME else metric
    title = (
        f"{clean(history.label)} (case {last['case_key'][:KEY]}): {_count(len(history.points), 'run', 'runs')}, {name}"
    )
    values = [_value(point) for point in history.points]
    size = max(map(width, values))
    rows = zip(history.points, values, strict=True)
    lines = [_line(point, pad(value, size, True), history.changes.get(at)) for at, (point, value) in enumerate(rows)]
    missing = RUNS_NEEDED - history.counted
    if missing > 0:
        more = _count(missing, "more run is", "more runs are")
        lines.append(f"  {more} needed to look for changes ({history.counted} of {RUNS_NEEDED} without flags)")
    return [fit(title, WIDTH), *lines]


def _value(point: Point) -> str:
    unit = point.row["unit"] or "1"
    return units.time(point.value) if unit == "ns" else value_text(point.value, unit)


def _line(point: Point, value: str, change: Change | None) -> str:
    row = point.row
    date = f"{row['date']:%Y-%m-%d %H:%M}" if row["date"] else "unknown date".ljust(16)
    sha = (row["git_sha"] or units.DASH)[:SHORT] + ("+" if row["git_dirty"] else "")
    flags = f"  ({', '.join(point.flags)}: not counted)" if point.flags else ""
    return clean(f"  {date}  {sha:{SHORT + 1}}  {value}{flags}{_mark(change)}").rstrip()


def _mark(change: Change | None) -> str:
    if change is None:
        return ""
    way = "up" if change.after > change.before else "down"
    size = f"{percent(change.magnitude)} " if change.before else "from 0 "
    return f"  <- {way} {size}(p = {change.p:.1g})"
