"""Who is faster: medians and ratios of the cases of a group."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import units
from .chart import GREY, Chart, Style, Variant, safe
from .data import Case, labels, sitting_groups
from .marks import LEGEND, METHOD_AXES, group_names, hover, markers, numbered, whiskers
from .query import Row
from .ratios import Ratio, baseline_of

Compare = Callable[[Case, Case], Ratio | None]

CAPTION = (
    "Left: median time of a call, with its interval (the envelope over processes). Right: time divided by "
    "the baseline's, from turn minima paired within the sitting, with a bootstrap interval; left of 1 is faster. Only "
    "cases measured together in one sitting stand in one group. Hollow marks carry a flag and count in no verdict."
)


def compare(cases: Sequence[Case], sql: tuple[str, ...], ratio: Compare, style: Style) -> Chart:
    """Median and interval of every case of a group, and its ratio to the group's baseline."""
    groups = sorted(sitting_groups(cases), key=len, reverse=True)
    variants = [
        _compare_variant(name, members, ratio, style)
        for name, members in zip(group_names([g[0] for g in groups]), groups, strict=True)
    ]
    return Chart(
        "compare",
        "Compare",
        CAPTION,
        sql,
        tuple(variants),
        "No case of this run has a time, so there is nothing to compare.",
    )


def _compare_variant(name: str, members: list[Case], ratio: Compare, style: Style) -> Variant:
    base = baseline_of(members)
    shown = dict(zip((c.key for c in members), numbered(labels([c.axes for c in members])), strict=True))
    ordered = sorted(members, key=lambda case: -(case.median_ns or 0.0))
    ratios = {case.key: ratio(base, case) for case in ordered if case is not base}
    unit = units.time_unit(min(case.median_ns or 0.0 for case in ordered))
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, column_widths=[0.58, 0.42], horizontal_spacing=0.03)
    for backend in sorted({case.axes["backend"] for case in ordered}):
        own = [case for case in ordered if case.axes["backend"] == backend]
        figure.add_trace(_time_dots(own, shown, backend, unit, style), row=1, col=1)
        figure.add_trace(_ratio_dots([c for c in own if ratios.get(c.key)], shown, ratios, style), row=1, col=2)
    figure.add_vline(x=1, line={"color": GREY, "width": 1, "dash": "dot"}, row=1, col=2)
    order = [safe(shown[case.key]) for case in ordered]
    figure.update_layout(height=24 * len(ordered) + 130, legend=LEGEND)
    axis = {"categoryorder": "array", "categoryarray": order, "type": "category"}
    figure.update_yaxes(**axis, range=[-0.7, len(ordered) - 0.3], tickfont={"size": 11}, ticks="")
    figure.update_xaxes(title_text=f"median, {unit[1]}", rangemode="tozero", row=1, col=1)
    ticks = ratio_ticks([bound for one in ratios.values() if one for bound in (one.ratio, one.lo, one.hi) if bound])
    figure.update_xaxes(title_text="time / baseline", type="log", **ticks, row=1, col=2)
    modes = sorted({mode for case in members for mode in case.row["modes"] or ()})
    note = f"Baseline: {shown[base.key]}. Mode: {', '.join(modes) or 'not recorded'}."
    csv_rows = tuple(_compare_row(case, shown, base, ratios.get(case.key)) for case in reversed(ordered))
    return Variant(name, figure, csv_rows, note, _stacked(order))


def ratio_ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return the ticks and the range of a logarithmic axis of ratios that always shows 1."""
    low, high = min([*values, 1.0]) / 1.05, max([*values, 1.0]) * 1.05
    if high / low < 3:
        ticks = [0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.4, 1.6, 1.8, 2.0, 2.5]
    else:
        steps = (1, 3) if high / low > 30 else (1, 2, 3, 5)
        ticks = [step * 10.0**power for power in range(-6, 7) for step in steps]
    return {
        "tickvals": ticks,
        "ticktext": [f"{tick:.4g}" for tick in ticks],
        "range": [math.log10(low), math.log10(high)],
    }


def _stacked(names: Sequence[str]) -> dict[str, Any]:
    """Return the layout of the two panels one above the other, with names above the marks, for a narrow screen."""
    rows = 36 * (len(names) + 1)
    height = 2 * rows + 100
    above = {"xref": "paper", "x": 0, "xanchor": "left", "yshift": 12, "showarrow": False, "font": {"size": 11}}
    return {
        "height": height + 110,
        "xaxis.domain": [0, 1],
        "xaxis2.domain": [0, 1],
        "yaxis.domain": [1 - rows / height, 1],
        "yaxis2.domain": [0, rows / height],
        "yaxis.showticklabels": False,
        "annotations": [{**above, "yref": axis, "y": name, "text": name} for axis in ("y", "y2") for name in names],
    }


def _time_dots(
    cases: list[Case], shown: Mapping[str, str], backend: str, unit: tuple[float, str], style: Style
) -> go.Scatter:
    size = unit[0]
    return go.Scatter(
        name=safe(backend),
        legendgroup=safe(backend),
        mode="markers",
        x=[(case.median_ns or 0.0) / size for case in cases],
        y=[safe(shown[case.key]) for case in cases],
        error_x=whiskers([(case.median_ns, *case.bounds_ns) for case in cases], size),
        marker=markers(cases, backend, style),
        hovertext=[hover(case, shown[case.key]) for case in cases],
        hoverinfo="text",
    )


def _ratio_dots(
    cases: list[Case], shown: Mapping[str, str], ratios: Mapping[str, Ratio | None], style: Style
) -> go.Scatter:
    found = [(case, found) for case in cases if (found := ratios[case.key])]
    backend = cases[0].axes["backend"] if cases else ""
    return go.Scatter(
        name=safe(backend),
        legendgroup=safe(backend),
        showlegend=False,
        mode="markers",
        x=[ratio.ratio for _, ratio in found],
        y=[safe(shown[case.key]) for case, _ in found],
        error_x=whiskers([(ratio.ratio, ratio.lo, ratio.hi) for _, ratio in found], 1.0),
        marker=markers([case for case, _ in found], backend, style) if found else None,
        hovertext=[f"{safe(shown[case.key])}<br>{ratio} ({ratio.pairs} pairs)" for case, ratio in found],
        hoverinfo="text",
    )


def _compare_row(case: Case, shown: Mapping[str, str], base: Case, ratio: Ratio | None) -> Row:
    return {
        "case_key": case.key,
        "case": shown[case.key],
        **{axis: case.axes[axis] for axis in ("backend", *METHOD_AXES)},
        "evidence": case.row["evidence"],
        "flags": " ".join(case.flags),
        "median_ns": case.median_ns,
        "lo_ns": case.bounds_ns[0],
        "hi_ns": case.bounds_ns[1],
        "baseline": shown[base.key],
        "ratio": ratio.ratio if ratio else None,
        "ratio_lo": ratio.lo if ratio else None,
        "ratio_hi": ratio.hi if ratio else None,
        "pairs": ratio.pairs if ratio else None,
    }
