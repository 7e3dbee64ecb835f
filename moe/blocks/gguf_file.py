"""What a GGUF file says of itself: its metadata, and where each tensor lies. Standard library only.

The file is the user's and is not believed: every length is held against what is left of the file before anything is
read or kept, so that a truncated or a hostile one costs a sentence and not the memory. Nothing in it is ever run.
The format is GGUF 2 and 3, little-endian: magic, version, counts of tensors and of metadata, metadata as (name, type,
value), tensors as (name, dimensions from the innermost, type, offset), and their bytes from an aligned place on.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from ...contracts import MoebenchError

MAGIC, VERSIONS = b"GGUF", (2, 3)
ALIGNMENT = 32
"""Of the tensors' bytes, where the file names no other."""

SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
"""Types of metadata by number, as struct names them; 8 is a string and 9 an array."""
STRING, ARRAY = 8, 9

MAX_DIMENSIONS = 4
MAX_NESTING = 4
"""Arrays of arrays so deep are read, and no deeper."""


class ArrayOf(NamedTuple):
    """An array in the metadata, of which only the length is kept: tokenizers have hundreds of thousands of entries."""

    length: int


@dataclass(frozen=True)
class Place:
    """One tensor: ``dims`` from the innermost, the number of its type, and where in the file it begins."""

    name: str
    dims: tuple[int, ...]
    type: int
    start: int

    @property
    def size(self) -> int:
        """Number of its weights."""
        return prod(self.dims)


@dataclass(frozen=True)
class GgufFile:
    """A file's metadata by name (arrays as ArrayOf) and its tensors; ``size`` is that of the file in bytes."""

    path: Path
    size: int
    metadata: Mapping[str, Any]
    tensors: Mapping[str, Place]

    def place(self, name: str) -> Place:
        """Return where a tensor lies; MoebenchError where there is none."""
        if name not in self.tensors:
            raise MoebenchError(f"{self.path} has no tensor {name!r}; convert or fetch the model again.")
        return self.tensors[name]


def read_header(path: Path) -> GgufFile:
    """Return what the file says of itself, read once as long as it does not change.

    Raises MoebenchError where it is not there, is no GGUF file of this kind, or ends too early.
    """
    try:
        stat = path.stat()
        return _read_header(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise MoebenchError(f"{path} cannot be read ({error.strerror}); name a GGUF file.") from error


@lru_cache(maxsize=8)
def _read_header(path: Path, size: int, mtime_ns: int) -> GgufFile:
    if size < len(MAGIC):
        raise MoebenchError(f"{path} is no GGUF file; name one that begins with GGUF.")
    with path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        cursor = _Cursor(path, content)
        if content[: len(MAGIC)] != MAGIC:
            raise MoebenchError(f"{path} is no GGUF file; name one that begins with GGUF.")
        cursor.at = len(MAGIC)
        version = cursor.scalar("<I")
        if version not in VERSIONS:
            raise MoebenchError(
                f"{path} is GGUF of version {version}, and {' and '.join(map(str, VERSIONS))} (little-endian) can be "
                f"read; convert the model again."
            )
        tensors, entries = cursor.scalar("<Q"), cursor.scalar("<Q")
        pairs = [cursor.entry() for _ in range(cursor.count(entries, 13))]
        metadata = dict(pairs)
        if len(metadata) < len(pairs):
            raise cursor.damaged("two metadata of one name")
        places = [cursor.tensor() for _ in range(cursor.count(tensors, 24))]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if not isinstance(alignment, int) or alignment < 1:
            raise cursor.damaged(f"an alignment of {alignment}")
        begin = -(-cursor.at // alignment) * alignment
    found = {place.name: Place(place.name, place.dims, place.type, begin + place.start) for place in places}
    if len(found) < len(places):
        raise cursor.damaged("two tensors of one name")
    return GgufFile(path, size, metadata, found)


class _Cursor:
    """A place in the file that moves forward; whatever it is asked for must still lie before the end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self.path, self.content, self.at, self.end = path, content, 0, len(content)

    def damaged(self, what: str) -> MoebenchError:
        """Return the error of a file that cannot be true."""
        return MoebenchError(f"{self.path} is damaged ({what}); fetch it again.")

    def take(self, size: int) -> bytes:
        """Return the next bytes."""
        self.skip(size)
        return self.content[self.at - size : self.at]

    def skip(self, size: int) -> None:
        """Go on by so many bytes."""
        if size > self.end - self.at:
            raise self.damaged("it ends within its header")
        self.at += size

    def count(self, number: int, least: int) -> int:
        """Return ``number`` of things that take ``least`` bytes each, if the file can hold so many."""
        if number * least > self.end - self.at:
            raise self.damaged("it ends within its header")
        return number

    def scalar(self, form: str) -> Any:
        """Return one number or truth value."""
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self) -> str:
        """Return one string."""
        return self.take(self.scalar("<Q")).decode("utf-8", "replace")

    def entry(self) -> tuple[str, Any]:
        """Return name and value of one entry of the metadata."""
        name = self.text()
        return name, self.value(self.scalar("<I"))

    def value(self, kind: int, depth: int = 0) -> Any:
        """Return a value of a type; of an array its length alone."""
        if kind == STRING:
            return self.text()
        if kind != ARRAY:
            return self.scalar(self._form(kind))
        inner, length = self.scalar("<I"), self.scalar("<Q")
        if inner in SCALARS:
            self.skip(length * struct.calcsize(SCALARS[inner]))
        elif depth == MAX_NESTING:
            raise self.damaged("arrays too deep in each other")
        else:
            for _ in range(self.count(length, 8)):
                self._pass(inner, depth)
        return ArrayOf(length)

    def _pass(self, kind: int, depth: int) -> None:
        if kind == STRING:
            self.skip(self.scalar("<Q"))
        else:
            self.value(kind, depth + 1)

    def _form(self, kind: int) -> str:
        if kind not in SCALARS:
            raise self.damaged(f"metadata of type {kind}")
        return SCALARS[kind]

    def tensor(self) -> Place:
        """Return one tensor; its ``start`` counts from where the tensors' bytes begin."""
        name, rank = self.text(), self.scalar("<I")
        if not 0 < rank <= MAX_DIMENSIONS:
            raise self.damaged(f"{name!r} has {rank} dimensions")
        dims = struct.unpack(f"<{rank}Q", self.take(8 * rank))
        return Place(name, dims, self.scalar("<I"), self.scalar("<Q"))
