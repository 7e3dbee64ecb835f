"""Sketches of outputs: rounding agrees, anything else does not, part for part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moebench.bench.sketch import difference, sketch

RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((64, 32)).astype(np.float32)
IDS = RNG.integers(0, 50_000, (64, 4))


def between(base, candidate):
    return difference(sketch(base), sketch(candidate))


@pytest.mark.parametrize("output", [LOGITS, (LOGITS, IDS), {"y": LOGITS, "k": 2}, torch.ones(3), 1.5, IDS > 7])
def test_an_output_agrees_with_itself(output):
    assert between(output, output) == ""


@pytest.mark.parametrize("output", [None, [], "text"])
def test_nothing_that_can_be_compared_is_no_sketch(output):
    assert sketch(output) is None


def test_rounding_agrees_and_a_wrong_factor_does_not():
    assert between(LOGITS, LOGITS * np.float32(1 + 1e-6)) == ""
    assert "of the norm" in between(LOGITS, LOGITS * np.float32(1.01))
    assert "shapes" in between(LOGITS, LOGITS[1:])


def test_large_integers_do_not_hide_wrong_logits():
    assert "of the norm" in between((LOGITS, IDS), (-LOGITS, IDS))


@given(st.integers(0, IDS.size - 1))
def test_integers_must_be_equal(place):
    other = IDS.copy()
    other.flat[place] += 1
    assert between((LOGITS, IDS), (LOGITS, other))


def test_what_is_not_finite_must_be_so_in_the_same_places():
    masked = np.where(LOGITS > 0, LOGITS, -np.inf)
    assert between(masked, masked.copy()) == ""
    assert between(masked, masked * np.float32(1.01))
    assert "not finite" in between(masked, np.where(LOGITS > 0, LOGITS, np.inf))
    assert "not finite" in between(masked, np.where(LOGITS > 0.1, LOGITS, -np.inf))
    assert "not finite" in between(LOGITS, np.where(LOGITS > 2, np.nan, LOGITS))


def test_the_sketch_of_an_older_revision_bears_no_comparison():
    assert difference({"shapes": [[3]], "dtype": "float32", "norm": 1.0, "projections": []}, sketch(LOGITS)) == ""
