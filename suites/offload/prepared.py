"""A model made ready once for all cases of a method in a worker: layers without experts, oracle, trace and slab file.

Imported by workers only.
"""

from __future__ import annotations

import ctypes
import gc
import sys
from dataclasses import dataclass, field
from typing import Any

from ...backends.offload.file import SlabFile
from ...backends.offload.keeping import kept_file
from ...contracts import Case, LayerSpec, Registry, make_key
from ...moe.experts import ExpertStore
from .layers import Layers
from .recording import Recording, record, without_experts
from .stacks import Stack, stack_of


@dataclass(frozen=True)
class Prepared:
    """What cases share. ``stack`` is begun anew by every turn; ``stores`` are kept only where a case has all experts
    at hand; ``probed`` is what probes measured, ``hosted`` are experts that lie in RAM, ``files`` those on the
    disk, by the form of their copies."""

    stack: Stack
    recording: Recording
    specs: dict[int, LayerSpec]
    stores: dict[int, ExpertStore]
    probed: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    hosted: dict[tuple[Any, ...], Any] = field(default_factory=dict)
    files: dict[str, SlabFile] = field(default_factory=dict)


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
    layers = Layers(bare, case.dtype, case.workload["order"] == "token")
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
    if low not in found.files:
        found.files[low] = kept_file(stores_of(case, registry, found), low)
    return found.files[low]


def let_go(found: Prepared) -> None:
    """Forget the experts in memory, and give the pages back to the system."""
    found.stores.clear()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
