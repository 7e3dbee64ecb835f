"""``moebench trend``: the history of each case on one class of hosts, with the points at which its level moved.

Medians of single runs differ by a few percent for no reason; a level over many runs does not. So a history finds slow
drifts that no gate of two revisions sees, and never judges one run.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..contracts import MoebenchError
from ..dashboards.data import labels
from ..results.query import reading, select
from ..results.statistics import Change, change_points
from ..results.statistics.changes import LEAST_SEGMENT
from .host import host_facts
from .store import existing_store

TIME = "time"
P_VALUE = 0.001

LEAST_MOVE = 0.01
"""Smallest relative move of times that is shown: smaller ones come and go with the machine. Metrics have no least."""

RUNS_NEEDED = 2 * LEAST_SEGMENT

TIMES = """
WITH v AS (              -- the device's clock where there is one, else the wall clock; never CPU time
  SELECT run_id, case_key, list_aggregate(flatten(list(ns)), 'median') AS value, 'ns' AS unit FROM timings_raw
  WHERE clock <> 'cpu' AND $metric = 'time' GROUP BY run_id, case_key, clock
  QUALIFY row_number() OVER (PARTITION BY run_id, case_key ORDER BY clock = 'wall', clock) = 1
)"""
VALUES = "WITH v AS (SELECT run_id, case_key, value, unit FROM metrics_raw WHERE name = $metric)"
"""One value for each run and case: the median of all calls, or a metric."""

CASES = """
SELECT c.case_key, c.suite, c.model, c.layers, c.structure, c.routing, c.quantization, c.sparsity, c.backend,
       c.traffic, c.tokens, c.dtype, c.pass, c.boundary, c.threads, c.residency, c.device, c.seed, c.flags,
       r.host_key, r.git_sha, r.git_dirty, coalesce(r.started_at, c.finished_at) AS date, h.cpu, h.cores,
       v.value, v.unit
FROM cases c JOIN runs r USING (run_id) JOIN v ON v.run_id = c.run_id AND v.case_key = c.case_key
LEFT JOIN hosts h ON h.run_id = c.run_id
WHERE c.status = 'ok' AND v.value IS NOT NULL AND ($host IS NULL OR starts_with(r.host_key, $host))
  AND ($suite IS NULL OR c.suite = $suite) AND ($backend IS NULL OR c.backend = $backend)
  AND ($case IS NULL OR starts_with(c.case_key, $case))
ORDER BY r.host_key NULLS LAST, c.suite, c.model, c.tokens, c.routing, c.backend, c.case_key, date, c.run_id
"""

METRICS = "SELECT DISTINCT name FROM metrics_raw ORDER BY name"


@dataclass(frozen=True)
class Point:
    """The value of a case in one run; a doubtful one carries flags and is no part of the level."""

    row: Mapping[str, Any]

    @property
    def value(self) -> float:
        """Median time in ns, or the metric."""
        return float(self.row["value"])

    @property
    def flags(self) -> tuple[str, ...]:
        """Doubts about the run's value."""
        return tuple(self.row["flags"] or ())


@dataclass(frozen=True)
class History:
    """The runs of one case on one class of hosts, the oldest first. ``changes`` are by index into ``points``."""

    label: str
    points: tuple[Point, ...]
    changes: Mapping[int, Change]

    @property
    def counted(self) -> int:
        """Number of runs without flags."""
        return sum(not point.flags for point in self.points)


def trend(options: argparse.Namespace) -> int:
    """Print the history of every case that the filters leave."""
    from .trend_text import trend_table

    host = None if options.host == "all" else options.host or host_facts()["host_key"]
    filters = {"host": host, **{name: getattr(options, name) for name in ("suite", "backend", "case", "metric")}}
    with reading(existing_store(options.store)) as connection:
        names, rows = select(connection, (TIMES if options.metric == TIME else VALUES) + CASES, filters)
        if not rows:
            raise MoebenchError(_nothing(options, [name for (name,) in select(connection, METRICS)[1]]))
    found = histories([dict(zip(names, row, strict=True)) for row in rows], options.metric)
    print(trend_table(found, options.metric))
    return 0


def _nothing(options: argparse.Namespace, metrics: Sequence[str]) -> str:
    if options.metric not in (TIME, *metrics):
        return f"no run has a metric '{options.metric}'; take {' or '.join([TIME, *metrics])}."
    where = {None: "this host", "all": "any host"}.get(options.host, f"host '{options.host}'")
    remedy = "drop a filter" if options.host == "all" else "drop a filter, or look at other hosts with --host all"
    return f"no ok case of {where} has a {options.metric} under these filters; {remedy}."


def histories(rows: Sequence[Mapping[str, Any]], metric: str) -> list[History]:
    """Return one history for each host and case, from rows in that order and by date."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for row in rows:
        groups.setdefault((row["host_key"], row["case_key"]), []).append(Point(row))
    axes = [
        {name: "" if value is None else str(value) for name, value in points[-1].row.items()}
        for points in groups.values()
    ]
    least = LEAST_MOVE if metric == TIME else 0.0
    return [
        History(label, tuple(points), changes(points, least))
        for label, points in zip(labels(axes), groups.values(), strict=True)
    ]


def changes(points: Sequence[Point], least: float) -> dict[int, Change]:
    """Return the changes of level by index into ``points``; flagged ones are passed over."""
    counted = [index for index, point in enumerate(points) if not point.flags]
    found = change_points([points[index].value for index in counted], P_VALUE, least)
    return {counted[change.index]: change for change in found}
