"""Parameters of a decoder with MoE layers, from its configuration alone. Imports no torch.

SlimMoE (arXiv 2506.18349) makes Phi-3.5-MoE (41.9 billion parameters, 6.6 active) Phi-mini-MoE (7.6, 2.4) by slimming
experts from 6400 to 960 channels, and Phi-tiny-MoE (3.8, 1.1) by 448 channels and half of the attention heads.
``PHI`` has their sizes. All are had from these but the 1.1: it is 1.29 with both embeddings counted, as they are in the
6.6 and the 2.4, 1.15 with one of them, and 1.02 with none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class MoEDecoder:
    """Sizes of a decoder of ``layers`` equal layers: grouped-query attention, gated experts and two norms each.

    ``biases`` are those of queries, keys, values, output and norms; with ``head_bias`` the output embedding has one.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    experts: int
    k: int
    width: int
    vocabulary: int
    tied: bool = False
    biases: bool = False
    head_bias: bool = False

    def attention(self) -> int:
        """Return the parameters of one attention."""
        queries, keys = self.heads * self.head_width, self.kv_heads * self.head_width
        biases = queries + 2 * keys + self.hidden if self.biases else 0
        return 2 * self.hidden * (queries + keys) + biases

    def expert(self) -> int:
        """Return the parameters of one expert."""
        return 3 * self.hidden * self.width

    def total(self) -> int:
        """Return all parameters."""
        return self._with(self.experts)

    def active(self) -> int:
        """Return the parameters that one token uses, both embeddings counted whole."""
        return self._with(self.k)

    def _with(self, experts: int) -> int:
        norm = self.hidden * (2 if self.biases else 1)
        layer = self.attention() + self.experts * self.hidden + experts * self.expert() + 2 * norm
        embeddings = self.vocabulary * self.hidden * (1 if self.tied else 2)
        return self.layers * layer + norm + embeddings + (self.vocabulary if self.head_bias else 0)


_PHI = MoEDecoder(32, 4096, 32, 8, 128, 16, 2, 6400, 32064, biases=True, head_bias=True)

PHI: Mapping[str, MoEDecoder] = {
    "phi-3.5-moe": _PHI,
    "phi-mini-moe": replace(_PHI, width=960),
    "phi-tiny-moe": replace(_PHI, width=448, heads=16, kv_heads=4),
}
"""Phi-3.5-MoE and what SlimMoE makes of it."""
