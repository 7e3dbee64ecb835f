"""The tables of the page as HTML. Every text from the data goes through ``esc``."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from . import units
from .data import STATUSES, Case, varying_axes
from .query import Row, parse_json

STATUS_MEANING = {
    "ok": "ran as planned and passed its check",
    "wrong": "the oracle rejected the output; there is no time",
    "crashed": "the worker process died",
    "failed": "the case raised an error",
    "timed_out": "the case did not answer before its deadline",
    "fell_back": "something other than the plan was executed",
    "skipped": "not run, for the reason given",
}

FLAG_ADVICE = {
    "contended": (
        "Other work took the cores while it was timed.",
        "Close what else runs on this machine (or pin it to other cores) and run again.",
    ),
    "not_steady": (
        "Its times had not settled when sampling began.",
        "Give it a longer warm-up, or look at its samples for drift, frequency scaling or caches that still fill.",
    ),
    "implausible": (
        "It beats 1.15 times the best that this host ever showed for data of this size.",
        "Suspect the measurement before the backend: check what was executed, and probe the roofline again.",
    ),
}

EVIDENCE_MEANING = {
    "measured-cpu": "run and measured on this CPU",
    "measured-gpu": "run and measured on a GPU",
    "interpreted": "run by an interpreter: right or wrong, but no time of real hardware",
    "host-executed": "GPU code executed on the host",
    "static-compile": "compiled and read, not run",
    "simulated": "from a simulator",
    "model": "from a formula",
}

METHOD = ("backend", "routing", "quantization", "sparsity", "tokens")
"""Columns that stand before the times; the other axes stand behind."""

NOT_MEASURED = f'<span class="null" title="not measured" aria-label="not measured">{units.DASH}</span>'


def esc(value: object) -> str:
    """Return ``value`` as text that HTML shows as it is, in elements and in quoted attributes."""
    return html.escape(str(value), quote=True)


def text(value: object) -> str:
    """Return a value as HTML; what is NULL or empty is a dash that says so."""
    return NOT_MEASURED if value is None or value == "" else esc(value)


def chip(status: str) -> str:
    """Return a status as a coloured word."""
    kind = status if status in STATUS_MEANING else "unknown"
    return f'<span class="chip {kind}" title="{esc(STATUS_MEANING.get(status, ""))}">{esc(status)}</span>'


def flag_marks(flags: Iterable[str]) -> str:
    """Return flags as small marks with their meaning."""
    return " ".join(
        f'<span class="flag" title="{esc(FLAG_ADVICE.get(flag, ("", ""))[0])}">{esc(flag)}</span>' for flag in flags
    )


def counts(cases: Sequence[Case]) -> str:
    """Return how many cases ended in which way, as a list."""
    found = [(status, sum(case.status == status for case in cases)) for status in _statuses(cases)]
    items = "".join(f"<li><b>{number}</b> {chip(status)}</li>" for status, number in found)
    return f'<ul class="counts" aria-label="cases by status">{items}</ul>' if items else ""


def _statuses(cases: Iterable[Case]) -> list[str]:
    present = {case.status for case in cases}
    known = [status for status in reversed(STATUSES) if status in present]
    return known + sorted(present - set(STATUSES))


def problems(cases: Sequence[Case]) -> str:
    """Return what did not run, by status and reason, the worst first; empty when all ran."""
    grouped: dict[tuple[str, str], list[Case]] = defaultdict(list)
    for case in cases:
        if not case.ok:
            grouped[case.status, case.row["reason"] or "no reason was recorded"].append(case)
    order = {status: rank for rank, status in enumerate(STATUSES)}
    items = [
        f"<li>{chip(status)} <span class=reason>{esc(reason)}</span>{_members(members)}</li>"
        for (status, reason), members in sorted(
            grouped.items(), key=lambda item: (order.get(item[0][0], -1), -len(item[1]))
        )
    ]
    return f'<ul class="problems">{"".join(items)}</ul>' if items else ""


def _members(members: Sequence[Case]) -> str:
    if len(members) == 1:
        return f'<div class="members">{esc(members[0].label)}</div>'
    names = "".join(f"<li>{esc(case.label)}</li>" for case in members)
    return f"<details><summary>{len(members)} cases</summary><ul>{names}</ul></details>"


def warnings(cases: Sequence[Case]) -> str:
    """Return each flag that occurs, what it means and what to do about it."""
    items = []
    for flag in sorted({flag for case in cases for flag in case.flags}):
        meaning, remedy = FLAG_ADVICE.get(flag, ("", ""))
        members = [case for case in cases if flag in case.flags]
        items.append(
            f"<li>{flag_marks([flag])} {esc(meaning)} <b>{esc(remedy)}</b>{_members(members)}</li>",
        )
    return f'<ul class="problems">{"".join(items)}</ul>' if items else ""


def evidence(cases: Sequence[Case]) -> str:
    """Return the kinds of evidence in the run, with counts."""
    kinds: dict[str, int] = defaultdict(int)
    for case in cases:
        kinds[str(case.row["evidence"])] += 1
    return "".join(
        f"<li><b>{number}</b> <span class=evidence>{esc(kind)}</span> {esc(EVIDENCE_MEANING.get(kind, ''))}</li>"
        for kind, number in sorted(kinds.items())
    )


# ---------------------------------------------------------------------------------------------------------------------
# The table of cases


def shared_axes(cases: Sequence[Case]) -> str:
    """Return in words what all cases have in common."""
    if not cases:
        return ""
    varying = set(varying_axes([case.axes for case in cases]))
    same = [f"{axis} = {value}" for axis, value in cases[0].axes.items() if axis not in varying and value]
    return f"The same in all cases: {', '.join(same)}." if same else ""


def cases_table(cases: Sequence[Case]) -> str:
    """Return the table of cases, what is not ok first."""
    axes = varying_axes([case.axes for case in cases])
    first, rest = [axis for axis in axes if axis in METHOD], [axis for axis in axes if axis not in METHOD]
    order = {status: rank for rank, status in enumerate(STATUSES)}
    ordered = sorted(cases, key=lambda case: order.get(case.status, -1))
    headers = [
        ("status", "status", False),
        *((axis, axis, bool(_numeric(axis))) for axis in first),
        ("median", "median", True),
        ("throughput", "layer-tokens/s", True),
        ("active", "active params/token", True),
        *((axis, axis, bool(_numeric(axis))) for axis in rest),
        ("evidence", "evidence", False),
        ("executed", "executed", False),
        ("error", "error / bound", True),
        ("note", "flags, reason, quality", False),
    ]
    head = "".join(_header(*header) for header in headers)
    body = "".join(_case_row(case, first, rest) for case in ordered)
    return (
        '<div class="scroll" role="region" aria-labelledby="cases-caption" tabindex="0"><table id="cases-table">'
        '<caption id="cases-caption">All cases. Headers sort; a row opens to samples, metrics and parameters.</caption>'
        f'<thead><tr><th scope="col" class="open"><span class="hidden">details</span></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _header(key: str, title: str, numeric: bool) -> str:
    kind = "number" if numeric else "text"
    return (
        f'<th scope="col" aria-sort="none" data-key="{esc(key)}" data-kind="{kind}" class="{kind}">'
        f'<button type="button">{esc(title)}<span class="arrow" aria-hidden="true"></span></button></th>'
    )


def _case_row(case: Case, first: Sequence[str], rest: Sequence[str]) -> str:
    def along(axes: Sequence[str]) -> list[str]:
        return [_cell(case.axes[axis], text(case.axes[axis]), _numeric(axis)) for axis in axes]

    cells = [
        _cell(STATUSES.index(case.status) if case.status in STATUSES else -1, chip(case.status)),
        *along(first),
        _cell(case.median_ns, median_html(case), "number"),
        _cell(case.layer_tokens_per_s, _si(case.layer_tokens_per_s), "number"),
        _cell(case.active_params, _si(case.active_params), "number"),
        *along(rest),
        _cell(case.row["evidence"], f"<span class=evidence>{text(case.row['evidence'])}</span>"),
        _cell(case.executed, text(case.executed), "path"),
        _cell(_error_share(case), _error(case), "number"),
        _cell(" ".join(case.flags) or case.row["reason"], _note(case), "note"),
    ]
    filters = {axis: case.axes[axis] for axis in (*first, *rest)}
    filters.update(status=case.status, evidence=str(case.row["evidence"]), flags=" ".join(case.flags) or "none")
    data = "".join(f' data-f-{esc(name)}="{esc(value)}"' for name, value in filters.items())
    opener = f'<button type="button" aria-expanded="false" aria-label="details of {esc(case.label)}"></button>'
    return (
        f'<tr class="case {"" if case.ok else "notok"}" data-case="{esc(case.key)}"{data}>'
        f'<td class="open">{opener}</td>{"".join(cells)}</tr>'
    )


def _numeric(axis: str) -> str:
    return "number" if axis in ("tokens", "threads", "seed") else ""


def _cell(value: object, content: str, kind: str = "") -> str:
    """Return a cell; ``data-v`` is what it is sorted by, and is missing where nothing was measured."""
    sort = "" if value is None or value == "" else f' data-v="{esc(value)}"'
    return f"<td{sort}{f' class={kind}' if kind else ''}>{content}</td>"


def median_html(case: Case) -> str:
    """Return the median with its interval on a second line."""
    if case.median_ns is None:
        return NOT_MEASURED
    unit = units.time_unit(case.median_ns)
    bounds = units.interval(case.bounds_ns, unit)
    missing = '<small title="too few samples for an interval">no interval</small>'
    return f"{esc(units.time(case.median_ns, unit))}{f'<small>{esc(bounds)}</small>' if bounds else missing}"


def _si(value: float | None) -> str:
    return NOT_MEASURED if value is None else esc(units.si(value))


def _error_share(case: Case) -> float | None:
    error, bound = case.row["error"], case.row["error_bound"]
    return None if error is None or not bound else error / bound


def _error(case: Case) -> str:
    error, bound = case.row["error"], case.row["error_bound"]
    if error is None:
        return NOT_MEASURED
    limit = NOT_MEASURED if bound is None else esc(f"{bound:.1e}")
    return f"{esc(f'{error:.1e}')} / {limit}"


def _note(case: Case) -> str:
    reason = case.row["reason"]
    parts = [flag_marks(case.flags), f"<span class=reason>{esc(reason)}</span>" if reason else ""]
    parts += [f"<div>{esc(metric['name'])} {esc(units.digits(metric['value']))}</div>" for metric in case.quality]
    return " ".join(part for part in parts if part)


def filters(cases: Sequence[Case]) -> str:
    """Return one drop-down per column that has more than one value."""
    columns: dict[str, list[str]] = {"status": _statuses(cases)}
    for axis in varying_axes([case.axes for case in cases]):
        columns[axis] = sorted({case.axes[axis] for case in cases if case.axes[axis]}, key=_natural)
    columns["evidence"] = sorted({str(case.row["evidence"]) for case in cases})
    columns["flags"] = sorted({" ".join(case.flags) or "none" for case in cases})
    return "".join(_select(name, values) for name, values in columns.items() if len(values) > 1)


def _natural(value: str) -> tuple[int, int, str]:
    return (0, int(value), "") if value.isdecimal() else (1, 0, value)


def _select(name: str, values: Iterable[str]) -> str:
    options = "".join(f'<option value="{esc(value)}">{esc(value)}</option>' for value in values)
    return (
        f'<label>{esc(name)} <select data-filter="{esc(name)}"><option value="">all</option>{options}</select></label>'
    )


# ---------------------------------------------------------------------------------------------------------------------
# Claims


def claims_table(rows: Sequence[Row], run_id: str) -> str:
    """Return the claims of papers beside what was found here, in this run or in the latest that tested them."""
    if not rows:
        return "<p class=\"empty\">No claim of a paper was tested in this store; 'moebench papers' does it.</p>"
    body = "".join(_claim(row, run_id) for row in rows)
    titles = ("claim", "their figure", "ours", "interval", "verdict", "configuration")
    head = "".join(f'<th scope="col">{title}</th>' for title in titles)
    return (
        '<div class="scroll" role="region" aria-labelledby="claims-caption" tabindex="0"><table class="claims">'
        '<caption id="claims-caption">Claims of papers, and what was found here.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _claim(row: Mapping[str, Any], run_id: str) -> str:
    unit = f" {esc(row['unit'])}" if row["unit"] not in (None, "", "1") else ""
    bounds = (
        NOT_MEASURED if row["lo"] is None else f"[{esc(units.digits(row['lo']))}, {esc(units.digits(row['hi']))}]{unit}"
    )
    estimate = NOT_MEASURED if row["estimate"] is None else f"{esc(units.digits(row['estimate']))}{unit}"
    seeds = row["seeds"] or ()
    spec = parse_json(row["spec"])
    shown = spec.get("run") if isinstance(spec, dict) and "run" in spec else spec
    other = f"run {row['run_id']}" if row["run_id"] != run_id else None
    seeded = f"{len(seeds)} seed{'s' * (len(seeds) != 1)}" if seeds else None
    place = " · ".join(str(part) for part in (row["kind"], row["model"], seeded, other) if part)
    configuration = (
        f"<details><summary>{esc(place or 'configuration')}</summary><pre>{esc(pretty(shown))}</pre></details>"
    )
    reason = f"<small>{esc(row['reason'])}</small>" if row["reason"] else ""
    return (
        f'<tr><th scope="row"><b>{text(row["title"])}</b> <code>{esc(row["key"])}</code><br>{text(row["claim"])}</th>'
        f"<td>{text(row['figure'])}</td><td class=number>{estimate}<small>{esc(row['ours'] or '')}</small></td>"
        f'<td class=number>{bounds}</td><td><span class="verdict {verdict_kind(row["verdict"])}">'
        f"{text(row['verdict'])}</span>{reason}</td><td>{configuration}</td></tr>"
    )


def verdict_kind(verdict: object) -> str:
    """Return the class that colours a verdict."""
    return {
        "confirmed": "ok",
        "holds": "ok",
        "improved": "ok",
        "refuted": "wrong",
        "fails": "wrong",
        "regressed": "wrong",
        "broken": "wrong",
    }.get(str(verdict), "plain")


def pretty(value: Any, indent: str = "") -> str:
    """Return nested objects as indented lines of ``name: value``."""
    if not isinstance(value, Mapping):
        return f"{indent}{value}"
    lines = []
    for name, item in value.items():
        if isinstance(item, Mapping) and item:
            lines += [f"{indent}{name}:", pretty(item, indent + "  ")]
        else:
            lines.append(f"{indent}{name}: {item}")
    return "\n".join(lines)
