"""The page put together: sections, payloads, styles and scripts in one file, each script pinned by its hash."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from plotly.offline import get_plotlyjs

from ..results.errors import ResultsError
from . import data, tables, units
from .chart import Chart, Style, figure_json, script_json
from .data import Case, Run, flatten
from .details import payload
from .figure_compare import compare
from .figure_gate import paired_ratios
from .figure_loads import loads, requested
from .figure_quality import quality
from .figure_roofline import roofline
from .figure_scaling import scaling
from .gate_data import Gate, load_gate
from .gate_html import gate_html
from .query import Answer, ask, parse_json, to_csv
from .ratios import Ratio, paired_ratio, turn_minima
from .tables import esc, text

if TYPE_CHECKING:
    import duckdb

SECTIONS = {
    "summary": "Summary",
    "problems": "What did not run",
    "cases": "Cases",
    "compare": "Compare",
    "scaling": "Scaling",
    "roofline": "Roofline",
    "loads": "Expert load",
    "quality": "Quality",
    "claims": "Claims",
}
"""Sections of every run that has cases."""

GATE_SECTIONS = {"gate": "Gate", "gate-pairs": "Pairs"}
"""Sections of a run of ``moebench gate``, which may have no cases; sections of cases are left out then."""


def render(connection: duckdb.DuckDBPyConnection, run_id: str | None, store: str) -> str:
    """Return the whole page for one run (the latest by default) as HTML."""
    runs = data.load_runs(connection)
    if not runs:
        return fill(_empty_page(store))
    run = runs[0] if run_id is None else next((run for run in runs if run.run_id == run_id), None)
    if run is None:
        known = ", ".join(run.run_id for run in runs[:5])
        raise ResultsError(f"run '{run_id}' is not in {store}; choose one of: {known}.")
    cases, answer = data.load_cases(connection, run.run_id)
    gate = load_gate(connection, run.run_id)
    claims = ask(connection, data.CLAIMS, run_id=run.run_id)
    charts = make_charts(connection, run.run_id, cases, answer) if cases or not gate else []
    judged = [paired_ratios(gate)] if gate else []
    sections = {"summary": _summary(connection, run, runs, cases, gate)}
    if gate:
        sections["gate"] = _gate(gate)
    sections |= {chart.key: chart_html(chart) for chart in judged}
    if charts:
        sections |= {"problems": _problems(cases), "cases": _cases(cases, answer)}
        sections |= {chart.key: chart_html(chart) for chart in charts}
    if charts or claims.rows:
        sections["claims"] = _claims(claims, run)
    samples = ask(connection, data.SAMPLES, run_id=run.run_id)
    texts = {"cases": answer, "claims": claims, **({"gate": gate.comparisons} if gate else {})}
    payloads = [
        _json_script("details", payload(run.run_id, cases, samples)),
        _json_script("csv", _csv_texts([*judged, *charts], texts)),
        *(_figure_script(chart, index) for chart in (*judged, *charts) for index in range(len(chart.variants))),
    ]
    titles = {**SECTIONS, **GATE_SECTIONS}
    links = "".join(f'<a href="#{key}">{titles[key]}</a>' for key in sections if key in titles)
    return fill(
        {
            "run_id": esc(run.run_id),
            "heading": f"Run {esc(run.run_id)}",
            "subtitle": _subtitle(run, cases, gate),
            "navigation": links,
            "sections": "\n".join(sections.values()),
            "version": text(run.row["version"]),
            "store": f"<code>{esc(store)}</code>",
            "payloads": "\n".join(payloads),
        }
    )


def make_charts(
    connection: duckdb.DuckDBPyConnection, run_id: str, cases: Sequence[Case], answer: Answer
) -> list[Chart]:
    """Return every chart of the page, in its order."""
    style = Style.of(case.axes["backend"] for case in cases)
    minima = ask(connection, data.MINIMA, run_id=run_id)
    turns = turn_minima(minima)

    def ratio(base: Case, case: Case) -> Ratio | None:
        return paired_ratio(turns.get(base.key, {}), turns.get(case.key, {}))

    points = ask(connection, data.ROOFLINE, run_id=run_id)
    ceilings = ask(connection, data.CEILINGS, run_id=run_id)
    series = ask(connection, data.LOADS, run_id=run_id)
    measured = ask(connection, data.QUALITY, run_id=run_id)
    return [
        compare(cases, (answer.sql, minima.sql), ratio, style),
        scaling(cases, (answer.sql,), style),
        roofline(cases, points, ceilings, style, run_id),
        loads(cases, series),
        requested(cases, series),
        quality(cases, measured, answer.sql, style),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _section(key: str, title: str, content: str, caption: str = "") -> str:
    lead = f'<p class="lead">{esc(caption)}</p>' if caption else ""
    heading = f'<h2 id="{key}-title">{esc(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">{heading}{lead}{content}</section>'


def chart_html(chart: Chart) -> str:
    """Return the section of a chart: selector, a place to draw in, its SQL and its CSV; or why there is none."""
    if not chart.variants:
        return _section(chart.key, chart.title, f'<p class="empty">{esc(chart.empty)}</p>{disclosure("", chart.sql)}')
    options = "".join(f'<option value="{i}">{esc(v.label)}</option>' for i, v in enumerate(chart.variants))
    hidden = "" if len(chart.variants) > 1 else " hidden"
    only = "" if len(chart.variants) > 1 else f'<p class="which">{esc(chart.variants[0].label)}</p>'
    notes = "".join(
        f'<p class="note" data-variant="{index}"{"" if index == 0 else " hidden"}>{esc(variant.note)}</p>'
        for index, variant in enumerate(chart.variants)
        if variant.note
    )
    height = chart.variants[0].figure.layout.height
    content = (
        f'<p class="choose"{hidden}><label>{esc(chart.selector)} '
        f'<select data-chart="{chart.key}">{options}</select></label></p>'
        f'{only}<figure><div class="plot" id="plot-{chart.key}" data-chart="{chart.key}" role="img" '
        f'aria-label="{esc(chart.title)}: {esc(chart.caption)}" style="min-height:{height}px"></div>'
        f"<figcaption>{notes}</figcaption></figure>{disclosure(chart.key, chart.sql)}"
    )
    return _section(chart.key, chart.title, content, chart.caption)


def disclosure(key: str, sql: Sequence[str]) -> str:
    """Return the queries behind something, folded away, and a button that copies its rows as CSV."""
    queries = "".join(f"<pre><code>{esc(one)}</code></pre>" for one in sql)
    copy = f'<button type="button" class="copy" data-csv="{esc(key)}">Copy CSV</button>' if key else ""
    return f'<div class="source">{copy}<details><summary>SQL</summary>{queries}</details></div>'


def _cases(cases: Sequence[Case], answer: Answer) -> str:
    if not cases:
        return _section("cases", "Cases", '<p class="empty">This run has no cases.</p>')
    content = (
        '<form class="filters" id="filters"><label>Search <input type="search" id="search" '
        f'placeholder="any text in a row"></label>{tables.filters(cases)}<button type="reset">Clear</button>'
        f'<output id="shown">{len(cases)} of {len(cases)} cases</output></form>'
        f"{tables.cases_table(cases)}{disclosure('cases', (answer.sql,))}"
    )
    return _section("cases", "Cases", content, tables.shared_axes(cases))


def _claims(claims: Answer, run: Run) -> str:
    content = tables.claims_table(claims.rows, run.run_id) + disclosure("claims", (claims.sql,))
    return _section("claims", "Claims", content)


def _gate(gate: Gate) -> str:
    content = gate_html(gate) + disclosure("gate", (gate.comparisons.sql,))
    return _section("gate", "Gate", content, "Is the candidate slower, larger or less exact than the base?")


def _problems(cases: Sequence[Case]) -> str:
    bad, flagged = tables.problems(cases), tables.warnings(cases)
    content = bad or f'<p class="empty">{"Every case is ok." if cases else "Nothing ran."}</p>'
    if flagged:
        content += f"<h3>Ran, but in doubt: shown, and left out of verdicts</h3>{flagged}"
    if cases and not any(case.ok for case in cases):
        content = f'<p class="empty">No case of this run is ok, so this page has no times.</p>{content}'
    kind = " class=attention" if bad else ""
    return _section("problems", "What did not run, and why", f"<div{kind}>{content}</div>")


def _subtitle(run: Run, cases: Sequence[Case], gate: Gate) -> str:
    started = run.row["started_at"]
    when = f'<time datetime="{started:%Y-%m-%dT%H:%M:%SZ}">{started:%d %B %Y, %H:%M} UTC</time>' if started else ""
    state = "" if run.row["status"] in ("finished", None) else f"<b>{esc(run.row['status'])}</b>"
    counted = _counted(len(cases), "case") if cases or not gate else ""
    judged = _counted(gate.judged, "comparison") if gate else ""
    return " · ".join(part for part in (when, counted, judged, state) if part)


def _counted(number: int, unit: str) -> str:
    return f"{number} {unit}{'' if number == 1 else 's'}"


def _summary(
    connection: duckdb.DuckDBPyConnection, run: Run, runs: Sequence[Run], cases: Sequence[Case], gate: Gate
) -> str:
    host = next(iter(ask(connection, data.HOSTS, run_id=run.run_id).rows), None)
    evidence = (
        f'<div class="card"><h3>Evidence</h3><ul class="plain">{tables.evidence(cases)}</ul>'
        "<p class=quiet>Kinds of evidence are never ranked, averaged or drawn together.</p></div>"
    )
    content = (
        f"{tables.counts(cases)}{_left_out(connection)}"
        f'<div class="cards"><div class="card"><h3>Run</h3>{_facts(_run_facts(run, cases))}</div>'
        f'<div class="card"><h3>Host</h3>{_host(host)}</div>{evidence if cases or not gate else ""}</div>'
        f"{_folded('Packages', _facts(run.packages))}{_folded('Configuration', _configuration(run))}"
        f"{_other_runs(run, runs)}"
    )
    return _section("summary", "Summary", content)


def _left_out(connection: duckdb.DuckDBPyConnection) -> str:
    """Return the parts of the store that could not be read, which are therefore not in this page."""
    rows = ask(connection, data.LEFT_OUT).rows
    items = "".join(f"<li><code>{esc(row['path'])}</code> {text(row['reason'])}</li>" for row in rows)
    return f'<div class="attention"><h3>Not in this page</h3><ul class="problems">{items}</ul></div>' if rows else ""


def _facts(facts: Mapping[str, Any]) -> str:
    items = "".join(f"<div><dt>{esc(name)}</dt><dd>{_value(value)}</dd></div>" for name, value in facts.items())
    return f"<dl>{items}</dl>" if items else '<p class="quiet">nothing was recorded</p>'


def _value(value: Any) -> str:
    return ", ".join(esc(item) for item in value) if isinstance(value, (list, tuple)) and value else text(value)


def _run_facts(run: Run, cases: Sequence[Case]) -> dict[str, Any]:
    row = run.row
    dirty = {True: ", with uncommitted changes", False: "", None: ""}[row["git_dirty"]]
    threads = {case.axes["threads"] for case in cases}
    duration = (row["finished_at"] - row["started_at"]) if row["finished_at"] and row["started_at"] else None
    return {
        "command": row["command"],
        "status": row["status"],
        "took": units.time(duration.total_seconds() * 1e9) if duration is not None else None,
        "git": f"{row['git_sha'][:12]}{dirty}" if row["git_sha"] else None,
        "moebench": row["version"],
        "torch": run.packages.get("torch"),
        **({"threads": ", ".join(sorted(threads, key=lambda value: (len(value), value)))} if threads else {}),
        "plan": row["plan_hash"][:12] if row["plan_hash"] else None,
    }


def _host(host: Mapping[str, Any] | None) -> str:
    if host is None:
        return '<p class="quiet">no facts of the host were recorded</p>'
    facts = flatten(parse_json(host["facts"]))
    named = {name.rsplit(".", 1)[-1]: value for name, value in facts.items()}
    caches = {name.rsplit(".", 1)[-1]: value for name, value in facts.items() if ".caches." in f".{name}"}
    first = {
        "CPU": host["cpu"],
        "cores": host["cores"],
        "ISA": named.get("isa"),
        "caches": ", ".join(f"{level} {units.storage(size)}" for level, size in caches.items()) or None,
        "memory": units.storage(host["memory_bytes"]) if host["memory_bytes"] is not None else None,
        "load": [f"{value:.2f}" for value in named["load"]] if isinstance(named.get("load"), list) else None,
    }
    rest = {name: units.storage(v) if name.endswith("_bytes") else v for name, v in facts.items()}
    return _facts(first) + _folded("All facts", _facts(rest))


def _folded(title: str, content: str) -> str:
    return f"<details><summary>{esc(title)}</summary>{content}</details>"


def _configuration(run: Run) -> str:
    config = parse_json(run.row["config"])
    return f"<pre>{esc(tables.pretty(config))}</pre>" if config else '<p class="quiet">nothing was recorded</p>'


def _other_runs(run: Run, runs: Sequence[Run]) -> str:
    others = [other for other in runs if other.run_id != run.run_id]
    if not others:
        return ""
    items = "".join(
        f"<li><code>{esc(other.run_id)}</code> {text(other.row['command'])} "
        f"<span class=quiet>{other.row['ok'] or 0} ok of {other.row['cases'] or 0}</span></li>"
        for other in others
    )
    return _folded(f"Other runs in this store ({len(others)})", f'<ul class="plain">{items}</ul>')


def _empty_page(store: str) -> dict[str, str]:
    message = (
        f"<p class=empty>There is no run in <code>{esc(store)}</code>. "
        "Measure something first: <code>moebench run</code>.</p>"
    )
    return {
        "run_id": "no run",
        "heading": "No run yet",
        "subtitle": "",
        "navigation": "",
        "sections": _section("summary", "Summary", message),
        "version": "",
        "store": f"<code>{esc(store)}</code>",
        "payloads": _json_script("details", {}) + _json_script("csv", {}),
    }


# ---------------------------------------------------------------------------------------------------------------------
# Payloads and the template


def _json_script(name: str, value: Any) -> str:
    return f'<script type="application/json" id="data-{name}">{script_json(value)}</script>'


def _figure_script(chart: Chart, index: int) -> str:
    variant = chart.variants[index]
    content = figure_json(variant.figure, variant.narrow)
    return f'<script type="application/json" id="figure-{chart.key}-{index}">{content}</script>'


def _csv_texts(charts: Iterable[Chart], answers: Mapping[str, Answer]) -> dict[str, list[str]]:
    texts = {chart.key: [to_csv(variant.rows) for variant in chart.variants] for chart in charts if chart.variants}
    return {**texts, **{key: [to_csv(answer.rows)] for key, answer in answers.items()}}


@functools.cache
def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def fill(parts: Mapping[str, str]) -> str:
    """Return the template with its places filled, once each: nothing that is put in is looked at again."""
    scripts = {
        "plotly": _inline(get_plotlyjs()),
        "report_js": _inline(_file("report.js")),
        "table_js": _inline(_file("table.js")),
    }
    hashes = " ".join(_hash(script) for script in scripts.values())
    places = {**parts, **scripts, "css": _file("report.css"), "script_hashes": hashes}
    return re.sub(r"\{\{(\w+)\}\}", lambda match: places[match[1]], _file("template.html"))


def _inline(script: str) -> str:
    """Return a script as the browser will see it, so that its hash is that of what runs."""
    return script.replace("\r\n", "\n").replace("\r", "\n")


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
