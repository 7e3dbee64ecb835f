"""The views that people query, the same over the database file and over the Parquet files of the parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import duckdb

from .schema import TABLES

RAW = {"timings": "timings_raw", "metrics": "metrics_raw"}
"""Tables whose plain name belongs to a view that joins the cases; their rows are under these names."""


@dataclass(frozen=True)
class View:
    """A view with one line about what a row of it is."""

    summary: str
    sql: str


VIEWS: dict[str, View] = {
    "timings": View(
        "A case, a process and a clock: all columns of the case, then samples (ns, turn) and their summary; a case "
        "to be timed that was not has one row without samples.",
        """
        SELECT c.*, t.* EXCLUDE (run_id, case_key)
        FROM cases c LEFT JOIN timings_raw t USING (run_id, case_key)
        WHERE c.protocol IS DISTINCT FROM 'once' OR t.case_key IS NOT NULL
        """,
    ),
    "metrics": View(
        "A case and a metric: all columns of the case, then name, value, unit, lo, hi, n.",
        "SELECT c.*, m.* EXCLUDE (run_id, case_key) FROM cases c JOIN metrics_raw m USING (run_id, case_key)",
    ),
    "summary": View(
        "A case of a run: all columns of the case, start and host of the run, and the wall times pooled over "
        "processes; lo and hi span the median intervals of all processes and are NULL where one of them has none.",
        """
        SELECT c.*, r.started_at, r.host_key, w.* EXCLUDE (run_id, case_key)
        FROM cases c
        LEFT JOIN (
            SELECT run_id, case_key,
                count(*) AS wall_processes,
                string_agg(DISTINCT mode, ' ') AS wall_mode,
                sum(n)::BIGINT AS wall_n,
                min(min_ns) AS wall_min_ns,
                list_aggregate(flatten(list(ns)), 'median') AS wall_median_ns,
                CASE WHEN count(median_lo_ns) = count(*) THEN min(median_lo_ns) END AS wall_lo_ns,
                CASE WHEN count(median_hi_ns) = count(*) THEN max(median_hi_ns) END AS wall_hi_ns
            FROM timings_raw WHERE clock = 'wall' GROUP BY run_id, case_key
        ) w USING (run_id, case_key)
        LEFT JOIN runs r USING (run_id)
        """,
    ),
    "latest": View(
        "A case: its row of view summary from the latest run that has it, whatever its status there.",
        """
        SELECT * FROM summary QUALIFY row_number() OVER (
            PARTITION BY case_key ORDER BY coalesce(started_at, finished_at) DESC NULLS LAST, run_id DESC
        ) = 1
        """,
    ),
    "statuses": View(
        "A run, suite, evidence and status: how many cases ended so, and how many of them carry a flag.",
        """
        SELECT run_id, suite, evidence, status, count(*) AS cases, count(*) FILTER (len(flags) > 0) AS flagged
        FROM cases GROUP BY run_id, suite, evidence, status
        """,
    ),
}


def base_table(table: str) -> str:
    """Return the name under which the rows of a table of the schema are stored."""
    return RAW.get(table, table)


def create_views(connection: duckdb.DuckDBPyConnection) -> None:
    """Create or replace all views."""
    for name, view in VIEWS.items():
        connection.execute(f"CREATE OR REPLACE VIEW {name} AS {view.sql}")


def views_sha256() -> str:
    """Return a digest that changes when a view or a column does."""
    return hashlib.sha256(repr((TABLES, VIEWS)).encode()).hexdigest()
