"""Which tokens meet which experts: hidden states to be routed, or a Routing that is forced.

Everything is a function of (parameters, sizes, step, seed): no engine, order of calls or number of threads enters.
Shape letters: T tokens, H hidden, E experts, K slots, B blocks, Q quadrature nodes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from ..contracts import canonical_json
from ..moe.routing import Routing
from .model_plugins import Balanced, Forced, Gaussian, Recorded
from .models import ModelSource, substream


class Traffic(Protocol):
    """What every traffic offers; only a ``forced`` one has ``routing`` and ``requested`` besides.

    These are told the case's ``layer``: what is drawn is the same at every layer, what was recorded is not. A traffic
    that may change what it is asked for has ``audit``, too, which says so (see suites.traffic_kinds.ReplayTraffic).
    """

    forced: ClassVar[bool]

    def hidden(self, source: ModelSource, layer: int, tokens: int, step: int, seed: int) -> Tensor:
        """Return x_TH float32, the input of ``layer`` at ``step``."""


def _generator(seed: int, *names: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(substream(seed, "traffic", *names))


@dataclass(frozen=True)
class GaussianTraffic:
    """Independent standard normal hidden states."""

    forced: ClassVar[bool] = False

    def hidden(self, source: ModelSource, layer: int, tokens: int, step: int, seed: int) -> Tensor:
        """Return x_TH float32."""
        rng = _generator(seed, "gaussian", layer, step)
        return torch.randn(tokens, source.shape.hidden, generator=rng)


@dataclass(frozen=True)
class RecordedTraffic:
    """Hidden states of the evaluation text; a step has the same tokens at every layer."""

    forced: ClassVar[bool] = False

    def hidden(self, source: ModelSource, layer: int, tokens: int, step: int, seed: int) -> Tensor:
        """Return x_TH float32."""
        return source.hidden_states(layer, "evaluation", tokens, substream(seed, "traffic", "recorded", step))


@dataclass(frozen=True)
class DrawnTraffic(GaussianTraffic):
    """Each token draws k distinct experts by their popularity, one after another."""

    params: Forced

    forced: ClassVar[bool] = True

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return a top-k Routing of shape (tokens, experts) with weights 1/k.

        The k largest of log p + Gumbel noise are k draws without replacement (Yellott 1977); dead experts have
        log p = -inf and cannot be among them, since ``check`` holds k below the number of the others.
        """
        self.params.check(experts, k)
        rng = _generator(seed, *self._name(), step, tokens, experts, k)
        log_p_E = torch.tensor(self.params.popularity(experts, step), dtype=torch.float64).log()
        clock_TE = torch.empty(tokens, experts, dtype=torch.float64).exponential_(generator=rng)
        return _equal_weights((log_p_E - clock_TE.log()).topk(k).indices, experts)

    def requested(self, experts: int, k: int, step: int = 0, layer: int | None = None) -> tuple[float, ...]:
        """Return the expected share of assignments of each expert; exact up to quadrature, sums to 1."""
        self.params.check(experts, k)
        p_E = torch.tensor(self.params.popularity(experts, step), dtype=torch.float64)
        return tuple((inclusion(p_E, k) / k).tolist())

    def _name(self) -> tuple[str, str]:
        return type(self.params).__name__, canonical_json(self.params)


@dataclass(frozen=True)
class BalancedTraffic(DrawnTraffic):
    """Every expert gets the same number of tokens to within one, and no token an expert twice."""

    def routing(self, tokens: int, experts: int, k: int, step: int, seed: int, layer: int | None = None) -> Routing:
        """Return a top-k Routing of shape (tokens, experts) with weights 1/k.

        Slots are dealt in order from decks of all experts; a block of E tokens uses k decks in one shuffled order, so
        k consecutive cards are distinct, whole blocks are exactly equal, and the rest differs by one at most.
        """
        self.params.check(experts, k)
        rng = _generator(seed, *self._name(), step, tokens, experts, k)
        order_BE = torch.rand(-(-tokens // experts), experts, generator=rng).argsort(dim=1)
        token_T = torch.arange(tokens)
        card_TK = ((token_T % experts)[:, None] * k + torch.arange(k)) % experts
        indices_TK = order_BE[(token_T // experts)[:, None], card_TK]
        return _equal_weights(indices_TK[torch.randperm(tokens, generator=rng)], experts)


def _equal_weights(indices_TK: Tensor, experts: int) -> Routing:
    return Routing.topk(indices_TK, torch.full(indices_TK.shape, 1 / indices_TK.shape[1]), experts)


def inclusion(p_E: Tensor, k: int, nodes: int = 512) -> Tensor:
    """Return the probability of each expert to be among k draws without replacement with popularity ``p_E`` float64.

    With an exponential clock of rate p_e per expert the draws are the first k to ring. So the probability is the
    integral over t of p_e exp(-p_e t) P(at most k-1 others rang by t); the count of the others is a sum of independent
    Bernoulli variables, here convolved from both ends. The trapezoid rule in log t converges geometrically.
    """
    live_E = p_E > 0
    rate_E = p_E[live_E]
    log_t_Q = torch.linspace(-42.0, 8.0 - float(rate_E.min().log()), nodes, dtype=torch.float64)
    rt_QE = log_t_Q.exp()[:, None] * rate_E
    ring_QE = -torch.expm1(-rt_QE)
    before_EQK, after_EQK = _counts(ring_QE, k), _counts(ring_QE.flip(1), k).flip(0)
    few_EQ = (before_EQK * after_EQK.cumsum(2).flip(2)).sum(2)
    density_EQ = (rt_QE * (-rt_QE).exp()).T
    result_E = torch.zeros_like(p_E)
    result_E[live_E] = torch.trapezoid(density_EQ * few_EQ, log_t_Q, dim=1)
    return result_E * (k / result_E.sum())


def _counts(ring_QE: Tensor, k: int) -> Tensor:
    """Return [E, Q, k]: for each expert, the probabilities that 0 .. k-1 of the experts before it rang."""
    count_QK = torch.zeros(len(ring_QE), k, dtype=torch.float64)
    count_QK[:, 0] = 1
    before = []
    for expert in range(ring_QE.shape[1]):
        before.append(count_QK)
        ring_Q1 = ring_QE[:, expert : expert + 1]
        shifted_QK = torch.nn.functional.pad(count_QK[:, :-1], (1, 0))
        count_QK = count_QK * (1 - ring_Q1) + shifted_QK * ring_Q1
    return torch.stack(before)


def gaussian(params: Gaussian) -> GaussianTraffic:
    """Return the traffic of normal hidden states."""
    return GaussianTraffic()


def recorded(params: Recorded) -> RecordedTraffic:
    """Return the traffic of recorded hidden states."""
    return RecordedTraffic()


def drawn(params: Forced) -> DrawnTraffic:
    """Return the traffic that draws experts by popularity."""
    return DrawnTraffic(params)


def balanced(params: Balanced) -> BalancedTraffic:
    """Return the traffic of equal counts."""
    return BalancedTraffic(params)
