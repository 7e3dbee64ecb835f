"""Linear maps of attention that leave out channels of what they read, by hooks. Imported by workers only.

Shape letters: B sequences, T tokens, I inputs, O outputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from ...contracts import Check, Metric
from ...moe.channels import SiteRule, low_rank
from ...moe.oracle import Reference, compare
from ...moe.routing import Routing
from ...moe.sparsifiers.cost import SparsityCost

SLOT = 0
"""Of a rule's residual: a projection is one matrix, where a layer has one for each expert."""


@dataclass(frozen=True)
class Projected:
    """What one projection was given and what came out: ``x_BTI`` before anything was left out, and ``y_BTO``.

    Of the first ``prefix`` tokens nothing is left out. ``forced`` (bool, [B, T, I]) are the channels that another
    execution used, None where the ``rule`` decided. ``weight_OI`` are those that were multiplied, ``nbytes`` what they
    take as stored.
    """

    name: str
    rule: SiteRule
    weight_OI: Tensor
    bias_O: Tensor | None
    nbytes: int
    x_BTI: Tensor
    y_BTO: Tensor
    prefix: int
    forced: Tensor | None = None

    def mask(self) -> Tensor:
        """Return which channels are to be used, bool [B, T, I], from the input alone."""
        if self.forced is not None:
            return self.forced
        mask_BTI = self.rule.mask(self.x_BTI).clone()
        mask_BTI[..., : self.prefix, :] = True
        return mask_BTI

    def check(self) -> Check:
        """Compare the output with W (x * mask) + b in float64, and what a residual makes of the rest.

        Rounding is in proportion to the norms of the terms x_j W_j, which add up as squares.
        """
        x_TI, mask_TI = self.x_BTI.flatten(0, -2).double(), self.mask().flatten(0, -2)
        weight_OI, kept_TI = self.weight_OI.double(), x_TI * mask_TI
        y_TO = nnf.linear(kept_TI, weight_OI, None if self.bias_O is None else self.bias_O.double())
        if self.rule.residual is not None:
            left_OR, right_RI = low_rank(self.rule.residual, SLOT, torch.float64)
            y_TO = y_TO + (x_TI - kept_TI) @ right_RI.T @ left_OR.T
        terms_T = (x_TI.square() @ weight_OI.square().sum(0)).sqrt()
        wanted = Reference(y_TO, torch.zeros_like(terms_T), 0, torch.maximum(terms_T, y_TO.norm(dim=1)))
        found = compare(self.y_BTO.flatten(0, -2), wanted, self.x_BTI.dtype)
        return found if found.ok else replace(found, reason=f"attention's {self.name}: {found.reason}")

    def used(self) -> tuple[int, int]:
        """Return how many input channels were used, and how many there are, behind the prefix."""
        later = self.mask()[..., self.prefix :, :]
        return int(later.sum()), later.numel()


@dataclass(frozen=True)
class AttentionCall:
    """What the projections of one layer did in one pass; ``dense_bytes`` are of its maps that leave nothing out."""

    projected: tuple[Projected, ...]
    dense_bytes: int

    def check(self, layer: Check) -> Check:
        """Return the first projection's Check that failed, or the worst of all and of the ``layer``'s own."""
        found = [one.check() for one in self.projected]
        failed = [check for check in found if not check.ok]
        worst = failed[0] if failed else max([layer, *found], key=lambda check: check.error or 0.0)
        return replace(worst, flips=layer.flips)

    def metrics(self, experts: SparsityCost | None, later: Routing) -> list[Metric]:
        """Return what was kept of the projections' inputs, and the bytes of experts and attention that a token needs.

        ``experts`` is the mean cost of an assignment of ``later``, the tokens behind the prefix; None without any.
        """
        counts = [one.used() for one in self.projected]
        used, total = (sum(count[place] for count in counts) for place in (0, 1))
        share = None
        if experts is not None and later.num_tokens:
            each = len(later.token_N) / later.num_tokens
            needed = [_bytes(one, *count) for one, count in zip(self.projected, counts, strict=True)]
            dense = self.dense_bytes + sum(one.nbytes for one in self.projected)
            kept = self.dense_bytes + sum(needed)
            share = (experts.kept_bytes * each + kept) / (experts.dense_bytes * each + dense)
        return [
            Metric("density_attention", used / total if total else None, "1", n=total),
            Metric("kept_bytes_with_attention", share, "1"),
        ]


def _bytes(one: Projected, used: int, total: int) -> float:
    """Return the bytes of one projection that a token needs on average, its residual's included."""
    per_weight = one.nbytes / one.weight_OI.numel()
    residual = one.rule.residual
    rank = 0 if residual is None else residual.left_FOR.shape[2]
    return one.nbytes * (used / total if total else 1.0) + per_weight * rank * sum(one.weight_OI.shape)


class Projection:
    """One linear map with a rule: hooks that take channels out of its input, and remember its last call.

    ``first_tokens`` says how many of so many tokens have nothing left out. With ``forced`` the rule is not asked.
    """

    def __init__(
        self, name: str, linear: nn.Linear, rule: SiteRule, nbytes: int, first_tokens: Callable[[int], int]
    ) -> None:
        self.name, self.linear, self.rule, self.nbytes = name, linear, rule, nbytes
        self.first_tokens = first_tokens
        self.forced: Tensor | None = None
        self.last: Projected | None = None
        self._x_BTI = torch.empty(0)

    def masked(self, x_BTI: Tensor) -> Tensor:
        """Return the input with what is left out set to zero."""
        if self.forced is not None:
            return torch.where(self.forced, x_BTI, torch.zeros_like(x_BTI))
        prefix = self.first_tokens(x_BTI.shape[-2])
        return torch.cat([x_BTI[..., :prefix, :], self.rule.apply(x_BTI[..., prefix:, :])], dim=-2)

    def before(self, module: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        """Hook: remember the input, and hand on what is kept of it."""
        (self._x_BTI,) = inputs
        return (self.masked(self._x_BTI),)

    def after(self, module: Any, inputs: tuple[Tensor], y_BTO: Tensor) -> Tensor:
        """Hook: add what a residual makes of the rest, and remember the call."""
        x_BTI, rule = self._x_BTI, self.rule
        if rule.residual is not None:
            left_OR, right_RI = low_rank(rule.residual, SLOT, y_BTO.dtype)
            y_BTO = y_BTO + nnf.linear(nnf.linear(x_BTI - inputs[0], right_RI), left_OR)
        prefix, bias_O = self.first_tokens(x_BTI.shape[-2]), None if module.bias is None else module.bias.detach()
        weight_OI = module.weight.detach()
        self.last = Projected(self.name, rule, weight_OI, bias_O, self.nbytes, x_BTI, y_BTO, prefix, self.forced)
        return y_BTO


class LayerProjections:
    """The projections of one layer's attention that leave out inputs; ``dense_bytes`` are those of its other maps."""

    def __init__(self, projections: Mapping[str, Projection], dense_bytes: int) -> None:
        self.projections, self.dense_bytes = projections, dense_bytes

    def call(self) -> AttentionCall:
        """Return what they did last."""
        seen = tuple(one.last for one in self.projections.values() if one.last is not None)
        return AttentionCall(seen, self.dense_bytes)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Let the projections leave out inputs until the block ends."""
        hooks = []
        try:
            for one in self.projections.values():
                hooks.append(one.linear.register_forward_pre_hook(one.before))
                hooks.append(one.linear.register_forward_hook(one.after))
            yield
        finally:
            for hook in hooks:
                hook.remove()
