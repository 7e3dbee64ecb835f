"""What the report shows, read from the results by SQL into plain dataclasses. No HTML and no figures here."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .query import Answer, Row, ask, parse_json

if TYPE_CHECKING:
    import duckdb

AXES = (
    "backend",
    "routing",
    "quantization",
    "sparsity",
    "tokens",
    "suite",
    "model",
    "layers",
    "structure",
    "traffic",
    "dtype",
    "pass",
    "boundary",
    "threads",
    "residency",
    "device",
    "seed",
    "base",
)
"""Columns of a case that tell it from another, in the order in which tables show them."""

IN_LABEL = tuple(axis for axis in AXES if axis != "base")
"""Axes that name a case; the base of its weights follows from the model."""

QUALITY_METRICS = ("kl_to_dense", "perplexity", "bits_per_byte")
"""Metrics of suite accuracy that stand for the quality of a method; lower is better for all."""

STATUSES = ("wrong", "crashed", "failed", "timed_out", "fell_back", "skipped", "ok")
"""The worst first."""

RUNS = """
SELECT run_id, r.plan_hash, r.started_at, r.finished_at, r.status, r.command, r.host_key, r.git_sha, r.git_dirty,
       r.version, r.packages, r.config, c.cases, c.ok
FROM (SELECT run_id FROM runs UNION SELECT run_id FROM cases) ids
LEFT JOIN runs r USING (run_id)
LEFT JOIN (SELECT run_id, count(*) AS cases, count(*) FILTER (status = 'ok') AS ok, max(finished_at) AS last
           FROM cases GROUP BY run_id) c USING (run_id)
ORDER BY coalesce(r.started_at, c.last) DESC NULLS LAST, run_id DESC
"""

HOSTS = "SELECT host_key, cpu, cores, memory_bytes, facts FROM hosts WHERE run_id = $run_id"

CASES = """
WITH timed AS (          -- one row per case: the device's clock if it has one, else the wall clock; never CPU time
  SELECT case_key, clock, list_aggregate(flatten(list(ns)), 'median') AS median_ns, count(*) AS processes,
         sum(n)::BIGINT AS samples,
         CASE WHEN count(median_lo_ns) = count(*) THEN min(median_lo_ns) END AS lo_ns,   -- envelope of the processes
         CASE WHEN count(median_hi_ns) = count(*) THEN max(median_hi_ns) END AS hi_ns,
         list(DISTINCT sitting ORDER BY sitting) AS sittings, list(DISTINCT mode ORDER BY mode) AS modes
  FROM timings WHERE run_id = $run_id AND clock <> 'cpu'
  GROUP BY case_key, clock
  QUALIFY row_number() OVER (PARTITION BY case_key ORDER BY clock = 'wall', clock) = 1
)
SELECT c.case_key, c.method_key, c.group_key, c.suite, c.protocol, c.model, c.layers, c.structure, c.routing,
       c.quantization, c.sparsity, c.backend, c.weights, c.sparse, c.traffic, c.tokens, c.dtype, c.pass, c.boundary,
       c.threads, c.residency, c.device, c.seed, c.base, c.evidence, c.status, c.reason, c.flags, c.error,
       c.error_bound, c.flips, c.elapsed_s, c.executed, c.params, t.clock, t.median_ns, t.lo_ns, t.hi_ns,
       t.processes, t.samples, t.sittings, t.modes
FROM cases c LEFT JOIN timed t ON t.case_key = c.case_key AND c.status = 'ok'
WHERE c.run_id = $run_id
ORDER BY c.suite, c.model, c.tokens, c.routing, c.quantization, c.sparsity, c.backend, c.case_key
"""

METRICS = """
SELECT case_key, name, value, unit, lo, hi, n FROM metrics WHERE run_id = $run_id ORDER BY case_key, name
"""

SAMPLES = """
SELECT case_key, process, clock, sitting, mode, ns, turn, n, min_ns, median_ns, median_lo_ns, median_hi_ns, p90_ns,
       p95_ns, p99_ns, switches
FROM timings WHERE run_id = $run_id AND clock IS NOT NULL ORDER BY case_key, clock DESC, process
"""

LEFT_OUT = "SELECT path, reason FROM left_out ORDER BY path"

MINIMA = """
SELECT case_key, clock, sitting, process, list(turn ORDER BY turn) AS turns, list(ns ORDER BY turn) AS minima_ns
FROM (SELECT case_key, clock, sitting, process, turn, min(ns) AS ns
      FROM (SELECT case_key, clock, sitting, process, unnest(turn) AS turn, unnest(ns) AS ns
            FROM timings WHERE run_id = $run_id AND clock <> 'cpu')
      GROUP BY case_key, clock, sitting, process, turn)
