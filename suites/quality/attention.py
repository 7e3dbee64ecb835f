"""The linear maps of attention in the bits that a plan gives them. Imported by workers only.

Shape letters: O outputs, I inputs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

from ...contracts import MoebenchError
from ...moe.experts import QTensor
from ...moe.quantization import encoder


def attention_maps(model: Any, index: int) -> dict[str, nn.Linear]:
    """Return the linear maps of the attention of decoder layer ``index``, by name."""
    attention = getattr(model.model.layers[index], "self_attn", None)
    found = {name: part for name, part in attention.named_modules() if type(part) is nn.Linear} if attention else {}
    if not found:
        raise MoebenchError(f"layer {index} has no attention of linear maps to change; give attention=false.")
    return found


class QuantizedAttention:
    """The packed weights [O, I] of the attention of some layers, each layer's in its own bits; biases stay."""

    def __init__(self, model: Any, params: Any, bits: Mapping[int, int]) -> None:
        self.packed: list[tuple[nn.Linear, QTensor]] = []
        for index, own in bits.items():
            encode = encoder(params.at(own))
            for linear in attention_maps(model, index).values():
                self.packed.append((linear, encode(linear.weight.detach(), None)))

    @property
    def nbytes(self) -> int:
        """Bytes of all of them as stored."""
        return sum(packed.nbytes for _, packed in self.packed)

    def nbytes_of(self, linear: nn.Linear) -> int:
        """Return the bytes of one map's weights: as packed, or as they are where they are not quantized."""
        packed = [packed.nbytes for own, packed in self.packed if own is linear]
        return packed[0] if packed else linear.weight.nbytes

    @property
    def weights(self) -> int:
        """How many weights they have."""
        return sum(linear.weight.numel() for linear, _ in self.packed)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Put what the bytes dequantize to in the place of the weights; the very parameters come back."""
        originals = [linear.weight for linear, _ in self.packed]
        try:
            for linear, packed in self.packed:
                dense = packed.dequantize(linear.weight.dtype)
                linear.weight = nn.Parameter(dense, requires_grad=False)
            yield
        finally:
            for (linear, _), original in zip(self.packed, originals, strict=True):
                linear.weight = original
