"""The checks of suite ``routing``: what a router's result must be, found apart from the timed call.

A router that is a Linear scorer with a Selection is computed anew in float64, by sorting. Any other is compared with
its own untimed result, made before the timing by another copy of it: that shows a result that is not one of this
input, and what it must be at all is for the property tests of the routers. Either way the result must be a
well-formed Routing.
Shape letters: T tokens, E expert ids, K slots, G groups, M experts of a group, N assignments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..contracts import Check, Selection
from ..moe.routing import Routing
from ..moe.routing_metrics.agreement import pairs

PermuteOutput = tuple[Tensor, Tensor, Tensor]
"""What ``Routing.sorted`` returns: token_N, offsets_E1, weight_N."""


@dataclass(frozen=True)
class Expected:
    """A Routing to compare with: entries by rising (token, expert), weights in float64.

    ``margin_T`` float64 is how far each token's choice lies from another one, in the scale of the scores; without it
    no token may choose otherwise.
    """

    pair_N: Tensor
    weight_N: Tensor
    shape: tuple[int, int]
    margin_T: Tensor | None = None


def expected_of(routing: Routing, margin_T: Tensor | None = None) -> Expected:
    """Return what a result must be that equals ``routing``."""
    pair_N, order_N = pairs(routing).sort()
    return Expected(pair_N, routing.weight_N.detach().double()[order_N], routing.shape, margin_T)


def selected(logits_TE: Tensor, selection: Selection, bias_E: Tensor | None) -> Expected:
    """Return what ``selection`` makes of logits, in float64 and by sorting."""
    logits_TE = logits_TE.double()
    score_TE = {
        "softmax": lambda: (logits_TE - logits_TE.logsumexp(1, keepdim=True)).exp(),
        "sigmoid": lambda: 1 / (1 + (-logits_TE).exp()),
        "one": lambda: logits_TE,
    }[selection.score]()
    rank_TE = score_TE if bias_E is None else score_TE + bias_E.double()
    margin_T = torch.full((len(logits_TE),), torch.inf, dtype=torch.float64)
    if selection.groups is not None:
        rank_TE, margin_T = _within_groups(rank_TE, *selection.groups)
    best_TE, order_TE = rank_TE.sort(dim=1, descending=True)
    if selection.k < rank_TE.shape[1]:
        margin_T = torch.minimum(margin_T, best_TE[:, selection.k - 1] - best_TE[:, selection.k])
    chosen_TK = order_TE[:, : selection.k]
    weight_TK = score_TE.gather(1, chosen_TK)
    weight_TK = torch.ones_like(weight_TK) if selection.score == "one" else weight_TK
    if selection.renormalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True)
    return expected_of(Routing.topk(chosen_TK, weight_TK * selection.scale, rank_TE.shape[1]), margin_T)


def _within_groups(rank_TE: Tensor, groups: int, kept: int) -> tuple[Tensor, Tensor]:
    """Return the ranks with -inf outside the kept groups, and how far the choice of groups lies from another."""
    rank_TGM = rank_TE.reshape(len(rank_TE), groups, -1)
    worth_TG = rank_TGM.sort(dim=2, descending=True).values[:, :, :2].sum(2)
    best_TG = worth_TG.sort(dim=1, descending=True).values
    least_T1 = best_TG[:, kept - 1 : kept]
    margin_T = least_T1[:, 0] - best_TG[:, kept] if kept < groups else torch.full_like(least_T1[:, 0], torch.inf)
    return torch.where((worth_TG >= least_T1)[:, :, None], rank_TGM, -torch.inf).flatten(1), margin_T


def malformed(routing: Routing, shape: tuple[int, int], max_k: int) -> str:
    """Return what makes this no Routing of ``shape`` with at most ``max_k`` experts per token, or an empty string."""
    if routing.shape != shape:
        return f"the routing is of shape {routing.shape}, not {shape}"
    for name, index_N, size in (("token", routing.token_N, shape[0]), ("expert", routing.expert_N, shape[1])):
        if index_N.dtype != torch.int64 or len(index_N) != len(routing.weight_N):
            return f"{name}_N is no int64 index with one entry for each weight"
        if len(index_N) and not 0 <= int(index_N.min()) <= int(index_N.max()) < size:
            return f"{name}_N is out of range"
    if len(torch.unique(pairs(routing))) != len(routing.token_N):
        return "a token has an expert twice"
    if not bool(torch.isfinite(routing.weight_N).all()):
        return "a weight is not finite"
    most = int(routing.k_T.max()) if shape[0] else 0
    return f"a token has {most} experts where the routing promises {max_k} at most" if most > max_k else ""


def compare_routing(found: Routing, expected: Expected, max_k: int, bound: float) -> Check:
    """Judge a router's result: the same experts, and weights within ``bound`` of the norm of the token's weights.

    A token may choose otherwise where its margin is below ``bound``; such tokens are counted as flips.
    """
    reason = malformed(found, expected.shape, max_k)
    if reason:
        return Check(False, bound=bound, reason=reason)
    mine = expected_of(found)
    moved_T = _moved(mine, expected)
    may_move_T = torch.zeros_like(moved_T) if expected.margin_T is None else expected.margin_T <= bound
    if bool((moved_T & ~may_move_T).any()):
        wrong = int((moved_T & ~may_move_T).sum())
        return Check(False, bound=bound, reason=f"{wrong} tokens have other experts than the reference gives them")
    error = _weight_error(mine, expected, moved_T)
    reason = "" if error <= bound else f"a weight is off by {error:.2g} of its token's weights"
    return Check(not reason, error, bound, reason, flips=int(moved_T.sum()))


def _moved(mine: Expected, expected: Expected) -> Tensor:
    """Return mask_T: the tokens whose sets of experts differ."""
    moved_T = torch.zeros(expected.shape[0], dtype=torch.bool)
    for one, other in ((mine.pair_N, expected.pair_N), (expected.pair_N, mine.pair_N)):
        moved_T[one[~torch.isin(one, other)] // expected.shape[1]] = True
    return moved_T


def _weight_error(mine: Expected, expected: Expected, moved_T: Tensor) -> float:
    """Return the largest difference of weights of tokens that kept their experts, relative to the token's norm."""
    token_N = expected.pair_N // expected.shape[1]
    stayed_N = ~moved_T[token_N]
    mine_N = mine.weight_N[~moved_T[mine.pair_N // expected.shape[1]]]
    square_T = torch.zeros(expected.shape[0], dtype=torch.float64)
    norm_T = square_T.index_add(0, token_N, expected.weight_N.square()).sqrt().clamp(min=1e-30)
    error_N = (mine_N - expected.weight_N[stayed_N]).abs() / norm_T[token_N[stayed_N]]
    return float(error_N.max()) if len(error_N) else 0.0


def compare_logits(found_TE: Tensor, expected_TE: Tensor, bound: float) -> Check:
    """Judge a scorer's result: each row within ``bound`` of the norm of the row of ``expected_TE`` (float64).

    Experts that a token may not have score -inf in both.
    """
    if found_TE.shape != expected_TE.shape:
        shapes = f"{tuple(found_TE.shape)}, not {tuple(expected_TE.shape)}"
        return Check(False, bound=bound, reason=f"logits of shape {shapes}")
    hidden_TE = expected_TE == -torch.inf
    if not torch.equal(found_TE == -torch.inf, hidden_TE):
        return Check(False, bound=bound, reason="other experts score -inf than in the reference")
    off_TE = (found_TE.double() - expected_TE).masked_fill(hidden_TE, 0.0)
    norm_T = expected_TE.masked_fill(hidden_TE, 0.0).norm(dim=1).clamp(min=1e-30)
    error = float((off_TE.norm(dim=1) / norm_T).max()) if len(norm_T) else 0.0
    reason = "" if error <= bound else f"logits are off by {error:.2g} of their norm"
    return Check(not reason, error, bound, reason)


def sorted_by_hand(routing: Routing) -> PermuteOutput:
    """Return what ``Routing.sorted`` must return, from a sort of Python tuples."""
    entries = sorted(zip(routing.expert_N.tolist(), routing.token_N.tolist(), routing.weight_N.tolist(), strict=True))
    offsets = [0] * (routing.num_experts + 1)
    for expert, _, _ in entries:
        offsets[expert + 1] += 1
    for expert in range(routing.num_experts):
        offsets[expert + 1] += offsets[expert]
    token_N = torch.tensor([token for _, token, _ in entries], dtype=torch.int64)
    weight_N = torch.tensor([weight for _, _, weight in entries], dtype=torch.float32)
    return token_N, torch.tensor(offsets, dtype=torch.int32), weight_N


def compare_sorted(found: Sequence[Tensor], expected: PermuteOutput) -> Check:
    """Judge a permutation: the same tokens, offsets and weights, bit for bit."""
    for name, mine, wanted in zip(("token_N", "offsets_E1", "weight_N"), found, expected, strict=True):
        if mine.dtype != wanted.dtype or not torch.equal(mine, wanted):
            return Check(False, bound=0.0, reason=f"{name} is not in the order of experts, then tokens")
    return Check(True, 0.0, 0.0)
