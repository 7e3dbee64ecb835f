"""How near to the limits of the machine."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import plotly.graph_objects as go

from . import units
from .chart import GREY, Chart, Style, Variant, safe
from .data import Case
from .marks import LEGEND, hover, markers
from .query import Answer, Row

CAPTION = (
    "Floating point operations per second that a case reached, against the operations it does per byte it must move at "
    "least. Lines are what probes reached on this host: slopes are memory levels, flat lines are arithmetic."
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
        CAPTION,
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
    figure.update_xaxes(type="log", dtick="D2", title_text="flop per byte")
    figure.update_yaxes(type="log", dtick="D2", title_text="flop/s", exponentformat="SI")
    figure.update_layout(height=460, legend=LEGEND)
    return figure


def _ceilings(roofs: Sequence[Row], intensities: Sequence[float]) -> list[go.Scatter]:
    """Draw each memory level up to the highest peak, and each peak from where the first level meets it."""
    peaks = [roof for roof in roofs if roof["name"].startswith("peak_flops")]
    slopes = [roof for roof in roofs if roof["name"].startswith("bandwidth_")]
    left, right = min(intensities) / 2, max(intensities) * 5
    if peaks and slopes:
        top = max(peak["value"] for peak in peaks)
        ridges = [top / slope["value"] for slope in slopes]
        left, right = min(left, min(ridges) / 4), max(right, 2 * max(ridges))
        ends, start = [min(right, ridge) for ridge in ridges], min(ridges)
    else:
        ends, start = [right] * len(slopes), left
    flat = [
        _ceiling([start, right], [peak["value"]] * 2, f"{peak['name']} {peak['dtype']}", peak, "flop/s")
        for peak in peaks
    ]
    return flat + [
        _ceiling([left, end], [left * slope["value"], end * slope["value"]], slope["name"], slope, "B/s")
        for slope, end in zip(slopes, ends, strict=True)
    ]


def _ceiling(xs: list[float], ys: list[float], name: str, roof: Row, unit: str) -> go.Scatter:
    text = safe(f"{name.replace('bandwidth_', '').replace('peak_flops', 'peak')}: {units.si(roof['value'], unit, 3)}")
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
