"""The sources are clean under every rung, and each rung kills the bugs that are put into them."""

from dataclasses import replace

import pytest
from cuda_mutants import MUTANTS, UNSEEN

from moebench.kernels.cuda import host

pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing() or "-")
SEVERAL = [host.Schedule(order, late, 3, 1) for order in host.ORDERS for late in (False, True)]
ONE = [host.Schedule("random", True, 6, 5)]


@pytest.fixture(scope="module")
def layers(lab):
    """Small layers by name: (layer or devices, its script), each of two calls with different routings."""
    problems = lab.problems

    def script(made, steps):
        return made, lab.replay.Script(steps)

    def layer(kinds, tokens, hidden, width, variant="fused", experts=5, blocks=3):
        routings = [problems.routing(kind, tokens, experts, 3) for kind in kinds]
        made = problems.Layer(routings, hidden, width)
        return script(made, made.steps(variant, blocks=blocks))

    devices = problems.Devices(2, 2, 7, 40, 24)
    return {
        "fused": layer(("dynamic_k", "hot"), 19, 56, 40),
        "odd": layer(("two", "hot"), 19, 53, 39),
        "dropped": layer(("dropped", "none"), 30, 56, 24),
        "idle": layer(("two", "hot"), 3, 40, 56, experts=2, blocks=6),
        "two_kernels": layer(("two", "dynamic_k"), 6, 24, 40, "two_kernels", experts=2),
        "devices": script(devices, devices.steps(blocks=2)),
    }


def wrong(made, script, outcome):
    """Return what the oracle says of the outputs that it refuses."""
    several = hasattr(made, "layers")
    pairs = zip(made.layers, made.outs, strict=True) if several else [(made, made.outs)]
    checks = [check for layer, outs in pairs for check in layer.verdicts([script.found(outcome, out) for out in outs])]
    return [check for check in checks if not check.ok]


def test_the_layers_have_enough_steps_for_bugs_of_a_pipeline(layers, lab):
    for made, _ in layers.values():
        one = made.layers[0] if hasattr(made, "layers") else made
        steps = -(-one.sizes.hidden // lab.problems.SMALL.bk)
        assert steps >= 3 or one.sizes.width > 2 * lab.problems.SMALL.bk


@pytest.mark.parametrize("rung", ["plain", "asan", "tsan"])
@pytest.mark.parametrize("name", ["fused", "odd", "dropped", "idle", "two_kernels", "devices"])
def test_the_sources_are_clean(layers, programs, tmp_path, rung, name):
    made, script = layers[name]
    schedules = SEVERAL if rung == "plain" else ONE
    done = script.run(programs(rung), schedules, tmp_path)
    assert (done.code, done.said, len(done.outcomes)) == (0, "", len(schedules))
    for outcome in done.outcomes:
        assert not outcome.report.failed, outcome.report.message
        assert not wrong(made, script, outcome)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.name)
def test_each_mutant_is_killed_by_its_rung(layers, programs, lab, tmp_path, mutant):
    made, script = layers[mutant.layer]
    number = lab.mutants.numbered(mutant.name)
    schedules = [replace(one, mutant=number) for one in ONE]
    rung = mutant.rung if mutant.rung in ("asan", "tsan") else "plain"
    done = script.run(programs(rung), schedules, tmp_path)
    if rung == "plain":
        assert done.code == 0, done.said
        (outcome,) = done.outcomes
        said = outcome.report.message.decode()
        assert bool(outcome.report.failed) == (mutant.rung == "stuck"), said
        assert mutant.said in said
        assert mutant.rung == "stuck" or wrong(made, script, outcome)
    else:
        assert done.code != 0
        assert (mutant.said or "data race") in done.said


@pytest.mark.parametrize("name", UNSEEN)
def test_numbers_alone_do_not_see_every_mutant(layers, programs, lab, tmp_path, name):
    number = lab.mutants.numbered(name)
    made, script = layers[MUTANTS[number - 1].layer]
    done = script.run(programs("plain"), [replace(one, mutant=number) for one in SEVERAL], tmp_path)
    assert len(done.outcomes) == len(SEVERAL)
    assert not any(outcome.report.failed or wrong(made, script, outcome) for outcome in done.outcomes)
