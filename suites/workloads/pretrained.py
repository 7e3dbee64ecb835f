"""A transformers language model whose layers may leave tokens out: rotary positions are those of the whole sequence.

Shape letters: B sequences, T tokens, K kept tokens, N blocks, A heads, D head width, H hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...contracts import MoebenchError
from .token_elimination import Choose, block_scores, segment_loss, through

Angles = tuple[Tensor, Tensor]
"""cos and sin of the rotary positions, each [1, T, D]."""


class PretrainedModel(nn.Module):
    """A model with layers like Llama's: q and k from one projection each, rotated, with a mask that is only causal.

    Raises MoebenchError where its attention is of another kind.
    """

    def __init__(self, whole: Any) -> None:
        super().__init__()
        attention = whole.model.layers[0].self_attn
        if not hasattr(attention, "q_proj") or hasattr(attention, "q_norm"):
            raise MoebenchError(f"{type(attention).__name__} scores keys in a way of its own; use model=smollm2.")
        if getattr(whole.config, "sliding_window", None):
            raise MoebenchError(f"{type(whole).__name__} attends within a window; use model=smollm2.")
        self.whole = whole
        self.layers: nn.ModuleList = whole.model.layers
        self.head: nn.Linear = whole.lm_head

    def embedded(self, ids_BT: Tensor) -> Tensor:
        """Return the residual stream before the first layer."""
        x_BTH: Tensor = self.whole.model.embed_tokens(ids_BT)
        return x_BTH

    def loss(self, ids_BT: Tensor, block: int, choose: Choose | None = None, segments: int = 0) -> Tensor:
        """Return the mean cross-entropy of the next token, in nats."""
        x_BTH = self.embedded(ids_BT[:, :-1])
        angles = self.angles(x_BTH)

        def compute(layer: nn.Module, x_BKH: Tensor, token_K: Tensor | None) -> Tensor:
            own = angles if token_K is None else (angles[0][:, token_K], angles[1][:, token_K])
            return run(layer, x_BKH, own)

        x_BTH = self.whole.model.norm(through(self.layers, x_BTH, block, choose, compute))
        return segment_loss(x_BTH.flatten(0, 1), self.head.weight, ids_BT[:, 1:].flatten(), segments)

    def own_loss(self, ids_BT: Tensor) -> Tensor:
        """Return what transformers' own forward pass says of the same, nothing eliminated."""
        logits_BTV = self.whole(ids_BT[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten())

    @torch.no_grad()
    def inputs(self, ids_BT: Tensor) -> list[Tensor]:
        """Return x_BTH before each layer but the last, nothing eliminated."""
        inputs: list[Tensor] = []
        x_BTH = self.embedded(ids_BT[:, :-1])
        angles = self.angles(x_BTH)
        for layer in self.layers[:-1]:
            inputs.append(x_BTH)
            x_BTH = run(layer, x_BTH, angles)
        return inputs

    def normed(self, layer: int, x_BTH: Tensor) -> Tensor:
        """Return what the attention of a layer reads."""
        normed_BTH: Tensor = self._layer(layer).input_layernorm(x_BTH)
        return normed_BTH

    def scores(self, layer: int, x_BTH: Tensor, block: int) -> Tensor:
        """Return what the attention of a layer says of blocks of all tokens, [B, N, N]."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        attention, normed_BTH = self._layer(layer).self_attn, self.normed(layer, x_BTH)
        q_BATD, k_BATD = (
            part(normed_BTH).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
            for part in (attention.q_proj, attention.k_proj)
        )
        q_BATD, k_BATD = apply_rotary_pos_emb(q_BATD, k_BATD, *self.angles(x_BTH))
        shared = q_BATD.shape[1] // k_BATD.shape[1]  # queries that share a head of keys
        return block_scores(q_BATD, k_BATD.repeat_interleave(shared, 1), block)

    def angles(self, x_BTH: Tensor) -> Angles:
        """Return cos and sin of all positions."""
        found: Angles = self.whole.model.rotary_emb(x_BTH, torch.arange(x_BTH.shape[1])[None])
        return found

    def _layer(self, layer: int) -> Any:
        return self.layers[layer]


def run(layer: nn.Module, x_BKH: Tensor, angles: Angles) -> Tensor:
    """Return a layer's output; without a mask each token attends to those before it in ``x_BKH``."""
    y_BKH: Tensor = layer(x_BKH, attention_mask=None, position_embeddings=angles)
    return y_BKH
