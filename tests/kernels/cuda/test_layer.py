"""The layer's kernels on the host shim: numbers, schedules, the queue, counts, and how Python sees the sources."""

from __future__ import annotations

import ctypes
import re

import pytest
import torch
from cuda_problems import ROUTINGS, SMALL, Layer, routing
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError
from moebench.kernels.cuda import host, layer, symmetric
from moebench.kernels.cuda.layer import Sizes, Tiles, ceil_div

pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing() or "-")
SCHEDULES = [host.Schedule(order, late, 3, 7) for order in host.ORDERS for late in (False, True)]


def run(made, steps, schedule=SCHEDULES[0]):
    """Run steps in this process; returns what was counted."""
    report = host.Report()
    for together in steps:
        host.shim(made.tiles).launch(together, schedule, report)
    return report


def outputs(made, variant="fused", schedule=SCHEDULES[0], atomic=False, blocks=5):
    """Return the outputs of all calls of a layer; the oracle must agree with each."""
    run(made, made.steps(variant, atomic, blocks), schedule)
    checks = made.verdicts(made.outs)
    assert all(check.ok for check in checks), checks
    return made.outs


# --- numbers ---------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(
    kinds=st.lists(st.sampled_from(ROUTINGS), min_size=2, max_size=2),
    tokens=st.sampled_from([1, 2, 17, 40]),
    experts=st.sampled_from([1, 3, 6]),
    hidden=st.sampled_from([9, 24, 47, 56]),
    width=st.sampled_from([1, 19, 32, 51]),
    dtype=st.sampled_from(layer.DTYPES),
    form=st.sampled_from([("silu", True), ("gelu", True), ("relu", True), ("silu", False), ("gelu", False)]),
    variant=st.sampled_from(["fused", "two_kernels"]),
    schedule=st.sampled_from(SCHEDULES),
    atomic=st.booleans(),
)
def test_any_sizes_and_routings_agree_with_the_oracle(
    kinds, tokens, experts, hidden, width, dtype, form, variant, schedule, atomic
):
    routings = [routing(kind, tokens, experts, 5 + i) for i, kind in enumerate(kinds)]
    made = Layer(routings, hidden, width, dtype, *form, seed=tokens)
    outputs(made, variant, schedule, atomic)


def test_the_tiles_of_the_backend_agree_with_the_oracle():
    made = Layer([routing("hot", 70, 3, 1), routing("dynamic_k", 70, 3, 1)], 104, 72, tiles=Tiles())
    outputs(made, schedule=SCHEDULES[3])


@pytest.mark.parametrize("dtype", layer.DTYPES)
def test_schedules_variants_and_numbers_of_blocks_give_the_same_bits(dtype):
    made = Layer([routing("dynamic_k", 19, 5, 3), routing("hot", 19, 5, 3)], 56, 40, dtype)
    expected = outputs(made)
    for variant in ("fused", "two_kernels"):
        for schedule in SCHEDULES:
            assert all(map(torch.equal, outputs(made, variant, schedule, blocks=schedule.multiprocessors), expected))


def test_a_tokens_output_does_not_depend_on_the_order_of_its_experts_work():
    """Powers of two add up exactly, so that any order of adding gives the same: atomic sums must be equal too."""
    made = Layer([routing("dynamic_k", 19, 5, 3)], 56, 40)
    made.x_TH, made.store.gate_up[:], made.store.down[:] = torch.ones_like(made.x_TH), 2.0**-6, 2.0**-3
    made.routings[0].weight_N[:] = 0.5
    exact = outputs(made)
    for schedule in SCHEDULES:
        assert all(map(torch.equal, outputs(made, schedule=schedule, atomic=True), exact))


# --- the queue -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("multiprocessors", [1, 2, 4, 8])
def test_the_queue_ends_under_any_interleaving(multiprocessors):
    made = Layer([routing("dynamic_k", 9, 4, 3)], 24, 24)
    expected = outputs(made)
    for seed in range(52):
        schedule = host.Schedule("random", bool(seed % 2), multiprocessors, seed)
        blocks = (1, multiprocessors, multiprocessors + 3, 13)[seed % 4]  # more than fit, too: none waits for another
        run(made, made.steps(blocks=blocks), schedule)
        assert all(map(torch.equal, made.outs, expected)), schedule


def test_a_launch_leaves_its_counters_as_it_found_them():
    made = Layer([routing("two", 9, 4, 3), routing("hot", 9, 4, 3), routing("none", 9, 4, 3)], 24, 24)
    steps = made.steps()
    state = steps[0][0].arguments[layer.POINTERS.index("state")]
    run(made, steps)
    epoch = 3
    assert state[epoch] == len(steps)
    state[epoch] = 0
    assert not state.any()


# --- counts ----------------------------------------------------------------------------------------------------------


