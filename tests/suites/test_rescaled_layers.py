"""Layers whose experts read rescaled inputs, through the trials of every suite that runs a layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moebench.bench.config import load
from moebench.bench.plan import make_plan
from moebench.contracts import Registry
from moebench.suites.layer import LayerTrial
from moebench.suites.layer_training import TrainingTrial
from moebench.suites.quality.block import MoEBlock, relative_error
from moebench.suites.subject import make_batch
from moebench.suites.tasks.block import Rows, TaskBlock

REGISTRY = Registry.load()
OUTLIERS = ("axes.structure=outliers", "params.structure.outliers.factor=64")
EAQUANT = ("axes.quantization=eaquant", "params.quantization.eaquant.group=null", "calibration.tokens=256")
LAYER = ("suite=throughput", "model=tiny", "axes.tokens=9")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan(*settings):
    return make_plan(load([*settings, "seed=0"], REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)


def trial_of(*settings, kind=LayerTrial):
    made = plan(*LAYER, *settings)
    assert not made.refused, made.refused[0].refusal
    (case,) = made.cases
    return kind(case, REGISTRY)


def all_ok(trial):
    for _ in range(2):
        trial.begin_turn()
        for step in range(trial.steps):
            check = trial.verify(step, trial.run(step))
            assert check.ok, check.reason


@pytest.mark.parametrize("boundary", ["topk", "sorted", "logits"])
@pytest.mark.parametrize("backend", ["reference", "eager", "batched", "grouped"])
def test_every_backend_runs_rescaled_layers_at_every_boundary(boundary, backend):
    trial = trial_of(*OUTLIERS, *EAQUANT, f"axes.boundary={boundary}", f"axes.backend={backend}")
    all_ok(trial)
    layer = trial.subject.layer
    assert layer.input_scale_H is not None
    assert layer.store.act_bits == 4
    traffic = REGISTRY.get("traffic", trial.case.traffic.name).create(trial.case.traffic.params)
    x_TH = traffic.hidden(trial.subject.source, trial.case.layers[0], 9, 0, trial.case.seed)
    assert torch.equal(trial.batches[0].x_TH, layer.reads(x_TH))
    assert not torch.equal(trial.batches[0].x_TH, x_TH)


def test_a_layer_that_is_given_inputs_without_their_factor_fails_its_oracle():
    trial = trial_of(*OUTLIERS, *EAQUANT, "axes.backend=eager")
    trial.begin_turn()
    trial.x[0].div_(trial.subject.layer.input_scale_H.to(trial.x[0].dtype))
    assert not trial.verify(0, trial.run(0)).ok


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_bits_run_packed(dtype):
    told = [f"params.quantization.eaquant.{name}=8" for name in ("bits", "act_bits", "router")]
    trial = trial_of(*EAQUANT, *told, f"axes.dtype={dtype}", "axes.backend=packed")
    assert trial.case.execution.weights == "packed"
    all_ok(trial)


def test_facts_count_the_gate_as_packed_and_the_experts_that_stay_short():
    values = {}
    for bits in ("4", "null"):
        trial = trial_of(*EAQUANT, f"params.quantization.eaquant.router={bits}", "axes.backend=eager")
        values[bits] = {metric.name: metric.value for metric in trial.facts().metrics}
    spec = trial.subject.spec
    assert values["4"]["router_bytes"] == spec.experts * (spec.hidden // 2 + 2)
    assert values["null"]["router_bytes"] == spec.experts * spec.hidden * 4
    assert values["4"]["calibration_short_experts"] >= 0
    plain = {metric.name for metric in trial_of("axes.backend=eager").facts().metrics}
    assert "router_bytes" in plain
    assert "calibration_short_experts" not in plain


def test_a_training_step_reads_rescaled_inputs():
    settings = ("axes.pass=forward_backward", "axes.residency=warm", "axes.backend=eager")
    all_ok(trial_of(*OUTLIERS, *settings, kind=TrainingTrial))


def blocks(*settings, kind=MoEBlock):
    """A block of the changed layer, and one of the plain one in the place of the dense model's."""
    plain, trial = trial_of("axes.backend=eager"), trial_of(*settings, "axes.backend=eager")
    dense = MoEBlock(0, plain.subject, plain.session.layer(0), [], 0, torch.nn.Identity())
    return kind(0, trial.subject, trial.session.layer(0), [], 0, dense), trial


def test_a_block_of_a_language_model_reads_rescaled_inputs_and_keeps_the_function():
    block, _ = blocks(*OUTLIERS)
    x_BTH = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    block(x_BTH)
    (call,) = block.calls
    assert call.check().ok, call.check().reason
    assert float(call.error_T.max()) < 1e-6, "outliers with a power of two change nothing"
    assert torch.equal(call.x_TH, block.subject.layer.reads(x_BTH.flatten(0, 1)))
    assert call.dense_routing is call.routing


def test_agreement_is_with_the_gate_before_it_was_rounded():
    told = ("params.quantization.eaquant.router=2", "params.quantization.eaquant.align=false")
    block, _ = blocks(*OUTLIERS, *EAQUANT, *told)
    x_BTH = torch.randn(4, 50, 64, generator=torch.Generator().manual_seed(0))
    block(x_BTH)
    (call,) = block.calls
    assert call.check().ok, call.check().reason
    exact = block.route(x_BTH.flatten(0, 1), [], block.subject.layer.exact_router)
    assert torch.equal(call.dense_routing.logits_TE, exact.logits_TE)
    assert not torch.equal(call.dense_routing.logits_TE, call.routing.logits_TE)


def test_tasks_read_rescaled_inputs():
    block, _ = blocks(*OUTLIERS, kind=TaskBlock)
    block.rows = Rows()
    x_BTH = torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    block.rows.begin(None, (torch.zeros(2, 5, dtype=torch.int64),), {})
    y_BTH = block(x_BTH)
    assert block.last.check().ok
    assert float(relative_error(y_BTH.flatten(0, 1), block.dense(x_BTH).flatten(0, 1)).max()) < 1e-6


@pytest.mark.parametrize("settings", [OUTLIERS, EAQUANT])
def test_experts_that_would_hand_the_factor_on_are_refused_in_the_plan(settings):
    refused = plan(*LAYER, *settings, "axes.routing=moepp", "axes.backend=eager").refused
    assert "which would not undo it; use axes.routing=topk" in refused[0].refusal


def test_batches_of_forced_traffic_are_rescaled_too():
    trial = trial_of(*OUTLIERS, "axes.traffic=uniform", "axes.backend=eager")
    all_ok(trial)
    bare = dataclasses.replace(trial.subject, layer=dataclasses.replace(trial.subject.layer, input_scale_H=None))
    scaled, plain = (make_batch(trial.case, REGISTRY, subject, 0) for subject in (trial.subject, bare))
    assert torch.equal(scaled.x_TH, trial.subject.layer.reads(plain.x_TH))
