"""A gate in the store: its comparisons with every turn of both sides as one part of a run; and what is known of
noise."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...contracts import make_key
from ...results.database import ingest
from ...results.errors import ResultsError
from ...results.gate import GateResult, Judged, Noise, Skipped
from ...results.parts import write_part
from ..rundir import RunFolder
from .measure import Measured
from .pairs import SIDES, PairedMember, clocks_of

PAST_NOISE = """
    SELECT case_key, arg_max(hi - lo, started_at) FROM comparisons JOIN runs USING (run_id)
    WHERE kind = 'time' AND lo IS NOT NULL AND hi IS NOT NULL GROUP BY case_key
"""


def past_noise(store: Path) -> dict[str, float]:
    """Return the width of the latest interval of every case that a gate of this store has judged."""
    from ...results.query import reading

    if not (store / "runs").is_dir():
        return {}
    with reading(store) as connection:
        return dict(connection.execute(PAST_NOISE).fetchall())


def open_run(store: Path, identity: Sequence[str], facts: dict[str, Any]) -> RunFolder:
    """Return a new run of the store; a gate that was cut off is measured anew, since its sides must be taken
    together."""
    return RunFolder.open(store, make_key(list(identity)), facts)


def write(folder: RunFolder, result: GateResult, measured: Measured) -> None:
    """Write comparisons and turns as one part, mark the run as finished, and bring the database up to date.

    A database that another process holds is told and waits: the part is what counts, and the verdict must be heard.
    """
    tables = {
        "comparisons": [
            *(comparison_row(result, one, measured.noise) for one in result.judged),
            *(skipped_row(result, one) for one in result.skipped),
        ],
        "turns": [
            row
            for members in measured.members.values()
            for number, member in enumerate(members)
            if member.alive
            for row in turn_rows(result.run_id, member, number)
        ],
    }
    name = make_key([result.run_id, "gate"])
    write_part(folder.path, name, tables, manifest={"gate": {"base": result.base, "candidate": result.candidate}})
    folder.finish()
    try:
        ingest(folder.store)
    except ResultsError as error:
        print(f"moebench: the database is not up to date yet: {error}", file=sys.stderr)


def skipped_row(result: GateResult, one: Skipped) -> dict[str, Any]:
    """Return the row of a case without a verdict: its status stands in the place of one."""
    return {
        "run_id": result.run_id,
        "case_key": one.case_key,
        "kind": "case",
        "metric": "",
        "label": one.label,
        "verdict": one.status,
        "reason": one.reason,
        "base": result.base,
        "candidate": result.candidate,
    }


def comparison_row(result: GateResult, one: Judged, noises: Mapping[str, Noise]) -> dict[str, Any]:
    """Return the row of table ``comparisons``; ``noises`` has the noise of each clock."""
    noise = noises.get(one.clock) if one.kind == "time" else None
    names = ("kind", "metric", "label", "base_value", "candidate_value", "unit", "ratio", "lo", "hi", "p", "q")
    return {
        **{name: getattr(one, name) for name in (*names, "pairs", "turns", "margin", "asked")},
        "run_id": result.run_id,
        "base_case": one.base_case,
        "case_key": one.case_key,
        "clock": one.clock or None,
        "verdict": str(one.verdict),
        "reason": one.reason or None,
        "base": result.base,
        "candidate": result.candidate,
        "tau": noise.tau if noise else None,
        "detectable": noise.detectable if noise else None,
        "moved": list(one.moved),
    }


def turn_rows(run_id: str, member: PairedMember, number: int) -> list[dict[str, Any]]:
    """Return the rows of table ``turns`` of one case in one process pair."""
    rows = []
    clocks = clocks_of(member.members)
    for side in SIDES:
        one = member.members[side]
        for clock in clocks:
            ns = getattr(one, f"{clock}_ns")
            rows.append(
                {
                    "run_id": run_id,
                    "case_key": member.paired.key,
                    "side": side,
                    "pair": number,
                    "clock": clock,
                    "ns": ns,
                    "turn": one.turns,
                    "switches": one.switches,
                }
            )
    return rows
