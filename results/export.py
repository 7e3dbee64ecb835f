"""A store, or the result of a SELECT, as Parquet or CSV files."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from .durable import write_file_atomic
from .errors import ResultsError
from .query import as_csv, check_reads, reading, select, sql_sentence
from .rows import arrow_schema
from .schema import TABLES
from .views import VIEWS, base_table

Format = Literal["parquet", "csv"]
FORMATS: tuple[Format, ...] = ("parquet", "csv")


def export(
    store: Path, target: Path, format: Format = "parquet", tables: Sequence[str] | None = None, sql: str | None = None
) -> list[Path]:
    """Write tables (all, unless named) or the result of one SELECT into folder ``target`` and return the files.

    A table is ``<target>/<table>.<format>``, with the columns of the schema; a view may be named like a table, and what
    is called ``timings`` or ``metrics`` is the rows of the schema, not the view that joins the cases. The result of
    ``sql`` is ``<target>/query.<format>``. Parquet has the columns and types of the parts, so that files of several
    stores can be read as one; CSV has lists as JSON text. Files of the same name are replaced, each at once.
    """
    if format not in FORMATS:
        raise ResultsError(f"there is no format '{format}'; take one of {', '.join(FORMATS)}.")
    if sql is not None and tables:
        raise ResultsError("export takes tables or SQL, not both; run it twice.")
    statements = {"query": sql} if sql is not None else _selects(TABLES if tables is None else tables)
    written = []
    with reading(store) as connection:
        for name, statement in statements.items():
            path = Path(target) / f"{name}.{format}"
            write_file_atomic(path, _content(connection, name, statement, format))
            written.append(path)
    return written


def _selects(names: Iterable[str]) -> dict[str, str]:
    known = [*TABLES, *(view for view in VIEWS if view not in TABLES)]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ResultsError(f"there is no table '{unknown[0]}'; known: {', '.join(known)}.")
    return {name: f'SELECT * FROM "{base_table(name)}" ORDER BY ALL' for name in names}


def _content(connection: duckdb.DuckDBPyConnection, name: str, statement: str, format: Format) -> bytes:
    if format == "csv":
        return as_csv(*select(connection, statement)).encode()
    table = _arrow(connection, statement)
    if name in TABLES:
        table = table.cast(arrow_schema(name))
    sink = BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def _arrow(connection: duckdb.DuckDBPyConnection, statement: str) -> Any:
    try:
        check_reads(connection, statement)
        result = connection.sql(statement).to_arrow_table()
    except duckdb.Error as error:
        raise ResultsError(sql_sentence(error)) from error
    return pa.table(result)
