"""Small layers, six archetypes of routing, and the built-in backends, for the tests of this folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moebench.backends.plugins import DESCRIPTORS
from moebench.contracts import LayerSpec, Refusal, SparsitySpec
from moebench.moe.experts import ExpertStore, Sparsity
from moebench.moe.quantization import quantize
from moebench.moe.routing import Routing

HIDDEN, WIDTH, EXPERTS = 32, 32, 6
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "padded", "dropped")


@pytest.fixture(scope="session", autouse=True)
def _inductor_cache():
    """Keep compiled code between runs, outside the user's cache."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "moebench-tests-inductor"))


def routing(archetype, tokens, seed, experts=EXPERTS):
    """Return a Routing of an archetype; weights never sum to one but by accident."""
    generator = torch.Generator().manual_seed(seed)
    chosen_TE = torch.rand(tokens, experts, generator=generator)
    weight_TE = torch.rand(tokens, experts, generator=generator) + 0.1
    best_TE = chosen_TE >= chosen_TE.topk(2, dim=1).values[:, -1:]
    keep_TE = {
        "dynamic_k": chosen_TE > 0.5,
        "empty": best_TE & (torch.arange(experts) < 3),
        "hot": (torch.arange(experts) == 3).expand(tokens, experts),
        "signed": best_TE,
        "padded": best_TE & (chosen_TE < 0.9),
        "dropped": best_TE & (torch.arange(tokens)[:, None] % 3 != 0),
    }[archetype]
    if archetype == "signed":
        weight_TE = weight_TE * torch.where(chosen_TE > chosen_TE.mean(), 1.0, -1.0)
    return Routing.dense(torch.where(keep_TE, weight_TE, 0.0))


def store(seed=0, dtype=torch.float32, scheme=None, sparsity=None, activation="silu", gated=True, experts=EXPERTS):
    """Return experts with weights near unit gain; with a Scheme they are quantized."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * WIDTH if gated else WIDTH
    gate_up = (torch.randn(experts, rows, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    down = (torch.randn(experts, HIDDEN, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    if scheme is not None:
        gate_up = tuple(quantize(weight, scheme) for weight in gate_up)
        down = tuple(quantize(weight, scheme) for weight in down)
    return ExpertStore(gate_up, down, ("ffn",) * experts, activation, gated, sparsity=sparsity)


def spec(experts_store, dtype="float32", boundary="topk", **changes):
    """Return the specification of a store."""
    sparsity = experts_store.sparsity
    values = {
        "hidden": experts_store.hidden,
        "width": experts_store.width,
        "kinds": experts_store.kinds,
        "dtype": dtype,
        "activation": experts_store.activation,
        "gated": experts_store.gated,
        "schemes": experts_store.schemes,
        "sparsity": None if sparsity is None else SparsitySpec(tuple(sparsity.thresholds)),
        "boundary": boundary,
        "max_k": EXPERTS,
    }
    return LayerSpec(**{**values, **changes})


def tokens(count, dtype=torch.float32, seed=0):
    """Return x_TH."""
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)


def inputs(some_routing, boundary):
    """Return a Routing as boundary inputs; topk with one padded slot more than it needs."""
    if boundary == "sorted":
        return some_routing.sorted()
    return some_routing.padded(int(some_routing.k_T.max()) + 1 if some_routing.num_tokens else 1)


def backend(name, **params):
    """Return a built-in backend."""
    return next(d for d in DESCRIPTORS if d.name == name).create(params)


def executor(name, experts_store, layer_spec):
    """Return the executor of one layer on a backend that must take it."""
    chosen = backend(name)
    answer = chosen.supports(layer_spec)
    assert not isinstance(answer, Refusal), answer
    return chosen.load({5: experts_store}, {5: layer_spec}).layer(5)


def sparsity(level=0.3, weights=False):
    """Return thresholds at both sites that leave out a part of the activations."""
    scale = {"hidden": torch.linspace(0.5, 1.5, WIDTH)} if weights else {}
    return Sparsity({"input": level, "hidden": 0.3 * level}, scale)


@pytest.fixture(scope="session")
def lab():
    """Everything above under one name."""
    return SimpleNamespace(
        archetypes=ARCHETYPES,
        routing=routing,
        store=store,
        spec=spec,
        tokens=tokens,
        inputs=inputs,
        backend=backend,
        executor=executor,
        sparsity=sparsity,
    )
