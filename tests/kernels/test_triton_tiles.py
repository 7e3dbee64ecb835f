"""Which tiles a layer takes is arithmetic: no triton, no torch, no device."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.kernels.triton.tiles import SMALL, SPACE, Tiles, candidates, interpreted, splits_of

KIB = 1024


def test_the_shared_memory_of_a_pipeline_is_what_the_compiler_says():
    """Figures of triton 3.7.1: bfloat16, two tiles of weights; sm_80 holds one stage less than sm_90 does."""
    small, large = Tiles(64, 64, 32, 4, 3), Tiles(64, 128, 64, 8, 3)
    assert [one.shared_bytes(2, 2, buffers=2) for one in (small, large)] == [24576, 81920]
    assert [one.shared_bytes(2, 2) for one in (small, large)] == [36864, 122880]


@given(
    st.sampled_from([2, 4]),
    st.integers(0, 10**6),
    st.integers(1, 512),
    st.sampled_from([1, 2]),
    st.sampled_from([99, 163, 227]),
)
def test_what_is_taken_fits_and_is_of_the_space(element_size, assignments, experts, matrices, kib):
    chosen = candidates(element_size, assignments, experts, matrices, kib * KIB)
    size = "small" if assignments <= SMALL * experts else "large"
    space = SPACE["half" if element_size == 2 else "single", size]
    assert chosen == tuple(one for one in space if one in chosen)
    assert all(one.shared_bytes(matrices, element_size) <= kib * KIB for one in chosen)
    left_out = [one for one in space if one not in chosen]
    assert all(one.shared_bytes(matrices, element_size) > kib * KIB for one in left_out)


def test_what_a_compiler_spilled_is_left_out():
    first, second, *_ = candidates(2, 10**5, 8, 2, 227 * KIB)
    assert candidates(2, 10**5, 8, 2, 227 * KIB, barred={first})[0] == second


def test_no_tile_that_fits_is_a_refusal():
    with pytest.raises(MoebenchError, match="no tile fits 1024 bytes of shared memory; use another backend"):
        candidates(2, 64, 8, 2, KIB)


@given(st.integers(1, 10**4), st.integers(1, 10**4))
def test_an_interpreted_tile_covers_a_size_or_is_the_largest(outputs, inputs):
    tiles = interpreted(outputs, inputs)
    for size, side in ((outputs, tiles.block_n), (inputs, tiles.block_k)):
        assert side == 128 or size <= side <= max(16, 2 * size)
        assert side & (side - 1) == 0


@given(st.integers(0, 10**5), st.integers(1, 100))
def test_a_product_is_split_where_programs_are_few(programs, steps):
    assert 1 <= splits_of(programs, steps) <= steps
    assert programs < 256 or splits_of(programs, steps) == 1
