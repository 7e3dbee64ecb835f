"""The digits split by a seed, and how far one set of images is from another.

Shape letters: B images, C classes, D pixels of an image.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..digits import digits
from ..models import substream

SIDE = 8
CLASSES = 10
HELD_OUT = 4
"""One in so many images is held out."""


def split(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return (images, classes) to train on and (images, classes) held out, by the seed."""
    images, classes = digits()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(substream(seed, "digits", "split")))
    held_out, training = order[::HELD_OUT], torch.cat([order[i::HELD_OUT] for i in range(1, HELD_OUT)])
    return (images[training], classes[training]), (images[held_out], classes[held_out])


def fd_pixel(first_BD: Tensor, second_BD: Tensor) -> float:
    """Return the Fréchet distance of two sets of raw pixels, taken as Gaussians.

    |m1 - m2|^2 + tr(C1 + C2 - 2 sqrt(C1 C2)); it is not FID: no network's features are involved.
    """
    a_BD, b_BD = first_BD.double(), second_BD.double()
    gap = float((a_BD.mean(0) - b_BD.mean(0)).square().sum())
    cov_a, cov_b = torch.cov(a_BD.T), torch.cov(b_BD.T)
    root = _square_root(cov_a)
    middle = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return gap + float(torch.trace(cov_a) + torch.trace(cov_b) - 2 * middle)


def _square_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    return root
