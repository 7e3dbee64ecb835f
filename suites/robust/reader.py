"""A small encoder that marks where an answer begins and ends, with dense or switch-MoE feed-forward layers.

Attention knows how far words are apart (as a bias, after arXiv 1803.02155), not where they stand. The switch layer
(arXiv 2101.03961) sends each token to the expert of its largest probability, scales its output by that probability, and
adds the balance loss. Shape letters: B examples, T tokens, H hidden, F width, E experts, N all tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

HIDDEN, HEADS, LAYERS, WIDTH = 64, 4, 2, 128
EXPERTS = 4

REACH = 8
"""Distances that attention tells apart; what is further away is as far as this."""


class SwitchFfn(nn.Module):
    """``experts`` ReLU FFNs, one of which runs for a token; with one expert it is a dense FFN."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.experts = experts
        self.up_EFH = nn.Parameter(torch.randn(experts, WIDTH, HIDDEN) * (2 / HIDDEN) ** 0.5)
        self.down_EHF = nn.Parameter(torch.randn(experts, HIDDEN, WIDTH) * WIDTH**-0.5)
        self.router = nn.Linear(HIDDEN, experts, bias=False)
        self.balance = torch.zeros(())

    def forward(self, x_NH: Tensor) -> Tensor:
        """Return y_NH, and keep the balance loss E sum_e f_e P_e."""
        if self.experts == 1:
            dense_NH: Tensor = nnf.linear(nnf.linear(x_NH, self.up_EFH[0]).relu(), self.down_EHF[0])
            return dense_NH
        probs_NE = self.router(x_NH).softmax(-1)
        top_N, expert_N = probs_NE.max(-1)
        share_E = nnf.one_hot(expert_N, self.experts).to(probs_NE.dtype).mean(0)
        self.balance = self.experts * (share_E * probs_NE.mean(0)).sum()
        y_NH = torch.zeros_like(x_NH)
        for expert in range(self.experts):
            chosen_N = (expert_N == expert).nonzero()[:, 0]
            own = (x_NH[chosen_N] @ self.up_EFH[expert].T).relu() @ self.down_EHF[expert].T
            y_NH = y_NH.index_add(0, chosen_N, own)
        scaled_NH: Tensor = y_NH * top_N[:, None]
        return scaled_NH


class Reader(nn.Module):
    """Words to logits of being the first and the last of the answer.

    ``mark`` is the number of the word that ends a question. A word is told whether the question has it, too: the exact
    match of DrQA (arXiv 1704.00051), without which so small a model takes long to find whom a question is about.
    """

    def __init__(self, words: int, experts: int, mark: int) -> None:
        super().__init__()
        self.mark, self.asked = mark, nn.Embedding(2, HIDDEN)
        self.words, self.apart = nn.Embedding(words, HIDDEN), nn.Embedding(2 * REACH + 1, LAYERS * HEADS)
        self.norms = nn.ModuleList(nn.LayerNorm(HIDDEN) for _ in range(2 * LAYERS))
        self.attentions = nn.ModuleList(nn.Linear(HIDDEN, 3 * HIDDEN) for _ in range(LAYERS))
        self.outputs = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))
        self.ffns = nn.ModuleList(SwitchFfn(experts) for _ in range(LAYERS))
        self.marks = nn.Linear(HIDDEN, 2)

    def forward(self, words_BT: Tensor) -> Tensor:
        """Return logits [B, 2, T] of the first and the last word; -inf where a batch was filled up (word 0)."""
        filled_BT = words_BT == 0
        hidden = self.words(words_BT) + self.asked(self._asked(words_BT))
        for layer in range(LAYERS):
            hidden = hidden + self._attend(layer, self.norms[2 * layer](hidden), filled_BT)
            flat_NH = self.norms[2 * layer + 1](hidden).flatten(0, 1)
            hidden = hidden + self.ffns[layer](flat_NH).view(hidden.shape)
        return self.marks(hidden).transpose(1, 2).masked_fill(filled_BT[:, None], -torch.inf)  # type: ignore[no-any-return]

    def _asked(self, words_BT: Tensor) -> Tensor:
        """Return 1 for words that stand in the question of their row, [B, T] int64."""
        in_question_BT = (words_BT == self.mark).cumsum(1) == 0
        same_BTT = words_BT[:, :, None] == words_BT[:, None, :]
        return (same_BTT & in_question_BT[:, None, :]).any(-1).long()

    def _attend(self, layer: int, x_BTH: Tensor, filled_BT: Tensor) -> Tensor:
        parts = self.attentions[layer](x_BTH).chunk(3, dim=-1)
        query, key, value = (part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in parts)
        place_T = torch.arange(x_BTH.shape[1])
        apart_TT = (place_T[None] - place_T[:, None]).clamp(-REACH, REACH) + REACH
        bias_HTT = self.apart(apart_TT).permute(2, 0, 1)[layer * HEADS : (layer + 1) * HEADS]
        bias = bias_HTT.masked_fill(filled_BT[:, None, None], -torch.inf)
        mixed = nnf.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return self.outputs[layer](mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]

    def balance(self) -> Tensor:
        """Return the mean balance loss of the last call."""
        return torch.stack([ffn.balance for ffn in self.ffns]).mean()  # type: ignore[misc]  # a SwitchFfn each
