"""Claims of gates that become sparse: temperature, the activation gate, DSelect-k and COMET.

Shape letters: T tokens, H hidden, E expert ids, P points of progress.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ...moe.balance.rows import given
from ...moe.routing import Context
from .base import Claim, Outcome, Scene, layer_shape
from .dynamic import largest_jump

SATURATED = 1e8
"""Steps so steep that next to no token lies on one."""

# --- temperature -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def evomoe_falls(scene: Scene) -> Outcome:
    """Count tokens whose effective number of experts (exp of the entropy) grows while the temperature falls."""
    params = {"start": 10.0, "end": 0.01, "threshold": 0.0, "hard": None}
    router, x_TH = scene.router("dense_to_sparse", layer_shape(), params=params).router, scene.normal(1000, 32)
    entropy_PT = torch.stack(
        [
            torch.special.entr(given(router(x_TH, Context(progress=point / 40)).probs_TE, "probs_TE")).sum(-1)
            for point in range(41)
        ]
    )
    grows = int((entropy_PT.diff(dim=0) > 1e-5).sum())
    first, last = (float(entropy_PT[point].mean().exp()) for point in (0, -1))
    figures = {"effective_at_first": first, "effective_at_last": last}
    return Outcome(float(grows), 0.0, first > 15 and last < 2, "the gate does not go from dense to sparse", figures)


@torch.no_grad()
def evomoe_one(scene: Scene) -> Outcome:
    """Return the mean number of experts of a token at the end of the schedule; nearly all at its start."""
    router, x_TH = scene.router("dense_to_sparse", layer_shape()).router, scene.normal(1000, 32)
    first, last = (float(router(x_TH, Context(progress=p)).k_T.double().mean()) for p in (0.0, 1.0))
    return Outcome(last, 1.0, first > 14.4, "fewer than 9 of 10 experts at the start", {"k_at_first": first})


def pde_residual(scene: Scene, routing: str, activation: str | None = None) -> float:
    """Return the largest of |du/dtau + a . du/da / tau| / |du/dtau| over the experts, u = exp(z / tau), in float64.

    z are the logits of the registered gate for one token of 4 channels, a its rows, one for each of 200 experts.
    """
    shape = layer_shape(experts=200, hidden=4)
    params = {} if activation is None else {"activation": activation}
    router = scene.router(routing, shape, scene.normal(200, 4, name="rows"), params).router
    scorer = router.get_submodule("scorer").double()
    rows_EH = next(parameter for parameter in scorer.parameters() if parameter.dim() == 2)
    tau_E = torch.full((200,), 0.7, dtype=torch.float64, requires_grad=True)
    logits_TE: Tensor = scorer(scene.normal(1, 4, name="token"), Context())
    slope_E, a_EH = torch.autograd.grad((logits_TE[0] / tau_E).exp().sum(), [tau_E, rows_EH])
    residual_E = slope_E + (a_EH * rows_EH).sum(1).detach() / 0.7
    return float((residual_E.abs() / slope_E.abs().clamp(min=torch.finfo(torch.float64).tiny)).max())


def temperature_tied(scene: Scene) -> Outcome:
    """Return the residual of the equation for a linear gate."""
    residual, broken = pde_residual(scene, "dense_to_sparse"), pde_residual(scene, "activation_gate", "sigmoid")
    return Outcome(residual, 0.0, broken > 1e-6, "the residual does not see an activation")


def activation_frees(scene: Scene) -> Outcome:
    """Return the least residual of four activations that are not positively homogeneous."""
    found = {name: pde_residual(scene, "activation_gate", name) for name in ("sigmoid", "tanh", "gelu", "silu")}
    linear = pde_residual(scene, "dense_to_sparse")
    return Outcome(min(found.values()), 0.0, linear < 1e-12, "the residual of a linear gate is not zero", found)


def activation_relu(scene: Scene) -> Outcome:
    """Return the residual of ReLU, which is positively homogeneous."""
    linear = pde_residual(scene, "dense_to_sparse")
    residual = pde_residual(scene, "activation_gate", "relu")
    return Outcome(residual, 0.0, linear < 1e-12, "the residual of a linear gate is not zero")


# --- smooth steps ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def most_experts(scene: Scene, routing: str, init: float) -> Outcome:
    """Compare the most experts of a token with k = 2, for a gate whose steps start with this ``init``."""
    router = scene.router(routing, layer_shape(), params={"k": 2, "init": init}).router
    routing_ = router(scene.normal(2000, 32), Context())
    figures = {"k_mean": float(routing_.k_T.double().mean())}
    return Outcome(float(routing_.k_T.max()), 2.0, len(routing_.token_N) >= 2000, "tokens have no expert", figures)


@torch.no_grad()
def dselect_k_continuous(scene: Scene) -> Outcome:
    """Compare the largest jump of DSelect-k's weights along a line, half of its steps saturated, with that of top-2."""
    router = scene.router("dselect_k", layer_shape(), params={"k": 2, "init": 1.0}).router
    jump, sets = largest_jump(router, scene)
    other, other_sets = largest_jump(scene.router("mixtral", layer_shape()).router, scene)
    return Outcome(jump, other, min(sets, other_sets) > 1, "the experts never change on this line")


@torch.no_grad()
def comet_simplex(scene: Scene) -> Outcome:
    """Return how far the weights of a token are from summing to one, for 12 experts and steps in every state."""
    worst = 0.0
    for init in (0.01, 1.0, SATURATED):
        router = scene.router("comet", layer_shape(experts=12), params={"init": init}).router
        gate_TE = router(scene.normal(1000, 32), Context()).to_dense()
        worst = max(worst, float((gate_TE.sum(1) - 1).abs().max()), float(-gate_TE.min()))
    return Outcome(worst, 0.0, float(gate_TE.max()) > 0.1, "no expert has a weight to speak of")


CLAIMS: dict[str, Claim] = {
    "evomoe-falls": evomoe_falls,
    "evomoe-one": evomoe_one,
    "temperature-tied": temperature_tied,
    "activation-frees": activation_frees,
    "activation-relu": activation_relu,
    "dselect-k-saturated": partial(most_experts, routing="dselect_k", init=SATURATED),
    "dselect-k-start": partial(most_experts, routing="dselect_k", init=0.01),
    "dselect-k-continuous": dselect_k_continuous,
    "comet-simplex": comet_simplex,
    "comet-saturated": partial(most_experts, routing="comet", init=SATURATED),
}
