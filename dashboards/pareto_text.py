"""Pareto fronts for a terminal, at most 100 columns wide, and as JSON and CSV for programs."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from ..results.pareto import Place, Placed
from ..results.pareto_axes import Axis
from ..results.query import plain
from ..results.utilisation import Bounds, cost_of_tokens, s_mbu, s_mfu
from . import units
from .pareto_data import Answer, Shown, caveats, counted
from .query import to_csv
from .text import GAP, WIDTH, clean, fit, pad, width

NO_PROBE = "S-MBU and S-MFU: no roofline probe of this host is in the store; `moebench run suite=roofline` makes one"

LEAST_LABEL = 12
"""Columns that the name of a case has at least."""

BY = 2
"""Others that a place names at most."""


def pareto_table(answer: Answer) -> str:
    """Return each front as a table, the best along x first; then what was left out, and why."""
    lines: list[str] = []
    for shown in answer.fronts:
        lines += [*_front(answer, shown), ""]
    for one in answer.left:
        lines += _wrapped(f"left out, {one.rows} row{'s' * (one.rows != 1)}: {one.reason}")
    return "\n".join(lines).rstrip()


def _front(answer: Answer, shown: Shown) -> list[str]:
    title = f"{answer.y.title} against {answer.x.title}: {shown.title}"
    columns = _columns(answer, shown)
    head = ["#", "case", *columns, "place"]
    numbers = {case.key: number for number, case in enumerate(shown.cases, 1)}
    rows = [
        [str(numbers[case.key]), clean(case.label), *cells, _place(shown.placed(case), numbers)]
        for case, *cells in zip(shown.cases, *columns.values(), strict=True)
    ]
    lines = _aligned([head, *rows])
    told = [counted(shown), *(one.rstrip(".") for one in caveats(shown))]
    told += [] if "S-MBU" in columns or not answer.x.together else [NO_PROBE]
    return [*_wrapped(title), *lines, *(line for one in told for line in _wrapped(one))]


def _columns(answer: Answer, shown: Shown) -> dict[str, list[str]]:
    """Return the cells of each column; one that is empty in all rows is left out."""
    rows = shown.front.rows
    found = {
        answer.x.name: [_value(row, "x", answer.x) for row in rows],
        answer.y.name: [_value(row, "y", answer.y) for row in rows],
        "S-MBU": [_short(s_mbu(row, answer.peaks)) for row in rows],
        "S-MFU": [_short(s_mfu(row, answer.peaks)) for row in rows],
        "cost/1M": [_short(cost_of_tokens(row, answer.price_per_hour)) for row in rows],
    }
    kept = {name for name, cells in found.items() if any(cell != units.DASH for cell in cells)}
    return {clean(name): cells for name, cells in found.items() if name in kept}


def _value(row: Mapping[str, Any], place: str, axis: Axis) -> str:
    """Return a value and the larger half of its interval; nothing behind what has no chance in it."""
    value, lo, hi = (row[name] for name in (place, f"{place}_lo", f"{place}_hi"))
    size, unit = units.scale(value, axis.unit)
    shown = f"{units.digits(value / size)} {unit}".rstrip()
    if axis.source == "counted":
        return shown
    if lo is None or hi is None:
        return f"{shown} ± ?"
    return f"{shown} ± {units.digits(max(hi - value, value - lo) / size, 2)}"


def _short(bounds: Bounds | None) -> str:
    return units.DASH if bounds is None else units.digits(bounds[0], 3)


def _place(placed: Placed, numbers: Mapping[str, int]) -> str:
    if placed.place == Place.UNJUDGED:
        return clean(f"not judged: {placed.why}")
    others = sorted(numbers[key] for key in placed.by)
    told = ", ".join(map(str, others[:BY])) + (", …" if len(others) > BY else "")
    return f"{placed.place}: {told}" if told else str(placed.place)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Pad the columns; the name of a case gets what the others leave."""
    last = len(rows[0]) - 1
    widths = [max(width(row[column]) for row in rows) for column in range(last + 1)]
    others = sum(widths) - widths[1] + len(GAP) * last
    widths[1] = min(widths[1], max(LEAST_LABEL, WIDTH - others))
    lines = []
    for row in rows:
        cells = [pad(fit(cell, widths[at]), widths[at], right=at not in (1, last)) for at, cell in enumerate(row)]
        lines.append(fit(GAP.join(cells).rstrip(), WIDTH))
    return [lines[0], "-" * min(WIDTH, max(map(width, lines))), *lines[1:]]


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(clean(text), WIDTH, subsequent_indent="  ")


def pareto_json(answer: Answer) -> str:
    """Return everything as JSON."""
    axes = {
        name: {"name": axis.name, "title": axis.title, "unit": axis.unit, "better": axis.better}
        for name, axis in (("x", answer.x), ("y", answer.y))
    }
    values = {
        **axes,
        "price_per_hour": answer.price_per_hour,
        "fronts": [
            {"front": shown.title, "caveats": caveats(shown), "cases": answer.rows(shown)} for shown in answer.fronts
        ],
        "left_out": [{"rows": one.rows, "reason": one.reason} for one in answer.left],
        "sql": answer.points.sql,
    }
    return json.dumps(plain(values), indent=1, ensure_ascii=False)


def pareto_csv(answer: Answer) -> str:
    """Return the rows of all fronts as CSV; column ``front`` tells them apart."""
    return to_csv(row for shown in answer.fronts for row in answer.rows(shown)).rstrip("\n")
