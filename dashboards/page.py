"""The report of a run put together: its sections, and the payloads behind them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..results.errors import ResultsError
from . import data, tables, units
from .chart import Chart, Style
from .data import Case, Run, flatten
from .details import payload
from .figure_compare import compare
from .figure_gate import paired_ratios
from .figure_loads import loads, requested
from .figure_pareto import pareto
from .figure_roofline import roofline
from .figure_saving import saving
from .figure_scaling import scaling
from .gate_data import Gate, load_gate
from .gate_html import gate_html
from .pareto_data import IN_REPORT, answers
from .query import Answer, ask, parse_json
from .ratios import Ratio, paired_ratio, turn_minima
from .saving_data import savings
from .static_table import static_table
from .tables import esc, text
from .template import chart_html, csv_texts, data_script, disclosure, figure_scripts, fill, section

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
    "saving": "Sparsity",
    "pareto": "Pareto",
    "claims": "Claims",
}
"""Sections of every run that has cases."""

GATE_SECTIONS = {"gate": "Gate", "gate-pairs": "Pairs"}
"""Sections of a run of ``moebench gate``, which may have no cases; sections of cases are left out then."""

STATIC_SECTIONS = {"static": "Compiled kernels"}
"""The section of a run that has compiled kernels."""


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
    if compiled := static_table(cases):
        sections["static"] = section("static", STATIC_SECTIONS["static"], compiled, "By compilers, without any GPU.")
    if charts or claims.rows:
        sections["claims"] = _claims(claims, run)
    samples = ask(connection, data.SAMPLES, run_id=run.run_id)
    texts = {"cases": answer.rows, "claims": claims.rows, **({"gate": gate.comparisons.rows} if gate else {})}
    payloads = [
        data_script("details", payload(run.run_id, cases, samples)),
        data_script("csv", csv_texts([*judged, *charts], texts)),
        *figure_scripts([*judged, *charts]),
    ]
    titles = {**SECTIONS, **GATE_SECTIONS, **STATIC_SECTIONS}
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
    counted = ask(connection, data.METRICS, run_id=run_id)
    turns = turn_minima(minima)

    def ratio(base: Case, case: Case) -> Ratio | None:
        return paired_ratio(turns.get(base.key, {}), turns.get(case.key, {}))

    points = ask(connection, data.ROOFLINE, run_id=run_id)
    ceilings = ask(connection, data.CEILINGS, run_id=run_id)
    series = ask(connection, data.LOADS, run_id=run_id)
    named = {case.key: case.axes for case in cases}
    return [
        compare(cases, (answer.sql, minima.sql), ratio, style),
        scaling(cases, (answer.sql,), style),
        roofline(cases, points, ceilings, style, run_id),
        loads(cases, series),
        requested(cases, series),
        saving(savings(cases, ratio), (answer.sql, counted.sql, minima.sql), style),
        pareto("pareto", "Pareto", answers(connection, IN_REPORT, run_id=run_id, named=named), style),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# Sections


def _cases(cases: Sequence[Case], answer: Answer) -> str:
    if not cases:
        return section("cases", "Cases", '<p class="empty">This run has no cases.</p>')
    content = (
        '<form class="filters" id="filters"><label>Search <input type="search" id="search" '
        f'placeholder="any text in a row"></label>{tables.filters(cases)}<button type="reset">Clear</button>'
        f'<output id="shown">{len(cases)} of {len(cases)} cases</output></form>'
        f"{tables.cases_table(cases)}{disclosure('cases', (answer.sql,))}"
    )
    return section("cases", "Cases", content, tables.shared_axes(cases))


def _claims(claims: Answer, run: Run) -> str:
    content = tables.claims_table(claims.rows, run.run_id) + disclosure("claims", (claims.sql,))
    return section("claims", "Claims", content)


def _gate(gate: Gate) -> str:
    content = gate_html(gate) + disclosure("gate", (gate.comparisons.sql,))
    return section("gate", "Gate", content, "Is the candidate slower, larger or less exact than the base?")


def _problems(cases: Sequence[Case]) -> str:
    bad, flagged = tables.problems(cases), tables.warnings(cases)
    content = bad or f'<p class="empty">{"Every case is ok." if cases else "Nothing ran."}</p>'
    if flagged:
        content += f"<h3>Ran, but in doubt: shown, and left out of verdicts</h3>{flagged}"
    if cases and not any(case.ok for case in cases):
        content = f'<p class="empty">No case of this run is ok, so this page has no times.</p>{content}'
    kind = " class=attention" if bad else ""
    return section("problems", "What did not run, and why", f"<div{kind}>{content}</div>")


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
    return section("summary", "Summary", content)


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
        "sections": section("summary", "Summary", message),
        "version": "",
        "store": f"<code>{esc(store)}</code>",
        "payloads": data_script("details", {}) + data_script("csv", {}),
    }
