"""What each expert of a changed layer made of a window, taken apart and put together again.

Shape letters: T tokens, H hidden, F expert width, N tokens of one expert.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...contracts import Check
from ...moe.channels import DENSE
from ...moe.experts import ExpertStore, expert_product, hidden_from
from ...moe.layer import assignments
from ...moe.token_codes import rounded_tokens
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
    """Yield a piece of every FFN expert that has tokens, computed from the stored weights and not by the backend.

    Of the call's first tokens nothing is left out where its sparsity has a dense prefix.
    """
    store = call.block.subject.layer.store
    for expert, token_N, weight_N in assignments(call.routing):
        if store.kinds[expert] != "ffn":
            continue
        x_NH = call.x_TH[token_N]
        hidden_NF, out_NH = forward(x_NH, store, store.slots[expert])
        if call.prefix:
            early_N1 = (token_N < call.prefix)[:, None]
            dense_NF, dense_NH = forward(x_NH, replace(store, sparsity=None), store.slots[expert])
            hidden_NF, out_NH = torch.where(early_N1, dense_NF, hidden_NF), torch.where(early_N1, dense_NH, out_NH)
        yield Piece(expert, token_N, weight_N, hidden_NF, out_NH)


def forward(x_NH: Tensor, store: ExpertStore, slot: int) -> tuple[Tensor, Tensor]:
    """Return what ``down`` of one expert reads [N, F], its channels left out and rounded, and its output [N, H]."""
    gate_up, down = store.weights(slot, x_NH.dtype)
    sparsity, hidden_NF = store.sparsity or DENSE, hidden_from(expert_product(x_NH, gate_up, store, slot), store, slot)
    read_NF = rounded_tokens(sparsity.apply("hidden", hidden_NF, slot), store.act_bits)
    return read_NF, sparsity.added("hidden", torch.nn.functional.linear(read_NF, down), hidden_NF, slot)


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
