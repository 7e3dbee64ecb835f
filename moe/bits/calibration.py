"""Router-aware calibration: what each expert of a layer read, and how much the router wanted it.

One pass over the calibration inputs serves every codec, smoother and allocator. Shape letters: T tokens, H hidden,
E expert ids, N assignments, I input channels of a matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import MoebenchError
from ..channel_stats import ChannelStats
from ..channels import DENSE
from ..experts import ExpertStore, expert_product, hidden_from
from ..router import Router
from ..routing import Context, Routing


@dataclass(frozen=True, eq=False)
class LayerCalibration:
    """What one layer's calibration inputs say of its experts.

    ``gate_up`` and ``down`` hold the statistics of what the two matrices of each expert read, one per expert that owns
    weights, in the order of their ids. The others have one number per expert id of any kind: ``counts_E`` int64 are the
    assignments, ``used_E`` float64 the summed routing weights as the layer uses them, and ``share_E`` float64 the
    expert's part of the summed weights before they are renormalised over a token's experts (they sum to 1; all are
    0 where no token was routed).
    """

    gate_up: tuple[ChannelStats, ...]
    down: tuple[ChannelStats, ...]
    counts_E: Tensor
    used_E: Tensor
    share_E: Tensor


def calibrate(
    store: ExpertStore, router: Router, x_TH: Tensor, ctx: Context | None = None, moments: bool = True
) -> LayerCalibration:
    """Return the calibration of one layer on ``x_TH``, routed by its own router and computed in float32.

    Without ``moments`` no second moments are kept: one of width I takes 8 I^2 bytes, for each matrix of each expert.
    """
    with torch.no_grad():
        routing = router(x_TH.float(), Context() if ctx is None else ctx)
        return calibrate_routed(store, [(routing, x_TH)], moments)


def calibrate_routed(
    store: ExpertStore, parts: Sequence[tuple[Routing, Tensor]], moments: bool = True
) -> LayerCalibration:
    """Return the calibration from routed inputs ``parts`` = [(routing, x_TH), ...].

    The first part is the layer's own traffic: counts and weights are counted on it alone. Further parts (such as those
    of ``balanced.extra_traffic``) add to the statistics of what the matrices read.
    """
    odd = next((kind for kind in store.kinds if kind == "sequence"), None)
    if odd is not None or store.quantized:
        what = "quantized experts" if odd is None else f"experts of kind '{odd}'"
        raise MoebenchError(f"{what} cannot be calibrated for quantization; give the dense FFN experts of a layer.")
    with torch.no_grad():
        pairs = [_expert_stats(store, expert, parts, moments) for expert in store.ffn_ids]
    traffic = parts[0][0]
    return LayerCalibration(
        tuple(gate_up for gate_up, _ in pairs),
        tuple(down for _, down in pairs),
        traffic.counts_E,
        _summed(traffic, traffic.weight_N),
        weight_shares(traffic),
    )


def weight_shares(traffic: Routing) -> Tensor:
    """Return share_E float64: each expert's part of the summed weights before renormalisation; 0 without tokens."""
    raw_E = _summed(traffic, unrenormalised(traffic))
    total = float(raw_E.sum())
    return raw_E / total if total else raw_E


def unrenormalised(routing: Routing) -> Tensor:
    """Return the weight_N of each assignment before renormalisation: its probability over all experts.

    A router that tells no probabilities (``probs_TE``) gets its weights as used.
    """
    if routing.probs_TE is None:
        return routing.weight_N
    return routing.probs_TE[routing.token_N, routing.expert_N]


def channel_stats(x_NI: Tensor, weight_N: Tensor, moments: bool = True) -> ChannelStats:
    """Return the statistics of a matrix that read ``x_NI``, at routing weights ``weight_N``; zeros where N is 0."""
    tokens, width = x_NI.shape
    wide_NI = x_NI.double()
    absolute_NI = wide_NI.abs()
    return ChannelStats(
        second_moment_II=wide_NI.T @ wide_NI if moments else None,
        absmax_I=(absolute_NI.amax(0) if tokens else absolute_NI.new_zeros(width)).float(),
        mean_abs_I=(absolute_NI.sum(0) / max(1, tokens)).float(),
        tokens=tokens,
        weight=float(weight_N.double().sum()),
    )


def _summed(routing: Routing, weight_N: Tensor) -> Tensor:
    zeros_E = torch.zeros(routing.num_experts, dtype=torch.float64, device=weight_N.device)
    return zeros_E.index_add(0, routing.expert_N, weight_N.detach().double())


def _expert_stats(
    store: ExpertStore, expert: int, parts: Sequence[tuple[Routing, Tensor]], moments: bool
) -> tuple[ChannelStats, ChannelStats]:
    """Return the statistics of (gate_up, down) of one expert, whose inputs are sparse where the store says so."""
    inputs, weights = [], []
    for routing, x_TH in parts:
        mine_N = routing.expert_N == expert
        inputs.append(x_TH.float()[routing.token_N[mine_N]])
        weights.append(routing.weight_N[mine_N])
    x_NH, weight_N = torch.cat(inputs), torch.cat(weights)
    sparsity, slot = store.sparsity or DENSE, store.slots[expert]
    hidden_NF = hidden_from(expert_product(x_NH, store.weights(slot)[0], store, slot), store, slot)
    read_NH, read_NF = sparsity.apply("input", x_NH, slot), sparsity.apply("hidden", hidden_NF, slot)
    return channel_stats(read_NH, weight_N, moments), channel_stats(read_NF, weight_N, moments)
