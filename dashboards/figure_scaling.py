"""How time grows with the number of tokens."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import plotly.graph_objects as go

from . import units
from .chart import Chart, Style, Variant, safe
from .data import IN_LABEL, Case, labels
from .marks import LEGEND, hover, markers, numbered, whiskers
from .query import Row

CAPTION = (
    "Time per token against the number of tokens in a call; both axes are logarithmic, whiskers are the interval of "
    "the median. Calls of different sizes were not measured in one sitting: read the shape, not small differences."
)


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
        CAPTION,
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
    figure.update_xaxes(
        type="log", title_text="tokens per call", tickvals=ticks, ticktext=[str(tick) for tick in ticks]
    )
    figure.update_yaxes(type="log", dtick="D2", title_text=f"{unit[1]} per token")
    figure.update_layout(height=420, legend=LEGEND)
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