GROUP BY case_key, clock, sitting, process ORDER BY case_key, sitting, process
"""

ROOFLINE = """
SELECT f.case_key, f.value AS flops, b.value AS bytes, f.value / b.value AS intensity
FROM metrics f JOIN metrics b USING (run_id, case_key)
WHERE f.run_id = $run_id AND f.status = 'ok' AND f.name = 'flops' AND b.name = 'bytes' AND f.value > 0 AND b.value > 0
"""

CEILINGS = """
SELECT m.run_id, m.dtype, m.threads, m.device, m.evidence, m.name, max(m.value) AS value, m.unit
FROM metrics m LEFT JOIN runs r USING (run_id)
WHERE m.suite = 'roofline' AND m.status = 'ok' AND m.value > 0
  AND (m.name LIKE 'peak_flops%' OR m.name LIKE 'bandwidth_%')
  AND (m.run_id = $run_id OR r.host_key = (SELECT any_value(host_key) FROM runs WHERE run_id = $run_id))
GROUP BY m.run_id, m.dtype, m.threads, m.device, m.evidence, m.name, m.unit, r.started_at
QUALIFY row_number() OVER (PARTITION BY m.dtype, m.threads, m.device, m.evidence, m.name
                           ORDER BY m.run_id = $run_id DESC, r.started_at DESC) = 1
ORDER BY m.name, m.dtype
"""

LOADS = """
SELECT min(s.case_key) AS case_key, s.name, c.method_key, c.traffic, c.tokens, s.layer, s.step, s.values
FROM series s JOIN cases c ON c.run_id = s.run_id AND c.case_key = s.case_key
WHERE s.run_id = $run_id AND s.name IN ('tokens_per_expert', 'requested_share') AND c.status = 'ok'
GROUP BY s.name, c.method_key, c.traffic, c.tokens, s.layer, s.step, s.values
ORDER BY c.method_key, c.traffic, c.tokens, s.layer, s.step
"""

CLAIMS = """
SELECT c.run_id, c.key, c.title, c.claim, c.kind, c.figure, c.ours, c.model, c.unit, c.direction, c.margin, c.seeds,
       c.a, c.b, c.estimate, c.lo, c.hi, c.verdict, c.reason, c.spec
FROM claims c LEFT JOIN runs r USING (run_id)
QUALIFY row_number() OVER (PARTITION BY c.key ORDER BY c.run_id = $run_id DESC, r.started_at DESC NULLS LAST) = 1
ORDER BY c.key
"""


@dataclass(frozen=True)
class Run:
    """One run as the summary shows it; NULL columns are None."""

    run_id: str
    row: Mapping[str, Any]

    @property
    def packages(self) -> dict[str, str]:
        """Versions of the installed packages that were recorded."""
        found = parse_json(self.row.get("packages"))
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}


@dataclass(frozen=True)
class Case:
    """One case with its outcome. Times are nanoseconds per call; None is 'not measured'."""

    key: str
    row: Mapping[str, Any]
    axes: Mapping[str, str]
    """Axis values as shown: the name, with those parameters that differ within the run."""
    label: str = ""
    flags: tuple[str, ...] = ()
    metrics: tuple[Row, ...] = field(default=(), repr=False)

    @property
    def status(self) -> str:
        """How the case ended."""
        return str(self.row["status"])

    @property
    def ok(self) -> bool:
        """Whether the case may have a time at all."""
        return self.status == "ok"

    @property
    def median_ns(self) -> float | None:
        """Median time of a call, over the calls of all processes."""
        value = self.row["median_ns"]
        return None if value is None else float(value)

    @property
    def bounds_ns(self) -> tuple[float | None, float | None]:
        """Interval of the median: the envelope of the processes' intervals."""
        return self.row["lo_ns"], self.row["hi_ns"]

    @property
    def layer_tokens_per_s(self) -> float | None:
        """Tokens through one layer per second, from the median time."""
        tokens, median = self.row["tokens"], self.median_ns
        if not tokens or not median:
            return None
        return float(tokens) * self.layer_count / (median * 1e-9)

    @property
    def executed(self) -> str:
        """What ran, in a few words; where the backend told nothing, what the plan said, marked as such."""
        told = parse_json(self.row["executed"])
        if not isinstance(told, dict):
            plan = ", ".join(
                str(self.row[name]) for name in ("weights", "sparse") if self.row[name] not in (None, "none")
            )
            return f"planned: {plan}" if plan else ""
        kernels = ", ".join(map(str, told.get("kernels") or ()))
        return " · ".join(
            str(part) for part in (told.get("weights"), told.get("sparse"), kernels) if part not in (None, "", "none")
        )

    @property
    def layer_count(self) -> int:
        """How many layers one call runs."""
        return max(1, len(re.findall(r"\d+", str(self.row["layers"] or ""))))

    @property
    def active_params(self) -> float | None:
        """Parameters that a token uses: those of its experts, of what is always on, and of the router."""
        values = [metric["value"] for metric in self.metrics if metric["name"] == "active_params_per_token"]
        return values[0] if values else None

    @property
    def quality(self) -> list[Row]:
        """The metrics of quality that a case without a time was run for: of tasks, all that have an interval."""
        if not self.ok or self.median_ns is not None:
            return []
        if self.row["suite"] == "lm_eval":
            return [metric for metric in self.metrics if metric["lo"] is not None]
        return [metric for name in QUALITY_METRICS for metric in self.metrics if metric["name"] == name]


