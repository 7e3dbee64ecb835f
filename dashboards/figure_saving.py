"""What sparsity buys: measured speed-ups beside theoretical ones, over the density of the weights that are needed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import units
from .chart import GREY, PALETTE, Chart, Style, Variant, safe
from .figure_compare import ratio_ticks
from .marks import LEGEND, group_names, whiskers
from .query import Row
from .ratios import Ratio
from .saving_data import Curve, Point, Saving, break_even
from .saving_text import sentence

CAPTION = (
    "Speed-up of a layer that leaves activations out, over the share of its experts' weights that its tokens need: "
    "left over the same backend's dense case, right over the fastest dense backend. Whiskers come from turns paired "
    "within the sitting. Dashes are predictions: dense bytes over those that this execution must move; a mask saves "
    "none. Hollow marks carry a flag and are not judged. The break-even density is the highest one up to which every "
    "interval lies at or above 1."
)

PANELS = ("own", "best")


def saving(found: Sequence[Saving], sql: tuple[str, ...], style: Style) -> Chart:
    """One variant for each set of cases that were measured together."""
    names = group_names([one.members[0] for one in found])
    variants = tuple(
        Variant(name, _figure(one.curves, style), _rows(one.curves), " ".join(map(sentence, one.curves)), NARROW)
        for name, one in zip(names, found, strict=True)
    )
    empty = "No case of this run left activations out beside a dense case of its backend, so nothing was saved."
    return Chart("saving", "What sparsity buys", CAPTION, sql, variants, empty)


NARROW: dict[str, Any] = {
    "height": 820,
    "xaxis.domain": [0, 1],
    "xaxis2.domain": [0, 1],
    "yaxis.domain": [0.56, 1],
    "yaxis2.domain": [0, 0.44],
}
"""The panels one above the other, for a small screen."""


def _figure(curves: Sequence[Curve], style: Style) -> go.Figure:
    figure = make_subplots(rows=1, cols=2, horizontal_spacing=0.08)
    for number, curve in enumerate(curves):
        color = PALETTE[number % len(PALETTE)]
        for column, against in enumerate(PANELS, 1):
            figure.add_trace(_measured(curve, against, color, style), row=1, col=column)
        figure.add_trace(_predicted(curve, color), row=1, col=1)
    seen = [1 / bound for curve in curves for point in curve.points for bound in _bounds(point) if bound]
    ticks = ratio_ticks([*seen, *(point.bytes_saving or 1.0 for curve in curves for point in curve.points)])
    for column, name in enumerate(("its dense case", "the fastest dense backend"), 1):
        figure.add_hline(y=1, line={"color": GREY, "width": 1, "dash": "dot"}, row=1, col=column)
        figure.update_yaxes(type="log", title_text=f"speed-up over {name}", **ticks, row=1, col=column)
        figure.update_xaxes(title_text="density of the weights needed", rangemode="tozero", row=1, col=column)
    figure.update_layout(height=480, legend=LEGEND)
    return figure


def _bounds(point: Point) -> list[float | None]:
    return [bound for ratio in (point.own, point.best) if ratio for bound in (ratio.ratio, ratio.lo, ratio.hi)]


def _measured(curve: Curve, against: str, color: str, style: Style) -> go.Scatter:
    """Draw the measured speed-ups of a curve; colour is the method's, shape the backend's."""
    found = [(point, ratio) for point in curve.points if (ratio := getattr(point, against))]
    symbols = [style.symbol(curve.backend, bool(point.case.flags)) for point, _ in found]
    return go.Scatter(
        name=safe(curve.label),
        legendgroup=safe(curve.label),
        showlegend=against == "own",
        mode="lines+markers",
        x=[point.density for point, _ in found],
        y=[1 / ratio.ratio for _, ratio in found],
        error_y=whiskers([(1 / ratio.ratio, *_inverted(ratio)) for _, ratio in found], 1.0),
        line={"color": color, "width": 1.5},
        marker={"color": color, "symbol": symbols, "size": 9, "line": {"width": 1.5, "color": color}},
        hovertext=[f"{safe(point.case.label)}<br>{ratio} ({ratio.pairs} pairs)" for point, ratio in found],
        hoverinfo="text",
    )


def _inverted(ratio: Ratio) -> tuple[float | None, float | None]:
    return (1 / ratio.hi if ratio.hi else None), (1 / ratio.lo if ratio.lo else None)


def _predicted(curve: Curve, color: str) -> go.Scatter:
    found = [point for point in curve.points if point.bytes_saving]
    return go.Scatter(
        name=safe(f"{curve.label}, bytes"),
        legendgroup=safe(curve.label),
        showlegend=False,
        mode="markers",
        x=[point.density for point in found],
        y=[point.bytes_saving for point in found],
        marker={"symbol": "line-ew-open", "size": 14, "color": color, "line": {"width": 2, "color": color}},
        hovertext=[
            f"{safe(point.case.label)}<br>predicted: {units.digits(point.bytes_saving, 3)} by bytes, "
            f"{units.digits(point.flops_saving, 3)} by operations"
            for point in found
        ],
        hoverinfo="text",
    )


def _rows(curves: Sequence[Curve]) -> tuple[Row, ...]:
    return tuple(_row(curve, point) for curve in curves for point in curve.points)


def _row(curve: Curve, point: Point) -> Row:
    ratios = {
        f"{name}_{bound}": getattr(ratio, bound) if ratio else None
        for name, ratio in (("own", point.own), ("best", point.best))
        for bound in ("ratio", "lo", "hi", "pairs")
    }
    return {
        "case_key": point.case.key,
        "curve": curve.label,
        "backend": curve.backend,
        "sparse": curve.executed,
        "case": point.case.label,
        "flags": " ".join(point.case.flags),
        "weight_density": point.density,
        "predicted_by_bytes": point.bytes_saving,
        "predicted_by_flops": point.flops_saving,
        "best_backend": curve.best.axes["backend"],
        **ratios,
        "own_break_even": break_even(curve, "own").density,
        "best_break_even": break_even(curve, "best").density,
    }
