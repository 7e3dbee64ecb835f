"""What is kept of a self-test: every call as JSON, the turns of calls without injected work as Parquet, host facts.

The rule was fixed before any of these turns were taken, and nothing was fitted on them: they are held out.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moebench.results.database import connect_parts
from moebench.results.parts import write_json_atomic

LOADS = ("idle", "busy")
CELLS = tuple((percent, load) for percent in (0, 5) for load in LOADS)

HERE = Path(__file__).resolve().parent
KEPT = HERE.parents[1] / "docs" / "gate-selftest"

RATIOS = """
    WITH minima AS (
        SELECT case_key, pair, side, turn, min(ns) AS ns FROM (
            SELECT case_key, pair, side, unnest(ns) AS ns, unnest(turn) AS turn FROM turns
            WHERE clock = 'cpu' AND run_id = ?
        ) GROUP BY ALL
    )
    SELECT b.case_key, b.pair, list(ln(c.ns / b.ns) ORDER BY b.turn), list(ln(a.ns / b.ns) ORDER BY b.turn)
    FROM minima b JOIN minima c USING (case_key, pair, turn) JOIN minima a USING (case_key, pair, turn)
    WHERE b.side = 'base' AND c.side = 'candidate' AND a.side = 'again' GROUP BY ALL ORDER BY ALL
"""


@dataclass(frozen=True)
class Recorded:
    """Log-ratios of one recorded process pair of one case: candidate / base and again / base, by turn."""

    candidate: np.ndarray
    again: np.ndarray


Calls = dict[tuple[int, str], list[dict[str, Any]]]


def keep(folder: Path, kept: Path) -> None:
    """Write to ``kept`` what the calls in ``folder`` said, and the turns of those without injected work."""
    kept.mkdir(parents=True, exist_ok=True)
    for name in ("host.json", "calibration.json"):
        shutil.copyfile(folder / name, kept / name)
    calls = [json.loads(path.read_text()) for path in sorted(folder.glob("call-*.json"))]
    write_json_atomic(kept / "calls.json", calls)
    _keep_turns(folder, [call for call in calls if call["percent"] == 0], kept / "held-out.parquet")


def _keep_turns(folder: Path, calls: Sequence[dict[str, Any]], target: Path) -> None:
    names = ("load", "call", "case_key", "pair", "candidate", "again")
    with connect_parts(folder / "store") as connection:
        rows = [
            dict(zip(names, (_load(call), call["call"], *row), strict=True))
            for call in calls
            for row in connection.execute(RATIOS, [call["run_id"]]).fetchall()
        ]
    ratios = pa.list_(pa.float32())
    schema = pa.schema([*zip(names, (pa.string(), pa.int32(), pa.string(), pa.int32(), ratios, ratios), strict=True)])
    pq.write_table(pa.Table.from_pylist(rows, schema), target, compression="zstd")


def load_calls(kept: Path) -> Calls:
    """Return the kept calls of each cell, in their order."""
    calls = json.loads((kept / "calls.json").read_text())
    return {cell: [call for call in calls if (call["percent"], _load(call)) == cell] for cell in CELLS}


def load_turns(kept: Path, loads: Sequence[str]) -> list[Recorded]:
    """Return every kept process pair that was recorded under one of ``loads``."""
    rows = pq.read_table(kept / "held-out.parquet").to_pylist()
    return [Recorded(np.array(row["candidate"]), np.array(row["again"])) for row in rows if row["load"] in loads]


def _load(call: dict[str, Any]) -> str:
    return LOADS[bool(call["busy"])]
