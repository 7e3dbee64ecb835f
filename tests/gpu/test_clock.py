"""What is launched when, what is waited for, and in which units: the clock of a GPU on one of virtual time."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import moebench
from moebench.bench.config import EngineConfig
from moebench.bench.flags import Limits, flags_of, throttling
from moebench.bench.gpu.clock import FLUSH_BYTES, DeviceClock, flush_bytes
from moebench.bench.gpu.nvml import Gpu, Reading
from moebench.bench.gpu.torch_device import open_device
from moebench.bench.rows import measured_rows
from moebench.bench.sampling import TURN_NS, Member, Phases, Sitting
from moebench.bench.worker import Worker
from moebench.contracts import Flag, MoebenchError
from moebench.dashboards.report import write_report
from moebench.results.database import connect_parts
from moebench.results.parts import write_part

COLD = ["flush", "record", "call", "record"]
WARM = ["record", "call", "record"]
LIMITS = Limits({"float32": 1.0}, {})
"""A limit that every call of a core would break: it is not a GPU's."""


@pytest.mark.parametrize(("flushes", "one_call"), [(True, COLD), (False, WARM)])
def test_a_turn_flushes_before_the_first_event_and_waits_once_at_its_end(virtual, flushes, one_call):
    device = virtual.Device()
    clock = DeviceClock(device, flushes)
    outputs = [clock.call(device.launch, step) for step in range(3)]
    assert [output.step for output in outputs] == [0, 1, 2]
    assert device.log == one_call * 3  # nothing else, and no wait
    assert clock.read() == [7_000] * 3  # the call alone, in ns
    assert device.log == [*one_call * 3, "wait"]
    assert clock.read() == []


@given(st.lists(st.integers(1, 10**9), min_size=1, max_size=20), st.booleans())
def test_every_call_has_its_own_time_in_nanoseconds(virtual, times, flushes):
    device = virtual.Device()
    clock = DeviceClock(device, flushes)
    for turn in range(2):  # events are used again in the next turn
        for ns in times:
            device.call_ns = ns + turn
            clock.call(device.launch, 0)
        assert clock.read() == [ns + turn for ns in times]


def test_a_graph_is_captured_off_the_clock_and_replayed(virtual):
    device = virtual.Device()
    clock = DeviceClock(device, flushes=False, graphs=True)
    clock.prepare(device.launch, 2)
    assert device.log == []
    first, second, again = (clock.call(device.launch, step) for step in (0, 1, 0))
    assert (first.step, second.step) == (0, 1)
    assert again is first  # its buffers, written anew
    assert device.log == ["record", "replay", "record"] * 3
    assert clock.read() == [7_000] * 3


def test_what_cannot_be_a_graph_is_told_in_one_sentence(virtual):
    clock = DeviceClock(virtual.Device(captures=False), flushes=False, graphs=True)
    with pytest.raises(MoebenchError, match=r"cannot be a CUDA graph \(operation not permitted [a-z ]*\); leave cuda"):
        clock.prepare(lambda step: None, 1)
    with pytest.raises(MoebenchError, match="warm L2"):
        DeviceClock(virtual.Device(), flushes=True, graphs=True)


@given(st.integers(0, 2**40))
def test_the_buffer_is_larger_than_twice_the_l2(l2_bytes):
    assert flush_bytes(l2_bytes) >= max(FLUSH_BYTES, 2 * l2_bytes)
    assert flush_bytes(0) == 256 * 2**20


def test_a_torch_without_gpus_says_so():
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(MoebenchError, match="finds no GPU; leave device=cuda out"):
        open_device()


# ---------------------------------------------------------------------------------------------------------------------
# In a worker, with a real layer on the fake device


def test_a_worker_times_a_layer_by_its_device_and_checks_it(virtual, fake, registry, make_case):
    device = virtual.Device()
    case = make_case(fake.NAME, "suite=throughput", "model=tiny", "axes.tokens=5", "axes.backend=eager")
    worker = Worker(SimpleNamespace(), open_device=lambda: device)
    worker.registry = registry
    with fake.Elsewhere():
        told = worker.prepare("t", case.to_json())
        run = worker.trials["t"].trial.run
        worker.trials["t"].trial.run = lambda step: (device.launch(step), run(step))[1]
        reply = worker.turn("t", 0, 6)
        check = worker.verify("t")["check"]
        facts = worker.facts("t")["facts"]
        worker.close("t")
    assert told["device"]["name"] == "virtual"
    assert reply["device_ns"] == [7_000] * 6
    assert reply["throttled"] == []
    assert check["ok"], check
    assert device.log == COLD * 6 + ["wait"]
    metrics = {metric["name"]: metric["value"] for metric in facts["metrics"]}
    assert metrics["gpu_sm_clock_before"] is None  # no driver was asked: NULL


