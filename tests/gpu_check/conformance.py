"""Every backend of the GPU against the float64 reference of the CPU: routing corner cases, dtypes, tails of tiles."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from checks import FAILED, PASSED, SKIPPED, Result

from moebench.contracts import LayerSpec, Refusal, Registry, load_file
from moebench.moe.experts import ExpertStore
from moebench.moe.fold import Folded, fold_store
from moebench.moe.oracle import compare, reference
from moebench.moe.placement import placed

LAB = load_file(Path(__file__).resolve().parents[1] / "backends" / "conftest.py")
"""Routings of the corner cases, as the backends' own tests have them."""

BACKENDS = ("reference", "eager", "batched", "grouped", "compiled", "triton", "cuda_fused")
DTYPES = ("float32", "bfloat16", "float16")
SIZES = ((32, 32), (136, 200))
"""Hidden size and width: of one tile, and of several with a tail."""

COUNTS = (0, 1, 17, 130)
LOOSER = 2.0
"""A GPU may be so many times as far from the reference as the oracle allows: its exponentials are approximations, and a
split product adds up in another order. Rows of `moebench run` are held to the oracle itself."""


def checks(registry: Registry, device: str, backends: Iterable[str] = BACKENDS) -> Iterator[Result]:
    """Yield a result for every backend and dtype."""
    known = registry.names("backend")
    for name, dtype in itertools.product(backends, DTYPES):
        title = f"conformance {name} {dtype}"
        if name not in known:
            yield Result(title, SKIPPED, "no backend of this name is registered")
            continue
        backend = registry.get("backend", name).create()
        available = backend.availability()
        if not available.available or device not in available.devices:
            yield Result(title, SKIPPED, f"not on {device}: {available.reason or 'it runs elsewhere'}")
            continue
        yield conformance(title, backend, dtype, device)


def conformance(title: str, backend: Any, dtype: str, device: str) -> Result:
    """Return how one backend does in one dtype: passed where every layer that it takes is right, and it takes some."""
    right, refused, worst = 0, "", 0.0
    for (sizes, archetype), count, boundary in itertools.product(
        itertools.product(SIZES, LAB.ARCHETYPES), COUNTS, ("topk", "sorted")
    ):
        store = layer(sizes, archetype, getattr(torch, dtype))
        said = one(backend, store, archetype, count, boundary, dtype, device)
        if isinstance(said, Refusal):
            refused = said.reason
            continue
        ok, share, reason = said
        worst = max(worst, share)
        if not ok:
            where = f"{archetype}, {count} tokens, {boundary}, H={sizes[0]}, F={sizes[1]}"
            return Result(title, FAILED, f"{where}: {reason}", {"right_before": right})
        right += 1
    if not right:
        return Result(title, SKIPPED, f"it takes none of these layers: {refused}")
    return Result(title, PASSED, "", {"layers": right, "worst_share_of_bound": worst, "refused": refused})


def one(
    backend: Any, store: ExpertStore, archetype: str, count: int, boundary: str, dtype: str, device: str
) -> tuple[bool, float, str] | Refusal:
    """Return (right, error / bound, reason) of one call, or the refusal; its output is full of NaN before it."""
    routing = LAB.routing(archetype, count, 3, store.kinds)
    generator = torch.Generator().manual_seed(count)
    x_TH = torch.randn(count, store.hidden, generator=generator).to(getattr(torch, dtype))
    spec = LAB.spec(store, dtype, boundary)
    run = executor(backend, placed(store, device), spec)
    if isinstance(run, Refusal):
        return run
    out_TH = torch.full_like(x_TH, torch.nan).to(device)
    with torch.no_grad():
        run(x_TH.to(device), *placed(LAB.inputs(routing, boundary), device), out_TH=out_TH)
    check = compare(out_TH.to("cpu"), reference(store, routing, x_TH), x_TH.dtype)
    if check.error is None or not check.bound:
        return check.ok, 0.0, check.reason
    share = check.error / check.bound
    return share <= LOOSER, share, check.reason


def executor(backend: Any, store: ExpertStore, spec: LayerSpec) -> Any:
    """Return what runs the layer, folded where the backend knows no other kinds than FFNs, or the refusal."""
    answer = backend.supports(spec)
    if not isinstance(answer, Refusal):
        return backend.load({0: store}, {0: spec}).layer(0)
    inner = backend.supports(spec.folded())
    if isinstance(inner, Refusal):
        return inner
    return Folded(backend.load({0: fold_store(store)}, {0: spec.folded()}).layer(0), store)


def layer(sizes: tuple[int, int], archetype: str, dtype: torch.dtype) -> ExpertStore:
    """Return experts of these sizes with weights near unit gain, and of the kinds that the corner case wants."""
    hidden, width = sizes
    small = LAB.store(0, dtype, some_kinds=LAB.kinds(archetype, constants=False))
    experts, generator = len(small.ffn_ids), torch.Generator().manual_seed(7)
    gate_up = (torch.randn(experts, 2 * width, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width, generator=generator) / width**0.5).to(dtype)
    return ExpertStore(gate_up, down, small.kinds)
