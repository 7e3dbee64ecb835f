"""From a case made ready to its prediction: the probes that its tier needs. Imported by workers only."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeVar

from ...backends.offload.costs import Curve
from ...backends.offload.file import SlabFile
from ...backends.plugins import Offload
from ...contracts import Case, Registry
from .cores import roaming
from .host import hosted
from .prediction import Prediction, predict, simulated
from .prepared import Prepared, stores_of
from .probes import Probes, all_at_hand, expert_seconds, load_seconds, step_seconds

T = TypeVar("T")


def hints_read(params: Offload) -> bool:
    """Return whether anybody reads the hints of gates, which cost a router's time."""
    return params.prefetch.partition(":")[0] == "gate"


def prediction_of(case: Case, registry: Registry, found: Prepared, file: SlabFile, params: Offload) -> Prediction:
    """Return what is predicted of a run under ``params``; each probe is measured once in a worker."""
    on_host = params.tier == "host"
    probes = _host(found, file, params) if on_host else _disk(case, registry, found, file, params)
    slab_bytes = {form: file.slab_bytes(form) for form in file.forms}
    costs = probes.tiers(found.recording, slab_bytes, params.readers, params.staging)
    return predict(found.recording, simulated(found.recording, params, probes.host), costs)


def _disk(case: Case, registry: Registry, found: Prepared, file: SlabFile, params: Offload) -> Probes:
    hints = hints_read(params)

    def step() -> float:
        session = all_at_hand(found.recording, found.specs, stores_of(case, registry, found))
        return step_seconds(found.stack, found.recording, session, hints)

    def expert() -> Curve:
        session = all_at_hand(found.recording, found.specs, stores_of(case, registry, found))
        return expert_seconds(found.recording, next(iter(found.specs.values())), session)

    def load(form: str) -> float:
        with roaming():
            return load_seconds(file, params.io, params.readers, form)

    setting = (params.io, params.readers, file.path)
    loads = {form: _once(found, (form, *setting), partial(load, form)) for form in file.forms}
    return Probes(_once(found, ("step", hints), step), _once(found, ("expert",), expert), loads)


def _host(found: Prepared, file: SlabFile, params: Offload) -> Probes:
    own, hints = hosted(found, file, params), hints_read(params)

    def step() -> float:
        session = own.all_at_hand(params)
        try:
            return step_seconds(found.stack, found.recording, session, hints)
        finally:
            session.close()

    step_s = _once(found, ("step on host", file.path, hints), step)
    return Probes(step_s, own.costs.fast, {"full": own.costs.load}, own.costs)


def _once(found: Prepared, name: tuple[object, ...], measure: Callable[[], T]) -> T:
    """Return what was measured under ``name`` before, or measure it."""
    if name not in found.probed:
        found.probed[name] = measure()
    value: T = found.probed[name]
    return value
