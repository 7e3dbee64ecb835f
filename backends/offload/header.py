"""The header of a slab file: that of safetensors, with what a store needs to know in its metadata. Imports no torch.

A file is eight bytes (the length of the header), the header as JSON padded by spaces, and the slabs. The slabs begin at
a multiple of ``ALIGN``, and so does each of them: that is what O_DIRECT asks for. A slab holds all that one expert
stores; safetensors allows no holes, so what lies between is a tensor of zeros called ``pad.<offset>``. An expert's
tensors are called ``<form>.<layer>.<expert>.gate_up`` and ``.down``, of quantized ones ``.gate_up.<part>``.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from ...contracts import Scheme, canonical_json, plain
from .access import Key, Layout

ALIGN, PART_ALIGN = 4096, 64
FORMAT, VERSION = "moebench-slabs", "1"
FORMS = ("full", "low")
MATRICES = ("gate_up", "down")
DTYPES = {
    "float64": ("F64", 8),
    "float32": ("F32", 4),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "float8_e8m0fnu": ("F8_E8M0", 1),
    "int64": ("I64", 8),
    "int32": ("I32", 4),
    "int16": ("I16", 2),
    "int8": ("I8", 1),
    "uint8": ("U8", 1),
    "bool": ("BOOL", 1),
}
"""What a part may consist of: torch's name, safetensors' name, bytes."""

_TORCH = {name: (dtype, size) for dtype, (name, size) in DTYPES.items()}


def aligned(number: int, to: int = ALIGN) -> int:
    """Return the least multiple of ``to`` that is at least ``number``."""
    return -(-number // to) * to


@dataclass(frozen=True)
class Identity:
    """What tells a file from another one at the same path, and from itself after a change."""

    device: int
    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> Identity:
        """Return that of a file that was looked up."""
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)


@dataclass(frozen=True)
class Part:
    """One stored tensor of a matrix: its name (empty: the matrix itself), dtype, shape, and where in the slab it is."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int

    @property
    def nbytes(self) -> int:
        """Its bytes."""
        return prod(self.shape) * DTYPES[self.dtype][1]


@dataclass(frozen=True)
class Matrix:
    """One matrix of an expert: its parts, and scheme and shape where it is quantized (``scheme`` None: dense)."""

    parts: tuple[Part, ...]
    scheme: Scheme | None
    shape: tuple[int, int]


@dataclass(frozen=True)
class Slab:
    """One expert in the file: ``offset`` counts from the first slab; ``crc32`` is of all ``nbytes``, zeros included."""

    offset: int
    nbytes: int
    crc32: int
    gate_up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Header:
    """All that a header says. ``data_bytes`` is what follows it."""

    layout: Layout
    activation: str
    gated: bool
    slabs: Mapping[str, Mapping[Key, Slab]]
    data_bytes: int

    def encode(self) -> bytes:
        """Return the JSON text, without padding."""
        schemes = list(
            dict.fromkeys(
                matrix.scheme
                for _, _, slab in self._all()
                for matrix in (slab.gate_up, slab.down)
                if matrix.scheme is not None
            )
        )
        place = {scheme: index for index, scheme in enumerate(schemes)}

        def told(matrix: Matrix) -> list[int]:
            return [-1 if matrix.scheme is None else place[matrix.scheme], *matrix.shape]

        rows: dict[str, list[Any]] = {form: [] for form in self.slabs}
        for form, key, slab in self._all():
            rows[form].append([*key, slab.offset, slab.nbytes, slab.crc32, told(slab.gate_up), told(slab.down)])
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "layout": canonical_json(self.layout),
            "activation": self.activation,
            "gated": str(self.gated).lower(),
            "schemes": canonical_json(schemes),
            "slabs": canonical_json(rows),
        }
        text = {"__metadata__": metadata, **self._tensors()}
        metadata["header_crc32"] = _crc(text)
        return json.dumps(text, separators=(",", ":")).encode()

    def _all(self) -> Iterator[tuple[str, Key, Slab]]:
        for form, slabs in self.slabs.items():
            for key, slab in slabs.items():
                yield form, key, slab

    def _tensors(self) -> dict[str, Any]:
        """Return safetensors' entry of every part, and of what lies between."""
        found: list[tuple[int, int, str, str, list[int]]] = []
        for form, (layer, expert), slab in self._all():
            for name, matrix in zip(MATRICES, (slab.gate_up, slab.down), strict=True):
                for part in matrix.parts:
                    called = ".".join(filter(None, (form, str(layer), str(expert), name, part.name)))
                    begin = slab.offset + part.begin
                    found.append((begin, begin + part.nbytes, called, DTYPES[part.dtype][0], list(part.shape)))
        tensors, reached = {}, 0
        for begin, end, called, dtype, shape in [*sorted(found), (self.data_bytes, self.data_bytes, "", "U8", [0])]:
            if begin > reached:
                tensors[f"pad.{reached}"] = _entry("U8", [begin - reached], reached, begin)
            if called:
                tensors[called] = _entry(dtype, shape, begin, end)
            reached = end
        return tensors


