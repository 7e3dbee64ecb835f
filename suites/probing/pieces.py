"""What each expert of a changed layer made of a window, taken apart and put together again.

Shape letters: T tokens, H hidden, F expert width, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Check
from ...moe.layer import assignments, ffn_hidden
from ..quality.block import Call
from .base import close


@dataclass(frozen=True)
class Piece:
    """One expert's tokens, their weights, what ``down`` reads of them, and the output before the weight."""

    expert: int
    token_N: Tensor
    weight_N: Tensor
    hidden_NF: Tensor
    out_NH: Tensor


def pieces(call: Call) -> Iterator[Piece]:
    """Yield a piece of every FFN expert that has tokens, computed from the stored weights and not by the backend."""
    store = call.block.subject.layer.store
    for expert, token_N, weight_N in assignments(call.routing):
        if store.kinds[expert] != "ffn":
            continue
        gate_up, down = store.weights(store.slots[expert], call.x_TH.dtype)
        hidden_NF = ffn_hidden(call.x_TH[token_N], gate_up, store.activation, store.gated)
        yield Piece(expert, token_N, weight_N, hidden_NF, torch.nn.functional.linear(hidden_NF, down))


def recomposes(call: Call, parts: list[Piece]) -> Check:
    """Compare what the layer put out with the sum of its pieces, and of the shared expert where there is one."""
    total_TH = torch.zeros_like(call.x_TH)
    for part in parts:
        total_TH.index_add_(0, part.token_N, (part.out_NH * part.weight_N[:, None]).to(total_TH.dtype))
    layer = call.block.subject.layer
    if layer.shared is not None:
        total_TH = layer.shared.added_to(total_TH, call.x_TH)
    bound = 1e-4 if call.x_TH.dtype == torch.float32 else 2e-2
    return close(total_TH, call.y_TH, f"experts of layer {call.block.index} put together", bound)
