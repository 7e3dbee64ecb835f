"""Mixtures of attentions against the one attention that they must be when all are the same."""

import pytest
import torch
import torch.nn.functional as nnf
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.moe.attention_mixture import (
    Attention,
    AttentionMixture,
    attend,
    attention_pairs,
    average,
    selective_attention,
)
from moebench.moe.experts import ExpertStore
from moebench.moe.layer import LayerWeights, PreparedLayer, ffn_hidden, moe_forward
from moebench.moe.routing import Context, Routing
from moebench.moe.transforms.upcycle import mix

H, HEADS, D, T = 16, 4, 4, 20


def seeded(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def attention(seed=0):
    rows = HEADS * D
    query, key, value = (seeded(rows, H, seed=seed + part) * H**-0.5 for part in range(3))
    return Attention(query, key, value, seeded(H, rows, seed=seed + 3) * rows**-0.5, HEADS)


def mixture(experts=3, shared_kv=False, same=False):
    branches = [attention(0 if same else 10 * index) for index in range(experts)]
    return AttentionMixture(branches, seeded(experts, H, seed=99), shared_kv)


SEGMENT_T = torch.tensor([0] * 8 + [1] * 12)


def test_attention_is_torchs_own():
    own, x_TH = attention(), seeded(T, H, seed=1)
    query, key, value = (
        (x_TH @ matrix.T).view(T, HEADS, D).transpose(0, 1) for matrix in (own.query_QH, own.key_QH, own.value_QH)
    )
    said = nnf.scaled_dot_product_attention(query, key, value, is_causal=True)
    torch.testing.assert_close(attend(x_TH, own), said.transpose(0, 1).flatten(1) @ own.output_HQ.T)


def test_sequences_are_apart_and_later_tokens_unseen():
    own, x_TH = attention(), seeded(T, H, seed=1)
    whole = attend(x_TH, own, SEGMENT_T)
    torch.testing.assert_close(whole[:8], attend(x_TH[:8], own))
    torch.testing.assert_close(whole[8:], attend(x_TH[8:], own))
    torch.testing.assert_close(attend(x_TH, own)[:5], attend(x_TH[:5], own))


def test_no_tokens_say_nothing():
    assert attend(torch.zeros(0, H), attention()).shape == (0, H)
    assert mixture()(torch.zeros(0, H)).shape == (0, H)


# --- BAM -------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 6), st.booleans(), st.integers(0, 99))
def test_identical_experts_are_the_attention_whatever_the_gate(experts, shared_kv, seed):
    """R17 (BAM): 2.4e-7 in float32 (6e-8 in the prototype, of sizes unsaid); weights of the soft gate sum to one."""
    one, x_TH = attention(seed), seeded(T, H, seed=seed + 1)
    layer = AttentionMixture([one] * experts, 3 * seeded(experts, H, seed=seed + 2), shared_kv)
    torch.testing.assert_close(layer(x_TH), attend(x_TH, one), atol=1e-6, rtol=0)


def test_mixture_is_the_weighted_sum():
    layer, x_TH = mixture(), seeded(T, H, seed=1)
    shares_TE = (x_TH @ layer.gate_EH.T).softmax(-1)
    wanted_TH = sum(shares_TE[:, e, None] * attend(x_TH, layer.expert(e), SEGMENT_T) for e in range(3))
    torch.testing.assert_close(layer(x_TH, Context(segment_T=SEGMENT_T)), wanted_TH)
    only_second = Routing.dense(torch.tensor([[0.0, 2.0, 0.0]]).expand(T, -1))
    torch.testing.assert_close(layer(x_TH, routing=only_second), 2 * attend(x_TH, layer.expert(1)))


def test_every_expert_serves_every_token():
    routing = mixture().gate(seeded(T, H, seed=1))
    assert (routing.k_T == 3).all()
    torch.testing.assert_close(routing.to_dense().sum(1), torch.ones(T))


def test_shared_keys_are_those_of_every_expert():
    shared = mixture(shared_kv=True)
    assert torch.equal(shared.expert(2).key_QH, shared.expert(0).key_QH)


def test_branches_become_experts_and_shared_keys_their_mean():
    branches = [attention(10 * index) for index in range(4)]
    layer = AttentionMixture.of_branches(branches, seed=1)
    assert torch.equal(layer.expert(2).value_QH, branches[2].value_QH)
    assert torch.equal(layer.gate_EH, AttentionMixture.of_branches(branches, seed=1).gate_EH)
    shared = AttentionMixture.of_branches(branches, seed=1, shared_kv=True)
    torch.testing.assert_close(shared.expert(3).key_QH, average([branch.key_QH for branch in branches]))
    assert torch.equal(shared.expert(3).query_QH, branches[3].query_QH)


def test_a_block_of_identical_branches_is_the_dense_block():
    """Branch, attend, mix without training changes nothing where weights sum to one."""
    one, x_TH = attention(), seeded(T, H, seed=1)
    ffn = LayerWeights(seeded(24, H, seed=5), seeded(H, 12, seed=6))

    def norm(x):
        return nnf.layer_norm(x, (H,))

    normed_TH = norm(x_TH)
    dense = x_TH + attend(normed_TH, one) + ffn_hidden(normed_TH, ffn.gate_up, "silu") @ ffn.down.T
    layer = mix([ffn] * 4, seed=2)
    experts = PreparedLayer(ExpertStore(layer.gate_up, layer.down, ("ffn",) * 4), None)
    soft = Routing.dense((normed_TH @ layer.router_EH.T).softmax(-1))
    attentions = AttentionMixture.of_branches([one] * 4, seed=3)
    mixed = x_TH + attentions(normed_TH) + moe_forward(experts, normed_TH, routing=soft)
    torch.testing.assert_close(mixed, dense, atol=2e-5, rtol=1e-5)


def test_gradients_reach_gate_and_experts():
    layer = mixture()
    layer(seeded(T, H, seed=1)).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_mixtures_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="2 rows for 3 attentions"):
        AttentionMixture([attention()] * 3, seeded(2, H))
    other = Attention(*(getattr(attention(), name) for name in ("query_QH", "key_QH", "value_QH", "output_HQ")), 2)
    with pytest.raises(ValueError, match="different numbers of heads"):
        AttentionMixture([attention(), other], seeded(2, H))


