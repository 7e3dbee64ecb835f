"""The rows of a Pareto front: cases with what stands along x, beside the quality of their method."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import duckdb
import numpy as np

from .pareto_axes import ITEM_METRICS, Y_AXES, Axis, item_axis
from .query import select
from .statistics import bootstrap_interval, clopper_pearson

Row = dict[str, Any]

PLACE = re.compile(r"\$(\w+)")
"""Where a parameter stands."""

TOGETHER = """
t AS (         -- the device's clock where there is one, else the wall clock; never CPU time
  SELECT run_id, case_key, sitting, mode, ns, median_lo_ns, median_hi_ns FROM timings_raw
  WHERE clock <> 'cpu' AND sitting IS NOT NULL AND ($run IS NULL OR run_id = $run)
  QUALIFY dense_rank() OVER (PARTITION BY run_id, case_key ORDER BY clock = 'wall', clock) = 1
),
s AS (         -- the sittings of each case
  SELECT run_id, case_key, any_value(c.group_key) AS group_key, list(DISTINCT t.sitting ORDER BY t.sitting) AS sittings
  FROM t JOIN cases c USING (run_id, case_key) WHERE c.status = 'ok' GROUP BY run_id, case_key
),
f AS (         -- the sittings of each front: those that all of its cases share
  SELECT DISTINCT run_id, group_key, sittings FROM s WHERE NOT EXISTS (
    SELECT 1 FROM s AS narrow WHERE narrow.run_id = s.run_id AND narrow.group_key = s.group_key
      AND narrow.sittings <> s.sittings AND list_has_all(s.sittings, narrow.sittings))
),
w AS (         -- times within these sittings; the interval spans those of the processes
  SELECT s.run_id, s.case_key, f.sittings, string_agg(DISTINCT t.mode, ' ' ORDER BY t.mode) AS mode,
         list_aggregate(flatten(list(t.ns)), 'median') AS median_ns,
         CASE WHEN count(t.median_lo_ns) = count(*) THEN min(t.median_lo_ns) END AS lo_ns,
         CASE WHEN count(t.median_hi_ns) = count(*) THEN max(t.median_hi_ns) END AS hi_ns
  FROM s JOIN f ON f.run_id = s.run_id AND f.group_key = s.group_key AND list_has_all(s.sittings, f.sittings)
  JOIN t ON t.run_id = s.run_id AND t.case_key = s.case_key AND list_contains(f.sittings, t.sitting)
  GROUP BY s.run_id, s.case_key, f.sittings
)"""

TIME = (
    TOGETHER
    + """,
v AS (
  SELECT run_id, case_key, w.sittings, w.mode, w.median_ns, w.lo_ns, w.hi_ns,
         {median} AS x, {lo} AS x_lo, {hi} AS x_hi
  FROM w JOIN (SELECT run_id, case_key, nullif(tokens, 0) AS tokens,
                      greatest(1, len(regexp_extract_all(layers, '\\d+'))) AS layer_count FROM cases)
  USING (run_id, case_key)
)"""
)

READ = (
    TOGETHER
    + """,
