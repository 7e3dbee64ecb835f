"""Small layers, six archetypes of routing, and the registered backends, for the tests of this folder."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moebench.contracts import LayerSpec, Refusal, Registry, SparsitySpec
from moebench.kernels.cpu import build
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import Constants, ExpertStore
from moebench.moe.fold import Folded, fold_store
from moebench.moe.oracle import compare, reference
from moebench.moe.oracle_gradients import Gradients, reference_gradients
from moebench.moe.routing import Routing

HIDDEN, WIDTH, EXPERTS = 32, 32, 6
ARCHETYPES = ("dynamic_k", "empty", "hot", "signed", "null", "dropped")
FFN = ("ffn",) * EXPERTS
OTHERS = ("zero", "ffn", "copy", "ffn", "ffn", "zero", "copy", "ffn", "ffn", "ffn")
CONSTANTS = ("constant", *OTHERS, "constant")
REGISTRY = Registry.load()


class Operators(TorchDispatchMode):
    """Names every operator that runs."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.fixture(scope="session", autouse=True)
def _inductor_cache():
    """Keep compiled code between runs, outside the user's cache."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "moebench-tests-inductor"))


@pytest.fixture(scope="session", autouse=True)
def _kernels():
    """Build our kernels once, outside the user's cache, and keep them between runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(Path(tempfile.gettempdir()) / "moebench-tests-cache"))
        if build.compiler():
            build.library("column_skip")


def kinds(archetype, constants=True):
    """Return the kinds of an archetype's experts; no gradient is known through constant ones."""
    return (CONSTANTS if constants else OTHERS) if archetype == "null" else FFN


def routing(archetype, tokens, seed, some_kinds=None):
    """Return a Routing of an archetype; weights sum to one by accident alone.

    ``dynamic_k``: 0, 1 .. E experts from token to token. ``empty``: the first, the last and a middle expert have no
    tokens. ``hot``: one expert has all tokens and no other has any. ``signed``: the weights of a token are w and -w,
    both negative, or of both signs. ``null``: zero, copy and constant experts beside the FFNs. ``dropped``: every third
    token has no entry.
    """
    experts = len(some_kinds or kinds(archetype))
    generator = torch.Generator().manual_seed(seed)
    chosen_TE = torch.rand(tokens, experts, generator=generator)
    weight_TE = torch.rand(tokens, experts, generator=generator) + 0.1
    if archetype == "empty":
        chosen_TE[:, [0, 3, 5]] = -1.0
    rank_TE = chosen_TE.argsort(1, descending=True).argsort(1)
    token_T1 = torch.arange(tokens)[:, None]
    two_TE = rank_TE < 2
    keep_TE = {
        "empty": two_TE,
        "signed": two_TE,
        "null": two_TE,
        "dynamic_k": rank_TE < (token_T1 + seed) % (experts + 1),
        "hot": (torch.arange(experts) == 3).expand(tokens, experts),
        "dropped": two_TE & (token_T1 % 3 != 0),
    }[archetype]
    if archetype == "signed":
        turn_T1 = token_T1 % 3
        weight_TE = torch.where(turn_T1 == 0, weight_TE[:, :1], weight_TE)
        weight_TE = torch.where((turn_T1 == 1) | (rank_TE == 1), -weight_TE, weight_TE)
    return Routing.dense(torch.where(keep_TE, weight_TE, 0.0))


def store(seed=0, dtype=torch.float32, scheme=None, sparsity=None, activation="silu", gated=True, some_kinds=FFN):
    """Return experts with weights near unit gain; with a Scheme they are quantized."""
    generator = torch.Generator().manual_seed(seed)
    rows = 2 * WIDTH if gated else WIDTH
    experts, number = some_kinds.count("ffn"), some_kinds.count("constant")
    gate_up = (torch.randn(experts, rows, HIDDEN, generator=generator) / HIDDEN**0.5).to(dtype)
    down = (torch.randn(experts, HIDDEN, WIDTH, generator=generator) / WIDTH**0.5).to(dtype)
    constants = None
    if number:
        gate_C2H = torch.randn(number, 2, HIDDEN, generator=generator) / HIDDEN**0.5
        constants = Constants(gate_C2H.to(dtype), torch.randn(number, HIDDEN, generator=generator).to(dtype))
    if scheme is not None:
        gate_up = tuple(round_to_nearest(weight, scheme) for weight in gate_up)
        down = tuple(round_to_nearest(weight, scheme) for weight in down)
    return ExpertStore(gate_up, down, some_kinds, activation, gated, constants, sparsity)


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
        "sparsity": None if sparsity is None else SparsitySpec(tuple(sparsity.sites)),
        "boundary": boundary,
        "max_k": experts_store.num_experts,
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
    """Return a registered backend."""
    return REGISTRY.get("backend", name).create(params)


