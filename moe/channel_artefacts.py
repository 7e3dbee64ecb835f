"""A layer's sparsity as an artefact and back: the plan that calibration made, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from .artefacts import Artefact
from .channels import LowRank, SiteRule, Sparsity, WeightMask
from .experts import ExpertStore, masked

RULE_TENSORS = ("kept", "weight", "basis_II")


def sparsity_artefact(sparsity: Sparsity | None) -> Artefact:
    """Return the rules of every site and the masks of the weights; nothing where nothing is left out."""
    if sparsity is None:
        return Artefact({}, {"sites": None})
    tensors: dict[str, Tensor | None] = {}
    sites: dict[str, Any] = {}
    for site, rule in sparsity.sites.items():
        sites[site] = {"threshold": rule.threshold, "k": rule.k}
        tensors |= {f"{site}.{name}": getattr(rule, name) for name in RULE_TENSORS}
        if rule.residual is not None:
            tensors |= {f"{site}.left_FOR": rule.residual.left_FOR, f"{site}.right_FRI": rule.residual.right_FRI}
    if sparsity.weights is not None:
        tensors |= {"gate_up": sparsity.weights.gate_up, "down": sparsity.weights.down}
    return Artefact({name: tensor for name, tensor in tensors.items() if tensor is not None}, {"sites": sites})


def sparsity_of(artefact: Artefact) -> Sparsity | None:
    """Return the Sparsity of ``sparsity_artefact``."""
    sites, tensors = artefact.meta["sites"], artefact.tensors
    if sites is None:
        return None
    rules = {}
    for site, told in sites.items():
        named: dict[str, Any] = {name: tensors.get(f"{site}.{name}") for name in RULE_TENSORS}
        left = tensors.get(f"{site}.left_FOR")
        residual = None if left is None else LowRank(left, tensors[f"{site}.right_FRI"])
        rules[site] = SiteRule(**told, **named, residual=residual)
    weights = WeightMask(tensors["gate_up"], tensors["down"]) if "gate_up" in tensors else None
    return Sparsity(rules, weights)


def sparsified(store: ExpertStore, sparsity: Sparsity | None) -> ExpertStore:
    """Return the store that leaves out what ``sparsity`` says, its masked weights set to zero."""
    if sparsity is None:
        return store
    store = store if sparsity.weights is None else masked(store, sparsity.weights)
    return replace(store, sparsity=sparsity)
