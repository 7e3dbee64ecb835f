"""One function per figure: cases in, a Chart out. Different kinds of evidence never meet in one figure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from . import units
from .chart import GREY, Chart, Style, Variant, safe
from .data import IN_LABEL, Case, labels, sitting_groups
from .query import Answer, Row
from .ratios import Ratio, baseline_of

GROUP_AXES = tuple(
    axis for axis in IN_LABEL if axis not in ("structure", "routing", "quantization", "sparsity", "backend")
)
"""Axes on which all cases of a group agree."""

METHOD_AXES = ("structure", "routing", "quantization", "sparsity")

Compare = Callable[[Case, Case], Ratio | None]


def compare(cases: Sequence[Case], sql: tuple[str, ...], ratio: Compare, style: Style) -> Chart:
    """Median and interval of every case of a group, and its ratio to the group's baseline."""
    groups = sitting_groups(cases)
    variants = [
        _compare_variant(name, members, ratio, style)
        for name, members in zip(group_names([g[0] for g in groups]), groups, strict=True)
    ]
    return Chart(
        "compare",
        "Compare",
        "Left: median time of a call, with the interval of the median (the envelope over processes). Right: time divided "
        "by the baseline's, from turn minima paired within the sitting, with a bootstrap interval; left of 1 is faster. "
        "Only cases measured together in one sitting stand in one group. Hollow marks carry a flag and count in no verdict.",
        sql,
        tuple(variants),
        "No case of this run has a time, so there is nothing to compare.",
    )


def group_names(members: Sequence[Case]) -> list[str]:
    """Return one name per group, from one case of each: what its cases share, its evidence, and a number if needed."""
    shared = labels([case.axes for case in members], GROUP_AXES) if len(members) > 1 else ["all cases"] * len(members)
    names = [f"{name} ({case.row['evidence']})" for name, case in zip(shared, members, strict=True)]
    return numbered(names)


def numbered(names: Sequence[str]) -> list[str]:
    """Make names unique by numbering those that occur again."""
    seen: dict[str, int] = defaultdict(int)
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if seen[name] == 1 else f"{name}, sitting {seen[name]}")
    return result


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
    rows = 34 * len(ordered)
    figure.update_layout(height=rows + 120, legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0})
    axis = {"categoryorder": "array", "categoryarray": order, "type": "category"}
    figure.update_yaxes(**axis, ticklabelposition="inside top", tickfont={"size": 11}, ticks="")
    figure.update_xaxes(title_text=f"median, {unit[1]}", rangemode="tozero", row=1, col=1)
    figure.update_xaxes(title_text="time / baseline", type="log", dtick="D1", row=1, col=2)
    narrow = {
        "height": 2 * rows + 260,
        "xaxis.domain": [0, 1],
        "xaxis2.domain": [0, 1],
        "yaxis.domain": [0.55, 1],
        "yaxis2.domain": [0, 0.42],
        "yaxis2.showticklabels": True,
    }
    modes = sorted({mode for case in members for mode in case.row["modes"] or ()})
    note = f"Baseline: {shown[base.key]}. Mode: {', '.join(modes) or 'not recorded'}."
    csv_rows = tuple(_compare_row(case, shown, base, ratios.get(case.key)) for case in reversed(ordered))
    return Variant(name, figure, csv_rows, note, narrow)


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


def markers(cases: Sequence[Case], backend: str, style: Style) -> dict[str, Any]:
    """Return the marks of one backend: its colour and shape, hollow where flagged."""
    symbols = [style.symbol(backend, bool(case.flags)) for case in cases]
    return {"color": style.color(backend), "symbol": symbols, "size": 10, "line": {"width": 1.5}}


def whiskers(points: Iterable[tuple[float | None, float | None, float | None]], size: float) -> dict[str, Any]:
    """Return asymmetric error bars from (middle, lo, hi); none where the interval is unknown."""
    above, below = [], []
    for middle, lo, hi in points:
        known = middle is not None and lo is not None and hi is not None
        above.append((hi - middle) / size if known else None)  # type: ignore[operator]
        below.append((middle - lo) / size if known else None)  # type: ignore[operator]
    return {"type": "data", "symmetric": False, "array": above, "arrayminus": below, "thickness": 2, "width": 4}


def hover(case: Case, label: str) -> str:
    """Return what a mark says when pointed at."""
    unit = units.time_unit(case.median_ns)
    lines = [label, f"{units.time(case.median_ns)} {units.interval(case.bounds_ns, unit)}"]
    lines += [f"flags: {', '.join(case.flags)}"] if case.flags else []
    return "<br>".join(safe(line) for line in lines)


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


