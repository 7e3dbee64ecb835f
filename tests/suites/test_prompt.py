"""Windows with a prompt: what follows is judged, and a routing may look ahead within the prompt and no further."""

from __future__ import annotations

import pytest
import torch

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.quality.trial import AccuracyTrial

TEXT = ("model.layers=all", "suite.tokens=256", "suite.window=64")
PROMPT = ("suite.prompt=40",)
ODP = ("axes.routing=odp", "params.routing.odp.protect=0.25")


@pytest.fixture(autouse=True)
def _cache(cache, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(cache))


def plan_of(*given_settings):
    return planned(["suite=accuracy", *given_settings], Registry.load())[0]


def judged(*given_settings):
    (case,) = plan_of(*given_settings).cases
    trial = AccuracyTrial(case, Registry.load())
    for step in range(trial.steps):
        check = trial.verify(step, trial.run(step))
        assert check.ok, check.reason
    return trial


def test_without_a_prompt_a_case_is_what_it_was():
    with_none, told = (plan_of("model=smollm2", *more).cases[0] for more in ((), ("suite.prompt=0",)))
    assert with_none.workload == told.workload == {"window": 256}
    assert with_none.group_key != plan_of("model=smollm2", "suite.prompt=8").cases[0].group_key
    with pytest.raises(MoebenchError, match="prompt=256 must be shorter than window=256"):
        plan_of("suite.prompt=256")


def test_what_follows_the_prompt_is_judged_as_it_was_without_one(smoke):
    whole, after = judged(*smoke, *TEXT), judged(*smoke, *TEXT, *PROMPT)
    for all_TC, some_TC in zip(whole.scores, after.scores, strict=True):
        assert torch.equal(all_TC[40:], some_TC)
    assert {metric.name: metric.n for metric in after.facts().metrics}["kl_to_dense"] == 4 * 24


def test_protection_is_judged_after_a_prompt_and_refused_without(smoke):
    (refused,) = plan_of(*smoke, *TEXT, *ODP).refused
    assert "looks at later tokens" in refused.refusal
    assert refused.refusal.endswith("give suite.prompt=N, or use suite=routing.")
    (drawn,) = plan_of(*smoke, *TEXT, *PROMPT, "axes.routing=expert_choice").refused
    assert drawn.refusal.endswith("which a language model must not; use suite=routing.")
    trial = judged(*smoke, *TEXT, *PROMPT, *ODP)
    assert trial.model.config._attn_implementation != "eager", "the model is as it was"
    for call in trial.changed.calls:
        attn = call.block.attn
        assert attn.shape[-2:] == (64, 64)
        torch.testing.assert_close(attn.sum(-1), torch.ones(attn.shape[:-1]))
        assert not bool(attn.triu(1).any())
        assert int((call.routing.k_T[:40] == 2).sum()) >= 10, "a quarter of the prompt is protected"
        assert int((call.routing.k_T == 1).sum()) > 0


def test_nothing_that_follows_a_prompt_changes_its_routing(smoke):
    """The same window with another end: what was decided up to the change is the same."""
    (case,) = plan_of(*smoke, *TEXT, *PROMPT, *ODP).cases
    trial = AccuracyTrial(case, Registry.load())
    trial.run(0)
    before = [call.routing.to_dense() for call in trial.changed.calls]
    trial.dense.entering[50:64] = trial.dense.entering[60:74].clone()
    trial.run(0)
    after = [call.routing.to_dense() for call in trial.changed.calls]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[:50], other[:50], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(one[50:], other[50:])
