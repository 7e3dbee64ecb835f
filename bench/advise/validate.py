"""How far the advice is off on this host: models are run by suite ``offload`` and compared with what is predicted.

First come models for what the harness spends on calls and reaches of the tiers' rates, then others.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...contracts import Case, MoebenchError, Registry
from .cases import OFFLOAD, case_load, case_model, case_prediction, case_weights
from .hardware import Hardware
from .predict import fixed_bytes, touched_experts
from .program import NAMES, Program, Run, Runs, as_metrics, fit

COMMON = ("suite=offload", "axes.threads=1", "axes.backend=[eager,offload]", "engine.processes=1", "suite.steps=32")
ALONE = ("axes.traffic=gaussian",)
CALIBRATION: Mapping[str, Sequence[str]] = {
    "few": ("model=tiny", "model.k=1", *ALONE),
    "many": ("model=tiny", "model.k=6", *ALONE),
    "wide": ("model=tiny", "model.hidden=1024", "model.width=2048", "model.depth=3", *ALONE),
    "decoding": ("model=tiny-olmoe", "axes.traffic=recorded"),
}
"""In ``wide`` bytes take time; the weights of the others are some hundred KiB, and the harness is all that does."""

VALIDATION: Mapping[str, Sequence[str]] = {
    "small": ("model=small", *ALONE),
    "large": ("model=small", "model.hidden=1024", "model.width=1024", "model.depth=4", *ALONE),
    "smollm2": ("model=smollm2",),
}
"""A small and a large synthetic model, layers alone, and SmolLM2's MoE form, which generates."""


@dataclass(frozen=True)
class Measured:
    """A case that ran: the median of its times and their tenth percentile in seconds, its metrics, and doubts about it.

    Programs are fitted to medians, and judged by medians; the tenth percentile tells how disturbed the machine was.
    """

    case: Case
    run_id: str
    seconds: float
    undisturbed: float
    metrics: Mapping[str, float]
    flags: Sequence[str] = ()


@dataclass(frozen=True)
class Compared:
    """A measured case beside what was predicted of it, in seconds."""

    name: str
    measured: Measured
    predicted: float

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return self.predicted / self.measured.seconds - 1


def run_suite(settings: Sequence[str], registry: Registry, store: Path, quiet: bool) -> list[Measured]:
    """Run suite ``offload`` and return its cases that were timed; MoebenchError where one of them is not ok."""
    from ..run import execute, planned

    plan, _ = planned(settings, registry)
    finished = execute(plan, [], store, shlex.join(["moebench", "run", *settings]), quiet)
    return list(_measured(plan.cases, finished.run_id, store))


def _measured(cases: Sequence[Case], run_id: str, store: Path) -> Iterator[Measured]:
    from ...results.query import reading, select

    with reading(store) as connection:
        _, ended = select(connection, "SELECT case_key, status, reason, flags FROM cases WHERE run_id = ?", [run_id])
        _, times = select(
            connection,
            "SELECT case_key, quantile_cont(ns, 0.5), quantile_cont(ns, 0.1) FROM (SELECT case_key, unnest(ns) AS ns "
            "FROM timings_raw WHERE run_id = ? AND clock = 'wall') GROUP BY case_key",
            [run_id],
        )
        _, found = select(connection, "SELECT case_key, name, value FROM metrics_raw WHERE run_id = ?", [run_id])
    states, taken = {key: told for key, *told in ended}, {key: (half, tenth) for key, half, tenth in times}
    for case in cases:
        if case.protocol != "timed":
            continue
        status, reason, flags = states.get(case.case_key, ("missing", "it did not run", ()))
        if status != "ok" or case.case_key not in taken:
            raise MoebenchError(f"{case.model} on {case.backend} ended {status} ({reason}); see `moebench report`.")
        metrics = {name: value for key, name, value in found if key == case.case_key and value is not None}
        half, tenth = taken[case.case_key]
        yield Measured(case, run_id, half / 1e9, tenth / 1e9, metrics, tuple(flags or ()))


PROBES = ("suite=roofline", "axes.threads=1", "suite.disk_bytes=268435456", "engine.processes=1")


