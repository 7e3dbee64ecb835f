"""The types of a GGUF file's tensors, as the package ``gguf`` knows and decodes them. Imports no torch."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from ...contracts import MoebenchError
from .gguf_file import GgufFile, Place, read_header

Type = tuple[str, int, int]
"""A type's name, the weights of a block, and its bytes."""


def library() -> Any:
    """Return the package ``gguf``; MoebenchError where it is not installed."""
    try:
        import gguf
    except ImportError as error:
        raise MoebenchError("GGUF formats need the package gguf; run pip install 'moebench[models]'.") from error
    return gguf


@cache
def decodable() -> dict[str, tuple[int, int]]:
    """Return the types that ``gguf`` decodes, each with the weights and the bytes of a block."""
    import numpy as np

    gguf = library()
    found = {}
    for kind, (block, size) in gguf.GGML_QUANT_SIZES.items():
        try:
            gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError:
            continue
        found[kind.name] = (block, size)
    return found


@cache
def types() -> dict[int, Type]:
    """Return every type that ``gguf`` knows, by number."""
    return {int(kind): (kind.name, block, size) for kind, (block, size) in library().GGML_QUANT_SIZES.items()}


def type_of(file: GgufFile, place: Place) -> Type:
    """Return a tensor's type, which ``gguf`` decodes.

    Raises MoebenchError where it does not, or where the innermost dimension is not made of whole blocks.
    """
    name, block, size = types().get(place.type, (f"type {place.type}", 1, 1))
    if name not in decodable():
        raise MoebenchError(
            f"{place.name!r} is stored as {name}, which the installed gguf does not decode; convert {file.path} to "
            f"another type."
        )
    if place.size == 0 or place.dims[0] % block:
        raise MoebenchError(f"{place.name!r} is {place.dims}, which {name} cannot store; fetch {file.path} again.")
    return name, block, size


def bytes_of(file: GgufFile, place: Place) -> int:
    """Return the bytes of a tensor; raises what ``type_of`` raises."""
    _, block, size = type_of(file, place)
    return place.size // block * size


def open_file(path: Path) -> GgufFile:
    """Return the header of a GGUF file all of whose tensors lie within it.

    Raises MoebenchError where they do not, besides what ``read_header`` raises. Types that ``gguf`` does not know are
    refused when a tensor of theirs is read.
    """
    file, known = read_header(path), types()
    for place in file.tensors.values():
        _, block, size = known.get(place.type, ("", 1, 0))
        if place.start + place.size // block * size > file.size:
            raise MoebenchError(f"{path} is truncated: {place.name!r} lies beyond its end; fetch it again.")
    return file
