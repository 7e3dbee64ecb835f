"""Sequence experts: whole attentions mixed per token (BAM), and heads that read only their own tokens (UoE's SMHA).

BAM (arXiv 2408.08274): y_t = sum_i softmax(W_a x_t)_i MHA_i(x)_t, soft over all experts, so that no token is dropped;
every expert has its own keys and values, or all share one pair. An attention reads a sequence, not a list of tokens; an
ExpertStore keeps those with keys and values of their own as experts of kind ``sequence``.

Shape letters: T tokens, H hidden, E experts, A heads, D width of one head, Q = A * D.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as nnf
from torch import Tensor, nn

from .router import seeded_normal
from .routing import Context, Routing


@dataclass(frozen=True)
class Attention:
    """One causal multi-head attention without biases: query, key and value [Q, H], output [H, Q]."""

    query_QH: Tensor
    key_QH: Tensor
    value_QH: Tensor
    output_HQ: Tensor
    heads: int


def visible(segment_T: Tensor) -> Tensor:
    """Return which token (column) each token (row) may read, [T, T] bool: itself and earlier ones of its sequence."""
    tokens = len(segment_T)
    earlier_TT = torch.ones(tokens, tokens, dtype=torch.bool, device=segment_T.device).tril()
    return earlier_TT & (segment_T[:, None] == segment_T[None, :])


def head_outputs(x_TH: Tensor, attention: Attention, allowed: Tensor) -> Tensor:
    """Return what each head says before the output projection, [T, A, D].

    ``allowed`` is [T, T] or [A, T, T] bool. A head says zero to a token that it lets read nothing.
    """
    width = len(attention.query_QH) // attention.heads
    query, key, value = (
        nnf.linear(x_TH, matrix_QH).view(len(x_TH), attention.heads, width).transpose(0, 1)
        for matrix_QH in (attention.query_QH, attention.key_QH, attention.value_QH)
    )
    scores_ATT = (query @ key.transpose(1, 2)) / math.sqrt(width)
    shares_ATT = scores_ATT.masked_fill(~allowed, float("-inf")).softmax(-1).nan_to_num()
    said_TAD: Tensor = (shares_ATT @ value).transpose(0, 1)
    return said_TAD


def attend(x_TH: Tensor, attention: Attention, segment_T: Tensor | None = None) -> Tensor:
    """Return MHA(x) [T, H], causal within each sequence."""
    said_TAD = head_outputs(x_TH, attention, visible(_segments(x_TH, segment_T)))
    return nnf.linear(said_TAD.flatten(1), attention.output_HQ)


def _segments(x_TH: Tensor, segment_T: Tensor | None) -> Tensor:
    return torch.zeros(len(x_TH), dtype=torch.int64, device=x_TH.device) if segment_T is None else segment_T


# --- BAM -------------------------------------------------------------------------------------------------------------


class AttentionMixture(nn.Module):
    """BAM's soft mixture of E attentions; with ``shared_kv`` all read the keys and values of the first."""

    def __init__(self, experts: Sequence[Attention], gate_EH: Tensor, shared_kv: bool = False) -> None:
        super().__init__()
        if len(experts) != len(gate_EH):
            raise ValueError(f"the gate has {len(gate_EH)} rows for {len(experts)} attentions; give one row for each.")
        if len({expert.heads for expert in experts}) > 1:
            raise ValueError("the attentions have different numbers of heads; mix models of one shape.")
        self.gate_EH = nn.Parameter(gate_EH.detach().clone())
        self.heads = experts[0].heads
        self.shared_kv = shared_kv
        own_kv = experts[:1] if shared_kv else experts
        self.query_EQH = _stacked([expert.query_QH for expert in experts])
        self.output_EHQ = _stacked([expert.output_HQ for expert in experts])
        self.key_EQH = _stacked([expert.key_QH for expert in own_kv])
        self.value_EQH = _stacked([expert.value_QH for expert in own_kv])

    @classmethod
    def of_branches(cls, branches: Sequence[Attention], seed: int, shared_kv: bool = False) -> AttentionMixture:
        """Return the mixture of the attentions of separately trained models, with a random gate (std 1 / sqrt(H)).

        Shared keys and values start as the mean over the branches.
        """
        hidden = branches[0].query_QH.shape[1]
        gate_EH = seeded_normal((len(branches), hidden), hidden**-0.5, seed, "bam.gate").to(branches[0].query_QH.dtype)
        mixture = cls(branches, gate_EH, shared_kv)
        if shared_kv:
            with torch.no_grad():
                mixture.key_EQH[0] = average([branch.key_QH for branch in branches])
                mixture.value_EQH[0] = average([branch.value_QH for branch in branches])
        return mixture

    def expert(self, index: int) -> Attention:
        """Return one expert as it stands."""
        kv = 0 if self.shared_kv else index
        return Attention(
            self.query_EQH[index], self.key_EQH[kv], self.value_EQH[kv], self.output_EHQ[index], self.heads
        )

    def gate(self, x_TH: Tensor) -> Routing:
        """Return the dense Routing: every expert for every token, weights that sum to one."""
        logits_TE = nnf.linear(x_TH, self.gate_EH)
        probs_TE = logits_TE.float().softmax(-1)
        return Routing.dense(probs_TE, logits_TE, probs_TE)

    def forward(self, x_TH: Tensor, ctx: Context | None = None, routing: Routing | None = None) -> Tensor:
        """Return y_TH; ``ctx.segment_T`` keeps sequences apart, a given ``routing`` replaces the gate."""
        segment_T = None if ctx is None else ctx.segment_T
        gate_TE = (self.gate(x_TH) if routing is None else routing).to_dense().to(x_TH.dtype)
        y_TH = torch.zeros_like(x_TH)
        for index in range(len(self.gate_EH)):
            y_TH = y_TH + gate_TE[:, index, None] * attend(x_TH, self.expert(index), segment_T)
        return y_TH


