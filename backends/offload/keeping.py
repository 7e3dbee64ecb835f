"""The file of a model's experts, kept by the hash of their bytes: whoever loads the same weights again finds it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...contracts import MoebenchError, Registry, Scheme, canonical_json
from ...kernels.cpu.build import cache_root
from ...moe.experts import ExpertStore
from ...moe.quantization import parts_of
from .file import OffloadError, SlabFile, write_slabs
from .writer import in_turn


def kept_file(layers: Mapping[int, ExpertStore], low: str = "none") -> SlabFile:
    """Return the file of these layers under ``$MOEBENCH_CACHE/offload``, written if it is not there or not whole.

    ``low`` names the quantization of each expert's copy of few bits, if it has one. Of processes that need the same
    file at once, the first one writes it and the others find it: a file that is written again is lost to those who
    read it. Slabs are checked when they are read, not here.
    """
    path = cache_root() / "offload" / f"{digest(layers, low)}.safetensors"
    try:
        return SlabFile.open(path)
    except OffloadError:
        pass
    with in_turn(cache_root()):  # not the file's own folder, for which the writer waits
        try:
            return SlabFile.open(path)
        except OffloadError:
            form = None if low == "none" else low_form(low)
            return SlabFile.open(write_slabs(path, sorted(layers.items()), form))


def low_form(low: str) -> Callable[[ExpertStore], ExpertStore]:
    """Return what makes a layer's copies of few bits in quantization ``low``, with its defaults."""
    step = Registry.load().get("quantization", low).create()

    def form(store: ExpertStore) -> ExpertStore:
        try:
            made: ExpertStore = step(store, None)
        except ValueError as error:
            raise MoebenchError(f"low={low}: {str(error).removesuffix('.')}; choose another quantization.") from error
        return made

    return form


def device_of(layers: Mapping[int, ExpertStore]) -> str:
    """Return the device of the weights."""
    return str(next(part.device for store in layers.values() for _, part in _parts(store)))


def digest(layers: Mapping[int, ExpertStore], low: str = "none") -> str:
    """Return the first 32 hex digits of the sha256 of all experts' bytes and of what says how to read them."""
    how = None if low == "none" else Registry.load().get("quantization", low).choose()
    seen = hashlib.sha256(canonical_json(how).encode())
    for index, store in sorted(layers.items()):
        seen.update(canonical_json([index, store.kinds, store.activation, store.gated]).encode())
        for told, part in _parts(store):
            seen.update(canonical_json([told, str(part.dtype), tuple(part.shape)]).encode())
            seen.update(_bytes(part))
    return seen.hexdigest()[:32]


def _parts(store: ExpertStore) -> Iterator[tuple[Scheme | None, Tensor]]:
    """Yield every stored tensor, with the scheme that says what it is."""
    for weights in (store.gate_up, store.down):
        if isinstance(weights, Tensor):
            yield None, weights
            continue
        for weight in weights:
            parts = parts_of(weight)
            if parts is None:
                raise MoebenchError(
                    f"codes of {weight.scheme.codec} cannot be written to a file; use a quantization of moebench's own."
                )
            yield from ((weight.scheme, part) for _, part in sorted(parts.items()))


def _bytes(part: Tensor) -> Any:
    return part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
