"""Weights in codes, read as they are stored, and what a decode leaves in memory: against the oracle and by the byte."""

import dataclasses

import pytest
import torch

from moebench.contracts import MoebenchError, Scheme, SparsitySpec
from moebench.kernels.triton import guard
from moebench.kernels.triton.grouped import Experts, Site
from moebench.kernels.triton.tiles import Tiles
from moebench.kernels.triton.weights import Matrices
from moebench.moe.blocks import codecs
from moebench.moe.blocks.microscaling import Mxfp4Tensor
from moebench.moe.channels import SiteRule, Sparsity
from moebench.moe.codecs.packing import pack_codes
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore
from moebench.moe.oracle import compare, reference
from moebench.moe.routing import Routing

H, F, E = 96, 64, 3
SCHEMES = [
    Scheme("rtn", 8.0),
    Scheme("rtn", 8.0, 32, symmetric=False),
    Scheme("rtn", 4.0),
    Scheme("rtn", 4.0, 16),
    Scheme("rtn", 4.0, 32, symmetric=False),
    Scheme("fp8_e4m3", 8.0),
    Scheme("mxfp4", 4.0, 32),
]


def coded(scheme):
    """Experts in codes: 96 inputs are a step of 64 and a half one, 16 and 32 are groups within a step."""
    generator = torch.Generator().manual_seed(5)
    encode = round_to_nearest if scheme.codec == "rtn" else codecs.encode
    gate_up = [torch.randn(2 * F, H, generator=generator) / H**0.5 for _ in range(E)]
    down = [torch.randn(H, F, generator=generator) / F**0.5 for _ in range(E)]
    return ExpertStore(tuple(encode(w, scheme) for w in gate_up), tuple(encode(w, scheme) for w in down), ("ffn",) * E)


def routed(tokens):
    """Weights of both signs; 2, 3, 0, 1, 2 ... experts for a token: the first token leaves one without any."""
    generator = torch.Generator().manual_seed(1)
    rank_TE = torch.rand(tokens, E, generator=generator).argsort(1)
    count_T1 = (torch.arange(tokens)[:, None] + 2) % (E + 1)
    return Routing.dense(torch.where(rank_TE < count_T1, torch.randn(tokens, E, generator=generator), 0.0))


