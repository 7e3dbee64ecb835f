"""Which experts do the work: realised load, and the load that was asked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from . import units
from .chart import Chart, Variant, safe
from .data import IN_LABEL, Case, labels
from .marks import LEGEND, numbered
from .query import Answer

REQUESTED_CAPTION = (
    "For forced traffic: the share of tokens that was asked for (line) and the share that the steps realised (bar)."
)


def loads(cases: Sequence[Case], answer: Answer) -> Chart:
    """Share of tokens per expert, one row per method, traffic and layer; one heat map per number of experts."""
    by_key = {case.key: case for case in cases}
    totals: dict[tuple[str, Any], list[float]] = {}
    for row in answer.rows:
        if row["name"] != "tokens_per_expert" or row["case_key"] not in by_key or not row["values"]:
            continue
        place, values = (row["case_key"], row["layer"]), [float(value or 0.0) for value in row["values"]]
        known = totals.get(place, [0.0] * len(values))
        totals[place] = [a + b for a, b in zip(known, values, strict=True)] if len(known) == len(values) else known
    maps: dict[tuple[str, int], list[tuple[Case, Any, list[float]]]] = defaultdict(list)
    for (key, layer), values in totals.items():
        if sum(values) > 0:
            maps[str(by_key[key].row["evidence"]), len(values)].append((by_key[key], layer, values))
    variants = tuple(
        _load_variant(f"{experts} experts ({evidence})", members)
        for (evidence, experts), members in sorted(maps.items())
    )
    return Chart(
        "loads",
        "Expert load",
        "Share of all routed tokens that each expert received, in percent, over all steps; one row per method, traffic "
        "and layer. Backends do not change the load, so cases that differ only in backend share a row.",
        (answer.sql,),
        variants,
        "No case of this run stored 'tokens_per_expert'.",
        "Experts",
    )


def _load_variant(name: str, members: list[tuple[Case, Any, list[float]]]) -> Variant:
    axes = [axis for axis in IN_LABEL if axis not in ("backend", "layers", "suite")]
    methods = labels([case.axes for case, _, _ in members], axes)
    several = len({layer for _, layer, _ in members}) > 1
    names = [
        f"{'' if method == 'case' else method}{f' · layer {layer}' if several or method == 'case' else ''}".strip(" ·")
        for method, (_, layer, _) in zip(methods, members, strict=True)
    ]
    names = [n if names.count(n) == 1 else f"{n} · {m[0].key[:6]}" for n, m in zip(names, members, strict=True)]
    shares = [[100 * value / sum(values) for value in values] for _, _, values in members]
    figure = go.Figure(
        go.Heatmap(
            z=shares,
            y=[safe(name) for name in names],
            x=list(range(len(shares[0]))),
            zmin=0,
            zmax=max(map(max, shares)),
            colorscale="Viridis",
            xgap=1,
            ygap=2,
            colorbar={"title": {"text": "%"}, "thickness": 12, "len": 1, "outlinewidth": 0},
            hovertemplate="%{y}<br>expert %{x}: %{z:.3g} %<extra></extra>",
        )
    )
    figure.update_layout(height=max(220, 26 * len(members) + 110))
    figure.update_yaxes(type="category", autorange="reversed", automargin=True, ticks="", tickfont={"size": 11})
    figure.update_xaxes(title_text="expert", showgrid=False)
    rows = tuple(
        {"case_key": case.key, "row": label, "layer": layer, "expert": expert, "tokens": tokens, "percent": percent}
        for (case, layer, values), label, own in zip(members, names, shares, strict=True)
        for expert, (tokens, percent) in enumerate(zip(values, own, strict=True))
    )
    even = 100 / len(shares[0])
    return Variant(
        name, figure, rows, f"An even load would be {units.digits(even, 3)} % each.", {"yaxis.tickfont.size": 9}
    )


def requested(cases: Sequence[Case], answer: Answer) -> Chart:
    """The load that forced traffic asked for, beside the load that was realised."""
    by_key = {case.key: case for case in cases}
    wanted: dict[tuple[str, Any], list[float]] = {}
    got: dict[tuple[str, Any], list[list[float]]] = defaultdict(list)
    for row in answer.rows:
        place = (row["case_key"], row["layer"])
        if row["name"] == "requested_share" and row["values"]:
            wanted[place] = [float(value or 0.0) for value in row["values"]]
        elif row["values"]:
            got[place].append([float(value or 0.0) for value in row["values"]])
    found = [
        place for place in wanted if place in got and place[0] in by_key and any(any(values) for values in got[place])
    ]
    axes = ["traffic", *(axis for axis in IN_LABEL if axis not in ("backend", "suite", "traffic"))]
    names = numbered(labels([by_key[key].axes for key, _ in found], axes)) if found else []
    variants = tuple(
        _requested_variant(name, place, wanted[place], got[place]) for name, place in zip(names, found, strict=True)
    )
    return Chart(
        "requested",
        "Requested and realised load",
        REQUESTED_CAPTION,
        (answer.sql,),
        variants,
        "No case of this run stored 'requested_share': its traffic was routed, not forced.",
        "Case",
    )


def _requested_variant(name: str, place: tuple[str, Any], wanted: list[float], steps: list[list[float]]) -> Variant:
    sums = [sum(column) for column in zip(*steps, strict=True)]
    realised = [100 * value / sum(sums) for value in sums]
    asked = [100 * value / (sum(wanted) or 1.0) for value in wanted]
    figure = go.Figure()
    figure.add_bar(name="realised", x=list(range(len(realised))), y=realised, marker={"color": "#2f7ed8"})
    figure.add_scatter(
        name="requested",
        x=list(range(len(asked))),
        y=asked,
        mode="markers",
        marker={"symbol": "line-ew-open", "size": 14, "color": "#dd7200", "line": {"width": 3}},
    )
    figure.update_xaxes(title_text="expert")
    figure.update_yaxes(title_text="share of tokens, %", rangemode="tozero")
    figure.update_layout(height=360, legend=LEGEND)
    rows = tuple(
        {"case_key": place[0], "layer": place[1], "expert": e, "requested_percent": a, "realised_percent": r}
        for e, (a, r) in enumerate(zip(asked, realised, strict=False))
    )
    return Variant(name, figure, rows)
