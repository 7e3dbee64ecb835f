"""Flops and parameters per token: of the experts that a Routing names, and of the router itself. A multiplication and
an addition are two flops. Shape letters: T tokens, E expert ids, H hidden, F expert width."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ...contracts import Metric, expert_matrices
from ..routing import Routing


def parameters_of_kind(kind: str, hidden: int, width: int, gated: bool) -> int | None:
    """Return how many weights one assignment to an expert of this kind reads.

    An FFN has 3 H F weights (2 H F ungated) and so has a gather expert, mostly with F = 1; a constant expert has 3 H
    (W_c [2, H] and v [H]), zero and copy experts none. None where the work depends on more than the token
    (``sequence``).
    """
    own = expert_matrices(gated) * hidden * width
    weights = {
        "ffn": own,
        "zero": 0,
        "copy": 0,
        "constant": 3 * hidden,
        "gather": own,
    }
    return weights.get(kind)


def expert_flops(routing: Routing, kinds: Sequence[str], hidden: int, width: int, gated: bool) -> list[Metric]:
    """Return ``expert_flops_per_token``, and ``expert_flops_share``: that over all ids of kind ``ffn`` at every token.

    Two flops for each weight that an assignment reads. So a share r of null assignments lowers the flops by r, which is
    a property of the Routing alone. Both are None where a kind with assignments has no known cost.
    """
    read = weights_per_token([routing], kinds, hidden, width, gated)
    value = None if read is None else 2.0 * read
    dense = 2.0 * kinds.count("ffn") * (parameters_of_kind("ffn", hidden, width, gated) or 0)
    share = value / dense if value is not None and dense else None
    return [
        Metric("expert_flops_per_token", value, "flop", n=routing.num_tokens),
        Metric("expert_flops_share", share, "share", n=routing.num_tokens),
    ]


def weights_per_token(
    routings: Sequence[Routing], kinds: Sequence[str], hidden: int, width: int, gated: bool
) -> float | None:
    """Return the weights that a token's experts read, in the mean over all tokens of ``routings``.

    None without tokens, and where a kind with assignments has no known size.
    """
    loads = dict.fromkeys(kinds, 0)
    for routing in routings:
        for kind, load in zip(kinds, routing.counts_E.tolist(), strict=True):
            loads[kind] += load
    sizes = {kind: parameters_of_kind(kind, hidden, width, gated) for kind, load in loads.items() if load}
    known = [size * loads[kind] for kind, size in sizes.items() if size is not None]
    tokens = sum(routing.num_tokens for routing in routings)
    return sum(known) / tokens if tokens and len(known) == len(sizes) else None


def counted_flops(call: Callable[[], Any]) -> int:
    """Return the flops of the matrix products, convolutions and attentions that ``call`` really runs in torch.

    Elementwise work, sorting and choosing are not counted, as in 2 H E for a linear router.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())
