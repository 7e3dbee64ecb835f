"""Two runs side by side as a terminal shows them."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from ..dashboards import units
from ..dashboards.data import Run
from ..dashboards.gate_text import values_text
from ..dashboards.text import WIDTH, clean, fit, pad, width
from ..results.gate import Judged
from ..results.verdict import Verdict
from .compare_runs import TAKEN_APART, Apart, ComparedRuns, Times

LABEL_WIDTH = 42
SHORT = 7
HEAD = ("case", "A", "B", "B / A", "note")


def compare_table(found: ComparedRuns) -> str:
    """Return the times without a verdict, then verdicts on all else, what cannot be compared, and the answer."""
    lines = [TAKEN_APART, _about("A", found.a), _about("B", found.b)]
    if found.a.row["host_key"] != found.b.row["host_key"]:
        lines.append("the hosts differ, and so do their times whatever the code")
    if found.times:
        lines += ["", *aligned([HEAD, *map(_row, found.times)])]
    for kind, title in (("metric", "deterministic metrics"), ("accuracy", "accuracy on the same items")):
        lines += _section(title, [one for one in found.judged if one.kind == kind])
    lines += _listed("not compared, and why", found.apart)
    lines += _listed("only in A", found.only_a) + _listed("only in B", found.only_b)
    return "\n".join([*lines, "", _answer(found)])


def _about(name: str, run: Run) -> str:
    row = run.row
    started = f"{row['started_at']:%Y-%m-%d %H:%M}" if row["started_at"] else "unknown date"
    sha = f"git {row['git_sha'][:SHORT]}{' + changes' if row['git_dirty'] else ''}" if row["git_sha"] else "no git"
    return clean(f"{name}  {run.run_id}  {started}  {sha}")


def _row(one: Times) -> tuple[str, ...]:
    ratio = units.DASH if one.ratio is None else f"{one.ratio:.3f}"
    label = fit(clean(one.label), LABEL_WIDTH)
    return label, units.time(one.a_ns), units.time(one.b_ns), ratio, clean(", ".join(one.flags))


def aligned(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the lines of a table: a head, a rule, and rows whose middle columns stand at the right."""
    columns = range(len(rows[0]))
    widths = [max(width(row[column]) for row in rows) for column in columns]
    last = len(rows[0]) - 1
    lines = [
        "  ".join(pad(cell, size, 0 < place < last) for place, (cell, size) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]
    rule = "-" * min(WIDTH, max(map(width, lines)))
    return [lines[0].rstrip(), rule, *(line.rstrip() for line in lines[1:])]


def _section(title: str, judged: Sequence[Judged]) -> list[str]:
    """Return the counts of a kind of verdicts, and each that is not "no difference"."""
    if not judged:
        return []
    counts = [f"{sum(one.verdict == verdict for one in judged)} {verdict}" for verdict in Verdict]
    told = [one for one in judged if one.verdict != Verdict.EQUIVALENT]
    shown = ", ".join(count for count in counts if not count.startswith("0 "))
    return ["", f"{title}: {shown}", *(line for one in told for line in _told(one))]


def _told(one: Judged) -> list[str]:
    line = f"{one.verdict}: {clean(one.label)}: {clean(one.metric)} {values_text(one)}"
    if one.kind == "accuracy" and one.lo is not None and one.hi is not None:
        line += f", difference {one.ratio:+.4f} [{one.lo:+.4f}, {one.hi:+.4f}], margin {one.margin:g}"
    if one.verdict == Verdict.INCONCLUSIVE:
        line += f" ({clean(one.reason)})"
    return textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ")


def _listed(title: str, cases: Sequence[Apart]) -> list[str]:
    lines = [
        f"{'broken: ' * one.broken}{clean(one.label)}{': ' * bool(one.reason)}{clean(one.reason)}" for one in cases
    ]
    wrapped = [textwrap.wrap(line, WIDTH, initial_indent="  ", subsequent_indent="    ", max_lines=4) for line in lines]
    return ["", f"{title} ({len(cases)})", *(line for part in wrapped for line in part)] if cases else []


def _answer(found: ComparedRuns) -> str:
    broken = sum(one.broken for one in found.apart)
    regressed = sum(one.verdict == Verdict.REGRESSED for one in found.judged)
    if broken or regressed:
        return f"regressed: {regressed} of {len(found.judged)} judged values; broken: {broken} of the cases in both"
    if not found.judged:
        return "nothing that can be judged between runs taken apart"
    return f"no regression among {len(found.judged)} judged values"
