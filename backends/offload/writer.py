"""Writing a slab file: one layer at a time, aside, synced, then renamed once."""

from __future__ import annotations

import errno
import fcntl
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ...moe.experts import ExpertStore, Weight
from ...moe.quantization import parts_of
from .access import Key, Layout
from .errors import OffloadError, named
from .faults import Faults
from .header import DTYPES, PART_ALIGN, Header, Matrix, Part, Slab, aligned

ROOM_LAYERS = 64
"""For how many layers like the first one the header gets room; where there are more, the slabs are moved at the end."""

CHUNK = 2**24


def write_slabs(
    path: Path | str,
    layers: Iterable[tuple[int, ExpertStore]],
    low: Callable[[ExpertStore], ExpertStore] | None = None,
) -> Path:
    """Write the experts of ``layers``, (decoder index, store) in ascending order, to the slab file ``path``.

    With ``low`` each expert is there a second time, as form ``low``, in the few bits that it makes of a store. No more
    than one layer is held, where ``layers`` makes each when it is asked for. The file appears at once and whole; two
    processes that write into one folder take turns, and what a killed one left is overwritten by the next.

    Raises:
        OffloadError: the experts cannot be stored, differ from layer to layer in what must be one, or the disk is full.
    """
    path = Path(path)
    with _aside(path) as file:
        writer = _Writer(path, file)
        for layer, store in layers:
            writer.add(layer, "full", store)
            if low is not None:
                writer.add(layer, "low", low(store))
            writer.layer_done(layer)
            del store  # before the next one is made
        writer.finish()
    return path


class _Writer:
    """Writes slabs one behind the other, then the header before them."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.faults = path, file, Faults()
        self.slabs: dict[str, dict[Key, Slab]] = {}
        self.layers: list[int] = []
        self.kind: tuple[int, str, bool] | None = None
        self.room = self.data_bytes = 0

    def add(self, layer: int, form: str, store: ExpertStore) -> None:
        """Write every expert of one layer in one form."""
        self._check(layer, store)
        for expert in range(store.num_experts):
            data, matrices = _serialized((layer, expert), form, store.gate_up[expert], store.down[expert])
            with _told_plainly(self.path):
                if self.room == 0:
                    self.room = self._room_for(store.num_experts, matrices)
                    self.file.seek(self.room)
                if self.faults.strikes("write_full"):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                self.file.write(data)
            slab = Slab(self.data_bytes, len(data), zlib.crc32(data), *matrices)
            self.slabs.setdefault(form, {})[layer, expert] = slab
            self.data_bytes += len(data)

    def layer_done(self, layer: int) -> None:
        """Note that all forms of a layer are written."""
        self.layers.append(layer)

    def finish(self) -> None:
        """Write the header."""
        if self.kind is None:
            raise OffloadError("there are no layers with experts to offload; give a model that has some.")
        experts, activation, gated = self.kind
        text = Header(Layout(tuple(self.layers), experts), activation, gated, self.slabs, self.data_bytes).encode()
        room = max(self.room, aligned(8 + len(text)))
        with _told_plainly(self.path):
            self.file.flush()
            _shift(self.file.fileno(), self.room, self.data_bytes, room - self.room)
            self.file.seek(0)
            self.file.write((room - 8).to_bytes(8, "little") + text.ljust(room - 8))

    def _room_for(self, experts: int, matrices: tuple[Matrix, Matrix]) -> int:
        """Return how many bytes to leave for a header: each part has an entry, padding behind it, and numbers."""
        parts = sum(len(matrix.parts) for matrix in matrices)
        return aligned(1024 + ROOM_LAYERS * experts * (256 * parts + 64))

    def _check(self, layer: int, store: ExpertStore) -> None:
        if set(store.kinds) != {"ffn"}:
            others = sorted(set(store.kinds) - {"ffn"})
            raise OffloadError(
                f"layer {layer} has experts of kind {', '.join(others)}; only FFN experts are offloaded."
            )
        kind = (store.num_experts, store.activation, store.gated)
        if self.kind is not None and kind != self.kind:
            raise OffloadError(
                f"layer {layer} has {kind[0]} experts (activation {kind[1]}, gated {kind[2]}), an earlier one "
                f"{self.kind[0]} ({self.kind[1]}, {self.kind[2]}); write a file for each kind."
            )
        if self.layers and layer <= self.layers[-1]:
            raise OffloadError(f"layer {layer} comes after layer {self.layers[-1]}; give layers in ascending order.")
        self.kind = kind


def _serialized(key: Key, form: str, *weights: Weight) -> tuple[bytes, tuple[Matrix, Matrix]]:
    """Return the bytes of one expert's slab, and where its two matrices are in it."""
    pieces: list[bytes] = []
    reached = 0
    matrices = []
    for weight in weights:
        parts = []
        for name, tensor in _parts(key, form, weight).items():
            begin, data = aligned(reached, PART_ALIGN), _bytes_of(tensor)
            parts.append(Part(name, _dtype(key, tensor), tuple(tensor.shape), begin))
            pieces += [bytes(begin - reached), data]
            reached = begin + len(data)
        rows, columns = weight.shape
        matrices.append(Matrix(tuple(parts), None if isinstance(weight, Tensor) else weight.scheme, (rows, columns)))
    pieces.append(bytes(aligned(reached) - reached))
    gate_up, down = matrices
    return b"".join(pieces), (gate_up, down)


