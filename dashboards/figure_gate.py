"""The paired-ratio plot: what every process pair of a gate said of every case, and what all of them say together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from .chart import GREY, Chart, Variant, safe
from .figure_compare import ratio_ticks
from .gate_data import Gate
from .gate_text import effect_text, percent
from .marks import LEGEND, whiskers
from .query import Row
from .text import clean, fit

KEY = "gate-pairs"

CAPTION = (
    "Candidate / base of every process pair: the median over its turns, with whiskers over the middle half of them. "
    "Hollow: the base against itself in the same turns, which should lie at 1. The large mark is the estimate of "
    "the verdict with its interval. The lines are 1, the margin and the slow-down to be excluded; right of 1 is slower."
)

EMPTY = "This gate judged no times, so there are no pairs to draw."

MARKS = {
    "regressed": ("#d64545", "triangle-right"),
    "improved": ("#159a74", "triangle-left"),
    "equivalent": ("#2f7ed8", "diamond"),
    "inconclusive": (GREY, "x"),
}
"""Colour and shape of a verdict."""

SERIES = {
    "candidate": ("candidate / base, by pair", "circle", 0.14),
    "again": ("base / base, by pair", "circle-open", 0.42),
}
"""Name, shape and place below the estimate of the pairs of a side."""

PAIR_COLORS = {"candidate": ("#8a63d2", "rgba(138,99,210,0.4)"), "again": (GREY, "rgba(132,139,148,0.4)")}
"""Colour of the mark and of its whiskers."""

BAND = 0.22
"""Height over which the pairs of a side are spread, so that their whiskers do not cover each other."""

ROW = 66
NARROW_ROW = 84
MARGINS = 210
"""Heights in pixels: of a case, of a case on a small screen, and of what stands around them."""

BELOW = 1.3
"""Room below the last case, in cases, for what the lines say."""

LABEL_WIDTH = 44
STEPS = (0.005, 0.01, 0.02, 0.05, 0.1)


def paired_ratios(gate: Gate) -> Chart:
    """Return the paired-ratio plot of every case; clocks are not drawn together."""
    clocks: dict[str, list[Row]] = defaultdict(list)
    for row in gate.comparisons.rows:
        if row["kind"] == "time":
            clocks[str(row["clock"])].append(row)
    variants = tuple(_variant(clock, rows, gate) for clock, rows in sorted(clocks.items()))
    sql = (gate.comparisons.sql, gate.pairs.sql)
    return Chart(KEY, "Paired ratios of every case", CAPTION, sql, variants, EMPTY, "Clock")


def _variant(clock: str, times: Sequence[Row], gate: Gate) -> Variant:
    keys = {row["case_key"] for row in times}
    pairs = [pair for pair in gate.pairs.rows if pair["clock"] == clock and pair["case_key"] in keys]
    places = {row["case_key"]: len(times) - 1 - number for number, row in enumerate(times)}
    shown = [fit(clean(str(row["label"])), LABEL_WIDTH) for row in times]
    figure = go.Figure()
    for side in SERIES:
        own = [pair for pair in pairs if pair["side"] == side]
        if own:
            figure.add_trace(_pair_dots(side, own, places))
    for verdict in MARKS:
        judged = [row for row in times if row["verdict"] == verdict and _has_interval(row)]
        if judged:
            figure.add_trace(_estimates(verdict, judged, places))
    _lines(figure, times)
    _layout(figure, times, pairs, places, shown)
    return Variant(f"{clock} time", figure, _rows(times, pairs), "", _narrow(times, list(places.values()), shown))


def _has_interval(row: Row) -> bool:
    bounds = (row["ratio"], row["lo"], row["hi"])
    return all(bound is not None and math.isfinite(bound) and bound > 0 for bound in bounds)


def _pair_dots(side: str, pairs: Sequence[Row], places: dict[str, int]) -> go.Scatter:
    name, symbol, below = SERIES[side]
    color, faint = PAIR_COLORS[side]
    most = max(1, *(pair["pair"] for pair in pairs))
    return go.Scatter(
        name=name,
        mode="markers",
        x=[pair["ratio"] for pair in pairs],
        y=[places[pair["case_key"]] - below + BAND * (0.5 - pair["pair"] / most) for pair in pairs],
        error_x={
            **whiskers([(pair["ratio"], pair["quarter"], pair["three_quarters"]) for pair in pairs], 1.0),
            "color": faint,
            "thickness": 1,
            "width": 0,
        },
        marker={"color": color, "symbol": symbol, "size": 6},
        hovertext=[f"pair {p['pair'] + 1}: {p['ratio']:.4f}, median of {p['turns']} turns" for p in pairs],
        hoverinfo="text",
    )


def _estimates(verdict: str, judged: Sequence[Row], places: dict[str, int]) -> go.Scatter:
    color, symbol = MARKS[verdict]
    return go.Scatter(
        name=verdict,
        mode="markers",
        x=[row["ratio"] for row in judged],
        y=[places[row["case_key"]] + 0.18 for row in judged],
        error_x=whiskers([(row["ratio"], row["lo"], row["hi"]) for row in judged], 1.0),
        marker={"color": color, "symbol": symbol, "size": 11},
        hovertext=[_told(row) for row in judged],
        hoverinfo="text",
    )


def _told(row: Row) -> str:
    numbers = effect_text("time", row["ratio"], row["lo"], row["hi"])
    lines = (row["label"], f"{row['verdict']}: {numbers}", f"{row['pairs']} pairs, {row['turns']} turns")
    return "<br>".join(safe(clean(str(line))) for line in lines)


def _limits(times: Sequence[Row]) -> dict[float, str]:
    """Return where the lines stand and what they say; all cases of a gate have the same, as a rule."""
    margins = {row["margin"] for row in times if row["margin"]}
    asked = {row["asked"] for row in times if row["asked"]}
    named = {1 + one: f"margin {percent(one)}" for one in sorted(margins)}
    return {1.0: "1", **named, **{1 + one: f"asked {percent(one)}" for one in sorted(asked)}}


def _lines(figure: go.Figure, times: Sequence[Row]) -> None:
    for (place, _), dash in zip(_limits(times).items(), ("solid", "dash", *("dot",) * len(times)), strict=False):
        figure.add_vline(x=place, line={"color": GREY, "width": 1, "dash": dash})


def _names_of_lines(times: Sequence[Row]) -> list[dict[str, Any]]:
    """Return what each line is, at its foot, where no marks are."""
    foot = {"y": 0, "yref": "paper", "yanchor": "bottom", "xanchor": "left", "textangle": -90, "showarrow": False}
    font = {"size": 11, "color": GREY}
    return [{**foot, "x": math.log10(at), "text": name, "font": font} for at, name in _limits(times).items()]


def _layout(
    figure: go.Figure, times: Sequence[Row], pairs: Sequence[Row], places: dict[str, int], shown: Sequence[str]
) -> None:
    values = [row[name] for row in times if _has_interval(row) for name in ("lo", "hi")]
    values += [pair[name] for pair in pairs for name in ("quarter", "three_quarters")]
    figure.update_layout(height=ROW * len(times) + MARGINS, legend=LEGEND, annotations=_names_of_lines(times))
    figure.update_xaxes(title_text="candidate / base", type="log", **_ticks([*values, *_limits(times)]))
    figure.update_yaxes(
        tickvals=list(places.values()), ticktext=[safe(name) for name in shown], range=[-BELOW, len(times) - 0.5],
        tickfont={"size": 11}, ticks="", showgrid=False,
    )  # fmt: skip


def _ticks(values: Sequence[float]) -> dict[str, Any]:
    """Return the ticks of a logarithmic axis: near 1 they are close, else as in other charts."""
    wide = ratio_ticks(values)
    low, high = min(values), max(values)
    if high / low > 1.6:
        return wide
    step = next((step for step in STEPS if (high - low) / step <= 9), STEPS[-1])
    ticks = [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
    edge = (high / low) ** 0.04
    bounds = [math.log10(low / edge), math.log10(high * edge)]
    return {"tickvals": ticks, "ticktext": [f"{tick:.4g}" for tick in ticks], "range": bounds}


def _narrow(times: Sequence[Row], places: Sequence[int], shown: Sequence[str]) -> dict[str, Any]:
    """Return the layout for a small screen: names stand above their marks, not beside."""
    above = {"xref": "paper", "x": 0, "xanchor": "left", "showarrow": False, "font": {"size": 11}}
    names = [{**above, "y": place + 0.37, "text": safe(name)} for place, name in zip(places, shown, strict=True)]
    return {
        "height": NARROW_ROW * len(places) + MARGINS,
        "yaxis.showticklabels": False,
        "annotations": [*names, *_names_of_lines(times)],
    }


def _rows(times: Sequence[Row], pairs: Sequence[Row]) -> tuple[Row, ...]:
    """Return one row per process pair and side, with the estimate of its case beside it."""
    judged = {row["case_key"]: row for row in times}
    names = ("label", "verdict", "lo", "hi", "margin", "asked")
    rows = []
    for pair in pairs:
        case = judged[pair["case_key"]]
        rows.append({**pair, "estimate": case["ratio"], **{name: case[name] for name in names}})
    return tuple(rows)
