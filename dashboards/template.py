"""What every page is made of: sections, charts with SQL and CSV, and one file with each script pinned by its hash."""

from __future__ import annotations

import base64
import functools
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import resources
from typing import Any

from plotly.offline import get_plotlyjs

from .chart import Chart, figure_json, script_json
from .query import Row, to_csv
from .tables import esc


def section(key: str, title: str, content: str, caption: str = "") -> str:
    """Return a section under a heading; ``content`` is HTML, the others are text."""
    lead = f'<p class="lead">{esc(caption)}</p>' if caption else ""
    heading = f'<h2 id="{key}-title">{esc(title)}</h2>'
    return f'<section id="{key}" aria-labelledby="{key}-title">{heading}{lead}{content}</section>'


def chart_html(chart: Chart) -> str:
    """Return the section of a chart: selector, a place to draw in, its SQL and its CSV; or why there is none."""
    if not chart.variants:
        return section(chart.key, chart.title, f'<p class="empty">{esc(chart.empty)}</p>{disclosure("", chart.sql)}')
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
    return section(chart.key, chart.title, content, chart.caption)


def disclosure(key: str, sql: Sequence[str]) -> str:
    """Return the queries behind something, folded away, and a button that copies its rows as CSV."""
    queries = "".join(f"<pre><code>{esc(one)}</code></pre>" for one in sql)
    copy = f'<button type="button" class="copy" data-csv="{esc(key)}">Copy CSV</button>' if key else ""
    return f'<div class="source">{copy}<details><summary>SQL</summary>{queries}</details></div>'


def data_script(name: str, value: Any) -> str:
    """Return a payload that the scripts of the page read by its name."""
    return f'<script type="application/json" id="data-{name}">{script_json(value)}</script>'


def figure_scripts(charts: Iterable[Chart]) -> list[str]:
    """Return a payload for each variant of each chart."""
    return [
        f'<script type="application/json" id="figure-{chart.key}-{index}">'
        f"{figure_json(variant.figure, variant.narrow)}</script>"
        for chart in charts
        for index, variant in enumerate(chart.variants)
    ]


def csv_texts(charts: Iterable[Chart], tables: Mapping[str, Iterable[Row]]) -> dict[str, list[str]]:
    """Return what the buttons copy, by key: the rows of each variant of a chart, or those of a table."""
    texts = {chart.key: [to_csv(variant.rows) for variant in chart.variants] for chart in charts if chart.variants}
    return {**texts, **{key: [to_csv(rows)] for key, rows in tables.items()}}


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
