"""How a GGUF file stores its FFNs: types, and bits per weight as they truly are. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence

from ...contracts import Scheme
from ...moe.blocks.gguf_file import GgufFile
from ...moe.blocks.gguf_types import Type, bytes_of, type_of
from ...moe.blocks.params import gguf_mixed, gguf_scheme
from .gguf_config import ffn_names


def types_of(file: GgufFile, layers: Sequence[int]) -> list[Type]:
    """Return the type of each FFN matrix of the layers, gate, up and down in turn; MoebenchError for unknown ones."""
    return [type_of(file, file.place(name)) for layer in layers for name in ffn_names(file, layer)]


def stored_scheme(file: GgufFile, layers: Sequence[int], width: int) -> Scheme:
    """Return the scheme of the layers' experts, ``width`` wide after their structure.

    Raises ValueError where gate and up of a layer are of two types, or blocks of down do not divide ``width``.
    """
    types = types_of(file, layers)
    for layer, gate, up, down in zip(layers, types[::3], types[1::3], types[2::3], strict=True):
        if gate != up:
            raise ValueError(
                f"layer {layer} stores gate as {gate[0]} and up as {up[0]}, which are one matrix here; use "
                f"quantization=none, or a file with one type for both"
            )
        if width % down[1]:
            raise ValueError(f"blocks of {down[1]} ({down[0]}) do not divide experts of {width} channels; cut fewer")
    if len(set(types)) == 1:
        return gguf_scheme(types[0][0], types[0][1])
    places = [file.place(name) for layer in layers for name in ffn_names(file, layer)]
    weights = sum(place.size for place in places)
    return gguf_mixed(8 * sum(bytes_of(file, place) for place in places) / weights)
