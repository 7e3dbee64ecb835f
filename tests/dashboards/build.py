"""A store with made-up but plausible results, written as real parts: what the tests of the dashboards look at."""

from __future__ import annotations

import datetime
import hashlib
import itertools
import json
import math
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moebench.results.parts import write_part
from moebench.results.statistics import summary

HOSTILE = '<img src=x onerror="document.title=1">'
HOSTILE_REASON = "</script><script>document.title=2</script> & \"quotes\" 'too'"
START = datetime.datetime(2026, 3, 14, 9, 26, 53)

SPEED = {"eager": 1.0, "grouped": 0.62, "batched": 0.81, "compiled": 0.55, "packed": 0.42, "reference": 2.6}
QUANT = {"none": (1.0, 0.0), "rtn_int8": (0.9, 0.0006), "rtn_int4": (0.84, 0.013)}
SPARSE = {"none": (1.0, 0.0), "teal": (0.78, 0.021)}
ROUTING = {"topk": (1.0, 0.004), "moepp": (0.8, 0.011)}


def key(*parts: object) -> str:
    """Return a key made of anything."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()


class Builder:
    """Collects rows of one run and writes them as one part with a run.json."""

    def __init__(self, store: Path, run_id: str = "20260314-092653-a1b2c3", seed: int = 7) -> None:
        self.store, self.run_id, self.random = store, run_id, random.Random(seed)
        self.tables: dict[str, list[dict[str, Any]]] = {}

    def add(self, table: str, **row: Any) -> None:
        """Add one row."""
        self.tables.setdefault(table, []).append({"run_id": self.run_id, **row})

    def case(self, **over: Any) -> dict[str, Any]:
        """Add a case with defaults for every column, and return its row."""
        row: dict[str, Any] = {
            "suite": "throughput", "suite_version": "1", "protocol": "timed", "model": "smollm2", "layers": "5",
            "structure": "split", "routing": "topk", "quantization": "none", "sparsity": "none", "backend": "eager",
            "traffic": "recorded", "tokens": 256, "dtype": "float32", "pass": "forward", "boundary": "topk",
            "threads": 1, "residency": "warm", "device": "cpu", "seed": 0, "base": "Q4_1",
            "evidence": "measured-cpu", "status": "ok", "reason": None, "flags": [], "weights": "dense",
            "sparse": "none", "executed": json.dumps({"weights": "dense", "kernels": ["aten::mm"]}),
            "error": 2.1e-7, "error_bound": 1e-5, "flips": 0, "input_sha256": key("input"), "finished_at": START,
        }  # fmt: skip
        params = over.pop("params", {})
        row.update(over)
        method = [row[name] for name in ("model", "layers", "structure", "routing", "quantization", "sparsity")]
        group = [row[name] for name in ("suite", "model", "traffic", "tokens", "dtype", "evidence", "threads")]
        row.setdefault("method_key", key("method", method, params))
        row.setdefault("group_key", key("group", group))
        row.setdefault("case_key", key("case", row["method_key"], row["group_key"], row["backend"]))
        row["params"] = json.dumps({axis: params.get(axis, {}) for axis in ("model", "structure", "routing")})
        self.add("cases", **row)
        return row

    def timings(self, row: dict[str, Any], median_us: float, processes: int = 2, calls: int = 180) -> None:
        """Add samples around a median, in turns of four calls, with a little drift between processes."""
        for process in range(processes):
            level = median_us * self.random.gauss(1, 0.006)
            wall = [int(1000 * level * (1 + abs(self.random.gauss(0, 0.025)))) for _ in range(calls)]
            turns = [index // 4 for index in range(calls)]
            for clock, ns in (("wall", wall), ("cpu", [int(value * 0.995) for value in wall])):
                sitting = f"{row['group_key'][:8]}-{process}"
                self.add(
                    "timings", case_key=row["case_key"], process=process, clock=clock, sitting=sitting,
                    mode="interleaved", ns=ns, turn=turns, switches=process, **summary(ns),
                )  # fmt: skip

    def metric(self, row: dict[str, Any], name: str, value: float, unit: str, half: float | None = None) -> None:
        """Add a metric, with an interval where its half width is given."""
        bounds = {} if half is None else {"lo": value - half, "hi": value + half, "n": 4096}
        self.add("metrics", case_key=row["case_key"], name=name, value=value, unit=unit, **bounds)

    def load(self, row: dict[str, Any], experts: int, skew: float, name: str = "tokens_per_expert") -> None:
        """Add the load of each expert, the more uneven the greater the skew."""
        order = random.Random(row["method_key"])
        values = [row["tokens"] * (rank + 1) ** -skew for rank in range(experts)]
        order.shuffle(values)
        self.add("series", case_key=row["case_key"], name=name, unit="tokens", layer=5, step=0, values=values)

    def write(self, started: datetime.datetime = START) -> Path:
        """Write the run and return the store."""
        folder = self.store / "runs" / self.run_id
        write_part(folder, "part", self.tables)
        (folder / "run.json").write_text(json.dumps(self._record(started)))
        return self.store

    def _record(self, started: datetime.datetime) -> dict[str, Any]:
        stable = {"cpu": "AMD EPYC 9R14", "isa": ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"], "cores": 2,
                  "caches": {"L1": 32768, "L2": 1048576, "L3": 33554432}, "machine": "x86_64"}  # fmt: skip
        facts = {"stable": stable, "snapshot": {"load": [0.31, 0.42, 0.4], "memory_available_bytes": 6_700_000_000}}
        return {
            "run_id": self.run_id, "plan_hash": key("plan"), "started_at": started.isoformat(),
            "finished_at": (started + datetime.timedelta(seconds=143)).isoformat(), "status": "finished",
            "command": "moebench run experiment=quick", "host_key": "host", "git_sha": key("git")[:40],
            "git_dirty": True, "version": "0.1.0", "packages": {"torch": "2.13.0", "numpy": "2.3.1"},
            "config": {"experiment": "quick", "threads": 1},
            "host": {"host_key": "host", "cpu": stable["cpu"], "cores": 2, "memory_bytes": 8 * 2**30, "facts": facts},
        }  # fmt: skip


def full_store(store: Path, tokens: Iterable[int] = (16, 256, 1024), extra: int = 0) -> Path:
    """Write a run with everything in it: all sections of the page have something to show."""
    run = Builder(store)
    for count in tokens:
        _speed(run, count)
    _quality(run)
    _forced(run)
    _probes(run)
    _troubles(run)
    _claims(run)
    for number in range(extra):
        row = run.case(suite="latency", tokens=1 + number % 16, routing=f"topk{number // 16}")
        run.timings(row, 40 + number, processes=1, calls=120)
    return run.write()


def _methods() -> list[tuple[str, str, str, dict[str, Any]]]:
    taus = [{"routing": {"tau": 0.25}}, {"routing": {"tau": 0.75}}]
    plain = [("topk", quant, sparse, {}) for quant in QUANT for sparse in SPARSE]
    return plain + [("moepp", "none", "none", tau) for tau in taus]


def _speed(run: Builder, tokens: int) -> None:
    for routing, quant, sparse, params in _methods():
        for backend, factor in SPEED.items():
            if quant != "none" and backend in ("batched", "reference"):
                continue
            packed = "packed" if backend == "packed" and quant != "none" else "dense"
            row = run.case(
                routing=routing, quantization=quant, sparsity=sparse, backend=backend, tokens=tokens, weights=packed,
                sparse="none" if sparse == "none" else "mask", params=params,
                flags=["contended"] if (backend, quant) == ("compiled", "rtn_int8") else [],
            )  # fmt: skip
            share = params.get("routing", {}).get("tau", 0.5) + 0.5
            cost = factor * QUANT[quant][0] * SPARSE[sparse][0] * ROUTING[routing][0] * share
            run.timings(row, cost * (60 + 21 * tokens**0.97))
            run.metric(row, "flops", 2.0 * tokens * 2 * 3 * 576 * 192, "flop")
            run.metric(
                row, "bytes", {"none": 1.0, "rtn_int8": 0.26, "rtn_int4": 0.14}[quant] * 4.2e6 + tokens * 4608, "byte"
            )
            if backend == "eager":
                run.load(row, 8, 0.35 if routing == "topk" else 0.8)


def _quality(run: Builder) -> None:
    for routing, quant, sparse, params in _methods():
        row = run.case(
            suite="accuracy", protocol="once", routing=routing, quantization=quant, sparsity=sparse, tokens=4096,
            params=params, elapsed_s=6.4,
        )  # fmt: skip
        lost = ROUTING[routing][1] + QUANT[quant][1] + SPARSE[sparse][1]
        lost *= 1.5 - params.get("routing", {}).get("tau", 0.5)
        run.metric(row, "kl_to_dense", lost, "nats", lost * 0.06)
        run.metric(row, "perplexity", 17.4 * (1 + 3 * lost), "", 0.2)


def _forced(run: Builder) -> None:
    for traffic, skew in (("zipf", 1.0), ("hotspot", 2.0)):
        row = run.case(traffic=traffic, routing="topk", model="olmoe-synthetic", base=None)
        run.timings(row, 900)
        run.load(row, 64, skew)
        run.load(row, 64, skew * 0.9, "requested_share")


def _probes(run: Builder) -> None:
    row = run.case(suite="roofline", protocol="once", model="none", routing="none", structure="none", base=None)
    run.metric(row, "peak_flops", 7.1e10, "flop/s")
    for level, value in (("L1", 2.9e11), ("L2", 1.3e11), ("L3", 6.2e10), ("dram", 1.4e10)):
        run.metric(row, f"bandwidth_{level}", value, "byte/s")


def _troubles(run: Builder) -> None:
    run.case(backend=HOSTILE, status="failed", reason=HOSTILE_REASON, error=None, executed=None)
    run.case(backend="segfault", status="crashed", reason="the worker was killed by SIGSEGV during 'turn'.", error=None)
    run.case(
        backend="rounding",
        status="wrong",
        reason="row 17 is 3.1e-02 from the reference; the bound is 1.0e-05.",
        error=0.031,
    )
    run.case(
        backend="lazy", status="fell_back", reason="the plan says weights=packed, the backend executed dequantized."
    )
    run.case(backend="hang", status="timed_out", reason="no answer to 'turn' within 60 s.", error=None)
    for tokens in (16, 256, 1024):
        run.case(backend="triton", tokens=tokens, status="skipped", error=None, executed=None,
                 reason="triton needs a GPU, and none is visible here.")  # fmt: skip
    row = run.case(backend="eager", tokens=64, flags=["not_steady"])
    run.timings(row, 151)
    row = run.case(backend="triton", evidence="interpreted", tokens=16)
    run.timings(row, 88_000, processes=1, calls=12)


def _claims(run: Builder) -> None:
    run.add(
        "claims", key="moepp2024", title="MoE++", claim="FFN time falls to tau/(1+tau) of top-k's.", kind="empirical",
        figure="1.1-2.1x expert throughput", ours="FFN time share", model="smollm2", unit="x", direction="greater",
        margin=0.05, seeds=[0, 1, 2], a=[1.3, 1.28, 1.33], b=[1.0, 1.0, 1.0], estimate=1.3, lo=1.24, hi=1.36,
        verdict="confirmed", spec=json.dumps({"run": {"suite": "throughput", "overrides": ["axes.routing=moepp"]}}),
    )  # fmt: skip
    run.add(
        "claims", key="teal2024", title="TEAL", claim="Half of the activations can be left out at little loss.",
        kind="empirical", figure="40-50 % sparsity, perplexity +0.2", ours="perplexity difference", model="smollm2",
        unit="", seeds=[0], estimate=0.31, verdict="inconclusive", reason="one seed bears no interval", spec="{}",
    )  # fmt: skip


STRUCTURES = {"split": (1.0, 0.0), "read_me": (0.93, 0.006), "upcycle": (1.2, -0.0005)}


def pareto_store(store: Path) -> Path:
    """Write 72 methods (3 structures, 4 routings, 3 quantizations, 2 sparsities) on two backends, judged and timed."""
    run = Builder(store)
    routings = {**ROUTING, "expert_choice": (0.9, 0.03), HOSTILE: (1.1, 0.05)}
    for structure, routing, quant, sparse in itertools.product(STRUCTURES, routings, QUANT, SPARSE):
        parts = (STRUCTURES[structure], routings[routing], QUANT[quant], SPARSE[sparse])
        names = {"structure": structure, "routing": routing, "quantization": quant, "sparsity": sparse}
        for backend in ("eager", "grouped"):
            row = run.case(backend=backend, **names)
            run.timings(row, 5400 * SPEED[backend] * math.prod(part[0] for part in parts), calls=60)
            run.metric(row, "flops", 5.1e6 * 256, "flop")
            run.metric(row, "bytes", 4.2e6 * parts[2][0], "byte")
            run.metric(row, "expert_bytes", 5.3e6 * parts[2][0] ** 8, "byte")
            run.metric(row, "resident_bytes", 6e6 * parts[2][0] ** 8, "byte")
        judged(run, sum(part[1] for part in parts), **names)
    _probes(run)
    return run.write()


def judged(run: Builder, lost: float, task: str = "cloze", **over: Any) -> dict[str, Any]:
    """Add the quality of a method that lost so much (in nats), with 300 items of a task."""
    row = run.case(**{"suite": "accuracy", "protocol": "once", "tokens": 4096, "elapsed_s": 6.4, **over})
    run.metric(row, "kl_to_dense", lost, "nat/token", abs(lost) * 0.06 + 1e-4)
    run.metric(row, "perplexity", 17.4 * math.exp(lost), "1", 0.12)
    right = round(300 * (0.8 - 2 * max(lost, 0.0)))
    for item in range(300):
        run.add("items", case_key=row["case_key"], task=task, item=f"{item:03d}", metric="acc,none", value=item < right)
    return row


GATE_SIDES = {"base": "HEAD~1 (1a2b3c4)", "candidate": "work tree (1a2b3c4 + changes)"}

HOSTILE_LABEL = "<script>document.title=3</script> | a\x1b[31mb\n::error::injected ##[error]x"


def gate_store(store: Path, detectable: float = 0.031) -> Path:
    """Write a run of a gate: no cases, a comparison of every kind and verdict, and the turns of five process pairs."""
    run = Builder(store, "20260315-101010-9a7e00")
    for label, factor, verdict in (
        ("T=16 E=8 k=2 on eager", 1.12, "regressed"),
        (HOSTILE_LABEL, 1.0, "inconclusive"),
        ("T=64 E=8 k=2 on grouped", 0.8, "improved"),
        ("T=256 E=8 k=2 on eager", 1.003, "equivalent"),
    ):
        moved = ["environment: torch 2.12 -> 2.13", HOSTILE] if verdict == "regressed" else []
        reason = HOSTILE_REASON if verdict == "inconclusive" else None
        compared(
            run, label, verdict, clock="cpu", ratio=factor, lo=factor / 1.02, hi=factor * 1.02, pairs=5, turns=200,
            p=0.004, q=0.008, tau=0.015, detectable=detectable, margin=0.01, asked=0.05, reason=reason, moved=moved,
            base_value=50_000.0, candidate_value=50_000.0 * factor, unit="ns",
        )  # fmt: skip
        gate_turns(run, key(label), factor)
    compared(run, "T=16 E=8 k=2 on eager", "equivalent", kind="metric", metric="bytes", unit="byte",
             base_value=1234567.0, candidate_value=1234567.0, ratio=1.0)  # fmt: skip
    compared(run, "smollm2 with teal", "inconclusive", kind="accuracy", metric="lambada", unit="1", ratio=-0.012,
             lo=-0.03, hi=0.006, base_value=0.52, candidate_value=0.508, margin=0.01, turns=400)  # fmt: skip
    return run.write()


def compared(run: Builder, label: str, verdict: str, kind: str = "time", metric: str = "time", **over: Any) -> None:
    """Add a comparison."""
    row = {"base_case": key(label), "case_key": key(label), "moved": [], **GATE_SIDES, **over}
    run.add("comparisons", label=label, kind=kind, metric=metric, verdict=verdict, **row)


def gate_turns(run: Builder, case_key: str, factor: float, pairs: int = 5, turns: int = 40) -> None:
    """Add the calls of all sides: three in a turn, of which the shortest of the candidate is ``factor`` of the base's.

    The last turn of the candidate is missing, as where a worker ended early.
    """
    for pair in range(pairs):
        least = [int(50_000 * run.random.gauss(1, 0.01)) for _ in range(turns)]
        for side, level in (("base", 1.0), ("again", run.random.gauss(1, 0.01)), ("candidate", factor)):
            kept = least[:-1] if side == "candidate" else least
            own = [int(one * level * run.random.gauss(1, 0.02)) for one in kept]
            ns = [int(one * slower) for one in own for slower in (1.3, 1.0, 1.7)]
            turn = [number for number in range(len(kept)) for _ in range(3)]
            for clock in ("cpu", "wall"):
                run.add("turns", case_key=case_key, side=side, pair=pair, clock=clock, ns=ns, turn=turn, switches=0)


# level, density of weights, time over the dense case of the same backend
TEAL = ((0.25, 0.76, 0.90), (0.5, 0.52, 0.64), (0.8, 0.22, 0.31))
CATS = ((0.25, 0.84, 1.06), (0.5, 0.68, 0.97), (0.8, 0.45, 0.81))
DENSE = {"column_skip": 100.0, "eager": 130.0, "grouped": 85.0}


def together(run: Builder, row: dict[str, Any], us: float) -> None:
    """Add turns that all cases of a sitting take together, with a small scatter around a time."""
    step = 3 + int(us) % 7
    minima = [int(1000 * us * (1 + 0.001 * (step * turn % 11 - 5))) for turn in range(60)]
    for process in range(2):
        run.add(
            "timings", case_key=row["case_key"], process=process, clock="wall", sitting=f"s{process}",
            mode="interleaved", ns=minima, turn=list(range(60)), n=60, min_ns=min(minima),
            median_ns=1000.0 * us, median_lo_ns=1000.0 * us, median_hi_ns=1000.0 * us,
        )  # fmt: skip


def decoded(run: Builder, us: float, density: float | None = None, **over: Any) -> dict[str, Any]:
    """Add a decode of cold weights; one that skips moves and multiplies what its density says."""
    row = run.case(suite="latency", tokens=1, residency="cold", **over)
    together(run, row, us)
    run.metric(row, "bytes", 1e7 * (density if density and over["sparse"] == "skip" else 1.0), "byte")
    run.metric(row, "flops", 5e6 * (density if density and over["sparse"] == "skip" else 1.0), "flop")
    if density is not None:
        run.metric(row, "weight_density", density, "share")
    return row


Levels = tuple[tuple[float, float, float], ...]


def skipping(
    run: Builder,
    levels: Levels,
    method: str,
    backend: str = "column_skip",
    sparse: str = "skip",
    times: float = 1.0,
    **over: Any,
) -> None:
    """Add a method at its levels."""
    for level, density, factor in levels:
        name = {"sparsity": method, "backend": backend, "sparse": sparse, "case_key": f"{method}{level}{backend}"}
        us = DENSE[backend] * factor * times
        row = decoded(run, us, density, **name, **over)
        row["params"] = f'{{"sparsity": {{"level": {level}}}}}'


def saving_run(run: Builder) -> Builder:
    """Add two methods that skip on one backend, one that masks on another, and the dense cases of three."""
    for backend, us in DENSE.items():
        decoded(run, us, backend=backend)
    skipping(run, TEAL, "teal")
    skipping(run, CATS, "cats")
    skipping(run, TEAL, "teal", "eager", "mask", times=2.8)
    return run