def scaling(cases: Sequence[Case], sql: tuple[str, ...], style: Style) -> Chart:
    """Time per token against tokens, one line per backend, wherever a setting ran at more than one number of tokens."""
    settings: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    fixed = [axis for axis in IN_LABEL if axis not in ("tokens", "backend")]
    for case in cases:
        if case.ok and case.median_ns and case.row["tokens"]:
            settings[(str(case.row["evidence"]), *(case.axes[axis] for axis in fixed))].append(case)
    found = [members for members in settings.values() if _has_curve(members)]
    names = labels([m[0].axes for m in found], fixed) if len(found) > 1 else ["all"] * len(found)
    variants = tuple(
        Variant(name, _scaling_figure(members, style), _scaling_rows(members))
        for name, members in zip(
            numbered([f"{n} ({m[0].row['evidence']})" for n, m in zip(names, found, strict=True)]), found, strict=True
        )
    )
    return Chart(
        "scaling",
        "Scaling over tokens",
        "Time per token against the number of tokens in a call; both axes are logarithmic, whiskers are the interval of "
        "the median. Calls of different sizes were not measured in one sitting: read the shape, not small differences.",
        sql,
        variants,
        "No setting of this run was timed at more than one number of tokens.",
        "Setting",
    )


def _has_curve(members: Iterable[Case]) -> bool:
    tokens: dict[str, set[int]] = defaultdict(set)
    for case in members:
        tokens[case.axes["backend"]].add(case.row["tokens"])
    return any(len(values) > 1 for values in tokens.values())


