"""Parameters of routers that learn nothing: a table of token ids, and chance. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ...contracts import Descriptor, Selection
from ..shapes import ModelShape
from .ffn_only import OneExpert


@dataclass(frozen=True)
class Hash(OneExpert):
    """Hash layers (arXiv 2106.04426): the expert is a fixed function of the token id, with weight 1.

    ``random`` draws an expert per id. ``balanced`` gives the ids, the most frequent first, to the expert with the
    least load so far; the frequency of id v is taken as (v + 1)^-``exponent``, since byte-pair vocabularies number
    their tokens roughly by frequency. Each layer has a ``random`` table of its own, and all share the ``balanced`` one.
    ``vocabulary`` is the number of token ids.
    """

    table: Literal["random", "balanced"] = "random"
    vocabulary: int = 65_536
    exponent: float = 1.0

    def __post_init__(self) -> None:
        if self.vocabulary < 1:
            raise ValueError(f"vocabulary={self.vocabulary} must be at least 1")

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: there are no logits."""
        return None


@dataclass(frozen=True)
class Thor(OneExpert):
    """THOR (arXiv 2110.04260): an expert drawn uniformly, with weight 1.

    Training draws one expert for the whole batch. Inference draws one per token, or one per ``segment`` (sentence).
    The consistency loss between two forwards with different draws belongs to a training recipe.
    """

    draw: Literal["token", "segment"] = "token"

    def selection(self, shape: ModelShape) -> Selection | None:
        """Return None: there are no logits."""
        return None


DESCRIPTORS = [
    Descriptor("routing", "hash", "expert by token id, no router", "moebench.moe.routers.lookup:build_hash", Hash),
    Descriptor("routing", "thor", "THOR: a random expert", "moebench.moe.routers.lookup:build_thor", Thor),
]
