"""A model made ready once for all cases of a method in a worker: layers without experts, oracle, trace and slab file.

Imported by workers only.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, field
from typing import Any

from ...backends.offload.file import SlabFile, write_slabs
from ...backends.offload.keeping import low_form
from ...backends.plugins import Offload
from ...contracts import Case, LayerSpec, Registry, make_key
from ...moe.experts import ExpertStore
from ..models import cache_dir
from .cores import roaming
from .layers import Layers
from .prediction import Prediction, predict, simulated
from .probes import Probes, all_at_hand, expert_seconds, load_seconds, step_seconds
from .recording import Recording, record, without_experts
from .stacks import Stack, stack_of


@dataclass(frozen=True)
class Prepared:
    """What cases share. ``stack`` is begun anew by every turn; ``stores`` are kept only where a case has all experts
    at hand; ``probed`` and ``loads`` are what probes measured."""

    stack: Stack
    recording: Recording
    specs: dict[int, LayerSpec]
    stores: dict[int, ExpertStore]
    probed: list[Any] = field(default_factory=list)
    loads: dict[tuple[Any, ...], float] = field(default_factory=dict)


_PREPARED: dict[str, Prepared] = {}


def identity(case: Case) -> str:
    """Return the hash of what decides the layers and their trace."""
    return make_key(
        [case.method_key, case.layers, case.dtype, case.boundary, case.tokens, case.traffic, case.seed, case.workload]
    )


def prepared(case: Case, registry: Registry) -> Prepared:
    """Return what cases of this method, model and workload share, made by the first that asks."""
    key = identity(case)
    if key not in _PREPARED:
        _PREPARED[key] = _make(case, registry)
    return _PREPARED[key]


def _make(case: Case, registry: Registry) -> Prepared:
    stores: dict[int, ExpertStore] = {}
    bare, layout = without_experts(case, registry, stores.__setitem__)
    layers = Layers(bare, case.dtype)
    stack = stack_of(case, registry, layers)
    specs = {index: one.spec for index, one in bare.items()}
    session = registry.get("backend", "eager").create().load(stores, specs)
    recording = record(stack, session, int(case.workload["steps"]), layout)
    session.close()
    return Prepared(stack, recording, specs, stores)


def stores_of(case: Case, registry: Registry, found: Prepared) -> dict[int, ExpertStore]:
    """Return the experts of all layers, in memory from now on."""
    if not found.stores:
        without_experts(case, registry, found.stores.__setitem__)
    return found.stores


def slab_file(case: Case, registry: Registry, found: Prepared, low: str) -> SlabFile:
    """Return the file with all experts of the case, and their ``low`` copies, written into the cache if need be."""
    key = make_key([case.method_key, case.layers, case.dtype, low])
    target = cache_dir() / "offload" / f"{key[:32]}.safetensors"
    if not target.is_file():
        write_slabs(target, stores_of(case, registry, found).items(), None if low == "none" else low_form(low))
    return SlabFile.open(target)


def probes_of(case: Case, registry: Registry, found: Prepared, file: SlabFile, params: Offload) -> Probes:
    """Return what a step, an expert and the bringing of one cost here, each measured once in a worker."""
    if not found.probed:
        session = all_at_hand(found.recording, found.specs, stores_of(case, registry, found))
        found.probed.append(step_seconds(found.stack, found.recording, session))
        found.probed.append(expert_seconds(found.recording, next(iter(found.specs.values())), session))
    step_s, expert = found.probed
    loads = {}
    for form in file.forms:
        name = (form, params.io, params.readers, file.path)
        if name not in found.loads:
            with roaming():
                found.loads[name] = load_seconds(file, params.io, params.readers, form)
        loads[form] = found.loads[name]
    return Probes(step_s, expert, loads)


def prediction_of(found: Prepared, file: SlabFile, params: Offload, probes: Probes) -> Prediction:
    """Return what is predicted of a run under ``params``."""
    slab_bytes = {form: file.slab_bytes(form) for form in file.forms}
    costs = probes.tiers(found.recording, slab_bytes, params.readers, params.staging)
    return predict(found.recording, simulated(found.recording, params, probes.host), costs)


def let_go(found: Prepared) -> None:
    """Forget the experts in memory, and give the pages back to the system."""
    found.stores.clear()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
