"""What one layer's experts take: the bytes that their tensors hold, and those of a file that they are read back from.

Imported by workers only.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...moe import artefacts
from ...moe.artefacts import Artefact
from ...moe.experts import ExpertStore, QTensor
from ...moe.stage_artefacts import quantized_artefact, quantized_of

LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian number of so many bytes."""


DENSE = ("gate_up", "down")
"""The tensors of experts that are not quantized."""


@dataclass(frozen=True)
class OnDisk:
    """A file of one layer's experts: its bytes, how many of these are its header, and the experts as it gives them."""

    file_bytes: int
    header_bytes: int
    store: ExpertStore


def written(store: ExpertStore) -> OnDisk | None:
    """Return what a safetensors file of the experts' weights takes, and the store read back from it.

    None of codes that are a plug-in's own, which nothing here knows how to read back.
    """
    artefact = quantized_artefact(store) if store.quantized else _dense_artefact(store)
    if artefact is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "made"
        artefacts.write(made, artefact, {})
        file = made / artefacts.TENSORS
        size, header = file.stat().st_size, header_bytes(file)
        back = artefacts.read(made)
    if back is None:
        raise OSError("a file that was just written cannot be read back; check the temporary folder's disk.")
    if store.quantized:
        return OnDisk(size, header, quantized_of(store, back))
    gate_up, down = (back.tensors[name] for name in DENSE)
    return OnDisk(size, header, replace(store, gate_up=gate_up, down=down))


def header_bytes(file: Path) -> int:
    """Return how many bytes of a safetensors file lie before its tensors."""
    with file.open("rb") as opened:
        return LENGTH_BYTES + int.from_bytes(opened.read(LENGTH_BYTES), "little")


def _dense_artefact(store: ExpertStore) -> Artefact:
    return Artefact({name: getattr(store, name) for name in DENSE}, {})


def matrices(store: ExpertStore) -> Iterator[tuple[str, Any]]:
    """Yield (what it is, its weight) of every matrix, expert after expert."""
    for slot, expert in enumerate(store.ffn_ids):
        yield f"gate_up of expert {expert}", store.gate_up[slot]
        yield f"down of expert {expert}", store.down[slot]


def mistake(store: ExpertStore, dense: ExpertStore, disk: OnDisk | None) -> str:
    """Return what is wrong with the codes of a layer, or nothing.

    Each matrix has the shape of the ``dense`` one, holds what it says, decodes to finite numbers, to the same whenever
    it is asked, and to the same from the file.
    """
    if disk is not None and disk.file_bytes - disk.header_bytes != store.nbytes:
        return f"{store.nbytes} bytes in memory are {disk.file_bytes - disk.header_bytes} on disk"
    backs = [back for _, back in matrices(disk.store)] if disk is not None else [None] * (2 * len(store.ffn_ids))
    for (name, weight), (_, original), back in zip(matrices(store), matrices(dense), backs, strict=True):
        problem = _problem(weight, original, back)
        if problem:
            return f"{name} {problem}"
    return ""


def _problem(weight: Tensor | QTensor, original: Tensor, back: Tensor | QTensor | None) -> str:
    if tuple(weight.shape) != tuple(original.shape):
        return f"has shape {tuple(weight.shape)} instead of {tuple(original.shape)}"
    held = held_bytes(weight)
    if held > weight.nbytes:
        return f"says that it takes {weight.nbytes} bytes and holds {held}"
    decoded = _decoded(weight)
    if decoded.shape != original.shape or not bool(decoded.isfinite().all()):
        return "does not decode to finite numbers of its shape"
    if not torch.equal(decoded, _decoded(weight)):
        return "decodes to something else each time"
    if back is not None and not torch.equal(decoded, _decoded(back)):
        return "decodes to something else when it comes from its file"
    return ""


def _decoded(weight: Tensor | QTensor) -> Tensor:
    return weight.float() if isinstance(weight, Tensor) else weight.dequantize(torch.float32)


def held_bytes(weight: Any) -> int:
    """Return the bytes of the tensors, arrays and byte strings that a matrix holds, each once, however deep in it."""
    seen: dict[int, Any] = {}
    _collect(weight, seen)
    return sum(len(part) if isinstance(part, bytes | bytearray) else part.nbytes for part in _buffers(seen.values()))


BUFFERS = (Tensor, np.ndarray, memoryview, bytes, bytearray)


def _buffers(values: Iterable[Any]) -> Iterator[Any]:
    return (value for value in values if isinstance(value, BUFFERS))


def _collect(value: Any, seen: dict[int, Any]) -> None:
    if id(value) in seen or isinstance(value, type):
        return
    seen[id(value)] = value
    if isinstance(value, BUFFERS):
        return
    if isinstance(value, Mapping | list | tuple | set | frozenset):
        for part in value.values() if isinstance(value, Mapping) else value:
            _collect(part, seen)
    for part in _attributes(value):
        _collect(part, seen)


def _attributes(value: Any) -> list[Any]:
    """Return what an object keeps under names, in a dict of its own and in slots."""
    slots = [getattr(kind, "__slots__", ()) for kind in type(value).__mro__]
    names = [name for own in slots for name in ((own,) if isinstance(own, str) else own)]
    own = dict(getattr(value, "__dict__", {}))
    return [*own.values(), *(getattr(value, name) for name in names if name not in own and hasattr(value, name))]
