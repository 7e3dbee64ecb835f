"""What a gate found, for machines and pull requests: JUnit XML, Markdown, GitHub annotations, JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from ..results.gate import Exit, GateResult, Judged, Skipped
from ..results.verdict import Verdict
from .gate_text import ANSWERS, answer, noise_lines, ratio_text, value_text, verdict_text, why
from .text import clean


def gate_json(result: GateResult) -> str:
    """Return everything as JSON, with the exit status of the command and its name; what is not finite is null."""
    code = result.status
    derived = {"exit": code, "exit_name": Exit(code).name.lower(), "answer": ANSWERS[result.exit]}
    values = {**asdict(result), **derived, "covered": result.covered}
    if values["noise"] is not None and result.noise is not None:
        values["noise"]["too_noisy"] = result.noise.too_noisy
    return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sentence(one: Judged) -> str:
    """Return what was found of one quantity in a sentence."""
    return f"{one.verdict}: {why(one)}"


def _doubt(result: GateResult, one: Judged) -> str:
    """Return the name in ``fail_on`` that would make a failure of a quantity without a verdict."""
    return "noisy" if one.kind == "time" and result.noise is not None and result.noise.too_noisy else "inconclusive"


# ---------------------------------------------------------------------------------------------------------------------
# JUnit


def junit_xml(result: GateResult) -> str:
    """Return one test case for each quantity: regressed and broken fail, what has no verdict is skipped.

    A doubt that ``fail_on`` names fails. Where the answer is a doubt, it is a test case of its own, since no quantity
    may be there to carry it.
    """
    suite = ElementTree.Element("testsuite", name="moebench gate", time=f"{result.seconds:.3f}")
    _properties(suite, result)
    for one in result.judged:
        case = _test(suite, f"moebench.{one.kind}", f"{one.label} {one.metric}")
        if one.verdict == Verdict.REGRESSED or (
            one.verdict == Verdict.INCONCLUSIVE and _doubt(result, one) in result.fail_on
        ):
            _outcome(case, "failure", _sentence(one), [f"moved: {what}" for what in one.moved])
        elif one.verdict == Verdict.INCONCLUSIVE:
            _outcome(case, "skipped", _sentence(one))
    for left in result.skipped:
        kind = "failure" if left.status == "broken" else "skipped"
        _outcome(_test(suite, "moebench.case", left.label), kind, f"{left.status}: {left.reason}")
    if result.exit in (Exit.INCONCLUSIVE, Exit.TOO_NOISY):
        kind = "failure" if result.status == Exit.REGRESSED else "skipped"
        _outcome(_test(suite, "moebench.gate", "answer"), kind, answer(result), noise_lines(result))
    for attribute, tag in (("tests", "testcase"), ("failures", "failure"), ("skipped", "skipped")):
        suite.set(attribute, str(sum(1 for _ in suite.iter(tag))))
    suite.set("errors", "0")
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _properties(suite: ElementTree.Element, result: GateResult) -> None:
    properties = ElementTree.SubElement(suite, "properties")
    named = {"run_id": result.run_id, "base": result.base, "candidate": result.candidate, "exit": result.status}
    for name, value in named.items():
        ElementTree.SubElement(properties, "property", name=name, value=clean(str(value)))


def _test(suite: ElementTree.Element, classname: str, name: str) -> ElementTree.Element:
    """Add a test case; ``clean`` leaves no character that XML 1.0 has no way to write."""
    return ElementTree.SubElement(suite, "testcase", classname=classname, name=clean(name))


def _outcome(case: ElementTree.Element, kind: str, message: str, lines: Iterable[str] = ()) -> None:
    found = ElementTree.SubElement(case, kind, message=clean(message))
    found.text = "\n".join(map(clean, lines)) or None


# ---------------------------------------------------------------------------------------------------------------------
# Markdown

HEAD = ("| case | quantity | base | candidate | candidate / base | verdict |", "|---|---|--:|--:|---|---|")

ENTITIES = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "|": "&#124;", "\\": "&#92;", "@": "@&#8203;"}
"""``@`` is followed by a space of no width: a name from the data must not call a person."""


def markdown(result: GateResult) -> str:
    """Return a table for a pull request or a step summary: the answer and what differs first, the rest folded."""
    different = [one for one in result.judged if one.verdict in (Verdict.REGRESSED, Verdict.IMPROVED)]
    doubtful = [one for one in result.judged if one.verdict == Verdict.INCONCLUSIVE]
    alike = [one for one in result.judged if one.verdict == Verdict.EQUIVALENT]
    equal = sum(one.kind == "metric" for one in alike)
    broken = [left for left in result.skipped if left.status == "broken"]
    left_out = [left for left in result.skipped if left.status != "broken"]
    lines = [
        f"### moebench gate: {_md(answer(result))}",
        "",
        f"base {_md(result.base)}, candidate {_md(result.candidate)}",
    ]
    lines += ["", *_rows(different)] if different else []
    lines += ["", *map(_left, broken)] if broken else []
    lines += _folded("Why, and what else changed", _reasons(different))
    lines += _folded(f"{len(doubtful)} inconclusive", _rows(doubtful))
    shown = [one for one in alike if one.kind != "metric"]
    lines += _folded(f"{len(shown)} with no difference that matters", _rows(shown))
    lines += _folded("Without a verdict, and why", [_left(left) for left in left_out])
    counted = [f"deterministic metrics that are equal: {equal}"] if equal else []
    return "\n".join([*lines, "", *(f"{_md(line)}  " for line in (*counted, *noise_lines(result)))]) + "\n"


def _rows(judged: Sequence[Judged]) -> list[str]:
    return [*HEAD, *map(_row, judged)] if judged else []


def _row(one: Judged) -> str:
    clock = f" ({one.clock})" if one.clock else ""
    cells = (
        one.label,
        f"{one.metric}{clock}",
        value_text(one.base_value, one.unit),
        value_text(one.candidate_value, one.unit),
        _effect(one),
        verdict_text(one),
    )
    return f"| {' | '.join(map(_md, cells))} |"


def _effect(one: Judged) -> str:
    if one.kind == "metric":
        return "~" if one.verdict == Verdict.INCONCLUSIVE else "exact"
    return ratio_text(one) + (" (candidate - base)" if one.kind == "accuracy" else "")


def _reasons(judged: Iterable[Judged]) -> list[str]:
    """Return the reason of every regression, and below it what else changed, first things first."""
    lines = []
    for one in judged:
        if one.verdict == Verdict.REGRESSED:
            lines.append(f"- regressed: {_md(one.label)}: {_md(why(one))}")
            names = ("first moved", *("then" for _ in one.moved[1:]))
            lines += [f"  - {name}: {_md(what)}" for name, what in zip(names, one.moved, strict=False)]
    return lines


def _left(left: Skipped) -> str:
    return f"- {_md(left.status)}: {_md(left.label)}: {_md(left.reason)}"


def _folded(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"<details><summary>{title}</summary>", "", *lines, "", "</details>"] if lines else []


def _md(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line and in one cell; nothing in it becomes a link."""
    escaped = re.sub(r"[&<>|\\@]", lambda found: ENTITIES[found[0]], clean(text))
    escaped = re.sub(r"([`*_\[\]~]|^[#+-])", r"\\\1", escaped)
    return escaped.replace("://", ":&#47;&#47;").replace("www.", "www&#46;")


