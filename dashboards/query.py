"""Ask the results a question and keep the question beside the answer, so that every figure can show its SQL."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from textwrap import dedent
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """The rows of one query, and the very text that made them."""

    sql: str
    rows: tuple[Row, ...]


def ask(connection: duckdb.DuckDBPyConnection, sql: str, **texts: str) -> Answer:
    """Run ``sql`` with every ``$name`` of ``texts`` written into it as a literal: what is shown is what ran."""
    text = dedent(sql).strip()
    for name, value in texts.items():
        text = text.replace(f"${name}", literal(value))
    cursor = connection.execute(text)
    names = [column[0] for column in cursor.description or ()]
    return Answer(text, tuple(dict(zip(names, row, strict=True)) for row in cursor.fetchall()))


def literal(value: str) -> str:
    """Return ``value`` as an SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def to_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as CSV with a header; NULL is an empty field, lists and objects are JSON."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(names)
    writer.writerows([_field(row.get(name)) for name in names] for row in rows)
    return out.getvalue()


def _field(value: Any) -> Any:
    return json.dumps(value, default=str) if isinstance(value, (list, tuple, dict)) else value


def parse_json(text: Any) -> Any:
    """Return a JSON column as Python values; what is NULL or no JSON is None."""
    if not isinstance(text, str):
        return text
    try:
        return json.loads(text)
    except ValueError:
        return None
