"""Scikit-learn's digits, split by seed, and ways to corrupt them. Shape letters: B images, Y and X pixels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ..digits import digits
from ..models import substream

TEST = 597
"""Images that are judged, of 1797."""


class Digits(NamedTuple):
    """Images [B, 1, 8, 8] float32 in 0..1 and their labels, for training and for judging."""

    train_B1YX: Tensor
    train_label_B: Tensor
    test_B1YX: Tensor
    test_label_B: Tensor


def load_digits(seed: int) -> Digits:
    """Return the digits in an order that ``seed`` alone decides."""
    image_BYX, label_B = digits()
    image_B1YX = image_BYX[:, None]
    order = torch.randperm(len(label_B), generator=torch.Generator().manual_seed(substream(seed, "digits")))
    train, test = order[TEST:], order[:TEST]
    return Digits(image_B1YX[train], label_B[train], image_B1YX[test], label_B[test])


def noisy(image_B1YX: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with N(0, .25^2) added to every pixel."""
    return (image_B1YX + 0.25 * torch.randn(image_B1YX.shape, generator=generator)).clamp(0, 1)


def blurred(image_B1YX: Tensor, generator: torch.Generator) -> Tensor:
    """Return the mean of each pixel and its eight neighbours."""
    return nnf.avg_pool2d(image_B1YX, 3, stride=1, padding=1)


def faded(image_B1YX: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with a third of their contrast."""
    return 0.5 + (image_B1YX - 0.5) / 3


def shifted(image_B1YX: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images one pixel further to the right, an empty column at the left."""
    return nnf.pad(image_B1YX, (1, 0))[..., :-1]


def occluded(image_B1YX: Tensor, generator: torch.Generator) -> Tensor:
    """Return the images with a square of three pixels blank, anywhere."""
    result = image_B1YX.clone()
    places = torch.randint(0, result.shape[-1] - 2, (len(result), 2), generator=generator).tolist()
    for image, (row, column) in zip(result, places, strict=True):
        image[:, row : row + 3, column : column + 3] = 0
    return result


CORRUPTIONS: Mapping[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": noisy,
    "blur": blurred,
    "contrast": faded,
    "shift": shifted,
    "occlusion": occluded,
}
"""Ways to corrupt images, as in ImageNet-C (arXiv 1903.12261), at one strength each."""
