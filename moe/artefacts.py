"""What calibration made, kept on disk: dicts of tensors with JSON, found again by a hash of everything that made them.

An artefact is the folder ``<cache>/artefacts/<key>/`` with ``tensors.safetensors`` and ``meta.json``. It is written
aside and renamed, so that a reader sees all of it or nothing; what does not match its checksum is built anew.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache as memoize
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from ..contracts import MoebenchError, canonical_json, make_key, plain

V = TypeVar("V")

TENSORS, META = "tensors.safetensors", "meta.json"


@dataclass(frozen=True)
class Artefact:
    """Named tensors, and whatever of them is no tensor as plain JSON values."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def cached(
    cache: Path | None,
    inputs: Mapping[str, Any],
    build: Callable[[], V],
    dump: Callable[[V], Artefact | None],
    restore: Callable[[Artefact], V],
) -> V:
    """Return ``restore`` of the artefact made from ``inputs``, or the value of ``build``, which is then kept.

    Nothing is read or kept without a ``cache``; a value whose ``dump`` is None is not kept.
    """
    if cache is None:
        return build()
    folder = cache / "artefacts" / make_key(inputs)
    found = read(folder)
    if found is not None:
        return restore(found)
    value = build()
    artefact = dump(value)
    if artefact is not None:
        write(folder, artefact, inputs)
    return value


def read(folder: Path) -> Artefact | None:
    """Return the artefact in ``folder``, or None where it is missing or damaged."""
    try:
        written = json.loads((folder / META).read_text(encoding="utf-8"))
        data = (folder / TENSORS).read_bytes()
        if written["sha256"] != _checksum(data, written["meta"]):
            return None
        return Artefact(load(data), written["meta"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def write(folder: Path, artefact: Artefact, inputs: Mapping[str, Any]) -> None:
    """Put the artefact at ``folder`` at once; a whole one that another process put there first stays."""
    data = save({name: _own(tensor) for name, tensor in artefact.tensors.items()})
    meta = plain(artefact.meta)
    text = json.dumps({"inputs": plain(inputs), "meta": meta, "sha256": _checksum(data, meta)}, indent=1)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".aside-", dir=folder.parent) as aside:
            made = Path(aside) / "made"
            made.mkdir()
            (made / TENSORS).write_bytes(data)
            (made / META).write_text(text, encoding="utf-8")
            _put(made, folder, Path(aside))
    except OSError as error:
        raise MoebenchError(
            f"the cache {folder.parent} cannot be written ({error}); free space or point MOEBENCH_CACHE elsewhere."
        ) from error


def _put(made: Path, folder: Path, aside: Path) -> None:
    """Rename ``made`` to ``folder``, moving a damaged artefact out of the way."""
    for attempt in range(3):
        try:
            made.rename(folder)
            return
        except OSError:
            if read(folder) is not None:
                return
            if not folder.exists():
                raise
        # Processes take turns here: what one found damaged may be another's whole artefact by the time it moves it.
        with _locked(folder.parent):
            if read(folder) is None and folder.exists():
                shutil.move(folder, aside / f"damaged{attempt}")
    made.rename(folder)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _own(tensor: Tensor) -> Tensor:
    """Return a contiguous copy: safetensors takes no views that share memory."""
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def _checksum(data: bytes, meta: Any) -> str:
    return hashlib.sha256(canonical_json(meta).encode() + data).hexdigest()


def tensors_sha256(tensors: Iterable[Tensor | None]) -> str:
    """Return one sha256 over dtype, shape and bytes of ``tensors`` in their order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            digest.update(b"none;")
            continue
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)};".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@memoize
def sources_sha256(factory: str) -> str:
    """Return one sha256 over the sources of this package and of the file that ``factory`` ("place:attribute") is in."""
    place = factory.rpartition(":")[0]
    if not place.endswith(".py"):
        spec = importlib.util.find_spec(place)
        place = spec.origin or "" if spec is not None else ""
    digest = hashlib.sha256()
    for file in (*sorted(Path(__file__).parent.rglob("*.py")), Path(place)):
        if file.is_file():
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()
