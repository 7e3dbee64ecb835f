"""What a gate found as a terminal shows it: one line per time, `~` where nothing is known, reasons below."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ..results.gate import Exit, GateResult, Judged, Skipped
from ..results.verdict import Verdict
from . import units
from .text import WIDTH, clean, fit, pad, width

ANSWERS = {
    Exit.NOT_REGRESSED: "not regressed",
    Exit.REGRESSED: "regressed",
    Exit.INCONCLUSIVE: "inconclusive: neither shown nor excluded",
    Exit.TOO_NOISY: "too noisy: this machine cannot tell now",
}

HEAD = ("case", "base", "candidate", "candidate / base", "verdict")
LABEL_WIDTH = 42


def gate_table(result: GateResult) -> str:
    """Return the table of times, then what else regressed or improved, what has no verdict, the noise and the
    answer."""
    times = [one for one in result.judged if one.kind == "time"]
    others = [one for one in result.judged if one.kind != "time" and one.verdict != Verdict.EQUIVALENT]
    lines = [f"base {clean(result.base)}, candidate {clean(result.candidate)}"]
    if times:
        lines += ["", *_aligned([HEAD, *map(_row, times)])]
    same = sum(one.kind != "time" and one.verdict == Verdict.EQUIVALENT for one in result.judged)
    if others or same:
        lines += ["", f"deterministic metrics: {same} equal, {len(others)} not", *map(_metric, others)]
    lines += _regressions(result.judged)
    lines += _skipped(result.skipped)
    return "\n".join([*lines, "", *noise_lines(result), answer(result)])


def _row(one: Judged) -> tuple[str, ...]:
    return (
        fit(clean(one.label), LABEL_WIDTH),
        "" if one.base_value is None else units.time(one.base_value),
        "" if one.candidate_value is None else units.time(one.candidate_value),
        ratio_text(one),
        verdict_text(one),
    )


def verdict_text(one: Judged) -> str:
    """Return the verdict as tables show it: ``~`` where no difference is known."""
    plain = {Verdict.EQUIVALENT: "~", Verdict.INCONCLUSIVE: "~ (inconclusive)"}
    return plain.get(one.verdict, str(one.verdict))


def ratio_text(one: Judged) -> str:
    """Return ratio (times) or difference (accuracies) with its interval; never a bare number."""
    if one.ratio is None or one.lo is None or one.hi is None:
        return "~"
    return f"{one.ratio:.3f} [{one.lo:.3f}, {one.hi:.3f}]"


def value_text(value: float | None, unit: str) -> str:
    """Return a value of a metric with its unit, exact as far as six digits go."""
    if value is None:
        return "unknown"
    return (
        units.time(value)
        if unit == "ns"
        else f"{value:.6g} {unit}".rstrip(" 1")
        if unit == "1"
        else f"{value:g} {unit}"
    )


def _metric(one: Judged) -> str:
    base, candidate = (value_text(value, one.unit) for value in (one.base_value, one.candidate_value))
    note = f" ({clean(one.reason)})" if one.verdict == Verdict.INCONCLUSIVE else ""
    return fit(f"  {one.verdict}: {clean(one.label)}: {one.metric} {base} -> {candidate}{note}", 2 * WIDTH)


def _regressions(judged: Sequence[Judged]) -> list[str]:
    """Return, for every case that regressed, what else changed: the first that moved is the first to look at."""
    lines, seen = [], set()
    for one in judged:
        if one.verdict != Verdict.REGRESSED or one.case_key in seen:
            continue
        seen.add(one.case_key)
        first, *rest = one.moved or ("nothing else that is recorded: look at the code of the backend",)
        lines.append(f"  {clean(one.label)}: first moved: {clean(first)}")
        lines += [f"    then: {clean(other)}" for other in rest]
    return ["", "what else changed where it regressed", *lines] if lines else []


def _skipped(skipped: Sequence[Skipped]) -> list[str]:
    lines: list[str] = []
    for one in skipped:
        lines.append(fit(f"  {clean(one.status)}: {clean(one.label)}", WIDTH))
        lines += textwrap.wrap(clean(one.reason), WIDTH, initial_indent="    ", subsequent_indent="    ", max_lines=4)
    return ["", "without a verdict, and why", *lines] if lines else []


def noise_lines(result: GateResult) -> list[str]:
    """Return what the machine can tell, and how much of what was asked has an answer."""
    lines = []
    noise = result.noise
    if noise is not None:
        found = "an unknown effect" if noise.detectable is None else f"{noise.detectable:.1%}"
        can = "too noisy: can detect only" if noise.too_noisy else "detects"
        lines.append(
            f"machine: base against itself, {noise.pairs} process pairs: tau {noise.tau:.1%}; "
            f"{can} {found}, asked for {noise.asked:.0%}"
        )
    lines.append(f"{result.covered} of {result.asked_cases} cases have a verdict ({result.seconds:.0f} s)")
    return lines


def answer(result: GateResult) -> str:
    """Return the answer in one line."""
    counts = [f"{result.count(verdict)} {verdict}" for verdict in Verdict if result.count(verdict)]
    broken = sum(one.status == "broken" for one in result.skipped)
    counts += [f"{broken} broken"] if broken else []
    return f"{ANSWERS[result.exit]} ({', '.join(counts) or 'nothing was judged'})"


def _aligned(rows: Iterable[tuple[str, ...]]) -> list[str]:
    table = list(rows)
    widths = [max(width(row[column]) for row in table) for column in range(len(HEAD))]
    lines = [
        "  ".join(
            pad(cell, size, right=0 < column < 3) for column, (cell, size) in enumerate(zip(row, widths, strict=True))
        )
        for row in table
    ]
    return [lines[0].rstrip(), "-" * min(WIDTH, sum(widths) + 2 * len(widths)), *(line.rstrip() for line in lines[1:])]
