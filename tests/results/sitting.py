"""A small run as its own process: three parts, run.json and an ingest. Usage: sitting.py STORE RUN_ID [PARTS]."""

import sys
from pathlib import Path

from moebench.results.database import ingest
from moebench.results.parts import blob_row, write_json_atomic, write_part
from moebench.results.statistics import summary


def tables(run_id, part, log):
    """One ok case with two processes, one that crashed, metrics, a series, an item and a log."""
    ok, bad = f"{part}-ok", f"{part}-bad"
    shared = {"run_id": run_id, "method_key": "m", "group_key": part, "suite": "selftest", "protocol": "timed"}
    shared |= {"model": "toy", "routing": "topk", "backend": "eager", "tokens": 4, "evidence": "measured-cpu"}
    turns = [0, 0, 1, 1, 2, 2, 3, 3]
    samples = [[1000 + 7 * i + 100 * process + len(part) for i in range(8)] for process in range(2)]
    key = {"run_id": run_id, "case_key": ok}
    return {
        "cases": [
            {
                **shared,
                "case_key": ok,
                "status": "ok",
                "flags": [],
                "params": {"k": 2},
                "finished_at": "2026-02-03T04:05:06",
            },
            {**shared, "case_key": bad, "status": "crashed", "reason": "signal 11", "flags": [], "error": float("nan")},
        ],
        "timings": [
            {**key, "process": process, "clock": "wall", "sitting": "s", "ns": ns, "turn": turns, **summary(ns)}
            for process, ns in enumerate(samples)
        ],
        "metrics": [{**key, "name": "gini", "value": 0.25, "unit": "1", "lo": None, "hi": float("inf"), "n": 4}],
        "series": [{**key, "name": "load", "layer": 0, "step": None, "values": [1.0, float("nan"), 0.1 + 0.2]}],
        "items": [{**key, "task": "t", "item": "1", "metric": "acc", "value": 1.0}],
        "blobs": [blob_row(run_id, ok, "log", log)],
    }


def write_run(store, run_id, parts):
    """Write what one run leaves behind."""
    folder = Path(store) / "runs" / run_id
    run = {"plan_hash": "p", "started_at": "2026-02-03T04:00:00", "status": "running", "git_dirty": True}
    run |= {"packages": {"torch": "2"}, "host": {"host_key": "h", "cpu": "toy", "cores": 2, "facts": {"isa": ["a"]}}}
    write_json_atomic(folder / "run.json", run)
    for part in parts:
        log = f"log of {part}".encode()
        write_part(folder, part, tables(run_id, part, log), {"log": log}, {"mode": "interleaved"})
    write_json_atomic(folder / "run.json", {**run, "status": "finished"})


if __name__ == "__main__":
    write_run(sys.argv[1], sys.argv[2], sys.argv[3].split(",") if len(sys.argv) > 3 else ["g1", "g2", "g3"])
    ingest(Path(sys.argv[1]))
