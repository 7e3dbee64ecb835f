"""What an expert's choice says of where, when and for what it was chosen: mutual information against permutations.

Shape letters: L layers, S steps of a sampler, B images, T patches, K slots, N assignments, E experts, V values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...contracts import Metric, Series
from ..training.specialisation import mutual_bits
from .base import mean
from .training import generator

PERMUTATIONS = 20


def normalised_information(expert_N: Tensor, label_N: Tensor, experts: int) -> float:
    """Return the mutual information of two labellings over the root of the product of their entropies, in [0, 1].

    Zero where one of them is constant. The geometric mean of the entropies: probe ``specialisation`` takes the
    arithmetic one, which is at least as large, and so has figures that are at most these.
    """
    values = int(label_N.max()) + 1
    joint_VE = torch.bincount(label_N * experts + expert_N, minlength=values * experts).view(values, experts).double()
    joint_VE = joint_VE / joint_VE.sum()
    bits = [float(torch.special.entr(joint_VE.sum(axis)).sum()) / math.log(2) for axis in (0, 1)]
    scale = math.sqrt(bits[0] * bits[1])
    return mutual_bits(joint_VE) / scale if scale > 0 else 0.0


def expert_information(
    expert_LSBTK: Tensor, class_B: Tensor, experts: int, seed: int
) -> tuple[list[Metric], list[Series]]:
    """Return normalised information of expert with patch, step and class, means over layers, each beside the mean of
    PERMUTATIONS shuffles of that label; and series of it by layer, and of expert shares by step.

    Patches and steps are shuffled within each image, classes over images, so that a shuffle keeps what an image has.
    """
    layers, steps, images, patches, slots = expert_LSBTK.shape
    shape = (steps, images, patches, slots)
    labels = {
        "patch": torch.arange(patches)[None, None, :, None],
        "step": torch.arange(steps)[:, None, None, None],
        "class": class_B[None, :, None, None],
    }
    metrics, series = [], []
    for name, label in labels.items():
        own, null = [], []
        for layer in range(layers):
            expert_N = expert_LSBTK[layer].flatten()
            own.append(normalised_information(expert_N, label.expand(shape).flatten(), experts))
            null.append(
                mean(
                    normalised_information(expert_N, _shuffled(name, label, shape, seed, draw).flatten(), experts)
                    for draw in range(PERMUTATIONS)
                )
            )
        metrics += [Metric(f"nmi_{name}", mean(own), "1"), Metric(f"nmi_{name}_shuffled", mean(null), "1")]
        series.append(Series(f"nmi_{name}", tuple(own), "1"))
    for step in range(steps):
        share_E = torch.bincount(expert_LSBTK[:, step].flatten(), minlength=experts).double()
        series.append(Series("expert_share", tuple((share_E / share_E.sum()).tolist()), "1", step=step))
    return metrics, series


def _shuffled(name: str, label: Tensor, shape: tuple[int, ...], seed: int, draw: int) -> Tensor:
    """Return the label of every assignment after a shuffle that keeps how often each value occurs."""
    rng = generator(seed, "information", name, draw)
    if name == "class":  # images keep their own assignments together, so classes are dealt out to whole images
        return label[:, torch.randperm(shape[1], generator=rng)].expand(shape)
    axis = 2 if name == "patch" else 0
    return label.expand(shape).gather(axis, torch.rand(shape, generator=rng).argsort(axis))
