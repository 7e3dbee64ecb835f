"""The layer over several emulated devices, and the layout by which their one-sided writes never meet."""

from __future__ import annotations

import pytest
import torch
from cuda_problems import SMALL, Devices
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.kernels.cuda import host
from moebench.kernels.cuda.symmetric import ROUNDS, STAGES, Shape

pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing() or "-")


def cells(shape):
    """Yield every coordinate of a buffer."""
    for peer in range(shape.peers):
        for round_ in range(ROUNDS):
            for stage in range(STAGES):
                for expert in range(shape.experts):
                    for slot in range(shape.capacity):
                        yield peer, round_, stage, expert, slot


@settings(deadline=None, max_examples=60)
@given(*[st.integers(1, 4)] * 2, st.integers(1, 5), st.integers(1, 9))
def test_rows_fill_the_buffer_without_meeting(peers, experts, capacity, hidden):
    shape = Shape(peers, experts, capacity, hidden)
    begins = [shape.offset(*cell) for cell in cells(shape)]
    assert sorted(begins) == list(range(0, shape.numbers, hidden))


@settings(deadline=None, max_examples=60)
@given(st.data(), *[st.integers(1, 4)] * 2, st.integers(1, 5), st.integers(1, 9))
def test_the_kernels_index_is_pythons(data, peers, experts, capacity, hidden):
    shape = Shape(peers, experts, capacity, hidden)
    cell = data.draw(st.sampled_from(list(cells(shape))))
    offset = host.shim(SMALL).library.sim_symmetric_offset
    offset.restype = host.c_longlong
    assert offset(peers, experts, capacity, hidden, *cell) == shape.offset(*cell)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
def test_no_two_writers_share_a_cell_whatever_the_routing(ranks, experts, capacity):
    """Every write that any routing can cause: rows of all senders to all experts, and results back to them."""
    writers = {}
    shape = Shape(ranks, experts, capacity, 1)
    for sender in range(ranks):
        for owner in range(ranks):
            stage = 0 if sender == owner else 1
            for expert in range(experts):
                for slot in range(capacity):
                    for writer, memory, round_ in ((sender, owner, 0), (owner, sender, 1)):
                        cell = (memory, shape.offset(writer, round_, stage, expert, slot))
                        assert cell not in writers
                        writers[cell] = writer


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_every_device_gets_the_layer_of_its_tokens(ranks, dtype):
    made, outs = Devices(ranks, 2, 9, 40, 24, dtype), None
    for schedule in (
        host.Schedule("forward", False, 2),
        host.Schedule("random", True, 3, 4),
        host.Schedule("reverse", True, 1),
    ):
        for together in made.steps():
            host.shim(SMALL).launch(together, schedule, host.Report())
        checks = made.verdicts()
        assert all(check.ok for check in checks), checks
        flat = [out for of_rank in made.outs for out in of_rank]
        assert outs is None or all(map(torch.equal, flat, outs))
        outs = flat


def test_a_buffer_holds_rows_that_were_sent_and_nothing_else():
    """Only real rows travel: what no packet has stays as it was (NaN)."""
    made = Devices(2, 2, 9, 40, 24, calls=1)
    (together,) = made.steps()
    host.shim(SMALL).launch(together, host.Schedule(), host.Report())
    buffers = next(argument for argument in together[0].arguments if isinstance(argument, tuple))
    for rank, buffer in enumerate(buffers):
        written = ~buffer.view(made.ranks, ROUNDS, STAGES, made.own, made.shape.capacity, -1).isnan().all(-1)
        for peer, layer in enumerate(made.layers):
            stage = 0 if peer == rank else 1
            received = layer.routings[0].counts_E.view(made.ranks, made.own)[rank]
            returned = made.layers[rank].routings[0].counts_E.view(made.ranks, made.own)[peer]
            assert torch.equal(written[peer, 0, stage].sum(1), received)
            assert torch.equal(written[peer, 1, stage].sum(1), returned)
            assert not written[peer, :, 1 - stage].any()