# --- UoE: selective multi-head attention -----------------------------------------------------------------------------


def test_all_tokens_for_all_heads_are_the_attention():
    own, x_TH = attention(), seeded(T, H, seed=1)
    every = Routing.dense(torch.ones(T, HEADS))
    torch.testing.assert_close(selective_attention(x_TH, own, every, SEGMENT_T), attend(x_TH, own, SEGMENT_T))


def test_a_head_reads_and_answers_its_own_tokens_alone():
    own, x_TH = attention(), seeded(T, H, seed=1)
    gate_TA = torch.zeros(T, HEADS)
    gate_TA[::2, 1] = 3.0
    y_TH = selective_attention(x_TH, own, Routing.dense(gate_TA))
    assert not y_TH[1::2].any()
    own_columns = torch.zeros_like(own.output_HQ)
    own_columns[:, D : 2 * D] = own.output_HQ[:, D : 2 * D]
    alone = Attention(own.query_QH, own.key_QH, own.value_QH, own_columns, HEADS)
    torch.testing.assert_close(y_TH[::2], 3 * attend(x_TH[::2], alone))


def test_half_the_tokens_are_a_quarter_of_the_pairs():
    half_TA = (torch.arange(T)[:, None] + torch.arange(HEADS)) % 2 == 0
    every, half = Routing.dense(torch.ones(T, HEADS)), Routing.dense(half_TA.float())
    assert attention_pairs(every) == HEADS * T**2
    assert attention_pairs(half) * 4 == attention_pairs(every)
    assert attention_pairs(every, SEGMENT_T) == HEADS * (8**2 + 12**2)
    assert attention_pairs(half, SEGMENT_T) * 4 == attention_pairs(every, SEGMENT_T)


def test_gradients_are_finite_where_a_head_reads_nothing():
    own = attention()
    x_TH = seeded(T, H, seed=1).requires_grad_()
    gate_TA = torch.zeros(T, HEADS)
    gate_TA[0, 0] = 1.0
    selective_attention(x_TH, own, Routing.dense(gate_TA)).square().sum().backward()
    assert torch.isfinite(x_TH.grad).all()
    assert not x_TH.grad[1:].any()


def test_a_routing_over_other_heads_is_refused():
    with pytest.raises(ValueError, match="5 experts does not fit 4 heads"):
        selective_attention(seeded(T, H), attention(), Routing.dense(torch.ones(T, 5)))
