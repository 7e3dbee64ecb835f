"""Self-contrast decoding: where it must be plain decoding, and that each pass has its own routing and cache."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.contracts import MoebenchError, Selection, load_file
from moebench.moe.layer import LayerWeights
from moebench.moe.router import Linear, Pipeline, Softmax, TopK
from moebench.moe.routing import Context
from moebench.moe.shapes import ModelShape
from moebench.suites.decoding import Ranked, SelfContrast, at_ranks, contrast, decode, ranked
from moebench.suites.models.reroute import reroute

pytest.importorskip("transformers")

NEW, FEW = 8, 4


@pytest.fixture(scope="module", params=["Mixtral", "Olmoe"])
def model(request):
    return load_file(Path(__file__).parent.parent / "tiny_models.py").build(request.param, initializer_range=0.3)


def prompts(batch=3, length=6):
    return torch.randint(0, 97, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def greedy(model, new=NEW):
    """Plain decoding, without a cache."""
    ids_BS = prompts()
    for _ in range(new):
        ids_BS = torch.cat([ids_BS, model(ids_BS, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    return ids_BS


# --- the contrast ----------------------------------------------------------------------------------------------------


@st.composite
def two_logits(draw):
    """Two rows of distinct logits, multiples of 1/8: no ties, and no rounding in what follows."""
    size = draw(st.integers(2, 12))
    row = st.lists(st.integers(-80, 80), min_size=size, max_size=size, unique=True)
    return torch.tensor([draw(row)]) / 8, torch.tensor([draw(row)]) / 8


@settings(deadline=None, max_examples=80)
@given(two_logits(), st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.sampled_from([0.0, 0.25, 0.5, 2.0]))
def test_degenerate_contrasts_are_greedy(rows, alpha, beta):
    """R19: beta = 0, weak = strong, alpha = 1."""
    strong, weak = rows
    best = strong.argmax(-1)
    assert torch.equal(contrast(strong, weak, SelfContrast(beta=0.0, alpha=alpha)).argmax(-1), best)
    assert torch.equal(contrast(strong, strong, SelfContrast(beta=beta, alpha=alpha)).argmax(-1), best)
    assert torch.equal(contrast(strong, weak, SelfContrast(beta=beta, alpha=1.0)).argmax(-1), best)


def test_contrast_by_hand():
    strong, weak = torch.tensor([[2.0, 1.5, -9.0]]), torch.tensor([[4.0, 0.0, -99.0]])
    params = SelfContrast(beta=0.5, alpha=0.1)
    scores = contrast(strong, weak, params)
    assert scores.tolist() == [[1.5 * 2 - 0.5 * 4, 1.5 * 1.5, float("-inf")]]
    assert contrast(strong, weak, SelfContrast(beta=0.5, alpha=0.0)).argmax().item() == 2
    tempered = SelfContrast(beta=1.0, alpha=0.1, strong_temperature=2.0, weak_temperature=4.0)
    torch.testing.assert_close(contrast(strong, weak, tempered)[:, :2], torch.tensor([[2 - 1.0, 1.5 - 0.0]]))


def test_random_logits_change_about_a_third_of_the_favourites():
    """routing.md section 7 counts 36 % with the default alpha and beta."""
    strong, weak = torch.randn(2, 4000, 97, generator=torch.Generator().manual_seed(0))
    changed = contrast(strong, weak, SelfContrast()).argmax(-1) != strong.argmax(-1)
    assert 0.2 < changed.double().mean() < 0.5


# --- ranks -----------------------------------------------------------------------------------------------------------


def pipeline(groups=None, bias_E=None, renormalize=True):
    weight_EH = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    return Pipeline(Linear(weight_EH), TopK(2, bias_E, groups), Softmax(renormalize))


def test_the_first_ranks_are_the_models_own_choice():
    router, x_TH = Ranked(pipeline()), torch.randn(20, 32, generator=torch.Generator().manual_seed(4))
    own = router(x_TH, Context())
    assert torch.equal(own.to_dense(), router(x_TH, Context(ranks=(0, 1))).to_dense())
    assert torch.equal(own.to_dense(), router.pipeline(x_TH, Context()).to_dense())


@pytest.mark.parametrize("renormalize", [True, False])
def test_a_rank_has_one_expert_with_a_weight_of_the_models_rule(renormalize):
    router, x_TH = Ranked(pipeline(renormalize=renormalize)), torch.randn(20, 32)
    routing = router(x_TH, Context(ranks=(2,)))
    probs_TE = routing.logits_TE.softmax(-1)
    assert torch.equal(routing.expert_N, probs_TE.argsort(-1, descending=True)[:, 2])
    wanted_N = torch.ones(20) if renormalize else probs_TE.sort(-1, descending=True).values[:, 2]
    torch.testing.assert_close(routing.weight_N, wanted_N)
    valid_T = torch.arange(20) % 2 == 0
    assert torch.equal(router(x_TH, Context(ranks=(2,), valid_T=valid_T)).k_T, valid_T.long())


def test_ranks_follow_the_selection_bias():
    bias_E = torch.zeros(8)
    bias_E[5] = 10.0
    routing = Ranked(pipeline(bias_E=bias_E))(torch.randn(20, 32), Context(ranks=(0,)))
    assert (routing.expert_N == 5).all()


@pytest.mark.parametrize("ranks", [(), (1, 1), (8,), (-1,)])
def test_ranks_that_do_not_exist_are_refused(ranks):
    with pytest.raises(ValueError, match="must be distinct and lie below 8"):
        at_ranks(torch.rand(3, 8), ranks)


def test_ranks_of_grouped_models_are_refused():
    with pytest.raises(ValueError, match="over all experts"):
        Ranked(pipeline(groups=(4, 2)))
    assert Ranked(pipeline(groups=(4, 4))).needs == {"ranks", "rng"}


@pytest.mark.parametrize("renormalize", [True, False])
def test_one_expert_by_chance(renormalize):
    x_TH = torch.randn(4000, 32, generator=torch.Generator().manual_seed(1)) / 4
    router = Ranked(pipeline(renormalize=renormalize))
    draws = [router(x_TH, Context(ranks="random", rng=torch.Generator().manual_seed(s))) for s in (0, 0, 1)]
    assert (draws[0].k_T == 1).all()
    assert torch.equal(draws[0].expert_N, draws[1].expert_N)
    assert not torch.equal(draws[0].expert_N, draws[2].expert_N)
    assert ((draws[0].counts_E - 500).abs() < 5 * 500**0.5).all(), "every expert is as likely as another"
    probs_N = draws[0].logits_TE.softmax(-1)[draws[0].token_N, draws[0].expert_N]
    torch.testing.assert_close(draws[0].weight_N, torch.ones(4000) if renormalize else probs_N)


@settings(deadline=None, max_examples=30)
@given(st.floats(0.05, 1.0), st.booleans(), st.integers(0, 9))
def test_a_share_takes_the_fewest_experts_that_hold_it(share, renormalize, seed):
    router = Ranked(pipeline(renormalize=renormalize))
    routing = router(torch.randn(50, 32, generator=torch.Generator().manual_seed(seed)) / 4, Context(ranks=share))
    probs_TE = routing.logits_TE.softmax(-1)
    for token, row_E in enumerate(probs_TE.double()):
        sorted_E = row_E.sort(descending=True)
        held_E = sorted_E.values.cumsum(0)
        k = min(int((held_E < share - 1e-6).sum()) + 1, 8)
        own = routing.token_N == token
        assert abs(int(own.sum()) - k) <= int(((held_E - share).abs() < 2e-6).any())
        assert set(routing.expert_N[own].tolist()) == set(sorted_E.indices[: int(own.sum())].tolist())
    total_T = routing.to_dense().sum(-1)
    if renormalize:
        torch.testing.assert_close(total_T, torch.ones(50))
    else:
        assert (total_T >= share - 1e-5).all()


def test_the_factory_makes_the_models_own_router():
    weights = LayerWeights(torch.zeros(8, 16, 32), torch.zeros(8, 32, 8), torch.randn(8, 32))
    shape = ModelShape(32, 8, 8, 1, (0,), Selection("softmax", 3, False))
    bundle = ranked()(weights, shape, 0)
    assert isinstance(bundle.router, Ranked)
    assert bundle.router.pipeline.selector.k == 3


# --- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        SelfContrast(beta=0.0),
        SelfContrast(alpha=1.0),
        SelfContrast(strong=(0, 1), weak=(0, 1), alpha=0.0),
    ],
    ids=["beta=0", "alpha=1", "weak=strong"],
)
def test_degenerate_decoding_is_greedy(model, params):
    """R19, with a real model, two passes and two caches."""
    if params.strong is not None and model.config.num_experts_per_tok != 2:
        params = SelfContrast(strong=(0, 1, 2), weak=(0, 1, 2), alpha=0.0)
    decoded = decode(model, prompts(), params, NEW)
    assert torch.equal(decoded.ids_BS, greedy(model))
    assert not decoded.changed_B.any()


def test_the_default_changes_some_tokens_and_the_weak_pass_touches_one_expert(model):
    decoded = decode(model, prompts(), SelfContrast(beta=2.0, alpha=0.01), NEW)
    assert decoded.ids_BS.shape == (3, 6 + NEW)
    assert decoded.changed_B.sum() > 0
    assert (decoded.strong_experts, decoded.weak_experts) == (model.config.num_experts_per_tok, 1)
    assert not torch.equal(decoded.ids_BS, greedy(model))


# --- other weak passes: the best expert, a lower rank, one by chance, as many as hold a share ------------------------

WEAK = [(0,), (2,), "random", 0.6]
weak_passes = pytest.mark.parametrize("weak", WEAK, ids=str)


def decoded_on_ours(model, new=FEW, prompt=None, **params):
    """A share gives tokens unlike numbers of experts, which our backends run."""
    return decode(model, prompts() if prompt is None else prompt, SelfContrast(**params), new, backend="grouped")


@weak_passes
@pytest.mark.parametrize("degenerate", [{"beta": 0.0}, {"alpha": 1.0}], ids=["beta=0", "alpha=1"])
def test_every_weak_pass_may_be_without_effect(model, weak, degenerate):
    decoded = decoded_on_ours(model, weak=weak, **degenerate)
    assert torch.equal(decoded.ids_BS, greedy(model, FEW))
    assert not decoded.changed_B.any()


@weak_passes
def test_a_pass_against_itself_is_greedy_in_its_own_routing(model, weak):
    """R19, also for one by chance: both passes draw the same."""
    own, plain = (
        decoded_on_ours(model, weak=weak, strong=weak, alpha=alpha, beta=beta)
        for alpha, beta in ((0.0, 2.0), (1.0, 0.0))
    )
    assert torch.equal(own.ids_BS, plain.ids_BS)
    assert not own.changed_B.any()
    assert own.strong_bytes == own.weak_bytes


@weak_passes
def test_a_weak_pass_reads_the_bytes_of_its_experts_alone(model, weak):
    """One expert a layer for one sequence, if not a share; the strong pass reads the model's own k."""
    decoded = decoded_on_ours(model, prompt=prompts(1), weak=weak)
    layers, expert = 2, 3 * 32 * 24 * 4
    k = model.config.num_experts_per_tok
    assert len(decoded.weak_bytes) == FEW
    assert set(decoded.strong_bytes[1:]) == {layers * k * expert}
    if isinstance(weak, float):
        assert 1 <= decoded.weak_experts <= 8
        assert all(layers * expert <= read <= layers * 8 * expert for read in decoded.weak_bytes)
    else:
        assert decoded.weak_experts == 1
        assert set(decoded.weak_bytes[1:]) == {layers * expert}


