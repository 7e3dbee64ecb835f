"""Stores with few runs, whose times are exact so that what is printed can be golden."""

from __future__ import annotations

import datetime
import hashlib
import json

from moebench.results.parts import write_part
from moebench.results.statistics import summary

START = datetime.datetime(2026, 3, 14, 9, 26)


def key(name):
    return hashlib.sha256(name.encode()).hexdigest()


def case(name, us=None, metrics=None, items=None, **columns):
    """Return the tables of one case: ``us`` is its median time in microseconds."""
    row = {"case_key": key(name), "method_key": "m", "group_key": "g", "suite": "throughput", "protocol": "timed"}
    row |= {"model": "small", "layers": "0", "structure": "none", "routing": "topk", "quantization": "none"}
    row |= {"sparsity": "none", "backend": name, "traffic": "gaussian", "tokens": 16, "dtype": "float32"}
    row |= {"pass": "forward", "boundary": "topk", "threads": 1, "residency": "warm", "device": "cpu", "seed": 0}
    row |= {"evidence": "measured-cpu", "status": "ok", "flags": [], "input_sha256": "i", "error": 1e-7, "params": "{}"}
    tables = {"cases": [{**row, **columns}]}
    shared = {"case_key": row["case_key"]}
    if us is not None:
        ns = [int(us * 1000) + step for step in (-2, -1, 0, 1, 2)]
        timing = {"process": 0, "sitting": "s", "mode": "interleaved", "turn": [0, 1, 2, 3, 4]}
        tables["timings"] = [{**shared, **timing, "clock": clock, "ns": ns, **summary(ns)} for clock in ("wall", "cpu")]
    tables["metrics"] = [{**shared, "name": name, "value": v, "unit": "1"} for name, v in (metrics or {}).items()]
    tables["items"] = [
        {**shared, "task": "arc", "item": str(number), "metric": "acc", "value": value}
        for number, value in enumerate(items or ())
    ]
    return tables


def write_run(store, day, *cases, host="h" * 64, sha="1a2b3c4d", dirty=False):
    """Write the run of a day with these cases and return its id."""
    started = START + datetime.timedelta(days=day)
    run_id = f"{started:%Y%m%d-%H%M%S}-{key(str(day))[:6]}"
    tables = {}
    for one in cases:
        for table, rows in one.items():
            tables.setdefault(table, []).extend({"run_id": run_id, **row} for row in rows)
    write_part(store / "runs" / run_id, "part", tables)
    run = {"run_id": run_id, "started_at": started.isoformat(), "status": "finished", "host_key": host}
    run |= {"git_sha": sha, "git_dirty": dirty, "version": "0.1.0"}
    run["host"] = {"host_key": host, "cpu": "toy", "cores": 2, "facts": {}}
    (store / "runs" / run_id / "run.json").write_text(json.dumps(run))
    return run_id
