"""Attention whose projections leave out inputs: what is computed, what is kept, who checks it, and what it leaves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as nnf

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.moe.sparsifiers.attention import projection_rule
from moebench.moe.sparsifiers.params import PROJECTIONS
from moebench.suites.models import substream
from moebench.suites.models.smollm2_jobs import token_ids
from moebench.suites.quality.attention import attention_maps
from moebench.suites.quality.backends import BackendTrial
from moebench.suites.quality.language_model import language_model
from moebench.suites.quality.projections import LayerProjections, Projection
from moebench.suites.quality.sparse_attention import calibration_inputs
from moebench.suites.quality.trial import AccuracyTrial
from moebench.suites.text import calibration_text

transformers = pytest.importorskip("transformers")

REGISTRY = Registry.load()
H, T, PREFIX, LEVEL = 32, 40, 3, 0.4
MODEL = ["model=tiny-olmoe", "model.layers=[0,2]", "calibration.tokens=64"]
METHODS = {
    "teal": {},
    "teal-topk": {"rule": "topk"},
    "wina": {},
    "wina-official": {"preset": "official"},
    "chess": {},
    "rsparse": {"alpha": 0.7},
}


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 3}
    config = transformers.LlamaConfig(num_attention_heads=4, num_key_value_heads=2, attention_bias=True, **sizes)
    model = transformers.LlamaForCausalLM(config).eval()
    for name, tensor in model.named_parameters():
        if name.endswith("proj.bias"):
            torch.nn.init.normal_(tensor)
    return model


@torch.no_grad()
def final_of(model):
    ids = torch.randint(97, (1, T), generator=torch.Generator().manual_seed(4))
    return model.model(ids, use_cache=False).last_hidden_state[0]


def params_of(method, **own):
    return REGISTRY.get("sparsity", method.split("-")[0]).params_from(
        {"level": LEVEL, "attention": True, **METHODS[method], **own}
    )


def projections(model, method, index=1, **own):
    """Return the projections of one layer, their rules made from seeded inputs."""
    params, maps = params_of(method, **own), attention_maps(model, index)
    x_TI = torch.randn(200, H, generator=torch.Generator().manual_seed(index))
    rules = {name: projection_rule(params, name, maps[name].weight.detach(), x_TI) for name in params.attention_scores}
    found = {n: Projection(n, maps[n], rule, maps[n].weight.nbytes, lambda tokens: PREFIX) for n, rule in rules.items()}
    return LayerProjections(found, sum(m.weight.nbytes for name, m in maps.items() if name not in found))


class Masked(torch.nn.Module):
    """A linear map whose input is masked by hand, from the definition."""

    def __init__(self, linear, rule):
        super().__init__()
        object.__setattr__(self, "linear", linear)
        object.__setattr__(self, "rule", rule)

    def forward(self, x_BTI):
        rule, weight_OI = self.rule, self.linear.weight
        score = x_BTI.abs() * (1 if rule.weight is None else rule.weight)
        if rule.threshold is not None:
            mask = score > rule.threshold
        else:
            mask = torch.zeros_like(x_BTI, dtype=torch.bool).scatter(-1, score.topk(rule.k).indices, True)
        mask[:, :PREFIX] = True
        y_BTO = nnf.linear(torch.where(mask, x_BTI, 0.0), weight_OI, self.linear.bias)
        if rule.residual is None:
            return y_BTO
        low_OI = rule.residual.left_FOR[0] @ rule.residual.right_FRI[0]
        return y_BTO + nnf.linear(torch.where(mask, 0.0, x_BTI), low_OI)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_that_whose_inputs_are_masked_by_hand_and_the_same_bits_after(llama, method):
    layer, before = projections(llama, method), final_of(llama)
    weights = {key: tensor.clone() for key, tensor in llama.state_dict().items()}
    by_hand = copy.deepcopy(llama)
    for name, one in layer.projections.items():
        setattr(by_hand.model.layers[1].self_attn, name, Masked(one.linear, one.rule))
    with layer.applied():
        inside = final_of(llama)
    assert not torch.equal(inside, before)
    assert torch.allclose(inside, final_of(by_hand), atol=1e-5 if method == "rsparse" else 0, rtol=0)
    # the prefix attends to itself alone, and so nothing changes there
    assert torch.allclose(inside[:PREFIX], before[:PREFIX], atol=1e-6)
    assert torch.equal(final_of(llama), before)
    assert all(torch.equal(tensor, weights[key]) for key, tensor in llama.state_dict().items())
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in attention_maps(llama, 1).values())
    for one in layer.call().projected:
        assert one.check().ok, one.check()
        assert one.mask()[:, :PREFIX].all()


def test_hooks_go_after_an_error(llama):
    layer = projections(llama, "teal")
    with pytest.raises(RuntimeError, match="stop"), layer.applied():
        raise RuntimeError("stop")
    assert all(not m._forward_pre_hooks and not m._forward_hooks for m in attention_maps(llama, 1).values())


@pytest.mark.parametrize("level", [0.1, 0.33, 0.5, 0.9])
def test_the_level_is_kept(llama, level):
    for method in ("wina", "teal-topk"):
        layer = projections(llama, method, level=level)
        with layer.applied():
            final_of(llama)
        metrics = {metric.name: metric for metric in layer.call().metrics(None, None)}
        density = metrics["density_attention"]
        assert density.value == math.floor(H * (1 - level) + 1e-9) / H
        assert abs(density.value - (1 - level)) <= 1 / H
        assert density.n == 4 * (T - PREFIX) * H
    x_TI = torch.randn(300, H, generator=torch.Generator().manual_seed(9))
    for method in ("teal", "chess"):
        rule = projection_rule(params_of(method, level=level), "q_proj", torch.empty(5, H), x_TI)
        assert rule.mask(x_TI).float().mean().item() == pytest.approx(1 - level, abs=0.01)


def test_each_method_scores_as_its_paper_says(llama):
    teal, chess, wina, official = (
        {name: one.rule for name, one in projections(llama, method).projections.items()}
        for method in ("teal", "chess", "wina", "wina-official")
    )
    assert set(teal) == set(wina) == set(official) == set(PROJECTIONS)
    assert len({rule.threshold for rule in teal.values()}) == 1, "they were given the same input"
    assert set(chess) == {"q_proj", "o_proj"}
    assert chess["q_proj"].threshold == teal["q_proj"].threshold
    assert [name for name, rule in official.items() if rule.weight is not None] == ["k_proj"]
    for name, linear in attention_maps(llama, 1).items():
        norms_I = linear.weight.detach().double().norm(dim=0)
        assert torch.allclose(wina[name].weight.double(), norms_I, rtol=2**-8)
    alone = projections(llama, "rsparse", alpha=1.0).projections["k_proj"].rule
    as_wina = projections(llama, "wina", rule="threshold").projections["k_proj"].rule
    assert alone.threshold == as_wina.threshold
    assert alone.residual is None


BROKEN = {
    "nothing is left out": lambda self, x: x,
    "the prefix is left out": lambda self, x: self.rule.apply(x),
    "the others are left out": lambda self, x: x - self.rule.apply(x),
    "one channel too many is left out": lambda self, x: self.rule.apply(x) * (torch.arange(x.shape[-1]) != 5),
}


@pytest.mark.parametrize("method", ["teal", "wina", "rsparse"])
@pytest.mark.parametrize("how", BROKEN)
def test_the_oracle_finds_a_broken_hook(llama, monkeypatch, how, method):
    layer = projections(llama, method)
    monkeypatch.setattr(Projection, "masked", BROKEN[how])
    with layer.applied():
        final_of(llama)
    for one in layer.call().projected:
        check = one.check()
        assert not check.ok
        assert f"attention's {one.name}: " in check.reason


def test_sequences_of_a_batch_know_nothing_of_each_other(llama):
    x_BTI = torch.randn(3, 20, H, generator=torch.Generator().manual_seed(2))
    for method in ("teal", "wina"):
        one = projections(llama, method).projections["k_proj"]
        assert torch.equal(one.masked(x_BTI), torch.stack([one.masked(x_TI[None])[0] for x_TI in x_BTI]))
        one.first_tokens = lambda tokens: 0  # as in the middle of a sequence
        assert torch.equal(one.masked(x_BTI), one.rule.apply(x_BTI))


# --- in suites -------------------------------------------------------------------------------------------------------


def plan_of(*given):
    return planned(list(given), REGISTRY)[0]


def trial_of(method, *given, suite="accuracy", kind=AccuracyTrial):
    text = [f"suite={suite}", "suite.tokens=64", "suite.window=32", f"axes.sparsity={method}"]
    plan = plan_of(*text, *MODEL, *given)
    assert not plan.refused, plan.refused[0].refusal
    (case,) = plan.cases
    return kind(case, REGISTRY)


def test_a_case_checks_its_attention_and_tells_what_was_kept(monkeypatch):
    trial = trial_of("chess", "params.sparsity.chess.attention=true")
    calls = [trial.run(step) for step in range(trial.steps)][-1]
    assert trial.verify(1, calls).ok
    assert all(len(call.attention.projected) == 2 for call in calls)
    metrics = {metric.name: metric.value for metric in trial.facts().metrics}
    assert metrics["density_attention"] == pytest.approx(0.5, abs=0.1)
    sizes = [[m.weight.nbytes for m in attention_maps(trial.model, i).values()] for i in (0, 2)]
    for call, (q, k, v, o) in zip(trial.changed.calls, sizes, strict=True):
        found = {metric.name: metric.value for metric in call.sparsity()}
        used = [one.used() for one in call.attention.projected]
        attended = used[0][0] / used[0][1] * q + k + v + used[1][0] / used[1][1] * o
        store = call.block.subject.layer.store
        dense = len(call.routing.token_N) / len(call.x_TH) * store.nbytes / len(store.ffn_ids)
        share = (found["kept_bytes"] * dense + attended) / (dense + q + k + v + o)
        assert found["kept_bytes_with_attention"] == pytest.approx(share, rel=1e-9)
    monkeypatch.setattr(Projection, "masked", lambda self, x: x)
    wrong = trial.verify(0, trial.run(0))
    assert not wrong.ok
    assert "attention's q_proj" in wrong.reason


def test_without_it_or_at_level_0_nothing_is_different():
    attention = "params.sparsity.teal.attention=true"
    zero = trial_of("teal", attention, "params.sparsity.teal.level=0.0")
    plain, dense = trial_of("teal"), trial_of("none")
    for trial in (plain, zero, dense):
        trial.run(0)
        assert trial.changed.sparse_attention.layers == {}
        assert not {m.name for m in trial.facts().metrics} & {"density_attention", "kept_bytes_with_attention"}
    assert torch.equal(zero.scores[0], dense.scores[0])
    with_attention = trial_of("teal", attention)
    with_attention.run(0)
    assert not torch.equal(with_attention.scores[0], plain.scores[0])


def test_rules_are_of_the_dense_model_on_the_text_of_calibration():
    trial = trial_of("wina", "params.sparsity.wina.attention=true")
    source = trial.subjects[0].source
    inputs = calibration_inputs(trial.case, source, trial.model, (0, 2))
    assert {name: tuple(tensor.shape[:1]) for name, tensor in inputs.items()} == {
        f"{index}.{name}": (64,) for index in (0, 2) for name in ("q_proj", "o_proj")
    }
    # what q reads is the normed sum of embeddings of the very tokens whose FFN inputs the experts are calibrated on
    rows_TH = trial.model.model.layers[0].input_layernorm(trial.model.model.embed_tokens.weight)
    ids = [int((rows_TH - row).abs().sum(1).argmin()) for row in inputs["0.q_proj"]]
    assert torch.allclose(rows_TH[ids], inputs["0.q_proj"], atol=1e-5)
    place = source.place("calibration", 64, substream(trial.case.seed, "calibration"))
    tokenizer = language_model(trial.case, source)[1]
    assert ids == token_ids(tokenizer, calibration_text(), place.stop)[place].tolist()
    for index, layer in trial.changed.sparse_attention.layers.items():
        for name, one in layer.projections.items():
            x_TI = inputs[f"{index}.{'o_proj' if name == 'o_proj' else 'q_proj'}"]
            again = projection_rule(params_of("wina", level=0.5), name, one.linear.weight.detach(), x_TI)
            assert one.rule.k == again.k
            assert torch.equal(one.rule.weight, again.weight)


def test_both_sides_of_backend_kl_leave_out_the_same():
    given = ["params.sparsity.teal.attention=true", "axes.backend=reference"]
    trial = trial_of("teal", *given, suite="backend_kl", kind=BackendTrial)
    window = trial.run(0)
    assert float(window.scores_TC[:, 2].abs().max()) == 0
    assert trial.verify(0, window).ok
    for index, layer in trial.changed.sparse_attention.layers.items():
        for name, one in layer.projections.items():
            other = trial.reference.sparse_attention.layers[index].projections[name].last
            assert torch.equal(one.last.mask(), other.mask())


def test_tasks_are_answered_with_it_and_checked(monkeypatch):
    pytest.importorskip("lm_eval")
    from moebench.suites.tasks.trial import TaskTrial

    settings = ["suite=lm_eval", "suite.items=2", "suite.tasks=[moebench_bits_per_byte]", "axes.sparsity=teal"]
    (case,) = plan_of(*settings, *MODEL, "params.sparsity.teal.attention=true").cases
    trial = TaskTrial(case, REGISTRY)
    calls = trial.run(0)
    assert trial.verify(0, calls).ok
    assert all(one.prefix == math.ceil(one.x_BTI.shape[1] / 100) for call in calls for one in call.attention.projected)
    monkeypatch.setattr(Projection, "masked", lambda self, x: x)
    trial.kept.remove()
    assert "attention's q_proj" in trial.verify(0, trial.run(0)).reason
    trial.kept.remove()
    trial.close()


def test_what_runs_no_attention_refuses_it_in_a_sentence():
    attention = ["axes.sparsity=teal", "params.sparsity.teal.attention=true"]
    told = "sparsity 'teal': attention=true leaves out what attention reads, which this suite does not run"
    for suite in (["suite=throughput", "axes.tokens=32", "axes.backend=eager"], ["suite=probe"]):
        plan = plan_of(*suite, *MODEL, *attention)
        assert not plan.cases
        assert all(told in item.refusal for item in plan.refused)
    with pytest.raises(MoebenchError, match="no rotated basis"):
        params_of("wina", preset="transform")
