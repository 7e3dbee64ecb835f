"""What speed or size costs in quality: Pareto fronts with intervals on both axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from ..results.pareto import Place
from ..results.pareto_axes import Axis
from ..results.utilisation import s_mbu, s_mfu
from . import units
from .chart import GREY, Chart, Style, Variant, safe
from .data import Case
from .marks import LEGEND, markers, whiskers
from .pareto_data import PLACES, Answer, Shown, caveats, counted

CAPTION = (
    "Each mark is one method on one backend, with intervals on both axes. Grey marks are dominated: another is better "
    "on both axes, beyond the intervals. Named marks are the front; coloured ones without a name are tied with it, "
    "which more samples may decide. Hollow marks carry a flag or have no interval, and are not judged."
)

NAMED = 12
"""Marks of a front that are named in the figure at most; the others say it when pointed at."""


def pareto(key: str, title: str, answers: Sequence[Answer], style: Style | None = None) -> Chart:
    """Return the chart of these answers, one variant for each front of each pair of axes.

    ``style`` keeps the colours of backends those of the other charts of a page.
    """
    backends = (case.axes["backend"] for one in answers for shown in one.fronts for case in shown.cases)
    style = style or Style.of(backends)
    variants = [_variant(answer, shown, style) for answer in answers for shown in answer.fronts]
    peaks = [answers[0].peaks.sql] if answers else []
    queries = [f"-- {one.y.title} against {one.x.title}\n{one.points.sql}" for one in answers]
    empty = " ".join(dict.fromkeys(f"{one.none[:1].upper()}{one.none[1:]}" for one in answers if one.none))
    return Chart(key, title, CAPTION, (*queries, *peaks), tuple(variants), empty, "Axes and group")


def _variant(answer: Answer, shown: Shown, style: Style) -> Variant:
    x, y = answer.x, answer.y
    x_unit = units.scale(min((abs(row["x"]) for row in shown.front.rows if row["x"]), default=1.0), x.unit)
    figure = go.Figure()
    _add_front(figure, shown, x, x_unit[0])
    for backend in sorted({case.axes["backend"] for case in shown.cases}):
        own = [case for case in shown.cases if case.axes["backend"] == backend]
        figure.add_scatter(
            name=safe(backend),
            legendgroup=safe(backend),
            mode="markers",
            x=[None],
            y=[None],
            marker={"color": style.color(backend), "symbol": style.symbol(backend), "size": 9},
        )
        figure.add_scatter(
            legendgroup=safe(backend),
            showlegend=False,
            mode="markers",
            x=[case.row["x"] / x_unit[0] for case in own],
            y=[case.row["y"] for case in own],
            error_x=_bars(own, "x", x_unit[0]),
            error_y=_bars(own, "y", 1.0),
            marker=_marker(shown, own, backend, style),
            hovertext=[_hover(answer, shown, case) for case in own],
            hoverinfo="text",
        )
    figure.update_xaxes(title_text=_axis_title(x, x_unit[1]), rangemode="tozero" if x.together else "normal")
    figure.update_yaxes(title_text=_axis_title(y, "" if y.unit == "1" else y.unit))
    figure.update_layout(height=480, legend=LEGEND)
    label = f"{y.title} against {x.title} · {shown.title}"
    return Variant(label, figure, answer.rows(shown), _note(answer, shown), {"annotations": []})


def _axis_title(axis: Axis, unit: str) -> str:
    better = "less is better" if axis.better == "lower" else "more is better"
    return safe(f"{axis.title}{f', {unit}' if unit else ''} ({better})")


def _bars(cases: Sequence[Case], place: str, size: float) -> dict[str, Any]:
    points = [(case.row[place], case.row[f"{place}_lo"], case.row[f"{place}_hi"]) for case in cases]
    return whiskers(points, size) | {"color": GREY, "thickness": 1}


def _marker(shown: Shown, cases: Sequence[Case], backend: str, style: Style) -> dict[str, Any]:
    """Return marks in the colour of the backend, grey where dominated, hollow where nothing was judged."""
    places = [shown.placed(case).place for case in cases]
    colors = [GREY if where == Place.DOMINATED else style.color(backend) for where in places]
    symbols = [style.symbol(backend, where == Place.UNJUDGED) for where in places]
    sizes = [10 if where == Place.FRONT else 7 for where in places]
    base = markers(cases, backend, style)
    return base | {"color": colors, "symbol": symbols, "size": sizes, "line": {"width": 1.5, "color": colors}}


def _add_front(figure: go.Figure, shown: Shown, x: Axis, size: float) -> None:
    """Draw the line of the marks that nothing is ahead of, and name them."""
    best = sorted(
        (case.row["x"], case.row["y"], case.label) for case in shown.cases if shown.placed(case).place == Place.FRONT
    )
    shape = "hv" if x.better == "lower" else "vh"
    figure.add_scatter(
        x=[value / size for value, _, _ in best],
        y=[value for _, value, _ in best],
        mode="lines",
        line={"shape": shape, "color": GREY, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    middle = max((value for value, _, _ in best), default=0.0) / 2
    for rank, (value, quality, name) in enumerate(best[:NAMED]):
        side, shift = ("left", 7) if value < middle else ("right", -7)
        figure.add_annotation(
            x=value / size,
            y=quality,
            text=safe(name),
            showarrow=False,
            xanchor=side,
            xshift=shift,
            yshift=-12 - 13 * (rank % 2),
            font={"size": 11},
        )


def _hover(answer: Answer, shown: Shown, case: Case) -> str:
    row, placed = case.row, shown.placed(case)
    names = shown.first_names(placed.by)
    verdict = f"{PLACES[placed.place]}{' by' if placed.place == Place.DOMINATED else ' with' if names else ''}"
    lines = [
        case.label,
        f"backend {case.axes['backend']}, run {row['run_id']}",
        f"{answer.x.title} {interval_text(row, 'x', answer.x)}",
        f"{answer.y.title} {interval_text(row, 'y', answer.y)} (run {row['quality_run']})",
        *(f"{name} {units.digits(found[0], 3)}" for name, found in _utilised(answer, row).items() if found),
        f"{verdict} {names or placed.why}".rstrip(),
    ]
    lines += [f"flags: {', '.join(case.flags)}"] if case.flags else []
    return "<br>".join(safe(line) for line in lines)


def _utilised(answer: Answer, row: Mapping[str, Any]) -> dict[str, Any]:
    return {"S-MBU": s_mbu(row, answer.peaks), "S-MFU": s_mfu(row, answer.peaks)}


def interval_text(row: Mapping[str, Any], place: str, axis: Axis) -> str:
    """Return a value with its interval in a unit that fits, such as ``12.3 µs [12.1, 12.6]``."""
    size, unit = units.scale(row[place], axis.unit)
    value, lo, hi = (row[name] for name in (place, f"{place}_lo", f"{place}_hi"))
    bounds = "no interval" if lo is None or hi is None else f"[{units.digits(lo / size)}, {units.digits(hi / size)}]"
    return f"{units.digits(value / size)} {unit} {bounds}".replace("  ", " ")


def _note(answer: Answer, shown: Shown) -> str:
    told = [f"{counted(shown)}.", *caveats(shown)]
    told += [f"Left out, {one.rows} rows: {one.reason}." for one in answer.left]
    return " ".join(told)
