"""The summary that a terminal shows at the end of a run: plain text, one line per case, at most 100 columns."""

from __future__ import annotations

import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from . import units
from .data import MINIMA, STATUSES, Case, labels, load_cases
from .query import ask
from .ratios import paired_ratio, turn_minima
from .saving_data import savings
from .saving_text import saving_lines

if TYPE_CHECKING:
    import duckdb

WIDTH = 100
LABEL_WIDTH = 44
GAP = "  "

IN_GROUP = ("backend", "structure", "routing", "quantization", "sparsity")
"""The axes that may differ between the cases of a group."""


def summary_table(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    """Return the cases of a run as a table: method and backend, status, median with its interval, flags or reason.

    Cases stand below a heading that says what the cases of their group share. What is not ok comes last, next to the
    prompt. Control characters from the data are replaced, so no reason can drive the terminal.
    """
    cases, _ = load_cases(connection, run_id)
    if not cases:
        return f"run {clean(run_id)} has no cases"
    sections = [_section(group) for group in _groups([case for case in cases if case.status == "ok"])]
    lines = _aligned([("case", "status", "median", "note"), *(row for _, rows in sections for row in rows)])
    body = iter(lines[1:])
    told = [line for title, rows in sections for line in (fit(title, WIDTH), *(next(body) for _ in rows))]
    head = [lines[0], "-" * min(WIDTH, max(map(width, lines)))] if sections else []
    return "\n".join([*head, *told, *_saving(connection, run_id, cases), *_not_ok(cases), "", _counts(cases)])


def _saving(connection: duckdb.DuckDBPyConnection, run_id: str, cases: Sequence[Case]) -> list[str]:
    """Return where the backends that skip what is left out break even, in words."""
    if not any(case.ok and case.row["sparse"] == "skip" for case in cases):
        return []
    turns = turn_minima(ask(connection, MINIMA, run_id=run_id))
    found = savings(cases, lambda base, case: paired_ratio(turns.get(base.key, {}), turns.get(case.key, {})))
    skipping = [replace(one, curves=tuple(c for c in one.curves if c.executed == "skip")) for one in found]
    told = [line for told in saving_lines(skipping) for line in textwrap.wrap(clean(told), WIDTH - 2)]
    return ["what skipping buys", *(f"  {line}" for line in told)] if told else []


def _not_ok(cases: Sequence[Case]) -> list[str]:
    """Return what did not run, the worst last, each with its whole reason."""
    order = {status: rank for rank, status in enumerate(STATUSES)}
    bad = sorted((case for case in cases if case.status != "ok"), key=lambda case: -order.get(case.status, -1))
    lines = ["what did not run, and why"] if bad else []
    for case in bad:
        lines.append(fit(f"  {clean(case.status)}: {clean(case.label)}", WIDTH))
        reason = clean(str(case.row["reason"] or "no reason was recorded"))
        lines += textwrap.wrap(reason, WIDTH, initial_indent="    ", subsequent_indent="    ", max_lines=4)
    return lines


def _groups(cases: Sequence[Case]) -> list[list[Case]]:
    """Return the cases of each group, fastest first; cases that run once have the order of the plan."""
    groups: dict[str, list[Case]] = {}
    for case in cases:
        groups.setdefault(str(case.row["group_key"]), []).append(case)
    return [sorted(group, key=lambda case: case.median_ns or 0.0) for group in groups.values()]


def _section(cases: Sequence[Case]) -> tuple[str, list[tuple[str, str, str, str]]]:
    row, axes = cases[0].row, cases[0].axes
    layers = f"layer {row['layers']}" if row["layers"] else ""
    tokens = "" if row["tokens"] is None else f"T={row['tokens']}"
    shared = (axes["suite"], axes["model"], layers, row["traffic"], tokens, row["dtype"], row["residency"])
    title = " · ".join(clean(str(part)) for part in shared if part not in ("", "none", None))
    named = labels([{name: case.axes[name] for name in IN_GROUP} for case in cases], IN_GROUP)
    routings = {case.axes["routing"] for case in cases}
    return title, [_line(case, f"  {label}", len(routings) > 1) for case, label in zip(cases, named, strict=True)]


def _line(case: Case, label: str, sized: bool) -> tuple[str, str, str, str]:
    """Return the columns of a case; ``sized`` tells its active parameters, where routings stand side by side."""
    size = case.active_params if sized else None
    note = [] if size is None else [f"{units.si(size)} params active"]
    return clean(label), clean(case.status), _median(case), clean(", ".join([*note, *_note(case)]))


def _median(case: Case) -> str:
    if case.median_ns is None:
        return units.DASH
    unit = units.time_unit(case.median_ns)
    lo, hi = case.bounds_ns
    if lo is None or hi is None:
        return f"{units.time(case.median_ns, unit)} ± ?"
    half = max(hi - case.median_ns, case.median_ns - lo)
    return f"{units.time(case.median_ns, unit)} ± {units.digits(half / unit[0], 2)}"


def _note(case: Case) -> list[str]:
    evidence = str(case.row["evidence"])
    parts = [] if evidence == "measured-cpu" else [evidence]
    parts += case.flags
    parts += [str(case.row["reason"])] if case.row["reason"] else []
    return parts + [f"{metric['name']} {units.digits(metric['value'])}" for metric in case.quality]


def _aligned(rows: Sequence[tuple[str, str, str, str]]) -> list[str]:
    """Pad the columns; the label gets its share at most, and the note what is left of the line.

    Where there is no median, the note takes its place too: a reason needs the room more than a dash does.
    """
    label, status, median = (max(width(row[column]) for row in rows) for column in range(3))
    label = min(label, LABEL_WIDTH)
    lines = []
    for name, state, time, note in rows:
        shown = time if time == units.DASH else pad(time, median, right=True)
        left = GAP.join((pad(fit(name, label), label), pad(state, status), shown))
        lines.append(f"{left}{GAP}{fit(note, WIDTH - width(left) - len(GAP))}".rstrip())
    return lines


def _counts(cases: Sequence[Case]) -> str:
    known = [status for status in reversed(STATUSES) if any(case.status == status for case in cases)]
    parts = [f"{sum(case.status == status for case in cases)} {status}" for status in known]
    flagged = sum(bool(case.flags) for case in cases)
    return ", ".join([*parts, *([f"{flagged} flagged"] if flagged else [])])


def clean(text: str) -> str:
    """Return ``text`` on one line and without control or formatting characters."""
    return "".join(" " if char.isspace() else char if unicodedata.category(char)[0] != "C" else "�" for char in text)


def width(text: str) -> int:
    """Return how many columns ``text`` takes in a terminal."""
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def fit(text: str, columns: int) -> str:
    """Return ``text`` shortened to ``columns``, with an ellipsis where something is missing."""
    if width(text) <= columns:
        return text
    while text and width(text) > columns - 1:
        text = text[:-1]
    return f"{text.rstrip()}…"


def pad(text: str, columns: int, right: bool = False) -> str:
    """Return ``text`` filled up to ``columns`` with spaces."""
    fill = " " * max(0, columns - width(text))
    return fill + text if right else text + fill