@weak_passes
def test_every_weak_pass_has_its_effect(model, weak):
    decoded = decoded_on_ours(model, weak=weak, beta=4.0, alpha=0.0)
    assert decoded.changed_B.sum() > 0
    assert torch.equal(decoded.ids_BS, decoded_on_ours(model, weak=weak, beta=4.0, alpha=0.0).ids_BS)


def test_chance_is_that_of_the_seed(model):
    sequences = [decoded_on_ours(model, weak="random", beta=4.0, alpha=0.0, seed=seed).ids_BS for seed in (0, 1)]
    assert not torch.equal(*sequences)


def test_a_share_needs_our_backends(model):
    with pytest.raises(MoebenchError, match="tokens with fewer experts than others, which only our backends run"):
        decode(model, prompts(), SelfContrast(weak=0.6), 1)


def test_caches_are_apart(model):
    """The same contrast without any cache, each pass over the whole sequence, gives the same tokens."""
    params = SelfContrast(beta=1.0, alpha=0.05, weak=(3,))
    ids_BS = prompts()
    with reroute(model, ranked()) as handle, torch.no_grad():
        for _ in range(NEW):
            logits = []
            for ranks in (None, (3,)):
                handle.context = Context(ranks=ranks)
                logits.append(model(ids_BS, use_cache=False).logits[:, -1])
            ids_BS = torch.cat([ids_BS, contrast(*logits, params).argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(decode(model, prompts(), params, NEW).ids_BS, ids_BS)


def test_backends_decode_the_same(model):
    params = SelfContrast(beta=1.0)
    assert torch.equal(
        decode(model, prompts(), params, NEW, backend="grouped").ids_BS, decode(model, prompts(), params, NEW).ids_BS
    )


def test_the_model_is_itself_afterwards(model):
    before = model(prompts()).logits
    decode(model, prompts(), SelfContrast(), 2)
    assert torch.equal(model(prompts()).logits, before)
    assert all("forward" not in layer.mlp.gate.__dict__ for layer in model.model.layers)


def test_an_ended_sequence_stays_ended(model):
    plain = greedy(model)
    end = int(plain[0, 7])
    decoded = decode(model, prompts(), SelfContrast(beta=0.0), NEW, end=end).ids_BS
    for own, wanted in zip(decoded, plain, strict=True):
        new = wanted[6:].tolist()
        stop = new.index(end) + 1 if end in new else NEW
        assert own[6 : 6 + stop].tolist() == new[:stop]
        assert (own[6 + stop :] == end).all()
    alone = decode(model, prompts()[:1], SelfContrast(beta=0.0), NEW, end=end).ids_BS
    assert alone.shape[1] == 7 + plain[0, 6:].tolist().index(end), "decoding stops when every sequence has ended"


def test_released_default_never_ends(model):
    end = int(greedy(model)[0, 7])
    decoded = decode(model, prompts(), SelfContrast(beta=0.0, alpha=1.0, never_end=True), NEW, end=end)
    assert decoded.ids_BS.shape == (3, 6 + NEW)
    assert not (decoded.ids_BS[:, 6:] == end).any()


def test_samples_are_those_of_the_generator(model):
    params = SelfContrast(sample=True, alpha=0.001)
    draws = [decode(model, prompts(), params, NEW, rng=torch.Generator().manual_seed(s)).ids_BS for s in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize(
    "params",
    [
        {"alpha": 1.5},
        {"alpha": -0.1},
        {"beta": -1.0},
        {"weak_temperature": 0.0},
        {"weak": 0.0},
        {"weak": 2},
        {"strong": "best"},
    ],
)
def test_impossible_parameters_are_refused(params):
    with pytest.raises(ValueError, match=r"must lie in|must be positive|names no experts"):
        SelfContrast(**params)
