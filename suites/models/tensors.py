"""Tensors in the cache: safetensors files that carry the sha256 of their content."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...contracts import MoebenchError


def save_checked(tensors: dict[str, Tensor], file: Path) -> None:
    """Write contiguous CPU tensors with their checksum."""
    save_file(tensors, file, metadata={"sha256": _sha256(tensors)})


def read_checked(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a file, mapped and not copied, after comparing their checksum."""
    try:
        with safe_open(file, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
            expected = (opened.metadata() or {}).get("sha256")
    except (SafetensorError, OSError) as error:
        raise MoebenchError(f"{file} cannot be read ({error}); delete it and run again.") from error
    if _sha256(tensors) != expected:
        raise MoebenchError(f"{file} is damaged (its checksum differs); delete it and run again.")
    return tensors


def _sha256(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}\n".encode())
        digest.update(tensors[name].flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
