"""The page of the Pareto fronts: quality against everything along x, and what the methods cost, in one file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..results.pareto_axes import X_AXES, Axis
from . import data
from .chart import Chart, Style
from .figure_pareto import pareto
from .pareto_cap import cap
from .pareto_data import Answer, answers
from .tables import esc, text
from .template import chart_html, csv_texts, data_script, figure_scripts, fill

if TYPE_CHECKING:
    import duckdb


def render_pareto(
    connection: duckdb.DuckDBPyConnection,
    x: Axis,
    y: Axis,
    store: str,
    where: str | None = None,
    price_per_hour: float | None = None,
) -> str:
    """Return the page as HTML, with ``x`` and ``y`` before all other axes."""
    xs = [x.name, *(name for name in X_AXES if name != x.name)]
    found = answers(connection, xs, y, where, price_per_hour=price_per_hour)
    style = Style.of(case.axes["backend"] for one in found for shown in one.fronts for case in shown.cases)
    charts = [_chart(name, [one for one in found if one.x.name == name], style) for name in xs]
    timed = next((one for one in found if one.x.source == "time" and one.y == y and one.fronts), None)
    shown = None if timed is None else timed.fronts[0]
    sections = [*map(chart_html, charts), *([] if timed is None or shown is None else [cap(timed, shown)])]
    texts = {} if timed is None or shown is None else {"cap": timed.rows(shown)}
    payloads = [data_script("details", {}), data_script("csv", csv_texts(charts, texts)), *figure_scripts(charts)]
    links = [(chart.key, X_AXES[name].title) for chart, name in zip(charts, xs, strict=True)]
    links += [("cap", "cost, accuracy, performance")] if texts else []
    runs = data.load_runs(connection)
    return fill(
        {
            "run_id": "Pareto fronts",
            "heading": "What quality costs",
            "subtitle": f"Fronts of {esc(y.title)} and other quality"
            + (f", of the cases with <code>{esc(where)}</code>" if where else ""),
            "navigation": "".join(f'<a href="#{key}">{esc(name)}</a>' for key, name in links),
            "sections": "\n".join(sections),
            "version": text(runs[0].row["version"] if runs else None),
            "store": f"<code>{esc(store)}</code>",
            "payloads": "\n".join(payloads),
        }
    )


def _chart(name: str, found: list[Answer], style: Style) -> Chart:
    return pareto(f"pareto-{name}", f"Quality against {X_AXES[name].title}", found, style)
