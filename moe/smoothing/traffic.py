"""The calibration tokens of EAQuant: the layer's traffic, and what balance draws for experts that it starves.

Shape letters: T calibration tokens, H hidden, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..bits.balanced import draw_balanced, extra_traffic
from ..routing import Routing
from .params import EAQuant

Part = tuple[Routing, Tensor]
"""A Routing, and the inputs of its tokens."""


@dataclass(frozen=True, eq=False)
class Traffic:
    """``parts`` for ``calibrate_routed``: the traffic, then what was drawn beside it; and which experts stay short."""

    parts: tuple[Part, ...]
    short: tuple[int, ...] = ()


def traffic_of(params: EAQuant, routing: Routing, x_TH: Tensor, seed: int) -> Traffic:
    """Return the calibration of a layer whose experts read ``x_TH``, routed by ``routing``.

    The first part of the tokens is the traffic; the last, ``params.spare`` of them, are candidates of the balance and
    nothing else.
    """
    ordinary = len(x_TH) - int(params.spare * len(x_TH))
    if ordinary == 0:
        raise ValueError("a layer is smoothed by calibration tokens and got none; ask for some.")
    traffic = rows(routing, 0, ordinary), x_TH[:ordinary]
    if params.balance == 0:
        return Traffic((traffic,))
    candidates = rows(routing, ordinary, len(x_TH))
    indices_TK, candidates_CK = traffic[0].padded()[0], candidates.padded()[0]
    sample = draw_balanced(indices_TK, candidates_CK, routing.num_experts, params.balance, seed)
    return Traffic((traffic, (extra_traffic(sample, candidates), x_TH[ordinary:])), sample.short)


def rows(routing: Routing, start: int, stop: int) -> Routing:
    """Return the Routing of the tokens from ``start`` to ``stop``, counted from 0."""
    kept = routing.keep((routing.token_N >= start) & (routing.token_N < stop))
    logits_TE, probs_TE = (None if t is None else t[start:stop] for t in (routing.logits_TE, routing.probs_TE))
    return Routing(
        kept.token_N - start, kept.expert_N, kept.weight_N, (stop - start, routing.num_experts), logits_TE, probs_TE
    )
