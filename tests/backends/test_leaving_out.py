"""Every backend leaves out what a layer's sparsity says, or refuses: rules, sites, weights by expert, residuals."""

import pytest
import torch

from moebench.backends import rules
from moebench.contracts import Refusal, SparsitySpec
from moebench.moe.channels import LowRank, SiteRule, Sparsity

BACKENDS = ("reference", "eager", "grouped", "batched", "compiled", "column_skip", "offload")
E, H, F = 6, 32, 32


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def residual(outputs, width, rank=3):
    return LowRank(rand(E, outputs, rank) - 0.5, rand(E, rank, width, seed=1) - 0.5)


def basis():
    return torch.linalg.qr(rand(H, H) - 0.5).Q


BY_EXPERT = {"per_expert": True}
PLANS = {
    "topk": ({"input": SiteRule(k=20), "hidden": SiteRule(k=9, weight=rand(F))}, {"rule": "topk"}),
    "fixed": (
        {"input": SiteRule(kept=rand(H) > 0.3), "hidden": SiteRule(kept=rand(E, F) > 0.3)},
        {"rule": "fixed", **BY_EXPERT},
    ),
    "gate": ({"gate": SiteRule(0.25)}, {}),
    "gate_and_hidden": ({"gate": SiteRule(0.2), "hidden": SiteRule(0.1)}, {}),
    "per_expert": (
        {"input": SiteRule(0.2, weight=rand(E, H)), "gate": SiteRule(0.1, weight=rand(E, F))},
        BY_EXPERT,
    ),
    "basis": ({"input": SiteRule(k=20, basis_II=basis())}, {"rule": "topk", "basis": True}),
    "residual": (
        {"input": SiteRule(0.4, residual=residual(2 * F, H)), "hidden": SiteRule(0.1, residual=residual(H, F))},
        {"residual": True},
    ),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("name", BACKENDS)
def test_what_is_left_out_is_left_out(lab, name, plan, dtype):
    sites, asked = PLANS[plan]
    sparsity = Sparsity(sites)
    torch_dtype = getattr(torch, dtype)
    store = lab.store(3, torch_dtype, sparsity=sparsity)
    spec = lab.spec(store, dtype, sparsity=SparsitySpec(tuple(sparsity.sites), **asked))
    answer = lab.backend(name).supports(spec)
    if isinstance(answer, Refusal):
        assert set(spec.sparsity.features) - set(rules.MASKED) or name == "compiled", answer
        return
    assert answer.sparse == ("skip" if name == "column_skip" else "mask")
    session = lab.backend(name).load({5: store}, {5: spec})
    assert session.executed().sparse == answer.sparse
    x_TH, routing = lab.tokens(40, torch_dtype), lab.routing("dynamic_k", 40, 1)
    y_TH = session.layer(5)(x_TH, *lab.inputs(routing, "topk"))
    verdict = lab.compare(y_TH, lab.reference(store, routing, x_TH), torch_dtype)
    assert verdict.ok, verdict
    dense = lab.reference(lab.store(3, torch_dtype), routing, x_TH).y_TH
    assert (y_TH.double() - dense).norm() > 0.05 * dense.norm()


def test_an_executor_that_forgets_an_experts_own_weights_is_wrong(lab):
    store = lab.store(3, sparsity=Sparsity({"input": SiteRule(0.3, weight=rand(E, H))}))
    shared = lab.store(3, sparsity=Sparsity({"input": SiteRule(0.3, weight=rand(E, H)[0])}))
    x_TH, routing = lab.tokens(40), lab.routing("dynamic_k", 40, 1)
    y_TH = lab.executor("eager", shared, lab.spec(shared))(x_TH, *lab.inputs(routing, "topk"))
    assert not lab.compare(y_TH, lab.reference(store, routing, x_TH), torch.float32).ok
