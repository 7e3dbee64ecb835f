"""What a gate found as a terminal shows it: one line per time, `~` where no difference is known, reasons below."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable, Sequence

from ..results.gate import Exit, GateResult, Judged, Noise, Skipped
from ..results.verdict import Verdict
from . import units
from .text import WIDTH, clean, fit, pad, width

ANSWERS = {
    Exit.NOT_REGRESSED: "not regressed",
    Exit.REGRESSED: "regressed",
    Exit.INCONCLUSIVE: "inconclusive: neither shown nor excluded",
    Exit.TOO_NOISY: "too noisy: this machine cannot tell now",
}

TIME_HEAD = ("case", "base", "candidate", "candidate / base", "verdict")
ACCURACY_HEAD = ("metric: case", "base", "candidate", "candidate - base", "verdict")
LEAST_LABEL = 24

RED, GREEN, DIM, PLAIN = "\x1b[1;31m", "\x1b[32m", "\x1b[2m", "\x1b[0m"
COLORS = {Verdict.REGRESSED: RED, Verdict.IMPROVED: GREEN, Verdict.EQUIVALENT: DIM, Verdict.INCONCLUSIVE: DIM}
EXIT_COLORS = {Exit.NOT_REGRESSED: GREEN, Exit.REGRESSED: RED}


def gate_table(result: GateResult, color: bool = False) -> str:
    """Return what was found: times, accuracies and metrics, why a case regressed, what has no verdict, the answer.

    Control characters from the data are replaced, so no name and no reason can drive the terminal.
    """
    sides = f"base {_told(result.base)}, candidate {_told(result.candidate)}"
    lines = [*_wrapped(sides), *_table(TIME_HEAD, _of(result, "time"), color)]
    lines += _table(ACCURACY_HEAD, _of(result, "accuracy"), color)
    lines += _metrics(_of(result, "metric"), color)
    lines += _regressions(result.judged)
    lines += _skipped(result.skipped)
    last = answer(result)
    lines += ["", *(line for told in noise_lines(result) for line in _wrapped(told))]
    return "\n".join([*lines, _painted(last, EXIT_COLORS.get(Exit(result.status), "") if color else "")])


def _of(result: GateResult, kind: str) -> list[Judged]:
    return [one for one in result.judged if one.kind == kind]


def _told(text: str) -> str:
    """Return ``text`` on one line without control characters, and without what GitHub reads as a command in a log."""
    return re.sub(r"(^|\s)::", r"\1: :", clean(text)).replace("##[", "# #[")


def _wrapped(text: str, first: str = "", after: str = "") -> list[str]:
    """Return ``text`` in four lines at most; it is cut at spaces alone, so that no line begins within a word."""
    wrapper = textwrap.TextWrapper(WIDTH, first, after, break_long_words=False, break_on_hyphens=False, max_lines=4)
    return wrapper.wrap(text)


def _painted(text: str, code: str) -> str:
    return f"{code}{text}{PLAIN}" if code else text


# ---------------------------------------------------------------------------------------------------------------------
# How one thing is told, wherever it stands


def verdict_text(one: Judged) -> str:
    """Return the verdict as tables show it: ``~`` where no difference is known."""
    plain = {Verdict.EQUIVALENT: "~", Verdict.INCONCLUSIVE: "~ (inconclusive)"}
    return plain.get(one.verdict, str(one.verdict))


def ratio_text(one: Judged) -> str:
    """Return ratio (times) or difference (accuracies) with its interval."""
    return effect_text(one.kind, one.ratio, one.lo, one.hi)


def effect_text(kind: str, middle: float | None, lo: float | None, hi: float | None) -> str:
    """Return an effect with its interval, such as ``1.093 [1.071, 1.115]``; ``~`` without one, never a bare number."""
    known = [value for value in (middle, lo, hi) if value is not None and math.isfinite(value)]
    if len(known) < 3:
        return "~"
    shown = [f"{value:+.4g}" if kind == "accuracy" else _factor(value) for value in known]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def _factor(value: float) -> str:
    return f"{value:.3f}" if 0.1 <= value < 1000 else f"{value:.3g}"


def value_text(value: float | None, unit: str) -> str:
    """Return a value with its unit; counts have all their digits, since a metric is compared to the last one."""
    if value is None or math.isnan(value):
        return "unknown"
    if unit == "ns":
        return units.time(value)
    number = f"{value:.0f}" if value.is_integer() and abs(value) < 1e15 else f"{value:.9g}"
    return number if unit in ("", "1") else f"{number} {clean(unit)}"


def values_text(one: Judged) -> str:
    """Return both values of a quantity, such as ``48 byte -> 64 byte``."""
    return f"{value_text(one.base_value, one.unit)} -> {value_text(one.candidate_value, one.unit)}"


def percent(fraction: float) -> str:
    """Return a fraction as a percentage, such as ``1.5 %``."""
    return f"{100 * fraction:.1f}".removesuffix(".0") + " %"


def noise_text(noise: Noise) -> str:
    """Return what the machine can tell, in one line."""
    source = f"tau {percent(noise.tau)} over {noise.pairs} A/A pairs"
    asked = f"asked for {percent(noise.asked)}"
    if noise.detectable is None:
        return f"machine: {source}; these are too few to say what it detects; {asked}"
    if noise.too_noisy:
        return f"too noisy: can detect only {percent(noise.detectable)}, {asked}; {source}"
    return f"machine: {source}; detects {percent(noise.detectable)}, {asked}"


def noise_lines(result: GateResult) -> list[str]:
    """Return what the machine can tell, and how much of what was asked has an answer."""
    told = [noise_text(result.noise)] if result.noise is not None else []
    cases = "case has" if result.asked_cases == 1 else "cases have"
    return [*told, f"{result.covered} of {result.asked_cases} {cases} a verdict ({result.seconds:.0f} s)"]


def answer(result: GateResult) -> str:
    """Return the answer in one line, with the exit status."""
    counts = [f"{result.count(verdict)} {verdict}" for verdict in Verdict if result.count(verdict)]
    broken = sum(one.status == "broken" for one in result.skipped)
    counts += [f"{broken} broken"] if broken else []
    code = result.status
    asked = "" if code == result.exit else ", as --fail-on asks"
    return f"{ANSWERS[result.exit]} ({', '.join(counts) or 'nothing was judged'}): exit {code}{asked}"


# ---------------------------------------------------------------------------------------------------------------------
# The parts of the table


def _table(head: tuple[str, ...], judged: Sequence[Judged], color: bool) -> list[str]:
    """Return a table with aligned columns, at most WIDTH wide; the case's name gets what the others leave."""
    if not judged:
        return []
    cells = [head[1:], *(_cells(one) for one in judged)]
    widths = [max(width(row[column]) for row in cells) for column in range(len(head) - 1)]
    room = max(LEAST_LABEL, WIDTH - sum(widths) - 2 * len(widths))
    labels = [fit(name, room) for name in (head[0], *map(_name, judged))]
    longest = max(map(width, labels))
    codes = ["", *(COLORS[one.verdict] if color else "" for one in judged)]
    lines = []
    for label, row, code in zip(labels, cells, codes, strict=True):
        numbers = [pad(cell, size, right=True) for cell, size in zip(row[:2], widths, strict=False)]
        filled = [*numbers, pad(row[2], widths[2]), _painted(row[3], code)]
        lines.append("  ".join((pad(label, longest), *filled)))
    return ["", lines[0], "-" * (longest + sum(widths) + 2 * len(widths)), *lines[1:]]


