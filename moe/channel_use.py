"""Which channels of a layer's experts its tokens use, alone and together, and the work that is left by it.

A layer is looked at as one wide FFN: what an expert holds is not used by a token that is not sent there. So a site has
``experts * channels`` channels in all. Chunks are consecutive tokens of the batch, and a shorter tail is left out (as
BlockFFN's released code counts, arXiv 2507.08771). Shape letters: T tokens, N tokens of one expert, I channels of a
site, H hidden, F expert width, C chunks, L tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..contracts import SITES, Metric
from .channels import DENSE
from .experts import ACTIVATIONS, ExpertStore, expert_product, hidden_from
from .layer import assignments
from .routing import Routing

CHUNK = 8
"""The length of chunks that BlockFFN reports first."""

Masks = Mapping[str, Tensor]
"""Which channels are used, bool [N, I] by site; sites without a rule are not in it."""


def token_sparsity(used_TI: Tensor) -> float | None:
    """Return TLS, the share of (token, channel) pairs that are not used; None without any."""
    return 1 - float(used_TI.double().mean()) if used_TI.numel() else None


def chunk_sparsity(used_TI: Tensor, length: int) -> float | None:
    """Return CLS, the share of channels that no token of a chunk uses, mean over chunks; None without a whole chunk."""
    if length < 1:
        raise ValueError(f"a chunk of {length} tokens is empty; give a length of at least 1.")
    chunks = len(used_TI) // length
    used_CLI = used_TI[: chunks * length].reshape(chunks, length, used_TI.shape[1])
    return token_sparsity(used_CLI.any(1)) if chunks else None


def union_density(used_TI: Tensor) -> float | None:
    """Return the share of channels that any of the tokens uses; None without tokens."""
    return float(used_TI.any(0).double().mean()) if used_TI.numel() else None


def expert_masks(store: ExpertStore, routing: Routing, x_TH: Tensor) -> Iterator[tuple[Tensor, Masks, int]]:
    """Yield (token_N, masks, slot) of every FFN expert with tokens. A neuron that its gate leaves out counts as left
    out at ``hidden`` too: its column of down is not needed, whatever the rule there."""
    x_TH, rules = x_TH.float(), (store.sparsity or DENSE).sites
    for expert, token_N, _ in assignments(routing):
        if store.kinds[expert] not in ("ffn", "gather"):
            continue
        slot, masks, x_NH = store.slots[expert], {}, x_TH[token_N]
        if "input" in rules:
            masks["input"] = rules["input"].mask(rules["input"].turned(x_NH), slot)
        if {"gate", "hidden"} & rules.keys():
            product = expert_product(x_NH, store.weights(slot)[0], store, slot)
            if "gate" in rules:
                masks["gate"] = rules["gate"].mask(ACTIVATIONS[store.activation](product.chunk(2, dim=-1)[0]), slot)
            if "hidden" in rules:
                masks["hidden"] = rules["hidden"].mask(hidden_from(product, store, slot), slot)
        if "gate" in masks:
            masks["hidden"] = masks["gate"] & masks.get("hidden", masks["gate"])
        yield token_N, masks, slot


def locality(store: ExpertStore, routing: Routing, x_TH: Tensor, length: int = CHUNK) -> list[Metric]:
    """Return ``tls_SITE``, ``cls_L_SITE`` and ``union_density_SITE`` for every site at which something is left out.

    With chunks that cover all tokens, 1 - union_density <= cls_L <= tls: what one token leaves out, its neighbours may
    need. A call on all tokens reads the union.
    """
    tokens, experts, found = routing.num_tokens, len(store.ffn_ids), list(expert_masks(store, routing, x_TH))
    metrics = []
    for site in SITES:
        alone, together, union = [], [], []
        for token_N, masks, _ in found:
            if site in masks:
                used_TI = _placed(token_N, masks[site], tokens)
                alone.append(token_sparsity(used_TI))
                together.append(chunk_sparsity(used_TI, length))
                union.append(union_density(used_TI))
        if alone:
            metrics.append(Metric(f"tls_{site}", _over_experts(alone, experts, 1.0), "share", n=tokens))
            share = _over_experts(together, experts, 1.0)
            metrics.append(Metric(f"cls_{length}_{site}", share, "share", n=tokens // length))
            metrics.append(Metric(f"union_density_{site}", _over_experts(union, experts, 0.0), "share", n=tokens))
    return metrics


def _placed(token_N: Tensor, mask_NI: Tensor, tokens: int) -> Tensor:
    """Return used_TI of one expert: all its tokens' masks, and nothing at the others."""
    counts_TI = torch.zeros(tokens, mask_NI.shape[1], dtype=torch.int32)
    return counts_TI.index_add(0, token_N, mask_NI.int()) > 0


def _over_experts(values: Iterable[float | None], experts: int, without_tokens: float) -> float | None:
    """Return the mean over all experts, those without tokens included; None where no expert has a value."""
    known = [value for value in values if value is not None]
    return (sum(known) + without_tokens * (experts - len(known))) / experts if known else None


@dataclass(frozen=True)
class Work:
    """Multiplications of the products that cannot be left out, and the weights that they read, each once."""

    products: int
    weights: int


def needed_work(store: ExpertStore, routing: Routing, x_TH: Tensor) -> Work:
    """Return the work of the routed FFN experts where every channel that is left out is skipped.

    Weights are the union over the tokens of an expert. Where the gate decides, it is multiplied for all neurons that
    the input leaves in, rows of up for kept neurons (whole: the input's zeros lie inside them), and columns of down for
    those that are left at ``hidden``. A low-rank residual reads the channels that are left out, and then all ranks.
    """
    products, weights = 0, 0
    H, F = store.hidden, store.width
    for token_N, masks, _ in expert_masks(store, routing, x_TH):
        of_inputs, of_neurons = _used(masks.get("input"), len(token_N), H), _used(masks.get("hidden"), len(token_N), F)
        rows = F if "gate" in masks or not store.gated else 2 * F
        parts = [(of_inputs, rows), (of_neurons, H)]
        if "gate" in masks:
            parts.append((_used(masks["gate"], len(token_N), F), H))
        parts += _residuals(store, masks, len(token_N))
        products += sum(used.products * outputs for used, outputs in parts)
        weights += sum(used.weights * outputs for used, outputs in parts)
    return Work(products, weights)


def _used(mask_NI: Tensor | None, tokens: int, channels: int) -> Work:
    """Return how many channels are used by tokens, and by any of them."""
    if mask_NI is None:
        return Work(tokens * channels, channels)
    return Work(int(mask_NI.sum()), int(mask_NI.any(0).sum()))


def _residuals(store: ExpertStore, masks: Masks, tokens: int) -> Iterator[tuple[Work, int]]:
    """Yield what low-rank matrices read: channels that are left out by their rank, and ranks by outputs."""
    for site, rule in (store.sparsity or DENSE).sites.items():
        if rule.residual is not None:
            outputs, rank = rule.residual.left_FOR.shape[1:]
            left_out = ~masks[site] & masks["gate"] if site == "hidden" and "gate" in masks else ~masks[site]
            yield _used(left_out, tokens, left_out.shape[1]), rank
            yield Work(tokens * rank, rank), outputs


def dense_work(store: ExpertStore, routing: Routing) -> Work:
    """Return the work of the routed FFN experts where nothing is skipped."""
    dense = replace(store, sparsity=None)
    return needed_work(dense, routing, torch.zeros(routing.num_tokens, store.hidden))
