"""The identity of tensors."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sha256_of(*tensors: Tensor) -> str:
    """Return the sha256 of the shapes, dtypes and bytes of ``tensors``, in order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
