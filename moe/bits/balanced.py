"""Balanced calibration: further tokens for experts that the traffic starves (EAQuant, arXiv 2506.13329, part c).

Shape letters: T tokens of the traffic, C candidate tokens, S drawn tokens, K slots per token, E expert ids.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..routing import Routing


@dataclass(frozen=True, eq=False)
class BalancedSample:
    """Which candidates were drawn, and what each expert has with them.

    ``token_S`` int64 are rows of the candidates in the order in which they were drawn. ``wanted`` is an expert's share
    in assignments; ``counts_E`` is what each has, counting a drawn token only for the experts in ``starved_E`` (bool),
    those that the traffic alone leaves below it. ``short`` names the ids that stay below although every candidate of
    theirs was drawn.
    """

    token_S: Tensor
    counts_E: Tensor
    wanted: int
    starved_E: Tensor
    short: tuple[int, ...]

    @property
    def reason(self) -> str:
        """Say which experts lack their share; empty where none does."""
        if not self.short:
            return ""
        named = ", ".join(str(expert) for expert in self.short[:8]) + (" ..." if len(self.short) > 8 else "")
        return (
            f"{len(self.short)} of {len(self.counts_E)} experts have fewer than {self.wanted} calibration tokens, all "
            f"candidates of theirs included: {named}; give more candidates."
        )


def draw_balanced(
    indices_TK: Tensor, candidates_CK: Tensor, num_experts: int, ratio: float = 1.0, seed: int = 0
) -> BalancedSample:
    """Draw candidates until each expert has ``ratio`` of its expected tokens, or its candidates are spent.

    Both arguments are expert ids, an id outside 0..E-1 an empty slot. An expert expects the assignments of the traffic
    over E. Candidates are looked at once, in an order that ``seed`` alone decides, and drawn where one of their experts
    has not got its share yet; an expert that is short at the end has therefore had every candidate of its own.
    """
    if not 0 < ratio < math.inf:
        raise ValueError(f"ratio={ratio:g} must be a positive number; 1 asks for each expert's expected tokens.")
    counts = torch.bincount(indices_TK[_filled(indices_TK, num_experts)], minlength=num_experts).tolist()
    wanted = math.ceil(ratio * sum(counts) / num_experts)
    starved = [count < wanted for count in counts]
    drawn: list[int] = []
    rows = candidates_CK.tolist()
    for token in torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist():
        experts = {expert for expert in rows[token] if 0 <= expert < num_experts}
        if any(counts[expert] < wanted for expert in experts):
            drawn.append(token)
            for expert in experts:
                counts[expert] += starved[expert]
    short = tuple(expert for expert, count in enumerate(counts) if count < wanted)
    return BalancedSample(
        torch.tensor(drawn, dtype=torch.long), torch.tensor(counts), wanted, torch.tensor(starved), short
    )


def extra_traffic(sample: BalancedSample, candidates: Routing) -> Routing:
    """Return the entries of ``candidates`` that calibration adds: drawn tokens, for starved experts only.

    The tokens keep their rows, so that the Routing goes with the inputs of all candidates.
    """
    drawn_C = torch.zeros(candidates.num_tokens, dtype=torch.bool, device=candidates.token_N.device)
    drawn_C[sample.token_S.to(drawn_C.device)] = True
    starved_E = sample.starved_E.to(drawn_C.device)
    return candidates.keep(drawn_C[candidates.token_N] & starved_E[candidates.expert_N])


def _filled(indices_TK: Tensor, num_experts: int) -> Tensor:
    return (indices_TK >= 0) & (indices_TK < num_experts)
