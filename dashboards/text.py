"""The summary that a terminal shows at the end of a run: plain text, one line per case, at most 100 columns."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from . import units
from .data import STATUSES, Case, load_cases

if TYPE_CHECKING:
    import duckdb

WIDTH = 100
LABEL_WIDTH = 44
GAP = "  "


def summary_table(connection: duckdb.DuckDBPyConnection, run_id: str) -> str:
    """Return the cases of a run as a table: label, status, median with its interval, flags or reason.

    What is ok comes first and the worst last, next to the prompt. Control characters from the data are replaced, so no
    reason can drive the terminal.
    """
    cases, _ = load_cases(connection, run_id)
    if not cases:
        return f"run {clean(run_id)} has no cases"
    order = {status: rank for rank, status in enumerate(STATUSES)}
    rows = [_line(case) for case in sorted(cases, key=lambda case: -order.get(case.status, -1))]
    lines = _aligned([("case", "status", "median", "note"), *rows])
    return "\n".join([lines[0], "-" * min(WIDTH, max(map(width, lines))), *lines[1:], "", _counts(cases)])


def _line(case: Case) -> tuple[str, str, str, str]:
    return clean(case.label), clean(case.status), _median(case), clean(_note(case))


def _median(case: Case) -> str:
    if case.median_ns is None:
        return units.DASH
    unit = units.time_unit(case.median_ns)
    lo, hi = case.bounds_ns
    if lo is None or hi is None:
        return f"{units.time(case.median_ns, unit)} ± ?"
    half = max(hi - case.median_ns, case.median_ns - lo)
    return f"{units.time(case.median_ns, unit)} ± {units.digits(half / unit[0], 2)}"


def _note(case: Case) -> str:
    evidence = str(case.row["evidence"])
    parts = [] if evidence == "measured-cpu" else [evidence]
    parts += case.flags
    parts += [str(case.row["reason"])] if case.row["reason"] else []
    parts += [f"{metric['name']} {units.digits(metric['value'])}" for metric in case.quality]
    return ", ".join(parts)


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
