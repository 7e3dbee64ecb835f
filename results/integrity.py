"""Rules that every store must keep, as SQL that finds the rows that break them."""

from __future__ import annotations

import duckdb

from .schema import KEYS
from .views import base_table

WHERE = "run_id || '/' || case_key"

RULES: dict[str, str] = {
    "ok and measured, but without samples": f"""
        SELECT {WHERE} FROM timings
        WHERE status = 'ok' AND protocol = 'timed' AND starts_with(evidence, 'measured-') AND coalesce(len(ns), 0) = 0
    """,
    "not ok, but with samples": f"SELECT {WHERE} FROM timings WHERE status <> 'ok' AND len(ns) > 0",
    "without a status": f"SELECT {WHERE} FROM cases WHERE status IS NULL",
    "not ok, but without a reason": f"SELECT {WHERE} FROM cases WHERE status <> 'ok' AND coalesce(reason, '') = ''",
    "run once, but with timings": f"SELECT {WHERE} FROM timings WHERE protocol = 'once' AND ns IS NOT NULL",
    "at odds with their own samples in n, turns, minimum or median": f"""
        SELECT {WHERE} FROM timings_raw WHERE ns IS NOT NULL AND (
            n IS DISTINCT FROM len(ns) OR (turn IS NOT NULL AND len(turn) <> len(ns))
            OR min_ns IS DISTINCT FROM list_min(ns) OR median_ns < min_ns)
    """,
    "with a sample that is NULL or not positive": f"""
        SELECT {WHERE} FROM timings_raw WHERE list_min(ns) <= 0 OR len(list_filter(ns, lambda x: x IS NULL)) > 0
    """,
    **{
        f"in {table}, but of no case": f"SELECT DISTINCT {WHERE} FROM {table} ANTI JOIN cases USING (run_id, case_key)"
        for table in ("timings_raw", "metrics_raw", "series", "items")
    },
    "of a run that has no run.json": "SELECT DISTINCT run_id FROM cases ANTI JOIN runs USING (run_id)",
}
"""What is wrong -> SQL with one text column that names each row where it is so."""

SHOWN = 3


def problems(connection: duckdb.DuckDBPyConnection) -> list[str]:
    """Return one sentence for each rule that some rows break, with the first of them; empty where all is well."""
    rules = {**RULES, **{f"twice in {base_table(table)}": _doubled(table) for table in KEYS}}
    found = ((what, [row[0] for row in connection.execute(sql).fetchall()]) for what, sql in rules.items())
    return [_sentence(what, names) for what, names in found if names]


def _doubled(table: str) -> str:
    columns = ", ".join(f'"{column}"' for column in KEYS[table])
    return f"SELECT concat_ws('/', {columns}) FROM \"{base_table(table)}\" GROUP BY {columns} HAVING count(*) > 1"


def _sentence(what: str, names: list[str]) -> str:
    shown = ", ".join(sorted(names)[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
    return f"{len(names)} {'is' if len(names) == 1 else 'are'} {what}: {shown}."
