"""Sorting on the device: any routing becomes blocks of one expert each, in the order of the slots."""

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.kernels.triton.dispatch import blocks_of_slots, blocks_of_sorted, most_blocks
from moebench.kernels.triton.tiles import Tiles
from moebench.moe.routing import Routing

few = settings(deadline=None, max_examples=15, suppress_health_check=list(HealthCheck))
EXPERTS = 5
rows = st.lists(st.lists(st.integers(0, EXPERTS), min_size=3, max_size=3), min_size=1, max_size=24)


def expected(assignments, counts, block):
    """The positions of assignments sorted by expert, each expert's padded to whole blocks, and whose the blocks are."""
    positions, experts, start = [], [], 0
    for expert, count in enumerate(counts):
        whole = -(-count // block)
        positions += assignments[start : start + count] + [None] * (whole * block - count)
        experts += [expert] * whole
        start += count
    return positions, experts


def check(blocks, token_of, assignments, counts, block):
    positions, experts = expected(assignments, counts, block)
    total = int(blocks.blocks_1)
    assert total == len(experts) <= most_blocks(blocks.num_assignments, EXPERTS, block) == len(blocks.expert_B)
    assert blocks.expert_B[:total].tolist() == experts
    found = blocks.assignment_P[: total * block].tolist()
    assert found == [blocks.num_assignments if one is None else one for one in positions]
    tokens = blocks.token_P[: total * block].tolist()
    assert all(token == token_of(one) for token, one in zip(tokens, positions, strict=True) if one is not None)


@few
@given(rows, st.sampled_from([16, 32]))
def test_slots_are_sorted_by_expert_in_their_order(indices, block):
    indices_TK = torch.tensor(indices)
    flat = indices_TK.flatten()
    order = flat.argsort(stable=True)[: int((flat < EXPERTS).sum())].tolist()
    counts = torch.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS].tolist()
    check(blocks_of_slots(indices_TK, EXPERTS, Tiles(block)), lambda slot: slot // 3, order, counts, block)


@few
@given(rows)
def test_sorted_assignments_are_cut(indices):
    routing = Routing.dense(torch.zeros(len(indices), EXPERTS + 1).scatter(1, torch.tensor(indices), 1.0)[:, :EXPERTS])
    token_N, offsets_E1, _ = routing.sorted()
    if len(token_N) == 0:
        return
    blocks = blocks_of_sorted(token_N, offsets_E1, Tiles(16))
    check(blocks, lambda place: int(token_N[place]), list(range(len(token_N))), routing.counts_E.tolist(), 16)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=70), st.sampled_from([16, 64, 128]))
def test_there_are_never_more_blocks_than_are_launched(counts, block):
    assert sum(-(-count // block) for count in counts) <= most_blocks(sum(counts), len(counts), block)


def test_many_slots_are_looked_at_in_several_steps():
    indices_TK = torch.randint(0, EXPERTS + 1, (301, 1), generator=torch.Generator().manual_seed(1))
    flat = indices_TK.flatten()
    order = flat.argsort(stable=True)[: int((flat < EXPERTS).sum())].tolist()
    counts = torch.bincount(flat, minlength=EXPERTS + 1)[:EXPERTS].tolist()
    check(blocks_of_slots(indices_TK, EXPERTS, Tiles(16)), lambda slot: slot, order, counts, 16)
