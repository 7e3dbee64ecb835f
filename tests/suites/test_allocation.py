"""Plans of bits in cases: layers and models take the same, attention is quantized and comes back, bytes are counted."""

from __future__ import annotations

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.probing.scene import Scene
from moebench.suites.quality.attention import QuantizedAttention, attention_maps
from moebench.suites.quality.backends import BackendTrial
from moebench.suites.quality.stored import stored_metrics
from moebench.suites.quality.trial import AccuracyTrial
from moebench.suites.subject import prepare_subject

pytest.importorskip("transformers")

REGISTRY = Registry.load()
MIXED = [
    "axes.quantization=mixed",
    "params.quantization.mixed.scope=model",
    "params.quantization.mixed.bits=[2,4]",
    "params.quantization.mixed.group=16",
    "params.quantization.mixed.codec=rtn",
    "params.quantization.mixed.budget=4.7",
    "calibration.tokens=64",
]
OLMOE = ["model=tiny-olmoe", "model.layers=[0,2,3]", "params.quantization.mixed.over=[0,2,3]", *MIXED]
ACCURACY = ["suite=accuracy", "suite.tokens=64", "suite.window=64", *OLMOE]
ATTENTION = ["params.quantization.mixed.attention=true", "params.quantization.mixed.by=attention"]


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan_of(*given):
    return planned(list(given), REGISTRY)[0]


def cases(*given):
    plan = plan_of(*given)
    assert not plan.refused, plan.refused[0].refusal
    return plan.cases


def test_cases_of_a_layer_and_of_the_model_take_the_same_bits():
    rule = "params.quantization.mixed.by=greedy"
    (whole,) = cases(*ACCURACY, rule)
    trial = AccuracyTrial(whole, REGISTRY)
    layers = cases("suite=throughput", *OLMOE, rule, "axes.backend=eager", "axes.tokens=32")
    assert [case.layers for case in layers] == [(0,), (2,), (3,)]
    for case in layers:
        alone = prepare_subject(case, REGISTRY).layer
        assert alone.bits == trial.subjects[case.layers[0]].layer.bits
        assert [w.scheme.bits for w in alone.store.down] == list(alone.bits.experts)
    assert len({trial.subjects[i].layer.bits for i in trial.subjects}) > 1, "layers differ, or this shows nothing"


def test_the_stored_bits_of_a_model_count_experts_and_attention_and_keep_the_budget():
    (case,) = cases(*ACCURACY, *ATTENTION)
    trial = AccuracyTrial(case, REGISTRY)
    plan = trial.subjects[0].plan
    metrics = {metric.name: metric.value for metric in stored_metrics(trial.changed)}
    assert metrics["stored_bits_per_weight"] == pytest.approx(plan.cost, rel=1e-12)
    assert metrics["stored_bits_per_weight"] <= 4.7
    assert metrics["planned_bits_per_weight"] == plan.cost
    assert [bits.attention for bits in plan.layers.values()] == [4, 4, 4]
    experts = sum(subject.layer.store.nbytes for subject in trial.subjects.values())
    assert metrics["expert_bytes"] == experts
    maps = [linear for index in (0, 2, 3) for linear in attention_maps(trial.model, index).values()]
    assert trial.changed.attention.nbytes == sum(w.numel() for w in (m.weight for m in maps)) * 6 / 8


def test_attention_is_quantized_for_the_windows_alone_and_its_error_shows():
    (quantized,) = cases(*ACCURACY, *ATTENTION)
    (spared,) = cases(*ACCURACY, "params.quantization.mixed.by=first")
    trials = [AccuracyTrial(case, REGISTRY) for case in (quantized, spared)]
    originals = [linear.weight for linear in attention_maps(trials[0].model, 2).values()]
    kept = [weight.clone() for weight in originals]
    calls = [trial.run(0) for trial in trials]
    after = [linear.weight for linear in attention_maps(trials[0].model, 2).values()]
    assert all(a is b for a, b in zip(originals, after, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept, after, strict=True))
    assert all(trial.verify(0, call).ok for trial, call in zip(trials, calls, strict=True))
    first = [call[0].x_TH for call in calls]
    assert not torch.equal(*first), "the first changed layer reads what quantized attention says"
    dense_TH = trials[1].changed.calls[0].x_TH
    assert torch.equal(trials[0].dense.reading[0], dense_TH), "which is held against what it reads in the dense model"
    assert trials[1].changed.attention.packed == []


def test_both_sides_of_backend_kl_have_the_attention_quantized():
    settings = ["suite=backend_kl", "suite.tokens=64", "suite.window=64", "axes.backend=reference", *OLMOE, *ATTENTION]
    (case,) = cases(*settings)
    trial = BackendTrial(case, REGISTRY)
    window = trial.run(0)
    assert float(window.scores_TC[:, 2].abs().max()) == 0
    assert trial.verify(0, window).ok


def test_probes_read_what_quantized_attention_says():
    (case,) = cases(*ACCURACY, *ATTENTION)
    scene = Scene(case, REGISTRY)
    (ids_T,) = scene.windows()
    found = scene.forward(ids_T), scene.undropped(ids_T)
    torch.testing.assert_close(*found)
    scene.changed.attention.packed = []
    for made_TH, spared_TH in zip(found, (scene.forward(ids_T), scene.undropped(ids_T)), strict=True):
        assert not torch.allclose(made_TH, spared_TH)
    scene.close()


def test_what_a_suite_cannot_do_is_refused_in_a_sentence():
    layer = ["suite=throughput", "axes.backend=eager", "axes.tokens=32"]
    (refused,) = {item.refusal for item in plan_of(*layer, *OLMOE, *ATTENTION).refused}
    assert "attention=true quantizes what is around the layers, which this suite does not run" in refused
    elsewhere = [*ACCURACY, "params.quantization.mixed.over=[0,2]", "params.quantization.mixed.by=first"]
    (item,) = plan_of(*elsewhere).refused
    assert "layer 3 has no part in a budget over layers [0, 2]; change over." in item.refusal
    with pytest.raises(MoebenchError, match="give scope=model"):
        plan_of("suite=throughput", "model=tiny", "axes.quantization=mixed", "params.quantization.mixed.by=first")


def test_shared_experts_of_a_layer_case_are_quantized():
    settings = [
        "suite=throughput",
        "model=tiny",
        "model.shared_width=32",
        "axes.backend=eager",
        "axes.tokens=32",
        *MIXED,
    ]
    (case,) = cases(*settings, "params.quantization.mixed.shared=true", "params.quantization.mixed.by=shared")
    subject = prepare_subject(case, REGISTRY)
    assert subject.layer.shared_store.down[0].scheme.bits == 4
    assert torch.equal(subject.layer.shared.down, subject.layer.shared_store.weights(0)[1])
    assert set(subject.plan.layers) == set(subject.source.shape.moe_layers)


def test_a_model_without_linear_attention_is_told():
    class Bare:
        self_attn = torch.nn.Module()

    model = torch.nn.Module()
    model.model = torch.nn.Module()
    model.model.layers = [Bare()]
    with pytest.raises(MoebenchError, match=r"layer 0 has no attention of linear maps to change"):
        attention_maps(model, 0)
    assert QuantizedAttention(model, None, {}).nbytes == 0
