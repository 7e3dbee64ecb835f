"""The digits of scikit-learn: 1797 images of 8x8 pixels. Imported by workers only.

Shape letters: B images, Y and X pixels.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from ..contracts import MoebenchError
from .digest import sha256_of


@cache
def digits() -> tuple[Tensor, Tensor]:
    """Return all images [B, Y, X], float32 in [0, 1], and their classes [B], int64."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MoebenchError("the digits need scikit-learn; run pip install 'moebench[workloads]'.") from error
    found = load_digits()
    return torch.tensor(found.images, dtype=torch.float32) / 16, torch.tensor(found.target).long()


def digits_sha256() -> str:
    """Return the identity of images and classes: another release of scikit-learn may have others."""
    return sha256_of(*digits())