def test_a_case_on_the_cpu_opens_no_device(registry, make_case):
    def never():
        raise AssertionError("a device was opened")

    worker = Worker(SimpleNamespace(), open_device=never)
    worker.registry = registry
    case = make_case("cpu", "suite=throughput", "model=tiny", "axes.tokens=5", "axes.backend=eager")
    assert worker.prepare("t", case.to_json())["device"] is None
    assert worker.turn("t", 0, 3)["device_ns"] == []
    worker.close("t")


# ---------------------------------------------------------------------------------------------------------------------
# In the parent


class Played:
    """A worker whose device takes 30 us and whose host 2 us a call, with clocks held down in some turns."""

    def __init__(self, held_down=()):
        self.held_down, self.turns = held_down, 0

    def request(self, op, timeout, trial=None, calls=0, **arguments):
        executed = {"weights": "dense", "sparse": "none"}
        if op == "turn":
            self.turns += 1
            throttled = ["sw_power_cap"] if self.turns in self.held_down else []
            times = {"ns": [2_000] * calls, "cpu_ns": [1_000] * calls, "device_ns": [30_000] * calls}
            return {**times, "switches": 0, "warm_s": 0.0, "ready_s": 0.0, "wait_s": 0.1, "throttled": throttled}
        device = {"name": "virtual", "uuid": None, "source": "none"}
        return {
            "prepare": {"steps": 3, "executed": executed, "seen": [], "input_sha256": "x", "seconds": 0.0}
            | {"device": device},
            "verify": {"check": {"ok": True, "error": 1e-7}},
            "facts": {"facts": {"executed": executed}, "cost": {}, "rss": 1},
        }[op]


@pytest.fixture
def sat(make_case, monkeypatch):
    monkeypatch.setattr("moebench.bench.gpu.watch.open_gpu", lambda uuid: Told())

    def sit(worker):
        member = Member(make_case("cuda", "suite=throughput", "model=tiny", "axes.tokens=5", "axes.backend=eager"))
        ring = SimpleNamespace(worker=lambda environment: worker)
        phases = Phases()
        engine = EngineConfig(seconds=0.01, min_calls=20, warmup_seconds=0.01)
        Sitting(ring, engine, 0, phases, lambda text: None).measure([member])
        return member, phases

    return sit


class Told(Gpu):
    """A driver that tells a counter of energy."""

    count = 0

    def read(self):
        Told.count += 1
        return Reading(Told.count * 10**9, energy_j=float(Told.count))


def test_the_device_decides_how_long_a_turn_is_and_what_is_stored(sat):
    member, phases = sat(Played())
    assert member.alive
    assert member.calls * 30_000 >= TURN_NS  # though the host's calls are shorter
    assert member.calls * 2_000 < TURN_NS
    assert phases.calls >= 0.1  # the waits
    tables = measured_rows("r", [member], flags_of([member], LIMITS), ["s"])
    clocks = {row["clock"]: set(row["ns"]) for row in tables["timings"]}
    assert clocks == {"device": {30_000}, "cpu": {1_000}}  # no wall time: the host only launches
    metrics = {row["name"]: row["value"] for row in tables["metrics"]}
    assert metrics["host_launch_ns"] == 2_000
    assert metrics["gpu_sitting_energy"] >= 1.0
    row = tables["cases"][0]
    assert '"name":"virtual"' in row["executed"]
    assert (row["flags"], row["reason"], row["evidence"]) == ([], None, "measured-gpu")


def test_rows_of_a_device_are_shown_and_answer_the_query_of_the_page(sat, tmp_path):
    member, _ = sat(Played())
    store = tmp_path / "store"
    write_part(store / "runs" / "r", "part", measured_rows("r", [member], [], ["s"]))
    (store / "runs" / "r" / "run.json").write_text('{"run_id": "r", "status": "finished"}')
    query = (Path(moebench.__file__).parent / "docs" / "gpu.md").read_text().split("```sql\n")[1].split("```")[0]
    ((backend, tokens, residency, l2, device, median_ns, n),) = connect_parts(store).execute(query).fetchall()
    assert (backend, tokens, residency, l2, device) == ("eager", 5, "cold", "flushed", "virtual")
    assert (median_ns, n) == (30_000, len(member.device_ns))
    assert "measured-gpu" in write_report(store, tmp_path / "report.html").read_text()


def test_turns_beside_which_clocks_were_held_down_flag_the_row_and_stay_in_it(sat):
    member, _ = sat(Played(held_down=range(0, 10**6, 2)))
    flags = flags_of([member], LIMITS)
    row = measured_rows("r", [member], flags, ["s"])["cases"][0]
    held, turns = member.throttled["sw_power_cap"], len(set(member.turns))
    assert 0 < held < turns
    assert flags == [Flag.NOT_STEADY]
    assert row["reason"] == f"clocks were held down: sw_power_cap in {held} of {turns} turns"
    assert len(member.device_ns) == len(member.turns)  # nothing is thrown away
    assert throttling([Member(member.case)]) == ""
