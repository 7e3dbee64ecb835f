"""Expert pruning for inference: keep some experts and let the gate choose among them alone (Z-code M3, 2109.10465).

Shape letters: E experts before, K kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..layer import LayerWeights


def by_utilisation(load_E: Tensor, keep: int) -> tuple[int, ...]:
    """Return the ids, rising, of the ``keep`` experts with the largest load (tokens, or any weight of them)."""
    _check_number(len(load_E), keep)
    return tuple(sorted(torch.argsort(load_E, descending=True, stable=True)[:keep].tolist()))


def at_random(experts: int, keep: int, seed: int) -> tuple[int, ...]:
    """Return ``keep`` ids, rising, drawn without replacement: what utilisation is compared to."""
    _check_number(experts, keep)
    order_E = torch.randperm(experts, generator=torch.Generator().manual_seed(seed))
    return tuple(sorted(order_E[:keep].tolist()))


def prune(weights: LayerWeights, kept: Sequence[int]) -> LayerWeights:
    """Return the layer with the experts, gate rows and selection biases of ``kept`` alone, in that order."""
    if weights.is_dense:
        raise ValueError("a dense FFN has no experts to prune; choose a layer of experts.")
    _check_ids(kept, len(weights.down))
    index_K = torch.tensor(list(kept))

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index_K]

    return replace(
        weights,
        gate_up=weights.gate_up[index_K],
        down=weights.down[index_K],
        router_EH=rows(weights.router_EH),
        router_bias_E=rows(weights.router_bias_E),
    )


def _check_ids(kept: Sequence[int], experts: int) -> None:
    if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(experts)):
        raise ValueError(f"kept={tuple(kept)} must be distinct ids of the layer's {experts} experts, at least one.")


def _check_number(experts: int, keep: int) -> None:
    if not 0 < keep <= experts:
        raise ValueError(f"keep={keep} must lie between 1 and the layer's {experts} experts.")
