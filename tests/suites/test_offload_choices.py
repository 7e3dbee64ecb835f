"""What a suite ``offload`` trial may do otherwise: defer, fetch few bits, compute in place, batch, generate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "offload_lab.py")

LAYERS, EXPERTS, K, STEPS = 4, 8, 2, 6


@pytest.fixture(autouse=True, scope="module")
def _cache(cache):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOEBENCH_CACHE", str(cache))
        yield


def ok(run):
    assert all(check.ok for check in run.checks), run.checks
    return run


# --- executions ------------------------------------------------------------------------------------------------------


def test_deferral_computes_what_it_says_and_tells_how_far_that_is(smoke):
    with ok(lab.run_of(*smoke, *lab.offloaded(policy="static", execution="'defer:1'"))) as run:
        assert run.checks[0].error == 0.0  # the same bits as deferral in memory
        how = {event.how for events in run.events for event in events if event.kind == "miss"}
        assert how == {"fetch", "deferred"}
        values = run.values()
    assert values["kl_to_exact"] > 1e-6
    assert values["output_error"] > 1e-4
    assert 0 <= values["agreement_with_exact"] <= 1


def test_few_bits_are_read_and_told_how_far_off_they_are(smoke):
    settings = lab.offloaded(policy="hobbit", execution="['hobbit:0.4',fetch]", low="int8")
    with_, without = (lab.Run(case) for case in lab.cases(*smoke, *settings))
    with ok(with_), ok(without):
        assert "low" in {event.how for events in with_.events for event in events if event.kind == "miss"}
        values, full = with_.values(), without.values()
    assert values["kl_to_exact"] > 0
    assert values["output_error"] > 1e-6
    assert values["bytes_per_step"] / values["misses_per_step"] < full["bytes_per_step"] / full["misses_per_step"]
    assert "kl_to_exact" not in full  # it is exact


def test_what_defers_nothing_is_exact():
    """All experts at hand: nobody is missing, so that nothing is put off, and the distance is 0."""
    with ok(lab.run_of(*lab.offloaded(policy="static", execution="'defer:1'", capacity=1.0))) as run:
        assert run.values()["output_error"] == 0.0


def test_a_wrong_deferral_is_wrong():
    with ok(lab.run_of(*lab.offloaded(policy="static", execution="'defer:1'"))) as run:
        run.trial.expected = run.trial.recording.final  # as if nothing had been deferred
        assert not run.held.verify().ok


HOST = (
    "axes.quantization=int4",
    "params.quantization.int4.group=32",
    "axes.dtype=bfloat16",
    "axes.tokens=3",
    "model.hidden=64",
    "model.width=64",
)


def test_the_tier_in_ram_brings_or_computes_in_place():
    settings = lab.offloaded(tier="host", execution="[fetch,in_place,fiddler,'fiddler:max',duplex]")
    runs = {case.backend.params["execution"]: lab.Run(case) for case in lab.cases(*HOST, *settings)}
    for name, run in runs.items():
        with ok(run):
            how = {event.how for events in run.events for event in events if event.kind == "miss"}
            assert how <= {"fetch", "in_place"}
            if name in ("fetch", "in_place"):
                assert how == {name}
            assert run.checks[0].error <= run.checks[0].bound
    assert (runs["fetch"].checks[0].error, runs["fetch"].checks[0].bound) == (0.0, 0.0)
    assert runs["in_place"].checks[0].error > 0  # products on codes round otherwise


def test_page_cache_and_more_readers_are_as_exact():
    with ok(lab.run_of(*lab.offloaded(io="page_cache", readers=3, staging=1, prefetch="gate"))) as run:
        assert run.checks[0].error == 0.0


# --- order and batches -----------------------------------------------------------------------------------------------


def test_token_by_token_asks_token_by_token_and_misses_more():
    settings = ["axes.tokens=4", "axes.traffic=zipf", *lab.offloaded()]
    with ok(lab.run_of(*settings)) as one, ok(lab.run_of(*settings, "suite.order=token")) as other:
        by_expert, by_token = one.values(), other.values()
        accesses = other.trial.recording.accesses[other.trial.recording.prompt_accesses :]
        assert len(accesses) == 4 * LAYERS * STEPS
        assert all(len(access.experts) == K for access in accesses)
    assert by_token["misses_per_step"] == by_expert["by_token_misses_per_step"]
    assert by_token["experts_per_step"] == 4 * LAYERS * K > by_expert["experts_per_step"]
    assert "by_token_misses_per_step" not in by_token


def test_batches_by_experts_need_fewer_of_them():
    settings = ["axes.tokens=4", "axes.traffic=domains", "params.traffic.domains.experts=2", *lab.offloaded()]
    needed = {}
    for batching in ("first_come", "expert_aware"):
        with ok(lab.run_of(*settings, f"suite.batching={batching}", "suite.steps=16")) as run:
            needed[batching] = run.values()
            waiting = run.trial.stack.waiting
            assert sorted(token for step in waiting.steps for token in step) == list(range(64))
    assert needed["first_come"]["first_come_experts_per_step"] == needed["first_come"]["experts_per_step"]
    assert needed["expert_aware"]["first_come_experts_per_step"] == needed["first_come"]["experts_per_step"]
    assert needed["expert_aware"]["experts_per_step"] < needed["first_come"]["experts_per_step"]


def test_steps_after_a_change_of_domain_are_told_apart():
    settings = ["axes.traffic=domains", "params.traffic.domains.period=3", "suite.steps=8", *lab.offloaded()]
    with ok(lab.run_of(*settings)) as run:
        found = run.metrics()
        (turn,) = run.trial.sampled
    assert (found["switch_step_time"].n, found["steady_step_time"].n) == (2, 6)  # the prompt is the domains' step 0
    assert found["switch_step_time"].value == (turn.step_ns[2] + turn.step_ns[5]) / 2


# --- other backends, and text ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "batched"])
def test_with_other_backends_all_experts_are_at_hand(backend):
    with ok(lab.run_of(f"axes.backend={backend}")) as run:
        assert run.trial.stack.layers.hint is None  # nobody reads hints: no gate is asked on the clock
        values = run.values()
        assert values["resident_bytes"] >= LAYERS * EXPERTS * 3 * 64 * 32 * 4
        assert set(values) == {"resident_bytes", "energy_per_step"}


def test_gates_are_asked_only_for_whoever_reads_hints():
    for prefetch, asked in (("gate", True), ("none", False), ("frequency", False)):
        with ok(lab.run_of(*lab.offloaded(prefetch=prefetch))) as run:
            assert (run.trial.stack.layers.hint is not None) == asked


def test_text_is_read_or_generated(smoke):
    read, made = (lab.run_of(*smoke, *lab.offloaded(), f"suite.feed={feed}") for feed in ("text", "generated"))
    with ok(read), ok(made):
        for run in (read, made):
            stack, logits = run.trial.stack, run.trial.recording.logits
            likeliest = [logits_BV.argmax(-1) for logits_BV in logits[:-1]]
            follows = [torch.equal(*pair) for pair in zip(stack.fed[1:], likeliest, strict=True)]
            assert all(follows) == (run is made)
        assert torch.equal(read.trial.stack.prompt_BP, made.trial.stack.prompt_BP)
        assert read.trial.input_sha256 != made.trial.input_sha256


def test_every_turn_is_the_same_and_seeds_are_not(smoke):
    with ok(lab.run_of(*smoke, *lab.offloaded(prefetch="gate"), turns=2)) as run:
        first = run.trial.recording
        assert len(run.trial.sampled) == 1
    with ok(lab.run_of(*smoke, *lab.offloaded(prefetch="gate"), "seed=1")) as run:
        assert run.trial.recording.accesses != first.accesses
