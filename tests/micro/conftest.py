"""Inputs of the micro-benchmarks: one small layer, big enough that its kernels are what takes the time.

The files are called bench_*.py, so that a test session leaves them out: `nox -s micro` runs them.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moebench.backends.plugins import DESCRIPTORS
from moebench.contracts import LayerSpec, Refusal, Selection
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.router import select
from moebench.moe.routing import Routing

HIDDEN, WIDTH, EXPERTS, K = 128, 128, 16, 2
SELECTION = Selection("softmax", K, renormalize=True)


def normal(*size, seed=0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def logits(tokens, experts=EXPERTS):
    return normal(tokens, experts, seed=tokens)


def routing(tokens):
    return Routing.topk(*select(logits(tokens), SELECTION), EXPERTS)


def store(dtype=torch.float32, scheme=None):
    gate_up = (normal(EXPERTS, 2 * WIDTH, HIDDEN, seed=1) / HIDDEN**0.5).to(dtype)
    down = (normal(EXPERTS, HIDDEN, WIDTH, seed=2) / WIDTH**0.5).to(dtype)
    if scheme is not None:
        gate_up, down = (tuple(round_to_nearest(weight, scheme) for weight in stacked) for stacked in (gate_up, down))
    return ExpertStore(gate_up, down, ("ffn",) * EXPERTS)


def executor(name, experts, dtype):
    backend = next(descriptor for descriptor in DESCRIPTORS if descriptor.name == name).create()
    spec = LayerSpec(HIDDEN, WIDTH, experts.kinds, dtype, schemes=experts.schemes, max_k=K)
    answer = backend.supports(spec)
    assert not isinstance(answer, Refusal), answer
    return backend.load({0: experts}, {0: spec}).layer(0)


@pytest.fixture(scope="session")
def layer():
    """Everything above under one name."""
    made = {"hidden": HIDDEN, "experts": EXPERTS, "selection": SELECTION}
    return SimpleNamespace(**made, normal=normal, logits=logits, routing=routing, store=store, executor=executor)
