"""Suite ``backend_kl``: backends that only round pass, one that is slightly wrong is caught and its expert named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import Registry
from moebench.suites.quality.backends import BackendTrial, kl_bound
from moebench.suites.quality.blame import blame, expert_errors
from moebench.suites.quality.scores import COLUMNS

pytest.importorskip("transformers")

PLUGIN = str(Path(__file__).parent.parent / "plugins" / "slightly_wrong.py")
SETTINGS = ("suite=backend_kl", "suite.tokens=128", "suite.window=128", "model=tiny-olmoe", "model.layers=[0,2,3]")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def trials(*given):
    registry = Registry.load([PLUGIN])
    plan = planned([*SETTINGS, *given], registry)[0]
    assert plan.cases, [item.refusal for item in plan.refused]
    return [BackendTrial(case, registry) for case in plan.cases]


def checked(trial):
    """(check, divergence) of the one window."""
    window = trial.run(0)
    return trial.verify(0, window), float(window.scores_TC[:, COLUMNS.index("kl")].mean())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_backends_that_round_pass_with_room(dtype):
    for trial in trials("axes.backend=[eager,batched,grouped]", f"axes.dtype={dtype}"):
        check, divergence = checked(trial)
        assert check.ok, (trial.case.backend.name, check.reason)
        assert divergence < trial.bound / 3
        assert {metric.name for metric in trial.facts().metrics} >= {
            "kl_to_reference",
            "kl_bound",
            "reference_agreement",
        }


def test_the_reference_is_at_distance_zero_from_itself():
    (trial,) = trials("axes.backend=reference")
    assert checked(trial)[1] == 0


@pytest.mark.parametrize(("layer", "expert"), [(0, 3), (2, 6), (3, 0)])
def test_one_expert_cut_instead_of_rounded_is_caught_and_named(layer, expert):
    wrong = (f"params.backend.slightly_wrong.layer={layer}", f"params.backend.slightly_wrong.expert={expert}")
    (trial,) = trials("axes.backend=slightly_wrong", *wrong)
    check, divergence = checked(trial)
    assert divergence > trial.bound
    assert not check.ok
    assert f"diverge by {divergence:.2g} nat" in check.reason
    assert f"layer {layer}, expert {expert} is off" in check.reason


def test_a_bias_that_every_row_forgives_is_seen_in_the_errors_of_the_experts():
    """A row may be off by 2e-5 in float32; the errors of experts tell half of that from rounding."""
    (trial,) = trials("axes.backend=eager")
    window = trial.run(0)
    call = window.calls[0]
    forgiven = replace(call, y_TH=call.y_TH * (1 + 1e-5))
    assert forgiven.check().ok
    assert float(expert_errors(forgiven).mean()) == pytest.approx(1e-5, rel=0.2)


def test_the_error_of_each_expert_is_told_apart():
    (trial,) = trials("axes.backend=eager")
    call = trial.run(0).calls[1]
    errors_E = torch.tensor([1e-3, 0.0, 0.0, 2e-3, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    off_TH = torch.zeros_like(call.y_TH)
    from moebench.moe.layer import assigned_output, assignments

    store = call.block.subject.layer.store
    for expert, token_N, weight_N in assignments(call.routing):
        term_NH = assigned_output(call.x_TH, store, expert, token_N) * weight_N[:, None]
        off_TH.index_add_(0, token_N, term_NH * float(errors_E[expert]))
    found_E = expert_errors(replace(call, y_TH=call.y_TH + off_TH))
    torch.testing.assert_close(found_E, errors_E, rtol=0.3, atol=4e-4)
    guilty = blame([replace(call, y_TH=call.y_TH + off_TH)])
    assert (guilty.layer, guilty.expert) == (2, 3)
    assert guilty.error == pytest.approx(2e-3, rel=0.1)


def test_the_bound_grows_with_rounding_and_with_layers():
    narrow, wide = kl_bound(torch.float32, 1, 4), kl_bound(torch.bfloat16, 1, 4)
    assert narrow < 1e-9 < 1e-4 < wide < 0.1
    assert kl_bound(torch.bfloat16, 2, 4) == pytest.approx(2 * wide, rel=1e-3)


def test_each_backend_is_a_case_and_quality_has_one():
    registry = Registry.load()
    backends = planned([*SETTINGS, "axes.backend=[eager,grouped]"], registry)[0].cases
    assert [case.backend.name for case in backends] == ["eager", "grouped"]
    assert len({case.method_key for case in backends}) == 1
    assert {case.protocol for case in backends} == {"once"}
