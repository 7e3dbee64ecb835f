"""What a gate found, for machines and pull requests: JUnit XML, Markdown, GitHub annotations, JSON."""

from __future__ import annotations

import json
import math
import re
from dataclasses import asdict
from typing import Any
from xml.etree import ElementTree

from ..results.gate import GateResult, Judged, Skipped
from ..results.verdict import Verdict
from .gate_text import ANSWERS, answer, noise_lines, ratio_text, value_text, verdict_text
from .text import clean


def gate_json(result: GateResult) -> str:
    """Return everything as JSON, with the exit status and its name; what is not finite is null."""
    values = {**asdict(result), "exit": int(result.exit), "answer": ANSWERS[result.exit], "covered": result.covered}
    return json.dumps(_finite(values), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# JUnit


def junit_xml(result: GateResult) -> str:
    """Return one test case for each quantity: regressed and broken fail, what has no verdict is skipped."""
    suite = ElementTree.Element("testsuite", name="moebench gate", time=f"{result.seconds:.3f}")
    strict = "inconclusive" in result.fail_on
    for one in result.judged:
        case = ElementTree.SubElement(suite, "testcase", classname=f"moebench.{one.kind}", name=_xml(_name(one)))
        if one.verdict == Verdict.REGRESSED or (strict and one.verdict == Verdict.INCONCLUSIVE):
            ElementTree.SubElement(case, "failure", message=_xml(_sentence(one))).text = _xml("\n".join(one.moved))
        elif one.verdict == Verdict.INCONCLUSIVE:
            ElementTree.SubElement(case, "skipped", message=_xml(_sentence(one)))
    for left in result.skipped:
        case = ElementTree.SubElement(suite, "testcase", classname="moebench.case", name=_xml(left.label))
        kind = "failure" if left.status == "broken" else "skipped"
        ElementTree.SubElement(case, kind, message=_xml(f"{left.status}: {left.reason}"))
    for name in ("failure", "skipped"):
        suite.set(f"{name}s" if name == "failure" else name, str(sum(1 for _ in suite.iter(name))))
    suite.set("tests", str(len(suite)))
    ElementTree.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(suite, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    """Return text without the characters that XML 1.0 has no way to write."""
    return re.sub("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", text)


def _name(one: Judged) -> str:
    return f"{one.label} {one.metric}"


def _sentence(one: Judged) -> str:
    """Return what was found of one quantity in a sentence."""
    what = f"{one.metric} {ratio_text(one)}" if one.kind != "metric" else f"{one.metric}: {_values(one)}"
    return f"{one.verdict}: {what}" + (f"; {one.reason}" if one.reason else "")


def _values(one: Judged) -> str:
    return f"{value_text(one.base_value, one.unit)} -> {value_text(one.candidate_value, one.unit)}"


# ---------------------------------------------------------------------------------------------------------------------
# Markdown and annotations


def markdown(result: GateResult) -> str:
    """Return a table for a pull request or a step summary: the answer first, what is equal folded away."""
    loud = [one for one in result.judged if one.kind == "time" or one.verdict != Verdict.EQUIVALENT]
    lines = [
        f"### moebench gate: {answer(result)}",
        "",
        f"base {_md(result.base)}, candidate {_md(result.candidate)}",
        "",
    ]
    if loud:
        lines += ["| case | quantity | base | candidate | candidate / base | verdict |", "|---|---|--:|--:|---|---|"]
        lines += [_line(one) for one in loud]
    moved = [(one, what) for one in loud if one.verdict == Verdict.REGRESSED for what in one.moved[:1]]
    lines += ["", *(f"- {_md(one.label)}: first moved: {_md(what)}" for one, what in moved)] if moved else []
    if result.skipped:
        lines += ["", "<details><summary>Without a verdict, and why</summary>", ""]
        lines += [f"- {_md(one.status)}: {_md(one.label)}: {_md(one.reason)}" for one in result.skipped]
        lines += ["", "</details>"]
    return "\n".join([*lines, "", *(f"{_md(line)}  " for line in noise_lines(result))]) + "\n"


def _line(one: Judged) -> str:
    cells = (
        one.label,
        one.metric + (f" ({one.clock})" if one.clock else ""),
        value_text(one.base_value, one.unit),
        value_text(one.candidate_value, one.unit),
        ratio_text(one),
        verdict_text(one),
    )
    return f"| {' | '.join(map(_md, cells))} |"


def _md(text: str) -> str:
    """Return text that Markdown and HTML show as it is, on one line."""
    escaped = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]|#@])", r"\\\1", escaped)


def github_annotations(result: GateResult) -> str:
    """Return GitHub workflow commands: errors for regressions, warnings for doubts, a notice with the answer."""
    lines = []
    for one in result.judged:
        if one.verdict == Verdict.REGRESSED:
            lines.append(_command("error", one.label, "; ".join([_sentence(one), *one.moved[:1]])))
        elif one.verdict == Verdict.INCONCLUSIVE:
            lines.append(_command("warning", one.label, _sentence(one)))
    for left in result.skipped:
        lines.append(_annotated(left))
    return "\n".join([*lines, _command("notice", "moebench gate", "; ".join([answer(result), *noise_lines(result)]))])


def _annotated(left: Skipped) -> str:
    return _command("error" if left.status == "broken" else "warning", left.label, f"{left.status}: {left.reason}")


def _command(level: str, title: str, message: str) -> str:
    escaped = _escaped(title).replace(":", "%3A").replace(",", "%2C")
    return f"::{level} title={escaped}::{_escaped(message)}"


def _escaped(text: str) -> str:
    """Return text as a workflow command takes it: what could end the line or the command is written as a code."""
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