def _parts(key: Key, form: str, weight: Weight) -> dict[str, Tensor]:
    if isinstance(weight, Tensor):
        return {"": weight}
    parts = parts_of(weight)
    if parts is None:
        raise OffloadError(
            f"{named(key, form)} is a {type(weight).__name__} of codec {weight.scheme.codec}, whose bytes are unknown "
            "here; use a quantization of moebench's own, or none."
        )
    return parts


def _dtype(key: Key, tensor: Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise OffloadError(
            f"{named(key, 'full')} has numbers of type {name}; convert it to one of {', '.join(DTYPES)}."
        )
    return name


def _bytes_of(tensor: Tensor) -> bytes:
    data: bytes = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return data


def _shift(descriptor: int, begin: int, nbytes: int, by: int) -> None:
    """Move ``nbytes`` from ``begin`` on by ``by`` bytes, the last first, so that nothing is overwritten unread."""
    end = begin + nbytes
    while by and end > begin:
        start = max(begin, end - CHUNK)
        data = memoryview(os.pread(descriptor, end - start, start))
        while data:
            data = data[os.pwrite(descriptor, data, end - len(data) + by) :]
        end = start


@contextmanager
def _aside(path: Path) -> Iterator[BinaryIO]:
    """Give a file to write beside ``path``, which takes its place once it is whole and synced."""
    aside = path.with_name(f".aside-{path.name}")
    with in_turn(path.parent) as folder:
        try:
            with _told_plainly(path):
                file = aside.open("w+b")
            with file:
                yield file
                with _told_plainly(path):
                    file.flush()
                    os.fsync(file.fileno())
                    _forget(file.fileno())
            with _told_plainly(path):
                os.rename(aside, path)
                os.fsync(folder)
        finally:
            aside.unlink(missing_ok=True)


def _forget(descriptor: int) -> None:
    """Ask the kernel to drop the pages that writing has left: a tier that is to be slow must not lie in RAM."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@contextmanager
def in_turn(folder: Path) -> Iterator[int]:
    """Hold ``folder``, which is made if need be, against all others who hold it; gives its descriptor."""
    with _told_plainly(folder):
        folder.mkdir(parents=True, exist_ok=True)
        held = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(held, fcntl.LOCK_EX)  # the kernel frees it when the process dies
        yield held
    finally:
        os.close(held)


@contextmanager
def _told_plainly(path: Path) -> Iterator[None]:
    """Turn an error of the file system into one sentence."""
    try:
        yield
    except OSError as error:
        raise OffloadError(
            f"{path} cannot be written ({error.strerror or error}); free space there or choose another folder."
        ) from error
