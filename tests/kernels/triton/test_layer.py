"""The interpreted kernels against the float64 oracle: dtypes, boundaries, ways to combine, sizes and paths."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.routing import Routing

HALF = [torch.bfloat16, torch.float16]
few = settings(deadline=None, max_examples=8, suppress_health_check=list(HealthCheck))


def odd_store(dtype, hidden=56, width=40, experts=3, activation="silu", gated=True):
    """Experts whose sizes are no multiple of a tile: 3 steps of 16 and a half one, 2 tiles of 32 and a part."""
    generator = torch.Generator().manual_seed(7)
    rows = 2 * width if gated else width
    gate_up = (torch.randn(experts, rows, hidden, generator=generator) / hidden**0.5).to(dtype)
    down = (torch.randn(experts, hidden, width, generator=generator) / width**0.5).to(dtype)
    return ExpertStore(gate_up, down, ("ffn",) * experts, activation, gated)


def routed(tokens, experts=3, k=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rank_TE = torch.rand(tokens, experts, generator=generator).argsort(1)
    return Routing.dense(torch.where(rank_TE < k, torch.randn(tokens, experts, generator=generator), 0.0))


def x_of(tokens, hidden, dtype):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("combine", ["atomic", "deterministic"])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_sizes_that_no_tile_divides(kernels, dtype, boundary, combine):
    store, routing, x_TH = odd_store(dtype), routed(19), x_of(19, 56, dtype)
    out_TH = kernels.run(kernels.dense(store), x_TH, routing, boundary, combine=combine)
    verdict = compare(out_TH, reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundary", ["topk", "sorted"])
def test_single_tokens_go_slot_by_slot(kernels, dtype, boundary, splits):
    store, routing, x_TH = odd_store(dtype), routed(2), x_of(2, 56, dtype)
    out_TH = kernels.run(kernels.dense(store), x_TH, routing, boundary, decode_tokens=2, splits=splits)
    verdict = compare(out_TH, reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict


@pytest.mark.parametrize("decode_tokens", [0, 4])
@pytest.mark.parametrize(("activation", "gated"), [("gelu", True), ("relu", False), ("silu", False)])
def test_activations_and_experts_without_a_gate(kernels, activation, gated, decode_tokens):
    store = odd_store(torch.float32, activation=activation, gated=gated)
    routing, x_TH = routed(4), x_of(4, 56, torch.float32)
    out_TH = kernels.run(kernels.dense(store), x_TH, routing, decode_tokens=decode_tokens)
    verdict = compare(out_TH, reference(store, routing, x_TH), torch.float32)
    assert verdict.ok, verdict


@pytest.mark.parametrize("decode_tokens", [0, 4])
@pytest.mark.parametrize("combine", ["atomic", "deterministic"])
@pytest.mark.parametrize("boundary", ["topk", "sorted"])
@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one(kernels, tokens, boundary, combine, decode_tokens):
    store, routing, x_TH = odd_store(torch.float32), routed(tokens), x_of(tokens, 56, torch.float32)
    plan = {"combine": combine, "decode_tokens": decode_tokens}
    out_TH = kernels.run(kernels.dense(store), x_TH, routing, boundary, **plan)
    assert compare(out_TH, reference(store, routing, x_TH), torch.float32).ok


@pytest.mark.parametrize("decode_tokens", [0, 4])
def test_tokens_without_experts_are_zero(kernels, decode_tokens):
    x_TH = x_of(3, 56, torch.float32)
    nothing = Routing.dense(torch.zeros(3, 3))
    for boundary in ("topk", "sorted"):
        out_TH = kernels.run(
            kernels.dense(odd_store(torch.float32)), x_TH, nothing, boundary, decode_tokens=decode_tokens
        )
        assert torch.equal(out_TH, torch.zeros(3, 56))


@few
@given(
    gate_TE=st.lists(st.lists(st.integers(-2, 2), min_size=3, max_size=3), min_size=1, max_size=18),
    seed=st.integers(0, 99),
    way=st.sampled_from([("atomic", 0), ("deterministic", 0), ("deterministic", 20)]),
    boundary=st.sampled_from(["topk", "sorted"]),
)
def test_whole_numbers_are_exact(kernels, gate_TE, seed, way, boundary):
    """Without rounding there is one answer: every path gives it, bit for bit, for any routing at all."""
    generator = torch.Generator().manual_seed(seed)
    up, down = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((3, 24, 20), (3, 20, 24)))
    store = ExpertStore(up, down, ("ffn",) * 3, "relu", gated=False)
    x_TH = torch.randint(-2, 3, (len(gate_TE), 20), generator=generator).float()
    routing = Routing.dense(torch.tensor(gate_TE, dtype=torch.float32))
    out_TH = kernels.run(kernels.dense(store), x_TH, routing, boundary, combine=way[0], decode_tokens=way[1])
    assert torch.equal(out_TH.double(), reference(store, routing, x_TH).y_TH)


def test_products_must_read_the_same_blocks():
    from moebench.kernels.triton.layer import Plan
    from moebench.kernels.triton.tiles import Tiles

    with pytest.raises(ValueError, match="give their tiles the same block_m"):
        Plan(Tiles(16), Tiles(32))