def _name(one: Judged) -> str:
    """Return whose line it is; an accuracy has one for each metric of a case, which stands first lest it be cut."""
    return _told(f"{one.metric}: {one.label}" if one.kind == "accuracy" else one.label)


def _cells(one: Judged) -> tuple[str, ...]:
    values = [one.base_value, one.candidate_value]
    if one.kind == "accuracy":
        values = [None if value is None else float(f"{value:.4g}") for value in values]
    return (*(value_text(value, one.unit) for value in values), ratio_text(one), verdict_text(one))


def _metrics(judged: Sequence[Judged], color: bool) -> list[str]:
    """Return how many deterministic metrics are equal, and every other one."""
    if not judged:
        return []
    others = [one for one in judged if one.verdict != Verdict.EQUIVALENT]
    lines = ["", f"deterministic metrics: {len(judged) - len(others)} of {len(judged)} equal"]
    for one in others:
        doubt = f": {_told(one.reason)}" if one.verdict == Verdict.INCONCLUSIVE and one.reason else ""
        what = f": {_told(one.label)}: {_told(one.metric)} {values_text(one)}{doubt}"
        first, *rest = _wrapped(f"{one.verdict}{what}", "  ", "    ")
        verdict = _painted(str(one.verdict), COLORS[one.verdict] if color else "")
        lines += [first.replace(str(one.verdict), verdict, 1), *rest]
    return lines


def _regressions(judged: Iterable[Judged]) -> list[str]:
    """Return, for every case that regressed, why; and what else changed: the first that moved is the first to see."""
    cases: dict[str, list[Judged]] = {}
    for one in judged:
        if one.verdict == Verdict.REGRESSED:
            cases.setdefault(one.case_key, []).append(one)
    lines = []
    for found in cases.values():
        lines.append(f"  {fit(_told(found[0].label), WIDTH - 2)}")
        for one in found:
            lines += _wrapped(_told(why(one)), "    ", "      ")
        first, *rest = found[0].moved or ("nothing else that is recorded: look at the code of the backend",)
        lines += _wrapped(f"first moved: {_told(first)}", "    ", "      ")
        lines += [line for other in rest for line in _wrapped(f"then: {_told(other)}", "    ", "      ")]
    return ["", "what regressed, and what else changed there", *lines] if lines else []


def why(one: Judged) -> str:
    """Return one sentence on why a quantity regressed, with its numbers."""
    numbers = values_text(one) if one.kind == "metric" else ratio_text(one)
    margin = f", margin {percent(one.margin)}" if one.kind == "time" else ""
    return f"{one.metric} {numbers}{margin}" + (f"; {one.reason}" if one.reason else "")


def _skipped(skipped: Sequence[Skipped]) -> list[str]:
    lines: list[str] = []
    for one in sorted(skipped, key=lambda one: one.status == "broken"):
        lines.append(fit(f"  {_told(one.status)}: {_told(one.label)}", WIDTH))
        lines += _wrapped(_told(one.reason), "    ", "    ")
    return ["", "without a verdict, and why", *lines] if lines else []
