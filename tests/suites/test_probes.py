"""Suite ``probe`` on tiny models: every probe passes its checks, moves nothing, and its checks can fail."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.moe.probes.dictionary import Dictionary
from moebench.suites.probe_plugins import FIELDS, OF_EXPERTS
from moebench.suites.probing import pieces as taken_apart
from moebench.suites.probing import scene as scenes
from moebench.suites.probing.dictionary import loss_again
from moebench.suites.probing.lazy_training import dealt
from moebench.suites.probing.skipping import Skipping, skipping, visible
from moebench.suites.probing.trial import ProbeTrial

pytest.importorskip("transformers")

SHORT = ("model=tiny-olmoe", "suite.tokens=64", "suite.window=32", "suite.calibration_tokens=64", "suite.draws=2")
QUICK = ("suite.steps=12", "suite.batch=32", "suite.epochs=2", "suite.permutations=20", "suite.generated=3")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


@functools.cache
def cases(*given):
    return planned(["suite=probe", *SHORT, *QUICK, *given], registry())[0]


@functools.cache
def registry():
    return Registry.load()


def trial_of(*given):
    (case,) = cases(*given).cases
    return ProbeTrial(case, registry())


def through(trial):
    """Run all stages; return the first check that failed, or None."""
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        if not check.ok:
            return check
    return None


def probed(*given):
    trial = trial_of(*given)
    failed = through(trial)
    assert failed is None, failed.reason
    facts = trial.facts()
    trial.close()
    return facts, trial.probe


def values(facts):
    return {metric.name: metric.value for metric in facts.metrics}


def hooks_left(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


EVERY = [[f"suite.probe=[{name}]"] for name in FIELDS if name != "voids"]
EVERY += [["suite.probe=[voids]", f"suite.mode=[{mode}]"] for mode in ("trace", "emulate", "skip")]
EVERY += [["suite.probe=[voids]", "suite.mode=[skip]", "suite.kv=missing"]]


@pytest.mark.parametrize("given", EVERY, ids=lambda given: "-".join(word.partition("=")[2] for word in given))
def test_every_probe_passes_its_checks_and_leaves_the_model_alone(given):
    facts, probe = probed(*given)
    assert facts.metrics
    assert all(math.isfinite(metric.value) for metric in facts.metrics), facts.metrics
    assert all(math.isfinite(value) for series in facts.series for value in series.values)
    if hasattr(probe, "scene"):
        assert hooks_left(probe.scene.model) == 0
        assert probe.scene.model.config._attn_implementation != "eager"


@pytest.mark.parametrize("name", [*OF_EXPERTS, "voids", "activation_flow", "sae"])
def test_every_probe_takes_sparse_layers_and_a_dense_prefix(name):
    prefix = 0.0 if name == "voids" else 0.3
    sparse = ("axes.sparsity=teal", f"params.sparsity.teal.dense_prefix={prefix}", "model.layers=all")
    facts, probe = probed(f"suite.probe=[{name}]", "suite.mode=[trace]", "suite.quantile=0.9", *sparse)
    assert facts.metrics
    assert {call.prefix for call in probe.scene.calls} == {math.ceil(prefix * 32)}


@pytest.mark.parametrize("name", ["voids", "activation_flow", "sae"])
def test_what_a_backend_gets_wrong_is_seen_by_the_oracle(name, monkeypatch):
    true = scenes.DroppingBlock.computed
    monkeypatch.setattr(scenes.DroppingBlock, "computed", lambda self, x_TH, routing: 1.1 * true(self, x_TH, routing))
    failed = through(trial_of(f"suite.probe=[{name}]", "suite.mode=[trace]", "model.layers=all"))
    assert failed is not None
    assert failed.error > failed.bound > 0


# --- plans -----------------------------------------------------------------------------------------------------------


def test_a_case_has_the_parameters_of_its_probe_alone():
    plan = cases("suite.probe=[voids,activation_flow]", "suite.mode=[trace,skip]")
    assert [case.workload["probe"] for case in plan.cases] == ["voids", "voids", "activation_flow"]
    assert {case.workload.get("mode") for case in plan.cases[:2]} == {"trace", "skip"}
    keys = {cases("suite.probe=[activation_flow]", f"suite.steps={steps}").cases[0].case_key for steps in (12, 13)}
    assert len(keys) == 1
    assert len({cases("suite.probe=[sae]", f"suite.steps={steps}").cases[0].case_key for steps in (12, 13)}) == 2


def test_layers_are_those_that_a_probe_looks_into():
    for name in FIELDS:
        (case,) = cases(f"suite.probe=[{name}]", "suite.mode=[trace]").cases
        assert case.layers == ((0, 1, 2, 3) if name in OF_EXPERTS else ())


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        (["suite.probe=[super_experts]", "model.layers=[]"], "names no layer"),
        (["suite.probe=[voids]", "suite.mode=[trace]", "suite.kv=missing"], "where layers are skipped"),
        (["suite.probe=[sae]", "axes.quantization=int8"], "changes no layer"),
        (["suite.probe=[voids]", "suite.mode=[trace]", "axes.sparsity=teal", "model.layers=all"], "no known length"),
    ],
)
def test_what_makes_no_sense_is_refused(given, sentence):
    refused = cases(*given)
    assert not refused.cases
    assert sentence in refused.refused[0].refusal


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("suite.probe=[super_expert]", "did you mean 'super_experts'"),
        ("suite.mode=[traces]", "did you mean 'trace'"),
        ("suite.share=1.5", "share must lie"),
        ("suite.generated=0", "generated=0"),
    ],
)
def test_mistakes_are_told(given, sentence):
    with pytest.raises(MoebenchError, match=sentence):
        cases(given)


# --- super experts ---------------------------------------------------------------------------------------------------


def test_super_experts_have_names_that_a_recipe_takes():
    facts, probe = probed("suite.probe=[super_experts]", "suite.quantile=0.9")
    names = [item.item for item in facts.items if item.task == "protect"]
    assert names == [f"{layer}:{expert}" for layer, expert in probe.found]
    from moebench.suites.quality.trial import AccuracyTrial

    settings = ["suite=accuracy", *SHORT[:3], "model.layers=moe", "axes.routing=dropped"]
    settings.append(f"params.routing.dropped.experts=[{','.join(map(repr, names))}]")
    (case,) = planned(settings, registry())[0].cases
    trial = AccuracyTrial(case, registry())
    for step in range(trial.steps):
        assert trial.verify(step, trial.run(step)).ok
    again = {metric.name: metric.value for metric in trial.facts().metrics}
    found = values(facts)
    assert found["pruned_perplexity"] == pytest.approx(again["perplexity"], rel=1e-4)
    assert found["perplexity"] == pytest.approx(again["dense_perplexity"], rel=1e-4)
    assert found["pruned_perplexity"] != found["perplexity"]


def test_dropping_other_experts_than_those_is_wrong(monkeypatch):
    monkeypatch.setattr(
        scenes, "dropped", lambda routing, gone: routing.keep(routing.expert_N != 0) if gone else routing
    )
    failed = through(trial_of("suite.probe=[super_experts]", "suite.quantile=0.9"))
    assert "weights are zero" in failed.reason


def test_peaks_of_other_outputs_are_wrong(monkeypatch):
    true = taken_apart.hidden_from
    monkeypatch.setattr(taken_apart, "hidden_from", lambda *args: 1.01 * true(*args))
    for probe in ("super_experts", "lazy_neurons"):
        assert "put together" in through(trial_of(f"suite.probe=[{probe}]")).reason


# --- voids -----------------------------------------------------------------------------------------------------------


def skipped(trial, how, ids_T):
    with skipping(trial.probe.scene.model, how):
        final_TH = trial.probe.scene.forward(ids_T)
    return final_TH, torch.stack(how.active)


def test_nothing_skipped_is_the_model_and_everything_skipped_its_embedding():
    trial = trial_of("suite.probe=[voids]", "suite.mode=[skip]")
    scene, ids_T = trial.probe.scene, trial.probe.scene.windows()[0]
    every_LT = torch.ones(len(scene.layers), len(ids_T), dtype=torch.bool)
    plain_TH = scene.forward(ids_T)
    for mode in ("trace", "emulate", "skip"):
        assert torch.equal(skipped(trial, Skipping(mode, 0.8, forced=every_LT), ids_T)[0], plain_TH)
    final_TH, _ = skipped(trial, Skipping("skip", 0.8, "missing", every_LT), ids_T)
    torch.testing.assert_close(final_TH, plain_TH)
    decoder = scene.model.model
    with torch.no_grad():
        embedded_TH = decoder.norm(decoder.embed_tokens(ids_T))
    for mode in ("emulate", "skip"):
        assert torch.equal(skipped(trial, Skipping(mode, 0.8, forced=~every_LT), ids_T)[0], embedded_TH)


@pytest.mark.parametrize("kv", ["project", "missing"])
def test_what_a_token_decides_does_not_depend_on_later_tokens(kv):
    trial = trial_of("suite.probe=[voids]", "suite.mode=[skip]")
    ids_T = trial.probe.scene.windows()[0]
    whole_TH, whole_LT = skipped(trial, Skipping("skip", 0.3, kv), ids_T)
    assert 0 < whole_LT.double().mean() < 1
    for tokens in (1, 7, 20):
        part_TH, part_LT = skipped(trial, Skipping("skip", 0.3, kv), ids_T[:tokens])
        assert torch.equal(part_LT, whole_LT[:, :tokens])
        torch.testing.assert_close(part_TH, whole_TH[:tokens], rtol=1e-4, atol=1e-5)


def test_missing_keys_are_those_of_void_tokens():
    active_T = torch.tensor([True, False, True])
    assert (visible(active_T, torch.float32)[0, 0] == 0).tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


def test_keys_matter():
    trial = trial_of("suite.probe=[voids]", "suite.mode=[skip]")
    ids_T = trial.probe.scene.windows()[0]
    finals = [skipped(trial, Skipping("skip", 0.3, kv), ids_T)[0] for kv in ("project", "missing")]
    assert not torch.allclose(*finals)


@pytest.mark.parametrize("mode", ["trace", "emulate", "skip"])
def test_other_decisions_than_the_definitions_are_wrong(mode, monkeypatch):
    true = Skipping._decide
    monkeypatch.setattr(Skipping, "_decide", lambda self, *args, **kw: ~true(self, *args, **kw))
    failed = through(trial_of("suite.probe=[voids]", f"suite.mode=[{mode}]"))
    assert "than the definition says" in failed.reason


def test_a_trace_that_moves_anything_is_wrong(monkeypatch):
    true = Skipping.after

    def moved(self, layer, last, module, entering, kwargs, out):
        true(self, layer, last, module, entering, kwargs, out)
        return out * (1 + 1e-3)

    monkeypatch.setattr(Skipping, "after", moved)
    assert through(trial_of("suite.probe=[voids]", "suite.mode=[trace]")) is not None


# --- dictionaries, specialisation, lazy training ---------------------------------------------------------------------


def test_the_loss_is_computed_twice(monkeypatch):
    model = Dictionary(8, 16, torch.Generator().manual_seed(0))
    x_TD = torch.randn(10, 8, generator=torch.Generator().manual_seed(1))
    assert loss_again(model, x_TD, 0.3) == pytest.approx(float(model.loss(x_TD, 0.3).detach()), rel=1e-5)
    true = Dictionary.loss
    monkeypatch.setattr(Dictionary, "loss", lambda self, x, sparsity: true(self, x, 1.1 * sparsity))
    assert "entry by entry" in through(trial_of("suite.probe=[sae]")).reason


def test_z_in_full_recovers_everything_and_none_nothing():
    trial = trial_of("suite.probe=[sae]")
    assert through(trial) is None
    probe = trial.probe
    probe.told["sae"] = torch.cat(probe.z).double() * probe.scale
    probe.judge("sae")
    assert probe.nats["sae"] == pytest.approx(probe.nats["dense"], abs=1e-4)
    assert probe.errors["zero"] > probe.errors["pca"] > 0
    assert values(trial.facts())["components"] == max(1, min(64, round(probe.l0)))


def test_a_routing_by_place_is_found():
    trial = trial_of("suite.probe=[specialisation]")
    probe = trial.probe
    tokens = len(probe.scene.passage.ids) - 1
    place_T = torch.arange(tokens) % 32 * 8 // 32
    probe.chosen = {0: [place_T[:, None].repeat(1, 2)]}
    assert all(check.ok for check in probe.layer(0))
    assert probe.found["position", 0].nmi == pytest.approx(1)
    assert probe.found["position", 0].p == pytest.approx(1 / 21)
    assert probe.found["kind", 0].nmi < 0.7


def test_all_activations_kept_is_the_plain_training():
    pytest.importorskip("sklearn")
    _, probe = probed("suite.probe=[lazy_training]", "suite.widths=[12]", "suite.active=12", "suite.shape=transformer")
    assert probe.found[12, 1, True] == probe.found[12, 1, False]
    _, few = probed("suite.probe=[lazy_training]", "suite.widths=[12]", "suite.active=3")
    assert few.found[12, 1, True].after[0] <= 3 / 12
    assert few.found[12, 1, True] != few.found[12, 1, False]


def test_digits_are_dealt_once():
    pytest.importorskip("sklearn")
    images, labels, held, held_labels = dealt(0)
    assert len(images) == len(labels)
    assert len(held) == len(held_labels) == round(0.25 * 1797)
    assert len(images) + len(held) == 1797
    assert float(images.min()) == -1
    assert float(images.max()) == 1