# ---------------------------------------------------------------------------------------------------------------------
# Annotations


def github_annotations(result: GateResult) -> str:
    """Return GitHub workflow commands: errors for failures, warnings for doubts, a notice with the answer.

    Failures come first: GitHub shows ten annotations of a kind at most.
    """
    errors, warnings = [], []
    for one in result.judged:
        if one.verdict == Verdict.REGRESSED:
            moved = [f"first moved: {what}" for what in one.moved[:1]]
            errors.append(_command("error", one.label, [_sentence(one), *moved]))
        elif one.verdict == Verdict.INCONCLUSIVE and _doubt(result, one) in result.fail_on:
            errors.append(_command("error", one.label, [_sentence(one)]))
        elif one.verdict == Verdict.INCONCLUSIVE:
            warnings.append(_command("warning", one.label, [_sentence(one)]))
    for left in result.skipped:
        level, into = ("error", errors) if left.status == "broken" else ("warning", warnings)
        into.append(_command(level, left.label, [f"{left.status}: {left.reason}"]))
    notice = _command("notice", "moebench gate", [answer(result), *noise_lines(result)])
    return "\n".join([*errors, *warnings, notice])


def _command(level: str, title: str, lines: Iterable[str]) -> str:
    """Return one workflow command; its title is a property, where ``:`` and ``,`` are written as codes too."""
    escaped = _escaped(clean(title)).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{_escaped(chr(10).join(map(clean, lines)))}"


def _escaped(text: str) -> str:
    """Return text as a workflow command takes it: what could end the line or the command is written as a code."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