def average(tensors: Sequence[Tensor]) -> Tensor:
    """Return the mean of the parameters that branches do not keep apart (embeddings, norms, head)."""
    return torch.stack(list(tensors)).mean(0)


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([tensor.detach() for tensor in tensors]))


# --- Union of Experts: selective multi-head attention ----------------------------------------------------------------


def selective_attention(
    x_TH: Tensor, attention: Attention, routing: Routing, segment_T: Tensor | None = None
) -> Tensor:
    """Return y_TH where head e reads, and answers, only the tokens that ``routing`` (over the heads) gives to it.

    The weight of an entry multiplies what the head says; with every token given to every head at weight 1 this is the
    attention. Keys of other tokens are masked here; ``attention_pairs`` counts what a kernel that skips them computes.
    """
    if routing.num_experts != attention.heads:
        raise ValueError(f"a routing over {routing.num_experts} experts does not fit {attention.heads} heads.")
    weight_TA = routing.to_dense().to(x_TH.dtype)
    chosen_AT = torch.zeros_like(weight_TA, dtype=torch.bool)
    chosen_AT[routing.token_N, routing.expert_N] = True
    chosen_AT = chosen_AT.T
    allowed_ATT = visible(_segments(x_TH, segment_T)) & chosen_AT[:, None, :] & chosen_AT[:, :, None]
    said_TAD = head_outputs(x_TH, attention, allowed_ATT) * weight_TA[:, :, None]
    return nnf.linear(said_TAD.flatten(1), attention.output_HQ)


def attention_pairs(routing: Routing, segment_T: Tensor | None = None) -> int:
    """Return sum over heads and sequences of S_h^2: (query, key) pairs of full squares, as the paper counts them."""
    if segment_T is None:
        return int(routing.counts_E.square().sum())
    groups = int(segment_T.max()) + 1 if len(segment_T) else 0
    count = torch.bincount(
        segment_T[routing.token_N] * routing.num_experts + routing.expert_N, minlength=groups * routing.num_experts
    )
    return int(count.square().sum())