def x_of(tokens, hidden, dtype):
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(3)).to(dtype)


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_are_read_as_they_are_stored(lab, scheme, dtype, tokens):
    store = coded(scheme)
    spec = lab.spec(store, str(dtype).removeprefix("torch."))
    session = lab.backend("triton", decode_tokens=1).load({0: store}, {0: spec})
    assert session.executed().weights == "packed"
    assert session.resident_bytes() == store.nbytes
    x_TH, routing = x_of(tokens, H, dtype), routed(tokens)
    verdict = compare(session.layer(0)(x_TH, *routing.padded()), reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict


def test_every_code_of_four_bits_is_decoded(kernels):
    """One expert without a gate whose weights are all sixteen codes, times powers of two: exact."""
    codes = pack_codes(torch.arange(32).remainder(16).expand(32, 32).contiguous(), 4)
    scales = torch.randint(120, 131, (32, 1), generator=torch.Generator().manual_seed(2)).to(torch.uint8)
    weight = Mxfp4Tensor(Scheme("mxfp4", 4.0, 32), (32, 32), codes, scales)
    down = Matrices(codes[None], "mxfp4", 32, 32, scales[None], group=32)
    experts = Experts(Matrices.dense(torch.eye(32)[None]), down, "relu", gated=False)
    routing = Routing.dense(torch.ones(32, 1))
    assert torch.equal(kernels.run(experts, torch.eye(32), routing), weight.dequantize().T)
    assert torch.equal(
        kernels.run(experts, torch.eye(32)[:3], Routing.dense(torch.ones(3, 1)), decode_tokens=3),
        weight.dequantize().T[:3],
    )


def test_codes_that_no_kernel_reads_are_dequantized(lab):
    store = coded(Scheme("rtn", 3.0, 32))
    spec = lab.spec(store)
    session = lab.backend("triton").load({0: store}, {0: spec})
    assert session.executed().weights == "dequantized"
    x_TH, routing = x_of(2, H, torch.float32), routed(2)
    assert compare(session.layer(0)(x_TH, *routing.padded()), reference(store, routing, x_TH), torch.float32).ok


def fp8(x_NI):
    """Activations in groups of 128 as torch rounds them: codes, and what they stand for in float64."""
    groups = x_NI.float().unflatten(1, (-1, 128))
    scales = groups.abs().amax(2, keepdim=True) / 448
    codes = (groups / torch.where(scales > 0, scales, 1.0)).to(torch.float8_e4m3fn)
    return codes.flatten(1), scales.squeeze(2), (codes.double() * scales.double()).flatten(1)


def test_codes_are_multiplied_by_codes():
    """W8A8 in blocks of 128: each product against float64 on the codes that it reads, which are torch's bit for bit."""
    from moebench.kernels.triton import grouped, products
    from moebench.kernels.triton.dispatch import blocks_of_slots

    generator = torch.Generator().manual_seed(4)
    gate_up, down = (torch.randn(s, generator=generator) / 16 for s in ((2, 256, 256), (2, 256, 128)))
    experts = Experts(Matrices.fp8_blocks(gate_up), Matrices.fp8_blocks(down))
    x_TH, tiles = torch.randn(5, 256, generator=generator).bfloat16(), Tiles(16, 128, 128)
    x_TH[3, :128] = 0
    indices_TK, weight_S = torch.tensor([[0, 1], [1, 0], [1, 2], [0, 1], [1, 0]]), torch.randn(10, generator=generator)
    blocks = blocks_of_slots(indices_TK, 2, tiles)
    codes_TH, scales_TG = products.fp8_rows(x_TH)
    expected_codes, expected_scales, read_TH = fp8(x_TH)
    assert torch.equal(codes_TH.view(torch.uint8), expected_codes.view(torch.uint8))
    assert torch.equal(scales_TG, expected_scales)
    exact = [
        one.codes.double() * one.scales.double().repeat_interleave(128, 1).repeat_interleave(128, 2)
        for one in (experts.gate_up, experts.down)
    ]
    hidden_SF = grouped.hidden_of(x_TH, experts, blocks, tiles)
    row_SH = torch.empty(10, 256)
    grouped.down_of(hidden_SF, weight_S, row_SH, experts, blocks, tiles, atomic=False)
    for slot, expert in enumerate(indices_TK.flatten().tolist()):
        if expert == 2:
            assert row_SH[slot].isnan().all()
            continue
        gate, up = (exact[0][expert] @ read_TH[slot // 2]).chunk(2)
        hidden = torch.nn.functional.silu(gate) * up
        assert (hidden_SF[slot].double() - hidden).norm() < 2**-8 * hidden.norm()  # rounded to bfloat16 once
        row = exact[1][expert] @ fp8(hidden_SF[slot][None])[2][0] * weight_S[slot].double()
        assert (row_SH[slot].double() - row).norm() < 1e-6 * row.norm()


def test_blocks_of_codes_have_their_refusals():
    with pytest.raises(ValueError, match="blocks of 128 do not divide 96 and 128"):
        Matrices.fp8_blocks(torch.zeros(1, 96, 128))
    matrices = Matrices.fp8_blocks(torch.zeros(1, 128, 128))
    with pytest.raises(ValueError, match="before a threshold could see them"):
        Experts(matrices, matrices, input=Site(0.1))


def test_scaled_codes_are_refused_by_the_interpreter(kernels):
    codes, scales = torch.zeros(1, 32, 16, dtype=torch.uint8), torch.zeros(1, 32, 1, dtype=torch.uint8)
    matrices = Matrices(codes, "mxfp4_scaled", 32, 32, scales, group=32)
    experts, routing = Experts(matrices, matrices, gated=False), Routing.dense(torch.ones(2, 1))
    with pytest.raises(MoebenchError, match=r"interpreter has no tl\.dot_scaled; compile this kernel"):
        kernels.run(experts, torch.zeros(2, 32).bfloat16(), routing)
    with pytest.raises(ValueError, match="multiplies bfloat16 activations, not torch"):
        kernels.run(experts, torch.zeros(2, 32), routing)


# --- leaving out ------------------------------------------------------------------------------------------------------

RULES = {
    "teal": {"input": SiteRule(0.6), "hidden": SiteRule(0.1)},
    "cats": {"gate": SiteRule(0.1)},
    "weighted": {"input": SiteRule(0.6, weight=torch.linspace(0.5, 1.5, 32)), "hidden": SiteRule(0.1)},
}


@pytest.mark.parametrize("tokens", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", RULES)
def test_channels_are_left_out(lab, name, dtype, tokens):
    store = lab.store(1, dtype, sparsity=Sparsity(RULES[name]))
    spec = lab.spec(store, str(dtype).removeprefix("torch."), tokens=tokens)
    backend = lab.backend("triton", decode_tokens=4)
    session = backend.load({0: store}, {0: spec})
    told = "skip" if tokens <= 4 and name != "cats" else "mask"
    assert session.executed().sparse == backend.supports(spec).sparse == told
    x_TH, routing = lab.tokens(tokens, dtype), lab.routing("signed", tokens, 3)
    verdict = compare(session.layer(0)(x_TH, *routing.padded()), reference(store, routing, x_TH), dtype)
    assert verdict.ok, verdict


def test_a_decode_loads_the_weights_of_the_channels_that_are_used_and_no_others(lab):
    """Bytes by the formula: of gate_up one column for each input above the threshold, of down one for each unit."""
    store = lab.store(1, sparsity=Sparsity({"input": SiteRule(0.6), "hidden": SiteRule(0.1)}))
    spec = lab.spec(store, tokens=1)
    run = lab.backend("triton").load({0: store}, {0: spec}).layer(0)
    x_TH, expert, size, hidden, width = lab.tokens(1), 4, 4, store.hidden, store.width
    with guard.counting() as counted:
        run(x_TH, torch.tensor([[expert, 6]]), torch.ones(1, 2))
    used = x_TH[0].abs() > 0.6
    gate, up = (store.gate_up[expert].double() @ torch.where(used, x_TH[0], 0.0).double()).chunk(2)
    units = int(((torch.nn.functional.silu(gate) * up).abs() > 0.1).sum())
    assert 0 < int(used.sum()) < hidden
    assert 0 < units < width
    tiles = 2 * width // 32
    looked = 2 * 8 * tiles  # both slots' expert, by every program; the second names none and returns
    loaded = counted["decode_up_kernel"].loaded - looked
    assert loaded == int(used.sum()) * 2 * width * size + tiles * hidden * size
    loaded = counted["decode_down_kernel"].loaded - 2 * 8
    assert loaded == units * hidden * size + 2 * width * size + size
    assert counted["decode_up_kernel"].stored == 2 * width * size
    assert counted["combine_kernel"].loaded == 2 * 8 + hidden * size


def test_a_grouped_call_moves_and_computes_what_the_formulas_say(lab):
    store = lab.store(1)
    x_TH, routing = lab.tokens(23), lab.routing("empty", 23, 5)
    run = lab.backend("triton", combine="atomic", decode_tokens=0).load({0: store}, {0: lab.spec(store)}).layer(0)
    with guard.counting() as counted:
        run(x_TH, *routing.padded())
    blocks = int((-(-routing.counts_E // 16)).sum())
    assignments, hidden, width = int(routing.counts_E.sum()), store.hidden, store.width
    assert assignments == 46
    assert counted["gate_up_kernel"].flops == blocks * 2 * 16 * hidden * 2 * width
    assert counted["down_kernel"].flops == blocks * 2 * 16 * width * hidden
    most = (46 + 6 * 15) // 16
    assert counted["gate_up_kernel"].programs == counted["down_kernel"].programs == most * (hidden // 32)
    positions = 4 * (most + blocks + blocks * 16 + assignments)  # how many blocks, whose, and rows and tokens
    assert counted["gate_up_kernel"].loaded == 4 * (blocks * 2 * width * hidden + assignments * hidden) + positions
    assert counted["gate_up_kernel"].stored == 4 * assignments * width
    weights = 4 * assignments
    assert counted["down_kernel"].loaded == 4 * (blocks * hidden * width + assignments * width) + positions + weights
    assert counted["down_kernel"].added == 4 * assignments * hidden


def test_a_rule_of_a_site_is_read_off_the_store(lab):
    store = lab.store(1, sparsity=Sparsity(RULES["weighted"]))
    assert dataclasses.asdict(Site(0.1)) == {"threshold": 0.1, "weight": None}
    spec = lab.spec(store, tokens=1, sparsity=SparsitySpec(("input", "hidden"), weight="norm"))
    experts = lab.backend("triton").load({0: store}, {0: spec}).layer(0).experts
    assert (experts.gate, experts.hidden) == (None, Site(0.1))
    assert experts.input.threshold == 0.6
    assert torch.equal(experts.input.weight, torch.linspace(0.5, 1.5, 32))