def _scaling_figure(members: list[Case], style: Style) -> go.Figure:
    figure = go.Figure()
    unit = units.time_unit(min((c.median_ns or 0.0) / c.row["tokens"] for c in members))
    for backend in sorted({case.axes["backend"] for case in members}):
        own = sorted((c for c in members if c.axes["backend"] == backend), key=lambda case: int(case.row["tokens"]))
        per_token = [
            tuple(None if ns is None else ns / case.row["tokens"] for ns in (case.median_ns, *case.bounds_ns))
            for case in own
        ]
        figure.add_scatter(
            name=safe(backend),
            mode="lines+markers",
            x=[case.row["tokens"] for case in own],
            y=[(middle or 0.0) / unit[0] for middle, _, _ in per_token],
            error_y=whiskers(per_token, unit[0]),  # type: ignore[arg-type]
            line={"color": style.color(backend), "width": 2},
            marker=markers(own, backend, style),
            hovertext=[hover(case, f"{backend}, {case.row['tokens']} tokens") for case in own],
            hoverinfo="text",
        )
    ticks = sorted({case.row["tokens"] for case in members})
    figure.update_xaxes(type="log", title_text="tokens per call", tickvals=ticks, ticktext=[str(tick) for tick in ticks])
    figure.update_yaxes(type="log", title_text=f"{unit[1]} per token")
    figure.update_layout(height=420, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def _scaling_rows(members: Iterable[Case]) -> tuple[Row, ...]:
    return tuple(
        {
            "case_key": case.key,
            "backend": case.axes["backend"],
            "tokens": case.row["tokens"],
            "evidence": case.row["evidence"],
            "flags": " ".join(case.flags),
            "median_ns": case.median_ns,
            "lo_ns": case.bounds_ns[0],
            "hi_ns": case.bounds_ns[1],
            "ns_per_token": (case.median_ns or 0.0) / case.row["tokens"],
        }
        for case in sorted(members, key=lambda case: (case.axes["backend"], int(case.row["tokens"])))
    )


def roofline(cases: Sequence[Case], points: Answer, ceilings: Answer, style: Style, run_id: str) -> Chart:
    """Achieved flop/s against flops per byte, under the ceilings that this host's probes reached."""
    costs = {row["case_key"]: row for row in points.rows}
    machines: dict[tuple[str, ...], list[Case]] = defaultdict(list)
    for case in cases:
        if case.key in costs and case.median_ns:
            machines[tuple(str(case.row[name]) for name in ("evidence", "device", "threads", "dtype"))].append(case)
    variants = []
    for (evidence, device, threads, dtype), members in sorted(machines.items()):
        roofs = [
            roof
            for roof in ceilings.rows
            if (str(roof["evidence"]), str(roof["device"]), str(roof["threads"])) == (evidence, device, threads)
            and (not roof["name"].startswith("peak_flops") or roof["dtype"] == dtype)
        ]
        name = f"{dtype}, {threads} thread{'s' * (threads != '1')}, {device} ({evidence})"
        rows = tuple(_roofline_row(case, costs[case.key]) for case in members)
        note = _roofline_note(roofs, run_id, f"{dtype}, {threads} threads, {device}, {evidence}")
        variants.append(Variant(name, _roofline_figure(members, rows, roofs, style), rows, note))
    return Chart(
        "roofline",
        "Roofline",
        "Floating point operations per second that a case reached, against the operations it does per byte it must move "
        "at least. Lines are what probes reached on this host: slopes are memory levels, flat lines are arithmetic.",
        (points.sql, ceilings.sql),
        tuple(variants),
        "No timed case of this run stored both 'flops' and 'bytes', so no point can be placed.",
        "Machine",
    )


def _roofline_row(case: Case, cost: Row) -> Row:
    seconds = (case.median_ns or 0.0) * 1e-9
    return {
        "case_key": case.key,
        "case": case.label,
        "backend": case.axes["backend"],
        "evidence": case.row["evidence"],
        "flags": " ".join(case.flags),
        "flops": cost["flops"],
        "bytes": cost["bytes"],
        "intensity": cost["intensity"],
        "median_ns": case.median_ns,
        "flop_per_s": cost["flops"] / seconds,
        "byte_per_s": cost["bytes"] / seconds,
    }


def _roofline_note(roofs: Sequence[Row], run_id: str, wanted: str) -> str:
    if not roofs:
        return (
            f"No ceilings: no roofline probe for {wanted} is stored for this host. Run 'moebench run suite=roofline' "
            "with the same threads and dtype to draw them."
        )
    others = sorted({str(roof["run_id"]) for roof in roofs if roof["run_id"] != run_id})
    named = ", ".join(sorted({roof["name"] for roof in roofs}))
    return f"Probes: {named}." + (f" Taken on this host in another run: {', '.join(others)}." if others else "")


def _roofline_figure(members: list[Case], rows: Sequence[Row], roofs: Sequence[Row], style: Style) -> go.Figure:
    figure = go.Figure()
    by_key = {row["case_key"]: row for row in rows}
    for trace in _ceilings(roofs, [row["intensity"] for row in rows]):
        figure.add_trace(trace)
    for backend in sorted({case.axes["backend"] for case in members}):
        own = [case for case in members if case.axes["backend"] == backend]
        figure.add_scatter(
            name=safe(backend),
            mode="markers",
            x=[by_key[case.key]["intensity"] for case in own],
            y=[by_key[case.key]["flop_per_s"] for case in own],
            marker=markers(own, backend, style),
            hovertext=[
                f"{hover(case, case.label)}<br>{units.si(by_key[case.key]['flop_per_s'], 'flop/s')}, "
                f"{units.si(by_key[case.key]['byte_per_s'], 'B/s')}, "
                f"{units.digits(by_key[case.key]['intensity'], 3)} flop/byte"
                for case in own
            ],
            hoverinfo="text",
        )
    figure.update_xaxes(type="log", title_text="flop per byte")
    figure.update_yaxes(type="log", title_text="flop/s", exponentformat="SI")
    figure.update_layout(height=460, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    return figure


def _ceilings(roofs: Sequence[Row], intensities: Sequence[float]) -> list[go.Scatter]:
    """Draw each memory level up to the highest peak, and each peak from where its first level meets it."""
    peaks = [roof for roof in roofs if roof["name"].startswith("peak_flops")]
    slopes = [roof for roof in roofs if roof["name"].startswith("bandwidth_")]
    if not roofs or not intensities:
        return []
    top = max((peak["value"] for peak in peaks), default=None)
    left, right = min(intensities) / 2, max(intensities) * 2
    if top is not None and slopes:
        right = max(right, 2 * top / min(slope["value"] for slope in slopes))
    start = left if not slopes or top is None else min(right, top / max(slope["value"] for slope in slopes))
    traces = [
        _ceiling([min(left, start), right], [peak["value"]] * 2, f"{peak['name']} {peak['dtype']}", peak, "flop/s")
        for peak in peaks
    ]
    for slope in slopes:
        end = right if top is None else min(right, top / slope["value"])
        xs = [min(left, end / 2), end]
        traces.append(_ceiling(xs, [x * slope["value"] for x in xs], slope["name"], slope, "B/s"))
    return traces


def _ceiling(xs: list[float], ys: list[float], name: str, roof: Row, unit: str) -> go.Scatter:
    text = safe(f"{name.replace('bandwidth_', '').replace('peak_flops', 'peak')}: {units.si(roof['value'], unit)}")
    flat = ys[0] == ys[1]
    return go.Scatter(
        mode="lines+text",
        x=xs,
        y=ys,
        text=["", text] if flat else [text, ""],
        textposition="top left" if flat else "bottom right",
        line={"color": GREY, "width": 1.5, "dash": "solid" if flat else "dash"},
        hovertext=text,
        hoverinfo="text",
        showlegend=False,
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
    return Variant(name, figure, rows, f"An even load would be {units.digits(even, 3)} % each.", {"yaxis.tickfont.size": 9})


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
    found = [place for place in wanted if place in got and place[0] in by_key and sum(map(sum, got[place]))]
    axes = [axis for axis in IN_LABEL if axis not in ("backend", "suite")]
    names = numbered(labels([by_key[key].axes for key, _ in found], ["traffic", *axes])) if found else []
    variants = tuple(
        _requested_variant(name, place, wanted[place], got[place]) for name, place in zip(names, found, strict=True)
    )
    return Chart(
        "requested",
        "Requested and realised load",
        "For forced traffic: the share of tokens that was asked for (outline) and the share that the steps realised (bar).",
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
    figure.update_layout(height=360, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    rows = tuple(
        {"case_key": place[0], "layer": place[1], "expert": e, "requested_percent": a, "realised_percent": r}
        for e, (a, r) in enumerate(zip(asked, realised, strict=False))
    )
    return Variant(name, figure, rows)


QUALITY_NAMES = {
    "kl_to_dense": "KL to dense",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
}


def quality(cases: Sequence[Case], answer: Answer, sql: str, style: Style) -> Chart:
    """Quality of a method against the speed of each backend that ran it; both with intervals, lower is better."""
    by_group: dict[tuple[str, str, str], dict[str, Row]] = defaultdict(dict)
    for row in answer.rows:
        by_group[row["name"], str(row["evidence"]), row["group_key"]].setdefault(row["method_key"], row)
    variants = []
    groups = sitting_groups(cases)
    names = group_names([members[0] for members in groups])
    for (metric, evidence, _), methods in by_group.items():
        for name, members in zip(names, groups, strict=True):
            own = [case for case in members if case.row["method_key"] in methods and case.row["evidence"] == evidence]
            if own:
                title = f"{QUALITY_NAMES[metric]} · {name}"
                variants.append(_quality_variant(title, metric, own, methods, style))
    return Chart(
        "quality",
        "Quality against speed",
        "Each mark is one method on one backend: down and left is better. Whiskers are intervals, of the median time and "
        "of the quality where it has one. Grey marks are dominated: another one is at least as good on both and better on "
        "one. Hollow marks carry a flag and dominate nothing.",
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
    front = sorted(p[:2] for p, case in zip(points, cases, strict=True) if not worse[case.key] and not case.flags)
    figure.add_scatter(
        x=[x / unit[0] for x, _ in front],
        y=[y for _, y in front],
        mode="lines",
        line={"shape": "hv", "color": GREY, "width": 1, "dash": "dot"},
        hoverinfo="skip",
        showlegend=False,
    )
    for backend in sorted({case.axes["backend"] for case in cases}):
        own = [case for case in cases if case.axes["backend"] == backend]
        colors = [GREY if worse[case.key] else style.color(backend) for case in own]
        found = [quality_of[case.key] for case in own]
        figure.add_scatter(
            name=safe(backend),
            mode="markers",
            x=[(case.median_ns or 0.0) / unit[0] for case in own],
            y=[row["value"] for row in found],
            error_x=whiskers([(case.median_ns, *case.bounds_ns) for case in own], unit[0]) | {"color": GREY},
            error_y=whiskers([(row["value"], row["lo"], row["hi"]) for row in found], 1.0) | {"color": GREY},
            marker=markers(own, backend, style) | {"color": colors},
            hovertext=[_quality_hover(case, shown[case.key], quality_of[case.key], worse[case.key]) for case in own],
            hoverinfo="text",
        )
    figure.update_xaxes(title_text=f"median, {unit[1]}", rangemode="tozero")
    figure.update_yaxes(title_text=f"{QUALITY_NAMES[metric]}{_unit_of(found[0])}")
    figure.update_layout(height=460, legend={"orientation": "h", "y": 1.02, "yanchor": "bottom"})
    rows = tuple(_quality_row(case, shown[case.key], quality_of[case.key], worse[case.key]) for case in cases)
    return Variant(name, figure, rows)


def _unit_of(row: Row) -> str:
    return f", {safe(row['unit'])}" if row["unit"] else ""


def _quality_hover(case: Case, label: str, row: Row, worse: bool) -> str:
    bounds = "" if row["lo"] is None else f" [{units.digits(row['lo'])}, {units.digits(row['hi'])}]"
    text = f"{row['name']} {units.digits(row['value'])} {row['unit'] or ''}{bounds}"
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
