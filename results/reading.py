"""The store without its database file: DuckDB in memory over the Parquet files of the parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import duckdb

from .errors import ResultsError
from .parts import MANIFEST, RUN_FILE, RUN_TABLES, inspect_part, list_parts, list_runs, read_manifest, sha256_of
from .rows import arrow_table
from .runs import read_run
from .schema import TABLES
from .views import base_table, create_views


def connect_parts(store: Path) -> duckdb.DuckDBPyConnection:
    """Return an in-memory database over the Parquet files of the store, with the tables and views of the file.

    It needs no lock and no ingest. Table ``left_out`` (path, reason) names the parts that cannot be read; nothing is
    moved. A store without parts gives empty tables.
    """
    store = Path(store)
    connection = duckdb.connect()
    files: dict[str, list[str]] = {table: [] for table in TABLES}
    run_rows: dict[str, list[dict[str, Any]]] = {table: [] for table in RUN_TABLES}
    parts: list[tuple[str, str, str | None]] = []
    left_out: list[tuple[str, str]] = []
    for path in list_parts(store):
        problem = inspect_part(path)
        if problem is not None:
            left_out.append((str(path), problem.sentence))
            continue
        parts.append((path.parent.name, path.name, sha256_of(path / MANIFEST)))
        for table in read_manifest(path)["tables"]:
            files[table].append(str(path / f"{table}.parquet"))
    for folder in list_runs(store):
        try:
            for table, rows in read_run(folder).items():
                run_rows[table] += rows
        except ResultsError as error:
            left_out.append((str(folder / RUN_FILE), str(error)))
    for table in TABLES:
        _create_table(connection, table, files[table], run_rows.get(table))
    _create_lists(connection, parts, left_out)
    create_views(connection)
    return connection


def _create_table(
    connection: duckdb.DuckDBPyConnection, table: str, files: list[str], rows: list[dict[str, Any]] | None
) -> None:
    columns, name = TABLES[table], base_table(table)
    if files:
        empty = ", ".join(f'NULL::{kind} AS "{column}"' for column, kind in columns.items())
        listed = ", ".join("'" + file.replace("'", "''") + "'" for file in files)
        connection.execute(
            f'CREATE VIEW "{name}" AS (SELECT {empty} WHERE false) '
            f"UNION ALL BY NAME (SELECT * FROM read_parquet([{listed}], union_by_name = true))"
        )
        return
    connection.execute(f'CREATE TABLE "{name}" ({", ".join(f"{q} {kind}" for q, kind in _quoted(columns))})')
    if rows:
        connection.register("new_rows", arrow_table(table, rows))
        connection.execute(f'INSERT INTO "{name}" BY NAME SELECT * FROM new_rows')
        connection.unregister("new_rows")


def _quoted(columns: dict[str, str]) -> list[tuple[str, str]]:
    return [(f'"{column}"', kind) for column, kind in columns.items()]


def _create_lists(
    connection: duckdb.DuckDBPyConnection, parts: list[tuple[str, str, str | None]], left_out: list[tuple[str, str]]
) -> None:
    connection.execute("CREATE TABLE parts (run_id VARCHAR, part VARCHAR, sha256 VARCHAR)")
    connection.execute("CREATE TABLE left_out (path VARCHAR, reason VARCHAR)")
    if parts:
        connection.executemany("INSERT INTO parts VALUES (?, ?, ?)", parts)
    if left_out:
        connection.executemany("INSERT INTO left_out VALUES (?, ?)", left_out)
