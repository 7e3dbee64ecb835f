"""What a row of the table opens to: raw samples, metrics and parameters, compressed into the page."""

from __future__ import annotations

import base64
import json
import zlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from .data import Case
from .query import Answer, Row, literal, parse_json

MAX_SAMPLES = 20_000
"""Samples of one clock of one process that the page carries at most; where there are more, the page says so."""

BUDGET = 2_000_000
"""Samples that the whole page carries, about four bytes each, so that it opens quickly; shared evenly."""


def payload(run_id: str, cases: Sequence[Case], samples: Answer) -> dict[str, str]:
    """Return the details of each case by its key, each as base64 of deflated JSON."""
    by_case: dict[str, list[Row]] = defaultdict(list)
    for row in samples.rows:
        by_case[row["case_key"]].append(row)
    limit = min(MAX_SAMPLES, BUDGET // max(1, len(samples.rows)))
    return {case.key: pack(details(run_id, case, by_case[case.key], limit)) for case in cases}


def pack(value: Any) -> str:
    """Return ``value`` as base64 of deflated JSON; the browser reads it back with DecompressionStream."""
    content = json.dumps(value, separators=(",", ":"), default=str).encode()
    return base64.b64encode(zlib.compress(content, 6)).decode()


def details(run_id: str, case: Case, timings: Sequence[Row], limit: int = MAX_SAMPLES) -> dict[str, Any]:
    """Return everything that is known of a case besides its row."""
    return {
        "label": case.label,
        "facts": _facts(case),
        "metrics": [{k: v for k, v in metric.items() if k != "case_key"} for metric in case.metrics],
        "params": parse_json(case.row["params"]),
        "executed": parse_json(case.row["executed"]),
        "timings": [thinned(row, limit) for row in timings] if case.ok else [],
        "sql": "SELECT process, clock, unnest(turn) AS turn, unnest(ns) AS ns FROM timings\n"
        f"WHERE run_id = {literal(run_id)} AND case_key = {literal(case.key)} ORDER BY clock, process",
    }


def _facts(case: Case) -> dict[str, Any]:
    names = (
        "case_key",
        "method_key",
        "group_key",
        "protocol",
        "layers",
        "seed",
        "base",
        "flips",
        "elapsed_s",
        "reason",
    )
    return {name: case.row[name] for name in names if case.row[name] is not None}


def thinned(row: Mapping[str, Any], limit: int) -> dict[str, Any]:
    """Return a row of timings with at most ``limit`` samples, every ``step``-th one, and how many there were."""
    ns, turn = list(row["ns"] or ()), list(row["turn"] or ())
    step = max(1, -(-len(ns) // limit))
    kept = {name: value for name, value in row.items() if name not in ("case_key", "ns", "turn")}
    return {**kept, "of": len(ns), "step": step, "ns": ns[::step], "turn": turn[::step]}