def executor(name, experts_store, layer_spec):
    """Return the executor of one layer on a backend that must take it, folded as a plan does where it has to be."""
    chosen = backend(name)
    if not isinstance(chosen.supports(layer_spec), Refusal):
        return chosen.load({5: experts_store}, {5: layer_spec}).layer(5)
    answer = chosen.supports(layer_spec.folded())
    assert not isinstance(answer, Refusal), answer
    session = chosen.load({5: fold_store(experts_store)}, {5: layer_spec.folded()})
    return Folded(session.layer(5), experts_store)


def check(name, experts_store, dtype, archetype, count, boundary, seed):
    """Run one layer into a NaN-filled piece of a larger buffer; the rest and the inputs must stay as they were."""
    x_TH = tokens(count, dtype, seed)
    some_routing = routing(archetype, count, seed, experts_store.kinds)
    some_inputs = inputs(some_routing, boundary)
    before = [x_TH.clone(), *(tensor.clone() for tensor in some_inputs)]
    run = executor(name, experts_store, spec(experts_store, str(dtype).removeprefix("torch."), boundary))
    buffer = torch.full((count + 2, experts_store.hidden), float("nan"), dtype=dtype)
    out_TH = buffer[1 : count + 1]
    assert run(x_TH, *some_inputs, out_TH=out_TH) is out_TH
    verdict = compare(out_TH, reference(experts_store, some_routing, x_TH), dtype)
    assert verdict.ok, verdict
    assert buffer[0].isnan().all()
    assert buffer[-1].isnan().all()
    assert all(torch.equal(a, b) for a, b in zip(before, [x_TH, *some_inputs], strict=True))
    assert torch.equal(run(x_TH, *some_inputs), out_TH)


def gradients(name, dtype, archetype, boundary, count=17):
    """Return (actual gradients, the oracle's, gradient of the weights, what they were made of) of one layer."""
    experts_store = store(1, dtype, some_kinds=kinds(archetype, constants=False))
    some_routing = routing(archetype, count, 3, experts_store.kinds)
    experts_store.gate_up.requires_grad_()
    experts_store.down.requires_grad_()
    x_TH = tokens(count, dtype).requires_grad_()
    grad_TH = tokens(count, dtype, seed=8)
    *where, weights = inputs(some_routing, boundary)
    weights = weights.clone().requires_grad_()
    layer_spec = spec(experts_store, str(dtype).removeprefix("torch."), boundary, backward=True)
    run = executor(name, experts_store, layer_spec)
    for _ in range(2):  # a second backward through the same executor must work too
        for leaf in (x_TH, experts_store.gate_up, experts_store.down, weights):
            leaf.grad = None
        run(x_TH, *where, weights).backward(grad_TH)
    actual = Gradients(x_TH.grad, experts_store.gate_up.grad, experts_store.down.grad)
    expected = reference_gradients(experts_store, some_routing, x_TH, grad_TH)
    return actual, expected, weights.grad, (experts_store, some_routing, x_TH, grad_TH)


def sparsity(level=0.3, weights=False):
    """Return thresholds at both sites that leave out a part of the activations."""
    scale = torch.linspace(0.5, 1.5, WIDTH) if weights else None
    return Sparsity({"input": SiteRule(level), "hidden": SiteRule(0.3 * level, weight=scale)})


@pytest.fixture(scope="session")
def lab():
    """Everything above under one name."""
    return SimpleNamespace(
        operators=Operators,
        archetypes=ARCHETYPES,
        kinds=kinds,
        routing=routing,
        store=store,
        spec=spec,
        tokens=tokens,
        inputs=inputs,
        backend=backend,
        executor=executor,
        check=check,
        gradients=gradients,
        sparsity=sparsity,
        compare=compare,
        reference=reference,
    )
