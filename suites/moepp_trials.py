"""The trials of suites ``moepp_balance`` and ``moepp_time``. Imported by workers only.

Shape letters: T tokens, E expert ids, K slots per token, N assignments.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..contracts import Case, Check, Cost, Facts, Metric, Registry
from ..moe.balance.load import eta
from ..moe.fold import fold_store
from ..moe.plugins import MoEPlusPlus
from ..moe.routing import Routing
from .layer import STEPS, VARIANTS, LayerTrial
from .models import substream
from .subject import DTYPES, Batch, Subject, boundary_inputs


def ffn_share(tau: float, ffn: int, others: int) -> float:
    """Return the FFN experts' share of all assignments at the least balance loss: tau N_F / (tau N_F + N_Z)."""
    return tau * ffn / (tau * ffn + others)


class BalanceTrial:
    """Minimises sum_e eta_e f_e P_e with f = k P over all distributions P = softmax(z), from a seeded start."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case, registry: Registry) -> None:
        params: MoEPlusPlus = registry.params("routing", case.routing)
        ffn = int(case.workload["ffn_experts"])
        self.k, self.tau, self.ffn = params.k, params.tau, ffn
        kinds = ("ffn",) * ffn + ("zero",) * (params.zero + params.copy + params.constant)
        self.eta_E = eta(kinds, params.tau).double()
        rng = torch.Generator().manual_seed(substream(case.seed, "moepp_balance"))
        self.z_E = torch.randn(len(kinds), generator=rng, dtype=torch.float64).requires_grad_()

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def loss(self, z_E: Tensor) -> Tensor:
        """Return the loss at logits ``z_E``."""
        p_E = z_E.softmax(-1)
        return self.k * (self.eta_E * p_E * p_E).sum()

    def run(self, step: int) -> Tensor:
        """Return P_E at the minimum."""
        optimiser = torch.optim.LBFGS(
            [self.z_E], max_iter=500, tolerance_grad=1e-14, tolerance_change=1e-18, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = self.loss(self.z_E)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimiser.step(closure)  # type: ignore[no-untyped-call]
        return self.z_E.detach().softmax(-1)

    def verify(self, step: int, output: Tensor) -> Check:
        """Accept a point where the loss is stationary: only there has a minimum been found."""
        (gradient_E,) = torch.autograd.grad(self.loss(self.z_E), self.z_E)
        error, bound = float(gradient_E.norm()), 1e-8
        return Check(error <= bound, error, bound, "" if error <= bound else "the minimisation did not converge")

    def cost(self, step: int) -> Cost:
        """Return nothing: this is no measurement of time."""
        return Cost(0.0, 0.0)

    def facts(self) -> Facts:
        """Return measured and predicted share, and the loss beside k / sum(1 / eta)."""
        p_E = self.z_E.detach().softmax(-1)
        others = len(self.eta_E) - self.ffn
        return Facts(
            (
                Metric("ffn_share", float(p_E[: self.ffn].sum()), "1"),
                Metric("ffn_share_formula", ffn_share(self.tau, self.ffn, others), "1"),
                Metric("balance_loss", float(self.loss(self.z_E.detach())), "1"),
                Metric("balance_loss_formula", self.k / float((1 / self.eta_E).sum()), "1"),
            )
        )

    def close(self) -> None:
        """Nothing to free."""


class FFNTimeTrial(LayerTrial):
    """A layer's FFN experts alone, with the assignments that the least balance loss gives them.

    Slots of experts without weights are empty, so the timed call is what those experts save: the backend's own work on
    the FFN experts. A layer of FFN experts alone has every slot filled, evenly.
    """

    def _make_batches(self) -> list[Batch]:
        kinds = self.subject.spec.kinds
        tau = getattr(self.registry.params("routing", self.case.routing), "tau", 1.0)
        self.subject = ffn_part(self.subject)
        return [self._batch(kinds, tau, number) for number in range(STEPS * VARIANTS)]

    def _batch(self, kinds: tuple[str, ...], tau: float, number: int) -> Batch:
        case, spec = self.case, self.subject.spec
        traffic = self.registry.get("traffic", case.traffic.name).create(case.traffic.params)
        x_TH = traffic.hidden(self.subject.source, case.layers[0], case.tokens, number, case.seed)
        rng = torch.Generator().manual_seed(substream(case.seed, "moepp_time", number))
        routing = ffn_entries(balanced_routing(kinds, tau, case.tokens, spec.max_k, rng), kinds)
        x_TH = self.subject.layer.reads(x_TH.to(DTYPES[case.dtype]))
        return Batch(x_TH, routing, boundary_inputs(case.boundary, routing, spec))


def ffn_part(subject: Subject) -> Subject:
    """Return the subject with its FFN experts alone."""
    layer = replace(subject.layer, store=fold_store(subject.layer.store), shared=None)
    return replace(subject, layer=layer, spec=subject.spec.folded())


def balanced_routing(kinds: tuple[str, ...], tau: float, tokens: int, k: int, rng: torch.Generator) -> Routing:
    """Return a Routing with weights 1/k whose load is proportional to 1 / eta, to within one assignment per expert."""
    share_E = 1 / eta(kinds, tau).double()
    indices_TK = deal(whole_counts(share_E / share_E.sum(), k * tokens), tokens, rng)
    return Routing.topk(indices_TK, torch.full(indices_TK.shape, 1 / k), len(kinds))


def whole_counts(share_E: Tensor, total: int) -> Tensor:
    """Return whole numbers near ``share_E`` * total that sum to ``total``: the largest remainders are rounded up."""
    exact_E = share_E * total
    counts_E = exact_E.floor().long()
    rest = total - int(counts_E.sum())
    counts_E[(exact_E - counts_E).argsort(descending=True, stable=True)[:rest]] += 1
    return counts_E


def deal(counts_E: Tensor, tokens: int, rng: torch.Generator) -> Tensor:
    """Return indices_TK in which expert e occurs counts_E[e] times and never twice for a token; tokens are shuffled.

    Dealt like cards to the tokens in turn, expert after expert: the places of an expert with at most T cards are
    consecutive, hence at different tokens.
    """
    total, most = int(counts_E.sum()), int(counts_E.max())
    if total % tokens or most > tokens:
        raise ValueError(f"{total} assignments, {most} of one expert, cannot be dealt to {tokens} tokens; lower k.")
    card_N = torch.repeat_interleave(torch.arange(len(counts_E)), counts_E)
    return card_N.view(-1, tokens).T[torch.randperm(tokens, generator=rng)].contiguous()


def ffn_entries(routing: Routing, kinds: tuple[str, ...]) -> Routing:
    """Return the entries of FFN experts, which are numbered anew; weights stay, so a token's need not sum to one."""
    ffn_E = torch.tensor([kind == "ffn" for kind in kinds])
    new_id_E = ffn_E.long().cumsum(0) - 1
    return routing.keep(ffn_E[routing.expert_N]).relabel(new_id_E, int(ffn_E.sum()))
