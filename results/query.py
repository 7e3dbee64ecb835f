"""SQL over a store, for reading only, as text in one of three formats."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import duckdb

from .database import DATABASE, connect_parts, open_database
from .errors import DatabaseBusyError, ResultsError
from .migrations import is_current
from .rows import finite

Format = Literal["table", "csv", "json"]
FORMATS: tuple[Format, ...] = ("table", "csv", "json")
HINTS = ("Did you mean", "Candidate")
"""How the lines begin in which DuckDB suggests other names."""

WIDEST = 60
"""Longest cell of a table in characters; csv and json are never cut."""


def run_sql(
    store: Path, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None, format: Format = "table"
) -> str:
    """Return the result of one SELECT as text; ``params`` fill ``?`` or ``$name``; mistakes are one sentence."""
    if format not in FORMATS:
        raise ResultsError(f"there is no format '{format}'; take one of {', '.join(FORMATS)}.")
    with reading(store) as connection:
        names, rows = select(connection, sql, params)
    return {"table": _as_table, "csv": as_csv, "json": _as_json}[format](names, rows)


@contextmanager
def reading(store: Path) -> Iterator[duckdb.DuckDBPyConnection]:
    """Give a connection that can read the store and nothing else, and write nothing.

    It is the database file, or the parts where that file is absent, held by a writer, or of an older schema.
    """
    store = Path(store)
    if not store.is_dir():
        raise ResultsError(f"there is no store at {store}; run `moebench run` first or name another with store=.")
    connection = _database(store)
    readable = "" if connection else str(store).replace("'", "''")
    connection = connection or connect_parts(store)
    try:
        if readable:
            connection.execute(f"SET allowed_directories = ['{readable}']")
        connection.execute("SET enable_external_access = false")
        connection.execute("SET lock_configuration = true")
        yield connection
    finally:
        connection.close()


def _database(store: Path) -> duckdb.DuckDBPyConnection | None:
    if not (store / DATABASE).exists():
        return None
    try:
        connection = open_database(store / DATABASE, read_only=True, timeout_s=0)
    except DatabaseBusyError:
        return None
    try:
        if is_current(connection):
            return connection
    except BaseException:
        connection.close()
        raise
    connection.close()
    return None


def select(
    connection: duckdb.DuckDBPyConnection, sql: str, params: Sequence[Any] | Mapping[str, Any] | None = None
) -> tuple[list[str], list[tuple[Any, ...]]]:
    """Return column names and rows of one statement that reads."""
    try:
        check_reads(connection, sql)
        result = connection.execute(sql, params) if params else connection.execute(sql)
        return [column[0] for column in result.description], result.fetchall()
    except duckdb.Error as error:
        raise ResultsError(sql_sentence(error)) from error


def check_reads(connection: duckdb.DuckDBPyConnection, sql: str) -> None:
    """Refuse anything but one SELECT, as which DuckDB also counts FROM, WITH, DESCRIBE, SHOW and SUMMARIZE."""
    statements = connection.extract_statements(sql)
    if len(statements) != 1 or statements[0].type.name != "SELECT":
        raise ResultsError("the store is read by one SELECT at a time; write one statement that only reads.")


def sql_sentence(error: duckdb.Error) -> str:
    """Return what DuckDB says about a statement as one sentence, with its suggestion where it has one."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    about = lines[0].rstrip(".!")
    hint = next((line[0].lower() + line[1:] for line in lines if line.startswith(HINTS)), "see SHOW TABLES.")
    return f"the SQL cannot be run: {about}: {hint}"


# ---------------------------------------------------------------------------------------------------------------------
# Formats


def plain(value: Any) -> Any:
    """Return a value of DuckDB as plain JSON: times as ISO text, numbers that are not finite as null."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return finite(value)
    if isinstance(value, datetime):
        return value.isoformat()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def as_csv(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return CSV with a header; NULL is an empty cell, lists and structures are JSON text."""
    sink = io.StringIO()
    writer = csv.writer(sink, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        cells = [plain(value) for value in row]
        writer.writerow([json.dumps(cell) if isinstance(cell, (list, dict, bool)) else cell for cell in cells])
    return sink.getvalue()


def _as_json(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    values = [dict(zip(names, map(plain, row), strict=True)) for row in rows]
    return json.dumps(values, indent=1, ensure_ascii=False) + "\n"


def _as_table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    numeric = [_is_numeric(row[place] for row in rows) for place in range(len(names))]
    lines = [names, ["-" * width for width in widths], *cells]
    text = ["  ".join(_aligned(*cell) for cell in zip(line, widths, numeric, strict=True)).rstrip() for line in lines]
    return "\n".join([*text, f"({len(rows)} row{'' if len(rows) == 1 else 's'})", ""])


def _aligned(cell: str, width: int, numeric: bool) -> str:
    return cell.rjust(width) if numeric else cell.ljust(width)


def _is_numeric(values: Iterator[Any]) -> bool:
    present = [value for value in values if value is not None]
    return bool(present) and all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in present)


def _cell(value: Any) -> str:
    if value is None:
        return "NULL"
    if isinstance(value, float):
        return f"{value:.6g}"
    cell = plain(value)
    text = json.dumps(cell) if isinstance(cell, (list, dict, bool)) else str(cell).replace("\n", "\\n")
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"
