"""Which run is meant: its id, a prefix that only it has, ``latest`` or ``latest~N``."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..contracts import MoebenchError

SHOWN = 3


def find_run(given: str, runs: Sequence[str]) -> str:
    """Return the id of the run that is meant; ``runs`` are those of the store that have cases, the latest first."""
    if not runs:
        raise MoebenchError("the store holds no run with cases; run `moebench run suite=selftest` first.")
    back = re.fullmatch(r"latest(?:~(\d+))?", given)
    if back:
        steps = int(back[1] or 0)
        if steps >= len(runs):
            oldest = f"latest~{len(runs) - 1}"
            raise MoebenchError(f"there is no {given}: the oldest of {len(runs)} runs is {oldest}; name that.")
        return runs[steps]
    if given in runs:
        return given
    found = [run for run in runs if given and run.startswith(given)]
    if len(found) == 1:
        return found[0]
    if found:
        some = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        raise MoebenchError(f"'{given}' fits {len(found)} runs ({some}); write more of its id.")
    everything = '`moebench sql "SELECT run_id, started_at FROM runs"` lists all'
    raise MoebenchError(f"there is no run '{given}'; the latest is {runs[0]}, and {everything}.")
