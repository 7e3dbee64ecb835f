"""What code must pass, what a roofline bound counts, and which cases suite ``static`` declares; nothing is compiled."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moebench.backends import triton as backend
from moebench.backends.plugins import Triton as Params
from moebench.bench.config import load
from moebench.bench.gate.cases import planned_cases
from moebench.bench.run import planned
from moebench.contracts import Evidence, MoebenchError, Registry
from moebench.kernels.isa import Resources
from moebench.kernels.occupancy import occupancy
from moebench.kernels.targets import DEVICES, TARGETS
from moebench.kernels.triton import tiles as triton_tiles
from moebench.kernels.triton.tiles import BARRED, SPACE
from moebench.suites.base import ELEMENT_SIZE
from moebench.suites.layer import layer_cost
from moebench.suites.static_bound import BoundTrial, balanced_cost, bound_seconds
from moebench.suites.static_kernels import KERNELS, kernel_named, parse_tile, tile_text
from moebench.suites.static_trial import broken_bar
from moebench.suites.subject import make_batch, prepare_subject

GOOD = Resources(128, 0, 0, 48 * 1024, 900, {"tensor": 32, "async_copy": 18, "barrier": 5, "atomic": 0})


@functools.cache
def registry():
    return Registry.load()


def plan_of(*settings):
    return planned(["suite=static", *settings], registry())[0]


def bar(found=GOOD, kernel="gate_up", dtype="bfloat16", target="sm_90", threads=256):
    on = TARGETS[target]
    held = occupancy(on, threads, found.registers, found.shared)
    return broken_bar(found, held, kernel_named(kernel), dtype, on)


def without(kind):
    return replace(GOOD, kinds={**GOOD.kinds, kind: 0})


def test_good_code_passes():
    assert bar() == ""


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (replace(GOOD, stack=8), "spills: 8 bytes of stack"),
        (replace(GOOD, spills=3, registers=32), "spills: 0 bytes of stack a thread, 3 spills"),
        (replace(GOOD, shared=227 * 1024 + 1), "more than the 232448 of a block on sm_90"),
        (without("tensor"), "no tensor instruction"),
        (without("async_copy"), "no async_copy instruction"),
    ],
)
def test_each_broken_bar_is_told(found, said):
    assert said in bar(found)


def test_a_block_that_does_not_fit_is_told():
    assert "by its registers" in bar(replace(GOOD, registers=255), threads=1024)


def test_bars_ask_for_what_a_kernel_and_a_target_have():
    assert bar(without("tensor"), dtype="float32") == ""
    assert bar(without("async_copy"), target="gfx942") == ""
    assert bar(without("tensor"), target="gfx942") != ""
    assert bar(without("tensor"), kernel="combine") == ""
    assert bar(without("async_copy"), kernel="moe_fused") != ""


def test_compiled_code_and_models_share_no_group_and_compiled_code_is_not_interpreted():
    plan = plan_of()
    kinds = [{case.evidence for case in group.cases} for group in plan.groups if group.cases]
    assert {Evidence.STATIC_COMPILE} in kinds
    assert {Evidence.MODEL} in kinds
    assert max(map(len, kinds)) == 1
    for case in (case for group in plan.groups for case in group.cases if case.evidence == Evidence.STATIC_COMPILE):
        assert case.environment == {"TRITON_INTERPRET": "0"}


def test_a_gate_runs_each_case_once_on_each_side():
    config = load(["suite=static", "suite.kernel=[combine]", "axes.tokens=[4]"], registry(), 2.0**33, 2.0**20)
    gated = planned_cases(config, registry(), 2.0**33)
    assert (gated.batches, gated.refused) == ((), ())
    assert len(gated.once) == len(TARGETS) + len(DEVICES)


def test_every_kernel_is_compiled_for_every_target_with_every_tile_or_says_why_not():
    plan = plan_of("suite.device=[]")
    run = {
        (one.backend.params["kernel"], one.backend.params["tile"], one.workload["target"])
        for group in plan.groups
        for one in group.cases
    }
    refused = {
        (one.case.backend.params["kernel"], one.case.backend.params["tile"], one.case.workload["target"])
        for one in plan.refused
    }
    assert not run & refused
    tiles = {tile_text(tile) for size in ("small", "large") for tile in SPACE["half", size]}
    for kernel in KERNELS:
        for target in TARGETS:
            own = {tile for name, tile, on in run | refused if (name, on) == (kernel.name, target)}
            assert own == tiles if kernel.matrices else len(own) == 1
    for one in plan.refused:
        assert any(reason in one.refusal for reason in ("shared memory", "CUDA C++", "code spills"))


def test_a_tile_that_spills_is_left_out_unless_it_is_named():
    (barred,) = BARRED["sm_80"]
    settings = (
        "axes.dtype=float32",
        "suite.device=[]",
        "suite.kernel=[gate_up]",
        "suite.target=[sm_80]",
        "axes.tokens=[4096]",
    )
    plan = plan_of(*settings)
    assert [one.case.backend.params["tile"] for one in plan.refused if "spills" in one.refusal] == [tile_text(barred)]
    named = plan_of(*settings, f"suite.tile=[{tile_text(barred)}]")
    assert [case.backend.params["tile"] for group in named.groups for case in group.cases] == [tile_text(barred)]


def test_backend_triton_knows_its_target_by_the_name_of_the_table(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert backend._target(torch.empty(1)) in TARGETS
    monkeypatch.setattr(torch.version, "hip", "6.4")
    told = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: told)
    assert backend._target(torch.empty(1)) in TARGETS


@pytest.mark.parametrize("target", ["sm_80", "sm_90"])
def test_backend_triton_leaves_out_what_spills_on_its_target(monkeypatch, target):
    """A layer on a tensor that is on no CPU takes the first tile of the space, or the next where that one is barred."""
    monkeypatch.setattr(backend, "_target", lambda x_TH: target)
    monkeypatch.setattr(backend, "_shared_limit", lambda x_TH: TARGETS[target].shared_per_block)
    plan = SimpleNamespace(Plan=lambda first, *others: first)
    experts = SimpleNamespace(gated=True, num_experts=8, gate_up=SimpleNamespace(form="dense"))
    executor = SimpleNamespace(experts=experts, tiles=triton_tiles, params=Params(), layer=plan)
    chosen = backend.TritonExecutor.plan(executor, torch.empty(1, device="meta"), assignments=10**5)
    first, second, *_ = SPACE["single", "large"]
    assert chosen == {"sm_80": second, "sm_90": first}[target]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["axes.dtype=float64", "suite.kernel=[gate_up]"], "does not compute in float64"),
        (["axes.dtype=float32", "suite.kernel=[moe_fused]", "suite.target=[sm_90]"], "does not compute in float32"),
        (["model=smollm2", "suite.kernel=[gate_up]"], "has no experts"),
    ],
)
def test_what_cannot_be_compiled_is_refused_in_the_plan(settings, said):
    plan = plan_of("suite.device=[]", *settings)
    assert plan.refused
    assert all(said in one.refusal for one in plan.refused)
    assert not any(group.cases for group in plan.groups)


@pytest.mark.parametrize("setting", ["kernel=[gate]", "target=[sm90]", "device=[h100]", "tile=[64x64]"])
def test_a_name_that_is_none_is_told(setting):
    with pytest.raises(MoebenchError, match=r"did you mean|write it as"):
        plan_of(f"suite.{setting}")


def test_tiles_are_named_so_that_they_can_be_read():
    for tiles in SPACE.values():
        assert [parse_tile(tile_text(one)) for one in tiles] == list(tiles)


def bound_trials(*settings):
    plan = plan_of("model=tiny", "suite.kernel=[combine]", "suite.target=[sm_80]", *settings)
    shape = registry().params("model", plan.groups[0].cases[0].model).shape()
    cases = [case for group in plan.groups for case in group.cases if case.evidence == Evidence.MODEL]
    return [BoundTrial(case, shape) for case in cases]


def test_a_bound_is_the_longer_of_computing_and_moving():
    trials = bound_trials("axes.tokens=[1,4096]", "axes.dtype=[bfloat16,float32]")
    assert len(trials) == 4 * len(DEVICES)
    for trial in trials:
        assert trial.verify(0, trial.run(0)).ok
        assert not trial.verify(0, trial.run(0) * 0.99).ok
        assert not trial.verify(0, trial.run(0) * 1.01).ok
    assert bound_seconds(trials[0].cost(0), 1e30, 2.0) == trials[0].cost(0).bytes / 2
    assert bound_seconds(trials[0].cost(0), 2.0, 1e30) == trials[0].cost(0).flops / 2


def test_a_bound_counts_the_work_as_measured_rows_do():
    case = (
        planned(["suite=throughput", "model=tiny", "axes.backend=eager", "axes.tokens=32"], registry())[0]
        .groups[0]
        .cases[0]
    )
    subject = prepare_subject(case, registry())
    batch = make_batch(case, registry(), subject, 0)
    measured = layer_cost(subject, batch, case)
    shape = registry().params("model", case.model).shape()
    assert torch.equal(batch.routing.counts_E > 0, torch.ones(8, dtype=torch.bool))  # all experts, as in the bound
    assert balanced_cost(shape, 32, ELEMENT_SIZE["float32"]) == measured
