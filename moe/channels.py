"""Which channels of an expert's activations are used, as data: the rules of a layer's sites, and weights set to zero.

Sites, in the order of an expert's work: ``input`` (width H) is what gate and up read; ``gate`` (width F) is
act(gate x), which decides of a gated expert which rows of up and which columns of down are used; ``hidden`` (width F)
is what down reads. Shape letters: N rows, I channels of a site, O outputs of the matrix behind it, R rank,
N_F experts that own weights, H hidden, F expert width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..contracts import SITES, MoebenchError, unknown

Slot = int | Tensor | None
"""Whose activations these are: the place of one expert among those that own weights, the places [N] of the expert of
each row, or None where no rule asks (``Sparsity.per_expert``)."""


@dataclass(frozen=True)
class LowRank:
    """A matrix of rank R that reads the channels that were left out (R-Sparse, arXiv 2504.19449).

    ``left_FOR`` [N_F, O, R] and ``right_FRI`` [N_F, R, I], one pair per expert that owns weights.
    """

    left_FOR: Tensor
    right_FRI: Tensor


@dataclass(frozen=True)
class SiteRule:
    """The channels of one site that are used; exactly one of ``threshold``, ``k`` and ``kept`` is given.

    ``threshold``: those with |a_j| * weight_j above it. ``k``: for each token the k of the largest |a_j| * weight_j,
    of equal ones the first. ``kept`` (bool, [I] or [N_F, I]): these, whatever the activations are. ``weight`` is
    float32, [I] or, where it differs by expert, [N_F, I]; None stands for ones. Scores are computed in float32 (float64
    of float64 activations): executions that read the same bits decide alike.

    With ``basis_II`` (orthogonal, columns are the new axes) the rule is about a V, and what is kept of it is turned
    back. ``residual`` reads what was left out and adds to the product of the matrix behind the site.
    """

    threshold: float | None = None
    k: int | None = None
    kept: Tensor | None = None
    weight: Tensor | None = None
    basis_II: Tensor | None = None
    residual: LowRank | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.threshold, self.k, self.kept) if value is not None]
        if len(given) != 1:
            raise MoebenchError("a site needs one rule: give it a threshold, a number k, or the channels kept.")
        if self.kept is not None and (self.weight is not None or self.basis_II is not None):
            raise MoebenchError("kept channels are fixed; give a weight or a basis with a threshold or a k.")

    @property
    def per_expert(self) -> bool:
        """Whether the rule differs from expert to expert."""
        by_channel = [tensor for tensor in (self.kept, self.weight) if tensor is not None]
        return self.residual is not None or any(tensor.dim() == 2 for tensor in by_channel)

    def score(self, activation: Tensor, slot: Slot = None) -> Tensor:
        """Return |a_j| * weight_j [.., I], in float32 at least, of activations in the rule's own basis."""
        score = activation.abs().to(torch.promote_types(activation.dtype, torch.float32))
        return score if self.weight is None else score * chosen(self.weight, slot).to(score.dtype)

    def mask(self, activation: Tensor, slot: Slot = None) -> Tensor:
        """Return which channels are used: bool, in the shape of ``activation`` [.., I], given in the rule's basis."""
        if self.kept is not None:
            return chosen(self.kept, slot).expand(activation.shape)
        score = self.score(activation, slot)
        if self.threshold is not None:
            return score > self.threshold
        first = score.argsort(dim=-1, descending=True, stable=True)[..., : self.k]
        return torch.zeros_like(score, dtype=torch.bool).scatter(-1, first, True)

    def turned(self, activation: Tensor) -> Tensor:
        """Return the activations in the rule's basis, in float64 if it has one so that all executions decide alike."""
        return activation if self.basis_II is None else activation.double() @ self.basis_II.double()

    def apply(self, activation: Tensor, slot: Slot = None) -> Tensor:
        """Return ``activation`` [.., I] with the channels that are not used set to zero."""
        turned = self.turned(activation)
        kept = torch.where(self.mask(turned, slot), turned, torch.zeros_like(turned))
        return kept if self.basis_II is None else (kept @ self.basis_II.double().T).to(activation.dtype)


def chosen(by_expert: Tensor, slot: Slot) -> Tensor:
    """Return what a rule says of the channels of ``slot``: [I], or [N, I] where each row has its own expert."""
    if by_expert.dim() == 1:
        return by_expert
    if slot is None:
        raise MoebenchError("this sparsity differs from expert to expert; say whose activations these are.")
    return by_expert[slot]


@dataclass(frozen=True)
class WeightMask:
    """Weights that are kept, bool: ``gate_up`` [N_F, 2F, H] and ``down`` [N_F, H, F]; the others are zeros."""

    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class Sparsity:
    """What one layer leaves out: a rule for each site that has one, and weights that are zeros in its store."""

    sites: Mapping[str, SiteRule] = field(default_factory=dict)
    weights: WeightMask | None = None

    def __post_init__(self) -> None:
        for site in self.sites:
            if site not in SITES:
                raise MoebenchError(unknown("site", site, SITES))

    @property
    def per_expert(self) -> bool:
        """Whether a rule differs from expert to expert, so that ``apply`` must be told a slot."""
        return any(rule.per_expert for rule in self.sites.values())

    def apply(self, site: str, activation: Tensor, slot: Slot = None) -> Tensor:
        """Return ``activation`` [.., I] with the channels that ``site`` leaves out set to zero."""
        return self.sites[site].apply(activation, slot) if site in self.sites else activation

    def added(self, site: str, product: Tensor, activation: Tensor, slot: int | None) -> Tensor:
        """Return ``product`` [.., O] of the matrix behind ``site``, plus its low-rank part of what was left out.

        ``activation`` is what came to the site; one expert at a time.
        """
        rule = self.sites.get(site)
        if rule is None or rule.residual is None:
            return product
        left_OR, right_RI = low_rank(rule.residual, slot, product.dtype)
        out = (activation - rule.apply(activation, slot)).to(product.dtype)
        return product + nnf.linear(nnf.linear(out, right_RI), left_OR)


def low_rank(residual: LowRank, slot: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return (left_OR, right_RI) of one expert as ``dtype``."""
    if slot is None:
        raise MoebenchError("a low-rank residual belongs to one expert; say whose activations these are.")
    return residual.left_FOR[slot].to(dtype), residual.right_FRI[slot].to(dtype)


DENSE = Sparsity()
"""Nothing is left out."""
