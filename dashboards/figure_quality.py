"""What speed costs in quality."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import plotly.graph_objects as go

from . import units
from .chart import GREY, Chart, Style, Variant, safe
from .data import Case, labels, sitting_groups
from .marks import LEGEND, group_names, hover, markers, whiskers
from .query import Answer, Row

CAPTION = (
    "Each mark is one method on one backend: down and left is better. Whiskers are intervals, of the median time and "
    "of the quality where it has one. Grey marks are dominated: another is at least as good on both and better on one. "
    "Hollow marks carry a flag and dominate nothing."
)

QUALITY_NAMES = {
    "kl_to_dense": "KL to dense",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


def quality(cases: Sequence[Case], answer: Answer, sql: str, style: Style) -> Chart:
    """Quality of a method against the speed of each backend that ran it; both with intervals, lower is better.

    The group with the most methods comes first, with the distance to the dense model before other metrics.
    """
    by_group: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in answer.rows:
        by_group[row["name"], str(row["evidence"]), row["group_key"]].setdefault(row["method_key"], row)
    found: list[tuple[int, int, Variant]] = []
    groups = sitting_groups(cases)
    names = group_names([members[0] for members in groups])
    for (metric, evidence, _), methods in by_group.items():
        for name, members in zip(names, groups, strict=True):
            own = [case for case in members if case.row["method_key"] in methods and case.row["evidence"] == evidence]
            if own:
                title = f"{QUALITY_NAMES[metric]} · {name}"
                rank = -len({case.row["method_key"] for case in own}), list(QUALITY_NAMES).index(metric)
                found.append((*rank, _quality_variant(title, metric, own, methods, style)))
    variants = [variant for _, _, variant in sorted(found, key=lambda entry: entry[:2])]
    return Chart(
        "quality",
        "Quality against speed",
        CAPTION,
        (answer.sql, sql),
        tuple(variants),
        _quality_missing(answer, groups),
        "Metric and group",
    )


def _quality_missing(answer: Answer, groups: Sequence[Sequence[Case]]) -> str:
    if not answer.rows:
        return "No quality was measured in this run; run the suite 'accuracy' on the same methods to fill this chart."
    if not groups:
        return "Quality was measured in this run, but no speed."
    return "Quality and speed were both measured in this run, but not of the same method."


def dominated(points: Sequence[tuple[float, float, bool]]) -> list[bool]:
    """Tell which of the points (x, y, may dominate) have another one that is no worse on both and better on one."""
    return [any(d and a <= x and b <= y and (a < x or b < y) for a, b, d in points) for x, y, _ in points]


def _quality_variant(name: str, metric: str, cases: list[Case], methods: Mapping[str, Row], style: Style) -> Variant:
    quality_of = {case.key: methods[case.row["method_key"]] for case in cases}
    points = [(case.median_ns or 0.0, float(quality_of[case.key]["value"]), not case.flags) for case in cases]
    worse = dict(zip((case.key for case in cases), dominated(points), strict=True))
    shown = dict(zip((case.key for case in cases), labels([case.axes for case in cases]), strict=True))
    unit = units.time_unit(min(x for x, _, _ in points))
    figure = go.Figure()
    _add_front(figure, cases, points, worse, shown, unit)
    for backend in sorted({case.axes["backend"] for case in cases}):
        own = [case for case in cases if case.axes["backend"] == backend]
        found = [quality_of[case.key] for case in own]
        marks = markers(own, backend, style)
        colors = [GREY if worse[case.key] else style.color(backend) for case in own]
        figure.add_scatter(
            name=safe(backend), legendgroup=safe(backend), mode="markers", x=[None], y=[None], marker=marks
        )
        figure.add_scatter(
            legendgroup=safe(backend),
            showlegend=False,
            mode="markers",
            x=[(case.median_ns or 0.0) / unit[0] for case in own],
            y=[row["value"] for row in found],
            error_x=whiskers([(case.median_ns, *case.bounds_ns) for case in own], unit[0]) | {"color": GREY},
            error_y=whiskers([(row["value"], row["lo"], row["hi"]) for row in found], 1.0) | {"color": GREY},
            marker=marks | {"color": colors, "line": {"width": 1.5, "color": colors}},
            hovertext=[_quality_hover(case, shown[case.key], quality_of[case.key], worse[case.key]) for case in own],
            hoverinfo="text",
        )
    figure.update_xaxes(title_text=f"median, {unit[1]}", rangemode="tozero")
    figure.update_yaxes(title_text=f"{QUALITY_NAMES[metric]}{_unit_of(next(iter(quality_of.values())))}")
    figure.update_layout(height=460, legend=LEGEND)
    rows = tuple(_quality_row(case, shown[case.key], quality_of[case.key], worse[case.key]) for case in cases)
    return Variant(name, figure, rows, narrow={"annotations": []})


def _add_front(
    figure: go.Figure,
    cases: Sequence[Case],
    points: Sequence[tuple[float, float, bool]],
    worse: Mapping[str, bool],
    shown: Mapping[str, str],
    unit: tuple[float, str],
) -> None:
    """Draw the line of the marks that nothing dominates, and name them."""
    best = [
        (x, y, shown[case.key]) for (x, y, may), case in zip(points, cases, strict=True) if may and not worse[case.key]
    ]
    best.sort()
    figure.add_scatter(
        x=[x / unit[0] for x, _, _ in best],
        y=[y for _, y, _ in best],
        mode="lines",
        line={"shape": "hv", "color": GREY, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    middle = max((x for x, _, _ in points), default=0.0) / 4
    for rank, (x, y, name) in enumerate(best):
        side, shift = ("left", 7) if x < middle else ("right", -7)
        figure.add_annotation(
            x=x / unit[0],
            y=y,
            text=safe(name),
            showarrow=False,
            xanchor=side,
            xshift=shift,
            yshift=-12 - 13 * (rank % 2),
            font={"size": 11},
        )


def _unit_of(row: Row) -> str:
    return f", {safe(row['unit'])}" if row["unit"] not in (None, "", "1") else ""


def _quality_hover(case: Case, label: str, row: Row, worse: bool) -> str:
    bounds = "" if row["lo"] is None else f" [{units.digits(row['lo'])}, {units.digits(row['hi'])}]"
    text = f"{row['name']} {units.digits(row['value'])}{bounds}"
    return f"{hover(case, label)}<br>{safe(text)}{'<br>dominated' if worse else ''}"


def _quality_row(case: Case, label: str, row: Row, worse: bool) -> Row:
    return {
        "case_key": case.key,
        "case": label,
        "backend": case.axes["backend"],
        "evidence": case.row["evidence"],
        "flags": " ".join(case.flags),
        "median_ns": case.median_ns,
        "lo_ns": case.bounds_ns[0],
        "hi_ns": case.bounds_ns[1],
        "metric": row["name"],
        "value": row["value"],
        "value_lo": row["lo"],
        "value_hi": row["hi"],
        "unit": row["unit"],
        "dominated": worse,
    }
