"""``moebench pareto``: which methods are worth having, in speed or size against quality."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..contracts import MoebenchError, unknown
from ..results.pareto_axes import X_AXES, Axis
from ..results.pareto_sql import quality_axes
from ..results.query import reading
from .store import existing_store

if TYPE_CHECKING:
    import duckdb


def pareto(options: argparse.Namespace) -> int:
    """Print the fronts of one pair of axes, or write the page of all of them."""
    from ..dashboards.pareto_data import answer

    price = checked_price(options.price_per_hour)
    store = existing_store(options.store)
    with reading(store) as connection:
        x, y = _axes(connection, options)
        found = answer(connection, x, y, options.where, None, price)
        if not found.fronts:
            raise MoebenchError(found.none)
        if options.page:
            from ..dashboards.pareto_page import render_pareto

            page = render_pareto(connection, x, y, str(store), options.where, price)
            print(_written(Path(options.page), page))
            return 0
    from ..dashboards import pareto_text as text

    print({"text": text.pareto_table, "json": text.pareto_json, "csv": text.pareto_csv}[options.format](found))
    return 0


def checked_price(price: float | None) -> float | None:
    """Return the price of an hour; refuse what is none."""
    if price is not None and not (math.isfinite(price) and price > 0):
        raise MoebenchError("--price-per-hour takes what an hour of the machine costs, a number above 0.")
    return price


def _axes(connection: duckdb.DuckDBPyConnection, options: argparse.Namespace) -> tuple[Axis, Axis]:
    known = quality_axes(connection)
    if options.x not in X_AXES:
        raise MoebenchError(unknown("axis x", options.x, X_AXES))
    if options.y not in known:
        raise MoebenchError(unknown("axis y", options.y, known))
    return X_AXES[options.x], known[options.y]


def _written(file: Path, page: str) -> Path:
    from ..dashboards.report import write_page

    try:
        return write_page(page, file)
    except OSError as error:
        raise MoebenchError(f"{file} cannot be written ({error.strerror}); name another file with --page.") from error
