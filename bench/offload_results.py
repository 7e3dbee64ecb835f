"""The figures behind ``docs/offload.md``, ``docs/offload.json``: runs of experiment ``offloading``, one a seed."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..backends.plugins import Offload
from ..contracts import Evidence, MoebenchError, Status, plain
from ..dashboards import units
from ..dashboards.data import HOSTS, SAMPLES, Case, Run, load_cases, load_runs
from ..dashboards.query import ask, parse_json
from ..results.claims import LEAST_SEEDS, mean_interval
from ..results.query import reading

EXPERIMENT = "offloading"
COMMAND = f"moebench run experiment={EXPERIMENT} seed=1"
CONFIG = "SELECT config->>'$.experiment.name' AS experiment FROM runs WHERE run_id = $run_id"

BASELINE: Mapping[str, Any] = {}
"""Least recently used, nothing brought ahead: the defaults."""

SYSTEMS: tuple[tuple[str, Mapping[str, Any]], ...] = (
    ("least recently used", BASELINE),
    ("Read-ME", {"policy": "belady:30", "prefetch": "pregate:1"}),
    ("MoE-Infinity", {"policy": "eam", "prefetch": "eam"}),
    ("Mixtral-offloading", {"policy": "per_layer", "prefetch": "gate"}),
    ("HOBBIT", {"policy": "hobbit", "execution": "hobbit:0.4", "low": "nf4"}),
    ("KTransformers", {"policy": "static", "execution": "defer:2"}),
    ("whole layers (llama.cpp)", {"policy": "cpu_moe"}),
    ("Belady (bound on demand)", {"policy": "belady"}),
)
"""What each published system is here: parameters of backend ``offload`` that are not the defaults."""

KEPT = (
    "hit_rate",
    "optimality",
    "misses_per_step",
    "stall_per_step",
    "bytes_per_step",
    "late_per_step",
    "resident_bytes",
    "step_time",
    "predicted_step_time",
    "prediction_error",
    "che_hit_rate",
    "prefetch_precision",
    "prefetch_recall",
    "energy_per_step",
    "kl_to_exact",
)


def offload_results(store: Path) -> dict[str, Any]:
    """Return what the latest run of each seed found, as ``docs/offload.json`` holds it.

    Raises:
        MoebenchError: the store has no run of the experiment.
    """
    runs: dict[str, dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    with reading(store) as connection:
        for run in load_runs(connection):
            cases = [case for case in load_cases(connection, run.run_id)[0] if case.row["suite"] == "offload"]
            seed = str(cases[0].row["seed"]) if cases else ""
            (one,) = ask(connection, CONFIG, run_id=run.run_id).rows
            if not cases or seed in runs or one["experiment"] != EXPERIMENT:
                continue
            host = next(iter(ask(connection, HOSTS, run_id=run.run_id).rows), {})
            samples = ask(connection, SAMPLES, run_id=run.run_id).rows
            wall = {one["case_key"]: one for one in samples if one["clock"] == "wall"}
            runs[seed] = _about(run, cases[0], str(host.get("cpu")))
            rows += [_row(case, wall.get(case.key, {})) for case in cases]
    if not rows:
        raise MoebenchError(f"the store has no run of experiment {EXPERIMENT}; run `{COMMAND}` first.")
    order = sorted(rows, key=lambda row: json.dumps([row["evidence"], row["backend"], row["setting"], row["seed"]]))
    return {"runs": dict(sorted(runs.items(), key=lambda item: int(item[0]))), "rows": order}


def _about(run: Run, case: Case, cpu: str) -> dict[str, Any]:
    return {
        "run": run.run_id,
        "commit": run.row["git_sha"],
        "uncommitted": run.row["git_dirty"],
        "torch": run.packages.get("torch"),
        "cpu": cpu,
        "model": case.row["model"],
        "threads": case.row["threads"],
        "steps": parse_json(case.row["params"])["workload"]["steps"],
    }


def _row(case: Case, timing: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row; without enough samples for a percentile of a step it has none."""
    defaults = plain(Offload())
    given = parse_json(case.row["params"])["backend"]
    found = {one["name"]: one["value"] for one in case.metrics}
    ok = case.status == Status.OK
    return {
        "seed": case.row["seed"],
        "evidence": case.row["evidence"],
        "backend": case.row["backend"],
        "capacity": given.get("capacity"),
        "setting": {name: value for name, value in given.items() if name != "capacity" and value != defaults[name]},
        "status": case.status,
        "reason": case.row["reason"],
        "flags": list(case.row["flags"] or ()),
        "p50_ns": timing.get("median_ns"),
        "p95_ns": timing.get("p95_ns"),
        "metrics": {name: found[name] for name in KEPT if found.get(name) is not None} if ok else {},
    }


