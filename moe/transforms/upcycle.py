"""Dense FFNs as experts: copies of one (sparse upcycling), or the FFNs of several models (branch-train-mix, BAM).

Shape letters: E experts, H hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..layer import LayerWeights
from ..router import seeded_normal


def upcycle(dense: LayerWeights, experts: int, seed: int, noise_std: float = 0.0) -> LayerWeights:
    """Return ``experts`` copies of one FFN behind a random router (std 1 / sqrt(H)): MoE-LLaVA, MoIIE, AdaMoE-VLA.

    Identical experts under weights that sum to one are the FFN, whatever the router. ``noise_std`` (AdaMoE-VLA, default
    0 there too) adds seeded normal noise to every copy, which breaks that.
    """
    if experts < 1:
        raise ValueError(f"experts={experts} must be at least 1.")
    layer = mix([dense] * experts, seed)
    if noise_std == 0:
        return layer
    gate_up, down = (
        tensor + seeded_normal(tensor.shape, noise_std, seed, f"upcycle.{name}").to(tensor)
        for name, tensor in (("gate_up", layer.gate_up), ("down", layer.down))
    )
    return replace(layer, gate_up=gate_up, down=down)


def mix(branches: Sequence[LayerWeights], seed: int) -> LayerWeights:
    """Return the dense FFNs of ``branches`` as the experts of one layer behind a random router (std 1 / sqrt(H)).

    The shared expert, where there is one, is the first branch's.
    """
    first = branches[0]
    if any(not branch.is_dense or branch.gate_up.shape != first.gate_up.shape for branch in branches):
        raise ValueError("upcycling wants dense FFNs of one shape; choose a model without experts.")
    if any((branch.activation, branch.gated) != (first.activation, first.gated) for branch in branches):
        raise ValueError("upcycling wants FFNs of one activation, all gated or none.")
    hidden = first.down.shape[0]
    return replace(
        first,
        gate_up=torch.stack([branch.gate_up for branch in branches]),
        down=torch.stack([branch.down for branch in branches]),
        router_EH=seeded_normal((len(branches), hidden), hidden**-0.5, seed, "upcycle.router"),
        router_bias_E=None,
    )