v AS (
  SELECT run_id, case_key, w.sittings, w.mode, w.median_ns, w.lo_ns, w.hi_ns, m.value AS x, m.lo AS x_lo, m.hi AS x_hi
  FROM w JOIN metrics_raw m USING (run_id, case_key) WHERE m.name = $x
)"""
)

COUNTED = """
v AS (         -- no chance in it: the value of the latest run is that of all
  SELECT c.run_id, c.case_key, NULL::VARCHAR[] AS sittings, NULL::VARCHAR AS mode, NULL::DOUBLE AS median_ns,
         NULL::DOUBLE AS lo_ns, NULL::DOUBLE AS hi_ns, m.value AS x, m.value AS x_lo, m.value AS x_hi
  FROM cases c JOIN metrics_raw m USING (run_id, case_key) LEFT JOIN runs r USING (run_id)
  WHERE m.name = $x AND m.value IS NOT NULL AND c.status = 'ok' AND ($run IS NULL OR c.run_id = $run)
  QUALIFY row_number() OVER (PARTITION BY c.case_key
                             ORDER BY coalesce(r.started_at, c.finished_at) DESC NULLS LAST, c.run_id DESC) = 1
)"""

QUALITY = """,
q AS (         -- the latest evaluation of each method, apart by how it was judged
  SELECT c.method_key, c.group_key AS quality_group, c.run_id AS quality_run, c.evidence AS quality_evidence,
         c.dtype AS quality_dtype, c.flags AS quality_flags, {value}
  FROM cases c LEFT JOIN runs r USING (run_id) JOIN {rows} USING (run_id, case_key)
  WHERE c.protocol = 'once' AND c.status = 'ok' AND m.y IS NOT NULL AND NOT EXISTS (  -- nothing later went wrong
    SELECT 1 FROM cases b LEFT JOIN runs br ON br.run_id = b.run_id
    WHERE b.method_key = c.method_key AND b.group_key = c.group_key AND b.status NOT IN ('ok', 'skipped')
      AND coalesce(br.started_at, b.finished_at) > coalesce(r.started_at, c.finished_at))
  QUALIFY row_number() OVER (PARTITION BY c.method_key, c.group_key
                             ORDER BY coalesce(r.started_at, c.finished_at) DESC NULLS LAST, c.run_id DESC,
                                      c.case_key) = 1
)"""

METRIC = "(SELECT run_id, case_key, value AS y, lo, hi, n FROM metrics_raw WHERE name = $y) m"
METRIC_VALUE = "m.y, m.lo AS y_lo, m.hi AS y_hi, m.n AS y_n, NULL::DOUBLE[] AS y_values"

ITEMS = """(
    SELECT run_id, case_key, avg(value) AS y, list(value ORDER BY item) AS y_values FROM (
      SELECT * FROM items WHERE task = $task AND split_part(metric, ',', 1) = $y AND value IS NOT NULL
      QUALIFY dense_rank() OVER (PARTITION BY run_id, case_key ORDER BY metric) = 1
    ) GROUP BY run_id, case_key) m"""
ITEMS_VALUE = "m.y, NULL::DOUBLE AS y_lo, NULL::DOUBLE AS y_hi, len(m.y_values) AS y_n, m.y_values"

JOINED = """,
joined AS (
  SELECT c.* EXCLUDE (executed), r.started_at, r.host_key, v.* EXCLUDE (run_id, case_key),
         flops.value AS flops, moved.value AS bytes, q.* EXCLUDE (method_key)
  FROM cases c JOIN v USING (run_id, case_key) LEFT JOIN runs r USING (run_id)
  LEFT JOIN metrics_raw flops ON flops.run_id = c.run_id AND flops.case_key = c.case_key AND flops.name = 'flops'
  LEFT JOIN metrics_raw moved ON moved.run_id = c.run_id AND moved.case_key = c.case_key AND moved.name = 'bytes'
  LEFT JOIN q ON q.method_key = c.method_key
)
SELECT * FROM joined WHERE ("""

ORDER = "\nORDER BY started_at DESC NULLS LAST, run_id, group_key, case_key, sittings, quality_group"

FAILED = """
SELECT status, count(*) FROM cases
WHERE protocol = 'timed' AND status <> 'ok' AND list_contains($runs, run_id) GROUP BY status ORDER BY status"""

TASKS = "SELECT DISTINCT task, split_part(metric, ',', 1) AS metric FROM items WHERE task IS NOT NULL ORDER BY ALL"


@dataclass(frozen=True)
class Points:
    """Rows of ``joined``, one for each case, front and evaluation, that fit ``where``; ``sql`` is what found them."""

    x: Axis
    y: Axis
    rows: tuple[Row, ...]
    sql: str
    where: str = ""
    failed: tuple[tuple[str, int], ...] = ()
    """How many timed cases of the same runs ended otherwise than ok, by status; empty where ``where`` narrows them."""


def quality_axes(connection: duckdb.DuckDBPyConnection) -> dict[str, Axis]:
    """Return every axis of quality by name, with one for each task of which the store has items."""
    _, pairs = select(connection, TASKS)
    items = [item_axis(task, metric) for task, metric in pairs if metric in ITEM_METRICS]
    return {**Y_AXES, **{axis.name: axis for axis in items}}


def present(connection: duckdb.DuckDBPyConnection, y: Axis) -> bool:
    """Whether any case of the store has this quality."""
    if y.source == "items":
        return True
    sql = "SELECT 1 FROM metrics_raw WHERE name = $y AND value IS NOT NULL LIMIT 1"
    return bool(select(connection, sql, {"y": y.metric})[1])


def load_points(
    connection: duckdb.DuckDBPyConnection, x: Axis, y: Axis, where: str | None = None, run_id: str | None = None
) -> Points:
    """Return all cases that have an ``x``, with the quality ``y`` of their method where it was judged.

    ``where`` is a condition in SQL over the columns of ``joined``; ResultsError says in a sentence what is wrong in it.
    """
    head = f"WITH {_along_x(x).strip()}{_quality(y)}{JOINED}"
    condition = (where or "").strip()
    tail = f"\n{condition or 'true'}\n){ORDER}"
    given = {"run": run_id, "x": x.metric, "y": y.metric, "task": y.task}
    params = {name: given[name] for name in PLACE.findall(head)}
    names, rows = select(connection, head + tail, params)
    found = tuple(dict(zip(names, row, strict=True)) for row in rows)
    for row in found:
        if row["y_values"] is not None:
            row["y_lo"], row["y_hi"] = share_interval(row["y_values"])
    runs = sorted({row["run_id"] for row in found})
    failed = () if condition else tuple(select(connection, FAILED, {"runs": runs})[1])
    return Points(x, y, found, written_out(head, params) + tail, condition, failed)


def _along_x(x: Axis) -> str:
    if x.source != "time":
        return READ if x.source == "read" else COUNTED
    low, high = ("lo_ns", "hi_ns") if x.better == "lower" else ("hi_ns", "lo_ns")
    names = {"median": "median_ns", "lo": low, "hi": high}
    return TIME.format(**{place: x.formula.format(ns=f"w.{name}") for place, name in names.items()})


def _quality(y: Axis) -> str:
    if y.source == "items":
        return QUALITY.format(value=ITEMS_VALUE, rows=ITEMS)
    return QUALITY.format(value=METRIC_VALUE, rows=METRIC)


def share_interval(values: list[float]) -> tuple[float | None, float | None]:
    """Return the interval of a mean over items: exact where each is right or wrong, else by the bootstrap."""
    if set(values) <= {0.0, 1.0}:
        found = clopper_pearson(sum(values), len(values))
    else:
        found = bootstrap_interval(values, np.mean)
    return found.lo, found.hi


def written_out(sql: str, params: Mapping[str, str | None]) -> str:
    """Return ``sql`` with every ``$name`` as a literal, in one pass, so that anybody can run what is shown."""

    def literal(match: re.Match[str]) -> str:
        value = params[match[1]]
        return "NULL" if value is None else "'" + value.replace("'", "''") + "'"

    return PLACE.sub(literal, sql)
