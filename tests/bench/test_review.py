"""What a turn must not allow: an answer kept from another call, or a sample that says more than was done."""

from __future__ import annotations

import gc
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moebench.bench.cli import main
from moebench.bench.config import EngineConfig, load
from moebench.bench.plan import make_plan
from moebench.bench.progress import Progress
from moebench.bench.ring import WorkerTimeoutError
from moebench.bench.rows import measured_rows
from moebench.bench.runner import Runner
from moebench.bench.sampling import MAX_CALLS, Member, Phases, RingLostError, Sitting, whole_rounds
from moebench.bench.worker import Worker, _Held
from moebench.contracts import Check, MoebenchError, Registry, Status

# ---------------------------------------------------------------------------------------------------------------------
# Rounds


class Rounds:
    """A trial that writes down what the engine asks of it."""

    def __init__(self, steps, state="none"):
        self.steps, self.state, self.asked = steps, state, []

    def begin_turn(self):
        self.asked.append("begin")

    def run(self, step):
        self.asked.append(step)
        return (step, len(self.asked))

    def verify(self, step, output):
        return Check(output[0] == step, 0.0, flips=1)


@pytest.mark.parametrize("residency", ["warm", "cold"])
@pytest.mark.parametrize(("steps", "calls", "first"), [(3, 9, 0), (3, 9, 2), (1, 4, 0), (5, 4, 3), (3, 7, 1)])
def test_no_input_is_used_twice_without_being_exchanged(steps, calls, first, residency, case):
    trial = Rounds(steps)
    held = _Held(trial, case(residency=residency))
    reply = held.turn(first, calls)
    assert len(reply["ns"]) == calls
    timed = trial.asked[1:] if residency == "warm" else trial.asked  # the untimed call comes before the first exchange
    rounds = " ".join(map(str, timed)).split("begin")[1:]
    assert [step for part in rounds for step in map(int, part.split())] == [(first + n) % steps for n in range(calls)]
    assert all(len(set(part.split())) == len(part.split()) for part in rounds)
    check = held.verify()
    assert check.ok
    assert check.flips == len(rounds[-1].split())  # every output of the last round, and no output that was exchanged


def test_a_stream_is_called_for_its_samples_alone(case):
    """A call before them would leave its marks in what they find."""
    trial = Rounds(4, "stream")
    reply = _Held(trial, case(residency="warm")).turn(0, 4)
    assert trial.asked == ["begin", 0, 1, 2, 3]
    assert len(reply["ns"]) == 4


@given(st.integers(1, 10**6), st.integers(1, 2000))
def test_a_turn_of_several_rounds_has_whole_ones(calls, steps):
    rounded = whole_rounds(calls, steps)
    assert 1 <= rounded <= MAX_CALLS
    assert rounded <= steps or rounded % steps == 0
    assert rounded >= min(calls, MAX_CALLS - steps + 1)


# ---------------------------------------------------------------------------------------------------------------------
# What a case says of itself


REGISTRY = Registry.load()


def planned(*settings):
    return make_plan(load(settings, REGISTRY, 2.0**32, 2.0**20), REGISTRY, 2.0**32)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (["axes.routing=moepp"], "constant experts"),
        (["axes.sparsity=teal"], "through sparsity"),
        (["axes.quantization=int8"], "quantized weights have no gradient"),
        (["axes.residency=cold"], "one copy of its weights"),
        (["axes.backend=batched"], "batched has no backward"),
        (["axes.threads=4096"], "4096 threads do not fit"),
    ],
)
def test_a_training_step_that_could_not_be_checked_is_refused_before_it_runs(settings, words):
    plan = planned("suite=training", "model=tiny", "axes.backend=eager", *settings)
    assert not plan.cases
    assert all(words in (item.refusal or "") for item in plan.refused)


def test_who_folds_and_still_refuses_says_why():
    (refused,) = planned("suite=selftest", "axes.routing=moepp", "axes.backend=packed").refused
    assert "fold" not in refused.refusal
    assert "quantized" in refused.refusal


def test_every_number_of_threads_is_probed():
    plan = planned("suite=roofline", "axes.threads=[1,4096]")
    assert len(plan.cases) == len(plan.refused)
    assert {case.threads for case in plan.cases} == {1}


def test_a_rate_is_that_of_the_fastest_process(case):
    members = []
    for ns in (500, 1000):
        member = Member(case(), wall_ns=[ns], cpu_ns=[ns], turns=[0], cost={"flops": 1000.0})
        member.facts = {"notes": {"rate": "peak_flops", "per": "flops"}}
        members.append(member)
    metrics = measured_rows("r", members, [], ["a", "b"])["metrics"]
    assert [metric["value"] for metric in metrics if metric["name"] == "peak_flops"] == [2e9]


def test_who_was_measured_alone_says_so(case):
    member = Member(case(), "alone", wall_ns=[1], cpu_ns=[1], turns=[0])
    assert {row["mode"] for row in measured_rows("r", [member], [], ["a"])["timings"]} == {"alone"}


def test_flips_of_a_case_that_runs_once_are_those_of_all_steps(case):
    trial = Rounds(3)
    worker = Worker(channel=type("Nobody", (), {"send": lambda self, message: None})())
    worker._number, worker.trials["t"] = 1, _Held(trial, case(protocol="once"))
    assert worker.run_once("t")["check"]["flips"] == 3


