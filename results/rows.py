"""Rows as dictionaries <-> Arrow tables with exactly the columns and types of ``schema.TABLES``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from .errors import ResultsError
from .schema import TABLES

SCALARS: dict[str, pa.DataType] = {
    "VARCHAR": pa.string(),
    "JSON": pa.string(),
    "INTEGER": pa.int32(),
    "BIGINT": pa.int64(),
    "DOUBLE": pa.float64(),
    "BOOLEAN": pa.bool_(),
    "TIMESTAMP": pa.timestamp("us"),
}


def arrow_type(sql_type: str) -> pa.DataType:
    """Return the Arrow type of a column type of the schema; JSON is text."""
    if sql_type.endswith("[]"):
        return pa.list_(SCALARS[sql_type[:-2]])
    return SCALARS[sql_type]


def arrow_schema(table: str) -> pa.Schema:
    """Return the Arrow schema of a table of the schema."""
    return pa.schema([(column, arrow_type(kind)) for column, kind in TABLES[table].items()])


def arrow_table(table: str, rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Return ``rows`` as an Arrow table.

    Missing columns and NaN or infinite numbers become NULL. Timestamps are ``datetime`` (UTC where naive) or ISO text;
    JSON columns take JSON text or plain values. An unknown table or column, or a value of another type, is an error.
    """
    columns = TABLES.get(table)
    if columns is None:
        raise ResultsError(f"there is no table '{table}'; known: {', '.join(TABLES)}.")
    unknown = {name for row in rows for name in row} - set(columns)
    if unknown:
        raise ResultsError(f"table '{table}' has no column '{min(unknown)}'; add it to results/schema.py first.")
    arrays = [_array(table, name, kind, [row.get(name) for row in rows]) for name, kind in columns.items()]
    return pa.Table.from_arrays(arrays, schema=arrow_schema(table))


def _array(table: str, column: str, kind: str, values: list[Any]) -> pa.Array:
    convert = _CONVERTERS.get(kind)
    try:
        if convert is not None:
            values = [None if value is None else convert(value) for value in values]
        return pa.array(values, type=arrow_type(kind))
    except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
        reason = str(error).splitlines()[0]
        raise ResultsError(
            f"column '{column}' of table '{table}' must hold {kind}, not what was given: {reason}"
        ) from error


def finite(value: Any) -> float | None:
    """Return ``value`` as a float, or None where it is no finite number."""
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def _finite_list(values: Any) -> list[float | None]:
    return [finite(value) for value in values]


def _integer(value: Any) -> int:
    """Return a whole number; Arrow alone would cut 1.5 to 1."""
    if int(value) != value:
        raise ValueError(f"{value!r} is no whole number")
    return int(value)


def _integers(values: Any) -> Any:
    """Return whole numbers as they are; Arrow alone would cut 1.5 to 1 inside a list."""
    array = np.asarray(values)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(f"expected a list of whole numbers, got {str(values)[:40]}")
    return array


def _texts(values: Any) -> Any:
    """Return a list of texts; Arrow alone would take one text for a list of its letters."""
    if isinstance(values, str):
        raise TypeError(f"expected a list of texts, got {values!r}")
    return values


def utc(value: Any) -> datetime:
    """Return a timestamp as naive UTC, from a ``datetime`` or ISO text."""
    moment = value if isinstance(value, datetime) else datetime.fromisoformat(value)
    return moment if moment.tzinfo is None else moment.astimezone(UTC).replace(tzinfo=None)


def json_text(value: Any) -> str:
    """Return JSON text: checked where it is text already, made from plain values otherwise (NaN becomes null)."""
    if isinstance(value, str):
        json.loads(value)
        return value
    return json.dumps(_without_nan(value), sort_keys=True, allow_nan=False)


def _without_nan(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return finite(value) if isinstance(value, float) else value


_CONVERTERS = {
    "DOUBLE": finite,
    "DOUBLE[]": _finite_list,
    "INTEGER": _integer,
    "BIGINT": _integer,
    "BIGINT[]": _integers,
    "INTEGER[]": _integers,
    "VARCHAR[]": _texts,
    "TIMESTAMP": utc,
    "JSON": json_text,
}
