"""Where layers come from: synthetic presets, SmolLM2 and local Hugging Face folders. Imports no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Protocol

from ...contracts import make_key
from .cache import cache_dir

if TYPE_CHECKING:
    from torch import Tensor

    from ...moe.layer import LayerWeights
    from ...moe.shapes import ModelShape

__all__ = ["ModelSource", "Split", "cache_dir", "substream"]

Split = Literal["calibration", "evaluation"]
"""Which text a hidden state comes from; the two never overlap."""


class ModelSource(Protocol):
    """A model whose layers can be had one at a time."""

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model before any structure is applied."""

    def layer(self, index: int) -> LayerWeights:
        """Return the FFN or MoE weights of decoder layer ``index``; no other layer is loaded."""

    def hidden_states(self, index: int, split: Split, tokens: int, seed: int) -> Tensor:
        """Return x_TH float32 [tokens, H]: recorded inputs of that FFN or MoE, a slice whose place ``seed`` decides.

        Raises MoebenchError where none are recorded. The same ``seed`` gives the same tokens at every layer.
        """


def substream(seed: int, *names: str | int) -> int:
    """Return the seed of a named stream below a root seed: a 63-bit number, different for every name."""
    return int(make_key([seed, *names])[:16], 16) >> 1
