"""Parameters of routers that mix the probabilities of related tokens. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...contracts import Descriptor
from .ffn_only import SoftmaxTopK


@dataclass(frozen=True)
class SimilarityAware(SoftmaxTopK):
    """Similarity-aware SMoE (arXiv 2505.00792): p'_i = sum_j S_ij p_j, then top-k of p', renormalised.

    S is the row softmax of x_i W_s x_j / ``temperature`` over the tokens of the same sequence; W_s starts as the
    identity and the temperature is sqrt(H) unless given. ``causal`` leaves later tokens out, as a language model
    must. No code is released; that probabilities and not logits are mixed is our reading.
    """

    renormalize: ClassVar[bool] = True

    temperature: float | None = None
    causal: bool = True

    def __post_init__(self) -> None:
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature} must be positive")


@dataclass(frozen=True)
class AttentionAware(SoftmaxTopK):
    """Attention-aware SMoE (arXiv 2505.00792): p'_i = sum_j A_ij p_j, then top-k of p', renormalised.

    A is the attention of the same block. The paper combines heads by a posterior that no released code defines; we
    take the mean of the heads. ``causal`` leaves later tokens out, whatever A says of them.
    """

    renormalize: ClassVar[bool] = True
    beyond_text: ClassVar[str] = "attn"

    causal: bool = True


DESCRIPTORS = [
    Descriptor(
        "routing",
        "got_similarity",
        "Graph of Tokens: probabilities of similar tokens mixed",
        "moebench.moe.routers.graph:build_similarity",
        SimilarityAware,
    ),
    Descriptor(
        "routing",
        "got_attention",
        "Graph of Tokens: probabilities mixed by attention",
        "moebench.moe.routers.graph:build_attention",
        AttentionAware,
    ),
]