@dataclass(frozen=True)
class Figures:
    """The rows of all seeds, asked by backend, setting and capacity."""

    rows: Sequence[Mapping[str, Any]]

    def of(
        self, setting: Mapping[str, Any] | None, capacity: float, predicted: bool = False
    ) -> list[Mapping[str, Any]]:
        """Return the row of each seed; ``setting`` None is the model with every expert at hand."""
        return [
            row
            for row in self.rows
            if (row["evidence"] == Evidence.MODEL) == predicted
            and (
                row["backend"] != "offload"
                if setting is None
                else (row["backend"], row["setting"], row["capacity"]) == ("offload", dict(setting), capacity)
            )
        ]

    def values(self, rows: Sequence[Mapping[str, Any]], name: str) -> dict[int, float]:
        """Return a metric, or a percentile of a step, by seed; seeds that are not ok, or lack it, have none."""
        found = {row["seed"]: row["metrics"].get(name, row.get(name)) for row in rows if row["status"] == Status.OK}
        return {seed: value for seed, value in found.items() if value is not None}

    def hidden(self, rows: Sequence[Mapping[str, Any]], capacity: float) -> dict[int, float]:
        """Return 1 - stall / stall of the baseline in the same sitting, by seed."""
        base = self.values(self.of(BASELINE, capacity), "stall_per_step")
        own = self.values(rows, "stall_per_step")
        return {seed: 1 - own[seed] / base[seed] for seed in own if base.get(seed)}


def told(values: Mapping[int, float], show: Callable[[float], str]) -> str:
    """Return the mean over seeds with its interval by Student's t, where there are enough seeds for one."""
    if not values:
        return units.DASH
    if len(values) < LEAST_SEEDS:
        return show(sum(values.values()) / len(values))
    mean, lo, hi = mean_interval(list(values.values()))
    return f"{show(mean)} [{show(lo)}, {show(hi)}]"


def percent(value: float) -> str:
    """Return a share as whole percents."""
    return f"{100 * value:.0f} %"


def ms(value: float) -> str:
    """Return nanoseconds as milliseconds."""
    return f"{value / 1e6:.1f}"


def mib(value: float) -> str:
    """Return bytes as MiB."""
    return f"{value / 2**20:.1f}"


COLUMNS: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("hit rate", "hit_rate", percent),
    ("gap to Belady closed", "optimality", percent),
    ("MiB read a step", "bytes_per_step", mib),
    ("stall, ms a step", "stall_per_step", ms),
    ("TPOT p50, ms", "p50_ns", ms),
    ("TPOT p95, ms", "p95_ns", ms),
    ("prediction error", "prediction_error", percent),
)


def table(figures: Figures, entries: Sequence[tuple[str, Mapping[str, Any] | None, float]]) -> Iterator[str]:
    """Yield a table of (name, setting, capacity): every figure as the mean over seeds with its interval."""
    heads = [head for head, _, _ in COLUMNS]
    yield "| | setting | capacity | " + " | ".join([*heads[:4], "stall hidden", *heads[4:], "KL, nat"]) + " |"
    yield "|---|---|---|" + "---|" * (len(heads) + 2)
    for name, setting, capacity in entries:
        rows = figures.of(setting, capacity)
        cells = [told(figures.values(rows, key), show) for _, key, show in COLUMNS]
        hidden = told(figures.hidden(rows, capacity), percent) if setting is not None else units.DASH
        kl = told(figures.values(rows, "kl_to_exact"), lambda value: units.digits(value, 2))
        yield (
            f"| {name}{_failures(rows)} | {_setting(setting)} | {_share(setting, capacity)} | "
            + " | ".join([*cells[:4], hidden, *cells[4:], kl])
            + " |"
        )


def predictions(figures: Figures, entries: Sequence[tuple[str, Mapping[str, Any] | None, float]]) -> Iterator[str]:
    """Yield a table of predicted rows, of evidence `model`, and of what was measured for the same seeds."""
    yield "| | setting | capacity | predicted, ms a step (`model`) | measured, ms a step (`measured-cpu`) | off by |"
    yield "|---|---|---|---|---|---|"
    for name, setting, capacity in entries:
        model = figures.values(figures.of(setting, capacity, predicted=True), "predicted_step_time")
        found = figures.values(figures.of(setting, capacity), "step_time")
        off = {seed: abs(model[seed] - found[seed]) / found[seed] for seed in model.keys() & found.keys()}
        cells = " | ".join((told(model, ms), told(found, ms), told(off, percent)))
        yield f"| {name} | {_setting(setting)} | {_share(setting, capacity)} | {cells} |"


def _setting(setting: Mapping[str, Any] | None) -> str:
    if setting is None:
        return "`backend=eager`"
    return " ".join(f"`{name}={value}`" for name, value in setting.items()) or "`policy=lru` `prefetch=none`"


def _share(setting: Mapping[str, Any] | None, capacity: float) -> str:
    return "all" if setting is None else f"{capacity:g}"


def _failures(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return what must be known of rows beside their figures: who is not ok, and doubts about those that are."""
    bad = sorted(
        {f"**{row['status']}** (seed {row['seed']}): {row['reason']}" for row in rows if row["status"] != "ok"}
    )
    flags = sorted({flag for row in rows for flag in row["flags"]})
    doubts = f" ({', '.join(flags)})" if flags else ""
    return doubts + "".join(f"; {one}" for one in bad)
