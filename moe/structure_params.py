"""Parameters of structures whose experts are no FFNs of the model: its neurons, or attentions. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from ..contracts import Selection
from .shapes import ModelShape


@dataclass(frozen=True)
class Neurons:
    """Every channel of the layer's FFNs as an expert of width 1: all at weight 1 are the sum of the FFNs, exactly.

    A layer of E experts of width F has E F of them, a dense FFN F. They are the rank-1 experts that product keys
    retrieve (routings ``peer`` and ``ultramem``), here with the weights of a model: those of a gated FFN are gated too.
    The model's own router goes; a routing that follows the layer's own selection takes all neurons.
    """

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the layer of neurons."""
        experts = max(1, shape.experts) * shape.width
        return shape.with_(experts=experts, width=1, selection=Selection("one", experts, renormalize=False))


@dataclass(frozen=True)
class Attentions:
    """``experts`` causal attentions of ``heads`` heads in the place of the layer's FFNs, as wide as the model.

    Their weights are drawn from the seed (std 1 / sqrt(fan-in)): a structure sees a layer's FFNs alone. The tokens of
    one call are one sequence. Keys and values are each expert's own, and a shared expert of the model goes.
    """

    experts: int = 4
    heads: int = 4

    def __post_init__(self) -> None:
        if self.experts < 1 or self.heads < 1:
            raise ValueError(f"experts={self.experts} and heads={self.heads} must be at least 1")

    def reshape(self, shape: ModelShape) -> ModelShape:
        """Return the shape of the layer of attentions, whose width is that of all heads together."""
        if shape.hidden % self.heads:
            raise ValueError(f"heads={self.heads} do not divide the hidden size {shape.hidden}")
        return shape.with_(
            experts=self.experts,
            width=shape.hidden,
            shared_width=0,
            selection=Selection("softmax", self.experts, renormalize=False),
            heads=self.heads,
        )
