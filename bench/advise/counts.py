"""How many weights a model has, part by part and layer by layer, and what it remembers of a token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple, dataclass

PARTS = ("experts", "shared", "attention", "dense", "embedding", "rest")
"""What weights belong to: routed experts; shared experts with their gate; attention and what stands in its place, with
biases and norms of queries and keys; dense FFNs; token embedding and head; norms and routers."""

KV_BYTES, STATE_BYTES = 2, 4
"""Bytes of a cached key or value (bfloat16), and of a value of a recurrent state (float32)."""


@dataclass(frozen=True)
class Layer:
    """Numbers of weights of a decoder layer, and values that it keeps of the past.

    ``expert`` is the weights of one routed expert, of which there are ``experts`` and a token uses ``k``. Of a token
    ``kv_values`` are kept, of the last ``window`` tokens where that is set; ``state`` values are kept of a sequence,
    however long it is.
    """

    attention: int = 0
    dense: int = 0
    shared: int = 0
    expert: int = 0
    experts: int = 0
    k: int = 0
    rest: int = 0
    width: int = 0
    kv_values: int = 0
    window: int | None = None
    state: int = 0

    def kept_bytes(self, context: int) -> int:
        """Bytes that one sequence of ``context`` tokens needs here."""
        tokens = context if self.window is None else min(context, self.window)
        return tokens * self.kv_values * KV_BYTES + self.state * STATE_BYTES


@dataclass(frozen=True)
class Model:
    """A whole model: ``embedding`` and ``head`` are weights of both (``head`` 0 where it is the embedding again)."""

    kind: str
    hidden: int
    vocabulary: int
    layers: tuple[Layer, ...]
    embedding: int
    head: int
    rest: int
    longest: int | None = None

    @property
    def moe_layers(self) -> tuple[Layer, ...]:
        """The layers with routed experts."""
        return tuple(layer for layer in self.layers if layer.experts)

    def parameters(self) -> Mapping[str, int]:
        """Return the number of weights of each of ``PARTS``."""
        layers = self.layers
        return {
            "experts": sum(layer.expert * layer.experts for layer in layers),
            "shared": sum(layer.shared for layer in layers),
            "attention": sum(layer.attention for layer in layers),
            "dense": sum(layer.dense for layer in layers),
            "embedding": self.embedding + self.head,
            "rest": self.rest + sum(layer.rest for layer in layers),
        }

    @property
    def total(self) -> int:
        """Number of all weights."""
        return sum(self.parameters().values())

    @property
    def active(self) -> int:
        """Number of weights that a token uses, the whole embedding counted as models' names do."""
        unused = sum(layer.expert * (layer.experts - layer.k) for layer in self.layers)
        return self.total - unused

    def kv_bytes(self, context: int) -> int:
        """Bytes of keys, values and states of one sequence of ``context`` tokens."""
        return sum(layer.kept_bytes(context) for layer in self.layers)


MOST_LAYERS, MOST_EXPERTS, MOST_WEIGHTS = 4096, 2048, 2**53
"""More of a model, of a layer and of a layer's parts are taken for a mistake."""


def check_sense(model: Model) -> Model:
    """Return the model, or raise ValueError where it cannot be one: parts that are no whole numbers, or below 0."""
    for layer in model.layers:
        counts = [value for value in astuple(layer) if value is not None]
        if not all(type(value) is int and 0 <= value < MOST_WEIGHTS for value in counts) or layer.window == 0:
            raise ValueError("a layer has sizes that are no whole numbers from 0")
        if layer.experts and not 0 < layer.k <= layer.experts <= MOST_EXPERTS:
            raise ValueError(f"a token uses {layer.k} of {layer.experts} experts")
        if layer.experts and not layer.expert:
            raise ValueError("experts have no weights")
    around = (model.hidden, model.vocabulary, model.embedding, model.head, model.rest, model.longest or 1)
    if not all(type(value) is int and 0 <= value < MOST_WEIGHTS for value in around):
        raise ValueError("embedding, head or context are no whole numbers from 0")
    return model


PREFILL_TOKENS = 512
"""Tokens of a prompt that go through the model together."""


def scratch_bytes(model: Model, batch: int) -> int:
    """Return bytes of activations: T (4 H + 3 W) in float32 for T tokens at once, and the logits of a batch.

    T = max(batch, PREFILL_TOKENS), H is the hidden size, W the widest FFN that a token goes through in a layer (k
    experts and the shared ones count together). Attention is taken to be fused: no T x context matrix is made.
    """
    tokens = max(batch, PREFILL_TOKENS)
    widest = max((layer.width for layer in model.layers), default=0)
    return 4 * (tokens * (4 * model.hidden + 3 * widest) + batch * model.vocabulary)
