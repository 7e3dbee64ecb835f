"""Experts for training on few cores: transformers' experts, without what its own implementations waste there.

Its ``eager`` picks one expert's matrix out of all, whose gradient is a tensor of all experts' size, once per expert;
here all are taken apart at once. Shape letters: T tokens, H hidden, K slots, N assignments, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

NAME = "moebench_training"


def forward(self: Any, x_TH: Tensor, indices_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts; ``self`` is transformers' module with ``gate_up_proj``."""
    slots = indices_TK.shape[1]
    expert_N = indices_TK.flatten()
    order_N = expert_N.argsort(stable=True)
    counts_E = torch.bincount(expert_N, minlength=self.num_experts).tolist()
    parts = torch.split(x_TH[order_N // slots], counts_E)
    sorted_NH = torch.cat(
        [
            _expert(self.act_fn, part_NH, gate_up, down)
            for part_NH, gate_up, down in zip(parts, self.gate_up_proj.unbind(0), self.down_proj.unbind(0), strict=True)
        ]
    )
    place_N = torch.empty_like(order_N)
    place_N[order_N] = torch.arange(len(order_N), device=order_N.device)
    y_TKH = sorted_NH[place_N].view(*indices_TK.shape, -1)
    return (y_TKH * weights_TK[..., None]).sum(1).to(x_TH.dtype)


def _expert(activation: Any, x_NH: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate_NF, up_NF = F.linear(x_NH, gate_up).chunk(2, dim=-1)
    return F.linear(activation(gate_NF) * up_NF, down)


def register() -> str:
    """Make the implementation known to transformers and return its name."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    if NAME not in ALL_EXPERTS_FUNCTIONS.valid_keys():
        ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    return NAME