def parse(text: bytes) -> Header:
    """Return what a header says.

    Raises:
        ValueError: it is no such header, of another version, or its checksum is wrong.
    """
    try:
        found = json.loads(text)
        metadata = found["__metadata__"]
        if metadata["format"] != FORMAT:
            raise ValueError("it is not a slab file")
        if metadata["version"] != VERSION:
            raise ValueError(f"it has version {metadata['version']}, and version {VERSION} is read here")
        if metadata.pop("header_crc32") != _crc(found):
            raise ValueError("the checksum of its header is wrong")
        return _header(metadata, found)
    except (KeyError, TypeError, AttributeError, IndexError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError("its header is not that of a slab file") from error


def _header(metadata: Mapping[str, str], entries: Mapping[str, Any]) -> Header:
    layout = json.loads(metadata["layout"])
    schemes = [Scheme(**one) for one in json.loads(metadata["schemes"])]
    parts = _parts(entries)
    slabs: dict[str, dict[Key, Slab]] = {}
    for form, rows in json.loads(metadata["slabs"]).items():
        slabs[form] = {}
        for layer, expert, offset, nbytes, crc32, *told in rows:
            gate_up, down = (
                Matrix(
                    tuple(
                        Part(part, dtype, shape, begin - offset)
                        for part, dtype, shape, begin in parts[f"{form}.{layer}.{expert}.{name}"]
                    ),
                    None if scheme < 0 else schemes[scheme],
                    (rows_, columns),
                )
                for name, (scheme, rows_, columns) in zip(MATRICES, told, strict=True)
            )
            slabs[form][layer, expert] = Slab(offset, nbytes, crc32, gate_up, down)
    total = max((entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__"), default=0)
    return Header(
        Layout(tuple(layout["layers"]), layout["experts"]),
        metadata["activation"],
        metadata["gated"] == "true",
        slabs,
        total,
    )


def _parts(entries: Mapping[str, Any]) -> dict[str, list[tuple[str, str, tuple[int, ...], int]]]:
    """Return (name, dtype, shape, begin) of the parts of every matrix, by ``<form>.<layer>.<expert>.<matrix>``."""
    parts: dict[str, list[tuple[str, str, tuple[int, ...], int]]] = {}
    for called, entry in entries.items():
        if called == "__metadata__" or called.startswith("pad."):
            continue
        form, layer, expert, name, *part = called.split(".")
        dtype = _TORCH[entry["dtype"]][0]
        parts.setdefault(f"{form}.{layer}.{expert}.{name}", []).append(
            (".".join(part), dtype, tuple(entry["shape"]), entry["data_offsets"][0])
        )
    return parts


def _entry(dtype: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def _crc(text: Any) -> str:
    """Return the checksum of all values of a header but itself, whatever the order and the spaces."""
    return f"{zlib.crc32(canonical_json(plain(text)).encode()):08x}"
