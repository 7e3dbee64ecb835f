"""The comparisons of a gate as HTML. Every text from the data goes through ``esc``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from .gate_data import Gate
from .gate_text import effect_text, noise_text, value_text
from .tables import NOT_MEASURED, esc, text, verdict_kind

HEAD = (
    ("kind", ""),
    ("case", ""),
    ("clock", ""),
    ("base", "number"),
    ("candidate", "number"),
    ("candidate / base", "number"),
    ("verdict", ""),
    ("reason", ""),
    ("moved", ""),
    ("pairs / turns", "number"),
    ("p / q", "number"),
)


def gate_html(gate: Gate) -> str:
    """Return verdicts by number, the names of the sides, the noise, and a table of all comparisons."""
    base, candidate = gate.sides
    counts = Counter(str(row["verdict"]) for row in gate.comparisons.rows)
    items = "".join(f"<li><b>{number}</b> {_verdict(name)}</li>" for name, number in counts.items())
    return (
        f'<ul class="counts" aria-label="comparisons by verdict">{items}</ul>'
        f"<dl><div><dt>base</dt><dd>{text(base)}</dd></div><div><dt>candidate</dt><dd>{text(candidate)}</dd></div>"
        f"<div><dt>noise</dt><dd>{_noise(gate)}</dd></div></dl>{_table(gate)}"
    )


def _noise(gate: Gate) -> str:
    noise = gate.noise
    if noise is None:
        return "no time was judged, so none was measured"
    told = esc(noise_text(noise))
    return f"<b>{told}</b>" if noise.too_noisy else told


def _table(gate: Gate) -> str:
    head = "".join(f'<th scope="col"{f" class={kind}" if kind else ""}>{title}</th>' for title, kind in HEAD)
    body = "".join(map(_row, gate.comparisons.rows))
    return (
        '<div class="scroll" role="region" aria-labelledby="gate-caption" tabindex="0"><table id="gate-table">'
        '<caption id="gate-caption">Every comparison, regressions first. Times are medians of turn minima; '
        "brackets are intervals; of an accuracy the difference is shown instead of a ratio; of what moved, the first "
        "is the first to look at.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _row(row: Mapping[str, Any]) -> str:
    unit = str(row["unit"] or "")
    values = (_value(row["base_value"], unit), _value(row["candidate_value"], unit))
    cells = "".join(f"<td class=number>{cell}</td>" for cell in (*values, _effect(row)))
    counted = "".join(f"<td class=number>{_both(row, names)}</td>" for names in (("pairs", "turns"), ("p", "q")))
    moved = "".join(f"<li>{esc(what)}</li>" for what in row["moved"] or ())
    return (
        f"<tr><td>{esc(row['kind'])}</td>"
        f'<th scope="row">{text(row["label"])}<small class=quiet> {esc(row["metric"] or "")}</small></th>'
        f"<td>{text(row['clock'])}</td>{cells}<td>{_verdict(row['verdict'])}</td>"
        f'<td class="note">{esc(row["reason"] or "")}</td>'
        f'<td class="note">{f"<ol>{moved}</ol>" if moved else ""}</td>{counted}</tr>'
    )


def _verdict(verdict: object) -> str:
    return f'<span class="verdict {verdict_kind(verdict)}">{text(verdict)}</span>'


def _value(value: float | None, unit: str) -> str:
    return NOT_MEASURED if value is None else esc(value_text(value, unit))


def _effect(row: Mapping[str, Any]) -> str:
    """Return ratio or difference with its interval; a deterministic metric has neither, both values say all."""
    if row["kind"] == "case":
        return NOT_MEASURED
    if row["kind"] == "metric":
        return "exact" if row["base_value"] is not None and row["candidate_value"] is not None else NOT_MEASURED
    shown = effect_text(str(row["kind"]), row["ratio"], row["lo"], row["hi"])
    return f"{esc(shown)}<small>candidate - base</small>" if row["kind"] == "accuracy" else esc(shown)


def _both(row: Mapping[str, Any], names: tuple[str, str]) -> str:
    if row["kind"] in ("case", "metric"):
        return NOT_MEASURED
    return " / ".join(NOT_MEASURED if row[name] is None else _number(row[name]) for name in names)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.2g}"