def load_runs(connection: duckdb.DuckDBPyConnection) -> list[Run]:
    """Return all runs of the store, the latest first."""
    return [Run(str(row["run_id"]), row) for row in ask(connection, RUNS).rows]


def load_cases(connection: duckdb.DuckDBPyConnection, run_id: str) -> tuple[list[Case], Answer]:
    """Return the cases of a run, named by what differs between them, and the query that found them."""
    answer = ask(connection, CASES, run_id=run_id)
    metrics: dict[str, list[Row]] = defaultdict(list)
    for row in ask(connection, METRICS, run_id=run_id).rows:
        metrics[row["case_key"]].append(row)
    shown = shown_axes(answer.rows)
    cases = [
        Case(row["case_key"], row, axes, label, tuple(row["flags"] or ()), tuple(metrics[row["case_key"]]))
        for row, axes, label in zip(answer.rows, shown, labels(shown), strict=True)
    ]
    return cases, answer


def labels(axes: Sequence[Mapping[str, str]], names: Iterable[str] = IN_LABEL) -> list[str]:
    """Return one short name per case: the values that differ on each axis; ``none`` goes without saying."""
    varying = varying_axes(axes, names) or ["backend"]
    shown = [
        [_tagged(name, row[name]) for name in varying if row.get(name, "none") not in ("", "none")] for row in axes
    ]
    return [" · ".join(parts) or "plain" for parts in shown]


def varying_axes(axes: Iterable[Mapping[str, str]], names: Iterable[str] = AXES) -> list[str]:
    """Return the axes that have more than one value among these cases, in the order of tables."""
    axes = list(axes)
    return [name for name in names if len({row.get(name, "") for row in axes}) > 1]


def _tagged(axis: str, value: str) -> str:
    """Return a value that can be understood without its column's header."""
    prefix = {"tokens": "T=", "threads": "threads=", "layers": "layer ", "seed": "seed "}
    return prefix.get(axis, "") + value


def shown_axes(rows: Sequence[Row]) -> list[dict[str, str]]:
    """Return the axes of each case as shown, with those of its parameters that differ among ``rows``."""
    return [_shown_axes(row, differing) for row, differing in _with_parameters(rows)]


def _shown_axes(row: Mapping[str, Any], differing: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    shown = {}
    for axis in AXES:
        value = "" if row[axis] is None else str(row[axis])
        inside = ", ".join(f"{name}={value}" for name, value in differing.get(axis, {}).items())
        shown[axis] = f"{value}({inside})" if inside else value
    return shown


def _with_parameters(rows: Sequence[Row]) -> list[tuple[Row, dict[str, dict[str, Any]]]]:
    """Pair each case with those of its parameters that differ between cases of the same name on the same axis."""
    seen: dict[tuple[str, str, str], set[str]] = defaultdict(set)
    parsed = []
    for row in rows:
        params = parse_json(row["params"])
        params = {**params, "suite": params.get("workload")} if isinstance(params, dict) else {}
        flat = {axis: flatten(params.get(axis)) for axis in AXES}
        parsed.append(flat)
        for axis, values in flat.items():
            for name, value in values.items():
                seen[axis, str(row[axis]), name].add(repr(value))
    return [
        (
            row,
            {
                axis: {n: v for n, v in values.items() if len(seen[axis, str(row[axis]), n]) > 1}
                for axis, values in flat.items()
            },
        )
        for row, flat in zip(rows, parsed, strict=True)
    ]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested objects as one object with dotted names; lists stay as they are."""
    if not isinstance(value, Mapping):
        return {prefix: value} if prefix else {}
    result: dict[str, Any] = {}
    for name, item in value.items():
        result.update(flatten(item, f"{prefix}.{name}" if prefix else str(name)))
    return result


def sitting_groups(cases: Iterable[Case]) -> list[list[Case]]:
    """Return the sets of ok cases that may be compared: one group key, one evidence, and measured in one sitting.

    A case joins the largest set of sittings that holds all of its own; cases of other sittings make another set.
    """
    charts: list[tuple[str, frozenset[str], list[Case]]] = []
    timed = [case for case in cases if case.ok and case.median_ns is not None]
    for case in sorted(timed, key=lambda case: -len(case.row["sittings"] or ())):
        group, sittings = case.row["group_key"], frozenset(case.row["sittings"] or ())
        for known, wider, members in charts:
            if known == group and sittings and sittings <= wider:
                members.append(case)
                break
        else:
            charts.append((group, sittings, [case]))
    return [members for _, _, members in charts]
