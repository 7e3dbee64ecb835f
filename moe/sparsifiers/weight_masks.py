"""Unstructured masks of weights: magnitude and Wanda. Shape letters: O outputs, I inputs of a matrix, N rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...contracts import MoebenchError
from ..channels import WeightMask
from ..experts import ExpertStore
from ..routing import Routing
from ..sparsity import site_activations


def weight_mask(store: ExpertStore, level: float, norms: dict[str, dict[int, Tensor]]) -> WeightMask:
    """Return the weights that are kept: in each row of I all but the floor(I level) of smallest |w_ij| * norm_j.

    ``norms`` [I] is by site (``input``: gate and up, ``hidden``: down) and slot; ones where a slot has none.
    """
    if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
        raise MoebenchError("weights are masked before they are quantized; use quantization=none with this sparsity.")
    kept = {"input": [], "hidden": []}  # type: dict[str, list[Tensor]]
    for slot in range(len(store.ffn_ids)):
        for site, weight_OI in zip(kept, store.weights(slot), strict=True):
            norm_I = norms.get(site, {}).get(slot, torch.ones(weight_OI.shape[1]))
            kept[site].append(largest_of_rows(weight_OI.abs() * norm_I, level))
    return WeightMask(torch.stack(kept["input"]), torch.stack(kept["hidden"]))


def largest_of_rows(score_OI: Tensor, level: float) -> Tensor:
    """Return the mask [O, I] of all but the floor(I level) smallest of every row, of equal ones the first go."""
    smallest = score_OI.argsort(dim=1, stable=True)[:, : math.floor(score_OI.shape[1] * level + 1e-9)]
    return torch.ones_like(score_OI, dtype=torch.bool).scatter(1, smallest, False)


def input_norms(store: ExpertStore, routing: Routing, x_TH: Tensor) -> dict[str, dict[int, Tensor]]:
    """Return ||x_j|| [I] over the tokens of each expert, by site and slot; slots without tokens are left out."""
    return {
        site: {slot: rows.norm(dim=0) for rows, slot in site_activations(store, routing, x_TH, site)}
        for site in ("input", "hidden")
    }