def probe(registry: Registry, store: Path, quiet: bool) -> None:
    """Measure memory, processor and disk of this host by suite ``roofline``."""
    from ..run import execute, planned

    plan, _ = planned(PROBES, registry)
    execute(plan, [], store, shlex.join(["moebench", "run", *PROBES]), quiet)


def calibrate(registry: Registry, hardware: Hardware, store: Path, quiet: bool) -> Program:
    """Return what the harness makes of this machine, after measuring and storing it."""
    runs = {
        (name, one.case.backend.name): one
        for name, settings in CALIBRATION.items()
        for one in run_suite([*COMMON, *settings], registry, store, quiet)
    }
    taken = {key: _taken(one, registry) for key, one in runs.items()}
    chosen = Runs(
        taken["few", "eager"],
        taken["many", "eager"],
        taken["many", OFFLOAD],
        taken["wide", "eager"],
        taken["wide", OFFLOAD],
        taken["decoding", "eager"],
    )
    program = fit(chosen, hardware.rate("ram"), hardware.rate("disk"))
    keep(store, runs["decoding", "eager"], as_metrics(program), "1")
    return program


def _taken(one: Measured, registry: Registry) -> Run:
    model = case_model(one.case, registry)
    weights, load = case_weights(one.case, model), case_load(one.case)
    used, brought = touched_experts(model, load), one.metrics.get("misses_per_step", 0.0)
    return Run(
        one.seconds,
        len(model.moe_layers),
        sum(bool(layer.attention) for layer in model.layers),
        used,
        brought,
        fixed_bytes(model, weights, load) + used * weights.expert(model),
        brought * weights.expert(model),
    )


def validate(registry: Registry, hardware: Hardware, store: Path, quiet: bool) -> list[Compared]:
    """Return every case of VALIDATION beside its prediction, after storing both."""
    compared = []
    for name, settings in VALIDATION.items():
        for one in run_suite([*COMMON, *settings], registry, store, quiet):
            compared.append(compare(name, one, registry, hardware, store))
    return compared


def compare(name: str, one: Measured, registry: Registry, hardware: Hardware, store: Path) -> Compared:
    """Return a measured case beside its prediction, after storing the prediction and its error."""
    found = Compared(name, one, case_prediction(one.case, registry, hardware).serial)
    keep(store, one, {"advise_predicted_s": found.predicted}, "s")
    keep(store, one, {"advise_error": found.error}, "1")
    return found


def keep(store: Path, one: Measured, values: Mapping[str, float], unit: str) -> None:
    """Add metrics to a case that ran, as a part of its run."""
    from ...results.database import ingest
    from ...results.parts import write_part

    rows = [
        {"run_id": one.run_id, "case_key": one.case.case_key, "name": name, "value": value, "unit": unit}
        for name, value in values.items()
    ]
    name = f"advise-{next(iter(values))}-{one.case.case_key[:16]}"
    write_part(store / "runs" / one.run_id, name, {"metrics": rows})
    ingest(store)


STORED = """
SELECT m.name, m.value, m.run_id, c.model FROM metrics_raw m JOIN cases c USING (run_id, case_key)
JOIN hosts h USING (run_id) WHERE h.host_key = ? AND m.name LIKE 'advise\\_%' ESCAPE '\\' ORDER BY m.run_id
"""


def stored(store: Path, host_key: str) -> tuple[Program | None, list[float]]:
    """Return what was found on this host: the latest Program, and the errors of the predictions since."""
    from ...results.database import connect_parts

    if not (store / "runs").is_dir():
        return None, []
    connection = connect_parts(store)
    try:
        rows: list[tuple[Any, ...]] = connection.execute(STORED, [host_key]).fetchall()
    finally:
        connection.close()
    latest = {name: (value, run) for name, value, run, _ in rows if name in NAMES}
    if len(latest) < len(NAMES):
        return None, []
    since = max(run for _, run in latest.values())
    errors = [value for name, value, run, _ in rows if name == "advise_error" and run >= since and math.isfinite(value)]
    return Program(*(latest[name][0] for name in NAMES)), errors
