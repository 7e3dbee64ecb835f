"""Claims about parts of one model: Union of Experts, MoHD and BAM (of which the mixture is ``moe``'s own module).

Shape letters: T tokens, H hidden, F channels, E slices or experts, A heads.
"""

from __future__ import annotations

import torch

from ...moe.attention_mixture import Attention, AttentionMixture, attend, attention_pairs
from ...moe.experts import ExpertStore
from ...moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from ...moe.router import Router
from ...moe.routing import Context, Routing
from ...moe.slices import mohd_forward, mohd_masked, sliced
from .base import Claim, Outcome, Scene, gap, layer_shape

HIDDEN, WIDTH, SLICES, SEQUENCES, LENGTH = 32, 64, 8, 4, 16
TOKENS = SEQUENCES * LENGTH
SHAPE = layer_shape(SLICES, HIDDEN, WIDTH // SLICES, activation="gelu")


def mlp(scene: Scene) -> LayerWeights:
    """Return a dense gated MLP."""
    gate_up = scene.normal(2 * WIDTH, HIDDEN, std=HIDDEN**-0.5, name="gate_up")
    return LayerWeights(gate_up, scene.normal(HIDDEN, WIDTH, std=WIDTH**-0.5, name="down"), activation="gelu")


def in_sequences() -> Context:
    """Return sequences of equal length."""
    return Context(segment_T=torch.arange(TOKENS) // LENGTH)


def run_slices(dense: LayerWeights, router: Router, routing: Routing, x_TH: torch.Tensor) -> torch.Tensor:
    """Return what the slices of ``dense`` make of ``x_TH``."""
    parts = sliced(dense, SLICES)
    store = ExpertStore(parts.gate_up, parts.down, ("ffn",) * SLICES, parts.activation, parts.gated)
    return moe_forward(PreparedLayer(store, router), x_TH, routing=routing)


def attention(scene: Scene, which: str) -> Attention:
    """Return an attention of 4 heads."""
    query, key, value, output = (
        scene.normal(HIDDEN, HIDDEN, std=HIDDEN**-0.5, name=f"{which}.{part}") for part in "qkvo"
    )
    return Attention(query, key, value, output, heads=4)


@torch.no_grad()
def uoe_dense(scene: Scene) -> Outcome:
    """Compare the slices of an MLP, every token to each of them at weight 1, with the MLP."""
    dense, x_TH, gate_EH = mlp(scene), scene.normal(TOKENS, HIDDEN), scene.normal(SLICES, HIDDEN, name="gate")
    wanted_TH = ffn_hidden(x_TH, dense.gate_up, dense.activation) @ dense.down.T
    gaps = []
    for keep in (1.0, 0.5):
        router = scene.router("uoe", SHAPE, gate_EH, {"k": SLICES, "keep": keep, "weighted": False}).router
        gaps.append(gap(run_slices(dense, router, router(x_TH, in_sequences()), x_TH), wanted_TH))
    return Outcome(gaps[0], 0.0, gaps[1] > 0.1, "half of the tokens would do as well", {"gap_at_half": gaps[1]})


@torch.no_grad()
def uoe_attention(scene: Scene) -> Outcome:
    """Compare the (query, key) pairs of heads that take half of each sequence with a quarter of all pairs."""
    ctx, x_TH = in_sequences(), scene.normal(TOKENS, HIDDEN)
    gate_EH, wanted = scene.normal(SLICES, HIDDEN, name="gate"), SLICES * SEQUENCES * LENGTH**2 / 4
    released, weighted = (
        scene.router("uoe", SHAPE, gate_EH, {"weighted": weighted}).router(x_TH, ctx) for weighted in (False, True)
    )
    pairs, fewer = (float(attention_pairs(routing, ctx.segment_T)) for routing in (released, weighted))
    half = bool((released.counts_E == TOKENS // 2).all())
    return Outcome(pairs, wanted, half, "heads do not take half of the tokens", {"pairs_without_zero_gates": fewer})


@torch.no_grad()
def mohd_dense(scene: Scene) -> Outcome:
    """Compare all groups of hidden units, equal scores and activation scaling, with the MLP."""
    dense, x_TH = mlp(scene), scene.normal(TOKENS, HIDDEN)
    wanted_TH = ffn_hidden(x_TH, dense.gate_up, dense.activation) @ dense.down.T
    even_EH = torch.zeros(SLICES, HIDDEN)
    routing, half = (
        scene.router("mohd", SHAPE, even_EH, {"k": k, "shared": shared}).router(x_TH, Context())
        for k, shared in ((2, SLICES - 2), (1, SLICES // 2 - 1))
    )
    computed_TH = mohd_forward(x_TH, sliced(dense, SLICES), routing)
    worst = max(gap(mohd_masked(x_TH, dense, routing), wanted_TH), gap(computed_TH, wanted_TH))
    at_half = gap(mohd_forward(x_TH, sliced(dense, SLICES), half), wanted_TH)
    return Outcome(worst, 0.0, at_half > 0.1, "half of the groups would do as well", {"gap_at_half": at_half})


@torch.no_grad()
def bam_dense(scene: Scene) -> Outcome:
    """Compare a mixture of identical attentions, keys and values shared or not, with one of them."""
    one, other = (attention(scene, which) for which in ("one", "other"))
    x_TH, ctx = scene.normal(TOKENS, HIDDEN), in_sequences()
    gate_EH = scene.normal(4, HIDDEN, name="gate")
    wanted_TH = attend(x_TH, one, ctx.segment_T)
    gaps = [gap(AttentionMixture([one] * 4, gate_EH, shared)(x_TH, ctx), wanted_TH) for shared in (False, True)]
    mixed = gap(AttentionMixture([one, other, one, one], gate_EH)(x_TH, ctx), wanted_TH)
    return Outcome(max(gaps), 0.0, mixed > 0.05, "another attention makes no difference", {"gap_of_mixed": mixed})


CLAIMS: dict[str, Claim] = {
    "uoe-dense": uoe_dense,
    "uoe-attention": uoe_attention,
    "mohd-dense": mohd_dense,
    "bam-dense": bam_dense,
}