def formulas(made, one):
    """Return (products of warps, bytes of asynchronous copies) of one call, from its sizes and its routing."""
    tiles, of, mats = made.tiles, made.sizes, 2 if made.store.gated else 1
    blocks = sum(ceil_div(count, tiles.bm) for count in one.counts_E.tolist())
    rows = len(one.token_N)
    columns, hidden_columns = ceil_div(of.width, tiles.bn), ceil_div(of.hidden, tiles.bn)
    each = (tiles.bm // 16) * (tiles.bn // 8) * (tiles.bk // 16)
    products = (
        blocks * each * (columns * mats * ceil_div(of.hidden, tiles.bk) + hidden_columns * ceil_div(of.width, tiles.bk))
    )
    numbers = rows * (columns * of.hidden + hidden_columns * of.width) + blocks * (mats + 1) * of.hidden * of.width
    return products, 2 * numbers


@pytest.mark.parametrize("variant", ["fused", "two_kernels"])
@pytest.mark.parametrize("gated", [True, False])
def test_counted_products_bytes_and_launches_are_those_of_the_formulas(variant, gated):
    made = Layer([routing("dynamic_k", 19, 5, 3), routing("hot", 19, 5, 3)], 56, 40, gated=gated)
    report = run(made, made.steps(variant))
    expected = [formulas(made, one) for one in made.routings]
    assert (report.mma, report.async_bytes) == tuple(map(sum, zip(*expected, strict=True)))
    assert report.launches == {"fused": 2, "two_kernels": 4}[variant]


def test_products_are_padded_to_whole_tiles_and_no_more():
    """2 x 16 x 8 x 16 operations a product: the formula of a layer, with every size rounded up to its tile."""
    made = Layer([routing("hot", 16, 2, 3)], 32, 48)
    report = run(made, made.steps())
    assert report.mma * 2 * 16 * 8 * 16 == 2 * 16 * 32 * 48 * 3


def test_rows_that_are_not_whole_chunks_are_not_copied_asynchronously():
    made = Layer([routing("two", 9, 4, 3)], 47, 51)
    assert run(made, made.steps()).async_bytes == 0


def test_tensors_that_begin_anywhere_give_the_same_bits():
    made = Layer([routing("dynamic_k", 9, 4, 3)], 56, 40)
    expected = outputs(made)
    for owner, name in ((made, "x_TH"), (made.store, "gate_up"), (made.store, "down")):
        whole = getattr(owner, name)
        moved = torch.empty(whole.numel() + 1, dtype=whole.dtype)[1:].view_as(whole).copy_(whole)
        object.__setattr__(owner, name, moved)
        assert moved.data_ptr() % 16
        assert all(map(torch.equal, outputs(made), expected))
        object.__setattr__(owner, name, whole)


# --- the sources as Python sees them ---------------------------------------------------------------------------------

C_TYPES = {"int": ctypes.c_int32, "float": ctypes.c_float}


def declared(file, macro):
    """Return the arguments of the kernels of a source by name, as types of ctypes."""
    text = (host.SOURCES / file).read_text()
    (body,) = re.findall(rf"#define {macro}\(T\)(.*?[^\\])\n", text, re.S)
    found = {}
    for argument in body.replace("\\\n", " ").split(","):
        kind, name = re.fullmatch(r"\s*(.*?)(\w+)\s*", argument).groups()
        found[name] = ctypes.c_void_p if "*" in kind else C_TYPES[kind.strip()]
    return found, set(re.findall(rf"__launch_bounds__\(THREADS\) (\w+)\({macro}\(", text))


@pytest.mark.parametrize(
    ("file", "macro", "table", "signatures"),
    [
        ("moe.cuh", "MOE_ARGUMENTS", layer.ARGUMENTS, layer.SIGNATURES),
        ("symmetric.cuh", "MOE_SYMMETRIC_ARGUMENTS", symmetric.ARGUMENTS, symmetric.SIGNATURES),
    ],
)
def test_signatures_are_those_of_the_sources(file, macro, table, signatures):
    arguments, kernels = declared(file, macro)
    assert list(arguments.items()) == list(table.items())
    assert kernels == set(signatures)
    assert all(signature == tuple(table.values()) for signature in signatures.values())


@pytest.mark.parametrize("tiles", [SMALL, Tiles()])
def test_shared_memory_is_that_of_the_struct(tiles):
    size = host.shim(tiles).library.sim_shared_bytes()
    assert size <= tiles.shared_bytes(1) < size + 16
    assert tiles.shared_bytes(5) % 16 == 0


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(0, 40), min_size=1, max_size=9), st.integers(1, 50), st.integers(1, 50))
def test_worst_case_grids_hold_for_every_routing(counts, hidden, width):
    sizes = Sizes(40, len(counts), hidden, width, sum(counts))
    blocks = sum(ceil_div(count, SMALL.bm) for count in counts)
    assert blocks <= sizes.row_blocks(SMALL)
    assert blocks * ceil_div(hidden, SMALL.bn) + sizes.token_tiles(SMALL) <= sizes.slots(SMALL)


def test_tiles_that_are_no_whole_products_are_refused():
    with pytest.raises(MoebenchError, match="bm must be a multiple of 16 warps_m"):
        Tiles(bm=24)


def test_a_failed_launch_says_why_and_the_next_one_runs():
    made = Layer([routing("two", 9, 4, 3)], 24, 24)
    steps = made.steps()
    (one,) = steps[0]
    with pytest.raises(MoebenchError, match="there is no kernel nothing"):
        ctypes_grid_of("nothing")
    state = one.arguments[layer.POINTERS.index("state")]
    state[0] = 1  # a ticket that nobody holds
    with pytest.raises(
        MoebenchError, match=r"on the host shim: deadlock .all who can go on wait for a flag.: of 64 live"
    ):
        run(made, steps)
    outputs(made)


def ctypes_grid_of(name):
    """Launch a kernel by a name that Python's table does not check."""
    grid, report = host.NamedGrid(name.encode(), 1, 32, 16, None), host.Report()
    if host.shim(SMALL).library.sim_launch(ctypes.byref(grid), 1, host.Schedule().numbers, ctypes.byref(report)):
        raise MoebenchError(report.message.decode())
