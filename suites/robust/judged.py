"""What a task of suite ``robustness`` returns, and the scores that its metrics are.

Calibration error: Naeini et al., AAAI 2015. Exact match and F1: as the evaluation of SQuAD (arXiv 1606.05250) has them.
Shape letters: B examples, C classes.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...contracts import Check, Item, Metric
from ..quality.bootstrap import interval

BINS = 15
"""Bins of the calibration error."""


@dataclass(frozen=True)
class Judged:
    """Metrics, one item per judged example, and what the model's own parts recomputed say of it."""

    metrics: Sequence[Metric]
    items: Sequence[Item]
    check: Check


def mean(name: str, value_B: Tensor, seed: int) -> Metric:
    """Return the mean over examples with its bootstrap interval; examples are independent of each other."""
    pairs_B2 = torch.stack([value_B.double(), torch.ones(len(value_B), dtype=torch.float64)], dim=1)
    found, lo, hi = interval(pairs_B2, lambda sums: sums[..., 0] / sums[..., 1], seed)
    return Metric(name, found, "1", lo, hi, len(value_B))


def items_of(task: str, judged: Mapping[str, Sequence[float]]) -> list[Item]:
    """Return one item per example and metric."""
    return [
        Item(task, str(place), metric, float(value))
        for metric, values in judged.items()
        for place, value in enumerate(values)
    ]


def calibration_error(probs_BC: Tensor, label_B: Tensor) -> float:
    """Return the mean gap between confidence and accuracy over ``BINS`` bins, weighted by examples.

    Bins have equal width, as in the paper; ``quality.calibration`` has bins of equal mass, whose figures are others.
    """
    confidence_B, predicted_B = probs_BC.double().max(dim=1)
    right_B = (predicted_B == label_B).double()
    bin_B = (confidence_B * BINS).long().clamp(max=BINS - 1)
    gap_b = confidence_B.new_zeros(BINS).index_add(0, bin_B, right_B - confidence_B)
    return float(gap_b.abs().sum() / len(label_B))


def normalised(answer: str) -> list[str]:
    """Return the words of an answer in lower case, without punctuation and articles."""
    plain = "".join(letter for letter in answer.lower() if letter not in string.punctuation)
    return re.sub(r"\b(a|an|the)\b", " ", plain).split()


def exact_match(answer: str, truth: str) -> float:
    """Return 1 where both are the same words, else 0."""
    return float(normalised(answer) == normalised(truth))


def f1(answer: str, truth: str) -> float:
    """Return the harmonic mean of precision and recall of the words; 1 where both have none."""
    found, wanted = normalised(answer), normalised(truth)
    if not found or not wanted:
        return float(found == wanted)
    common = sum((Counter(found) & Counter(wanted)).values())
    return 2 * common / (len(found) + len(wanted))