def test_a_case_that_only_works_alone_is_labelled(engine, query, store_problems, tmp_path):
    plugin = Path(__file__).parent.parent / "plugins" / "once_bitten.py"
    settings = ["axes.routing=topk", "axes.backend=[eager,once_bitten]", "engine.seconds=0.02", "--quiet"]
    done = engine(
        tmp_path / "store", "run", f"plugin={plugin}", "suite=selftest", *settings, MOEBENCH_MARK=str(tmp_path / "mark")
    )
    assert done.returncode == 0, done.stderr
    rows = query(tmp_path / "store", "SELECT backend, status, reason, mode, sitting FROM timings WHERE clock = 'wall'")
    found = {backend: row for backend, *row in rows}
    assert found["eager"][:3] == ["ok", None, "interleaved"]
    status, reason, mode, sitting = found["once_bitten"]
    assert (status, mode) == ("ok", "alone")
    assert "measured alone" in reason
    assert "SIGKILL" in reason
    assert sitting != found["eager"][3]
    assert store_problems(tmp_path / "store") == []


# ---------------------------------------------------------------------------------------------------------------------
# Settings


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("engine.memory=5", "at most 1"),
        ("engine.steady_tolerance=-1", "from 0"),
        ("engine.warmup_seconds=-1", "from 0"),
        (f"seed={2**64}", "at most 64 bits"),
        ("experiment=quick", "names its own suites"),
        ("axes.backend=[]", "is empty"),
    ],
)
def test_settings_without_a_meaning_are_told_in_a_sentence(setting, words):
    with pytest.raises(MoebenchError, match=words):
        planned("suite=selftest", setting)


def test_a_model_given_as_an_axis_brings_the_axes_that_it_needs():
    def structures(*models):
        config = load([f"axes.model=[{','.join(models)}]", "suite=throughput"], REGISTRY, 2.0**32, 2.0**20)
        return [choice.name for choice in config.blocks[0].axes["structure"]]

    assert structures("smollm2") == ["split"]
    assert structures("tiny") == ["none"]
    assert structures("smollm2", "tiny") == ["none"]  # where models differ the structure must be given


def test_a_report_that_cannot_be_written_is_one_sentence(monkeypatch, tmp_path, capsys):
    (tmp_path / "runs").mkdir()

    def refuse(*arguments):
        raise IsADirectoryError(21, "Is a directory")

    monkeypatch.setattr("moebench.dashboards.report.write_report", refuse)
    assert main(["report", "--store", str(tmp_path), "-o", str(tmp_path)]) == 2
    assert "cannot be written (Is a directory)" in capsys.readouterr().err


def test_precision_is_looked_at_seldom(case, monkeypatch):
    looks = []
    monkeypatch.setattr("moebench.bench.sampling.precise", lambda ns, precision: looks.append(len(ns)))
    sitting = Sitting(None, EngineConfig(seconds=1e9, min_calls=1), 0, Phases(), print)
    member = Member(case())
    for _ in range(2000):
        member.wall_ns.append(1)
        assert not sitting._enough([member], 0.0, 1e9)
    assert len(looks) < 120
    assert all(b >= 1.05 * a for a, b in itertools.pairwise(looks))


# ---------------------------------------------------------------------------------------------------------------------
# What goes wrong is told


def test_a_call_that_raises_leaves_the_garbage_collector_on(case):
    trial = Rounds(1)
    trial.run = lambda step: [][0]
    with pytest.raises(IndexError):
        _Held(trial, case(residency="cold")).turn(0, 1)
    assert gc.isenabled()


def test_a_timeout_names_the_setting_that_bounds_it(case):
    class Slow:
        def request(self, op, timeout, **arguments):
            raise WorkerTimeoutError(f"no answer to '{op}' within {timeout:g} s; the worker was killed.")

    ring = type("OneRing", (), {"worker": lambda self, environment: Slow()})()
    member = Member(case())
    with pytest.raises(RingLostError):
        Sitting(ring, EngineConfig(), 0, Phases(), lambda text: None).measure([member])
    assert member.reason.count(".") == 2  # one sentence, and the name of the setting
    assert "raise engine.prepare_timeout" in member.reason


def test_an_anchor_that_fails_in_a_later_piece_is_counted_and_told(case, capsys):
    runner = Runner.__new__(Runner)
    runner.counts, runner.progress = {}, Progress(1, quiet=True)
    member = Member(case())
    member.end(Status.CRASHED, "killed")
    runner._tell_lost_anchor([Member(case()), member])
    assert runner.counts == {"crashed": 1}
    assert "killed" in capsys.readouterr().err


def test_references_are_made_before_a_backend_sees_the_weights(monkeypatch, tmp_path):
    import torch

    from moebench.backends.eager import Eager
    from moebench.suites.layer import LayerTrial

    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    honest = Eager.load

    def tampering(self, layers, specs):
        for store in layers.values():
            store.gate_up.mul_(torch.tensor(1.01))
        return honest(self, layers, specs)

    monkeypatch.setattr(Eager, "load", tampering)
    (case,) = planned("suite=selftest", "axes.routing=topk", "axes.backend=eager", "seed=77").cases
    trial = LayerTrial(case, REGISTRY)
    trial.begin_turn()
    assert not trial.verify(0, trial.run(0)).ok
