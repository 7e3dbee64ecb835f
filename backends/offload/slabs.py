"""All experts of a slab file at once, for the tier in RAM."""

from __future__ import annotations

import zlib
from typing import BinaryIO

import torch

from ...moe.experts import Weight
from .access import Key
from .errors import OffloadError, named
from .file import SlabFile


def read_all(file: SlabFile) -> dict[Key, tuple[Weight, Weight]]:
    """Return (gate_up, down) of every expert of ``file`` in memory.

    Raises:
        OffloadError: the file cannot be read, or a slab is not what was written.
    """
    keys = file.layout.keys()
    try:
        with file.path.open("rb") as opened:
            return {key: _read(file, key, opened) for key in keys}
    except OSError as error:
        raise OffloadError(f"{file.path} cannot be read ({error.strerror}); write it anew.") from error


def _read(file: SlabFile, key: Key, opened: BinaryIO) -> tuple[Weight, Weight]:
    slab = file.slab(key)
    opened.seek(file.data_begin + slab.offset)
    data = bytearray(opened.read(slab.nbytes))
    if len(data) != slab.nbytes or zlib.crc32(data) != slab.crc32:
        raise OffloadError(f"{named(key, 'full')} in {file.path} is damaged; delete the file and write it anew.")
    return file.weights(key, "full", torch.frombuffer(data, dtype=torch.uint8))
