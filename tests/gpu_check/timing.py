"""Times beside torch's grouped_mm and the peers that are installed, by `moebench run`: no time without its oracle."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from checks import FAILED, PASSED, SKIPPED, Result
from programs import Run, run_program

HERE = Path(__file__).resolve().parent
PEERS = ("vllm",)
"""The backends of peers.py, each of somebody else's package."""

BACKENDS = ("eager", "grouped", "batched", "compiled", "triton", "cuda_fused", *PEERS)
TOKENS = (1, 16, 512)
QUERY = """
SELECT c.backend, c.tokens, c.status, c.reason, c.flags, c.evidence, c.executed, t.clock, t.n, t.median_ns,
       t.median_lo_ns, t.median_hi_ns
FROM cases c LEFT JOIN timings_raw t ON t.run_id = c.run_id AND t.case_key = c.case_key AND t.clock = 'device'
WHERE c.suite = 'throughput' ORDER BY c.tokens, c.backend
"""


def table(store: Path, known: Sequence[str], run: Run = run_program) -> Iterator[Result]:
    """Yield a result for every backend and number of tokens: its time on the device's clock, or why there is none."""
    names = [name for name in BACKENDS if name in (*known, *PEERS)]
    command = [sys.executable, "-m", "moebench.bench", "run", f"plugin={HERE / 'peers.py'}", "suite=throughput"]
    command += ["model=small", "model.hidden=1024", "model.width=512", "device=cuda", "axes.dtype=bfloat16"]
    command += [f"axes.backend=[{','.join(names)}]", f"axes.tokens=[{','.join(map(str, TOKENS))}]"]
    command += ["axes.residency=cold", "engine.processes=1", "engine.seconds=0.5", f"store={store}"]
    code, said = run(command, 300.0)
    code_of_sql, printed = run(
        [sys.executable, "-m", "moebench.bench", "sql", QUERY, "--format=json", "--store", str(store)], 60.0
    )
    if code_of_sql:
        yield Result("timing", FAILED, f"the run left no table (status {code}): {said[-300:]}")
        return
    yield from (of_row(row) for row in json.loads(printed))


def of_row(row: Mapping[str, Any]) -> Result:
    """Return what a row of the store says: only one that is ok, measured on a GPU and by its clock has a time."""
    name = f"timing {row['backend']} T={row['tokens']}"
    if row["status"] == "skipped":
        return Result(name, SKIPPED, row["reason"] or "no reason was kept")
    if row["status"] != "ok":
        return Result(name, FAILED, f"{row['status']}: {row['reason']}")
    if row["evidence"] != "measured-gpu" or row["median_ns"] is None:
        return Result(name, FAILED, f"it has no time on a device's clock (evidence {row['evidence']})")
    kept = ("n", "median_ns", "median_lo_ns", "median_hi_ns", "flags")
    return Result(name, PASSED, row["reason"] or "", {key: row[key] for key in kept})
