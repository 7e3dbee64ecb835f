"""One file with all experts of a model, each in an aligned slab that one read brings: opened, checked, looked into."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from ...moe.experts import Weight
from ...moe.quantization import tensor_of
from .access import Key, Layout
from .errors import OffloadError, named
from .header import ALIGN, Header, Identity, Matrix, Slab, parse
from .writer import write_slabs

__all__ = ["OffloadError", "SlabFile", "write_slabs"]


class SlabFile:
    """An open slab file: what is in it, and where. Its bytes are read by a store; this holds none of them."""

    def __init__(self, path: Path, header: Header, data_begin: int, identity: Identity) -> None:
        self.path, self.header, self.data_begin, self.identity = path, header, data_begin, identity
        self.layout: Layout = header.layout
        self.activation, self.gated = header.activation, header.gated
        self.forms: tuple[str, ...] = tuple(header.slabs)

    @classmethod
    def open(cls, path: Path | str) -> SlabFile:
        """Return the file at ``path`` after checking its header and its length; slabs are checked as they are read.

        Raises:
            OffloadError: it is missing, not a slab file, damaged or not whole.
        """
        path = Path(path)
        try:
            with path.open("rb") as file:
                identity = Identity.of(os.fstat(file.fileno()))
                length = int.from_bytes(file.read(8), "little")
                text = file.read(length) if 0 < length <= identity.nbytes - 8 else b""
        except OSError as error:
            raise OffloadError(f"{path} cannot be read ({error.strerror}); write it first with write_slabs.") from error
        try:
            header = parse(text)
        except ValueError as error:
            raise OffloadError(f"{path} cannot be used: {error}; write it anew.") from error
        if (8 + length) % ALIGN or 8 + length + header.data_bytes != identity.nbytes:
            whole = 8 + length + header.data_bytes
            raise OffloadError(f"{path} has {identity.nbytes} bytes where its header says {whole}; write it anew.")
        return cls(path, header, 8 + length, identity)

    def slab(self, key: Key, form: str = "full") -> Slab:
        """Return where an expert is.

        Raises:
            OffloadError: the file does not have it, or not in this form.
        """
        slabs = self.header.slabs.get(form)
        if slabs is None:
            raise OffloadError(f"{self.path} has no form {form} of its experts; write it with low=.")
        if key not in slabs:
            raise OffloadError(
                f"{self.path} has no {named(key, form)}: its layers are {list(self.layout.layers)} with "
                f"{self.layout.experts} experts each; give it the model that it was written from."
            )
        return slabs[key]

    def slab_bytes(self, form: str = "full") -> int:
        """Return the bytes of the largest slab of a form, a multiple of 4096: what a slot takes."""
        return max(slab.nbytes for slab in self.header.slabs[form].values())

    def weights(self, key: Key, form: str, buffer: Tensor) -> tuple[Weight, Weight]:
        """Return (gate_up, down) of an expert as views on ``buffer``, uint8, which begins with its slab."""
        slab = self.slab(key, form)
        return _weight(slab.gate_up, buffer), _weight(slab.down, buffer)


def _weight(matrix: Matrix, buffer: Tensor) -> Weight:
    parts = {
        part.name: buffer[part.begin : part.begin + part.nbytes].view(getattr(torch, part.dtype)).view(part.shape)
        for part in matrix.parts
    }
    return parts[""] if matrix.scheme is None else tensor_of(parts, matrix.scheme, matrix.shape)
