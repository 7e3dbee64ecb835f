"""NVML's own Python package over a small library that stands in for the driver, each scenario in a process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moebench
from moebench.bench.gpu.nvml import Gpu, Reading, open_gpu
from moebench.bench.gpu.watch import Sampler, Watch, integral, watched
from moebench.results.errors import ResultsError
from moebench.results.parts import write_part

PROBE = """
import dataclasses, json, time
from moebench.bench.gpu.nvml import all_gpus, open_gpu
from moebench.bench.gpu.watch import Sampler, Watch
with open_gpu("GPU-fake") as gpu:
    watch = Watch(gpu.read)
    seen = [watch.look(), watch.look()]
    with Sampler(gpu.read, interval=0.005) as sampler:
        time.sleep(0.03)
    said = {"facts": gpu.facts(), "why": gpu.why, "reading": dataclasses.asdict(gpu.read()), "seen": seen,
            "metrics": {m.name: m.value for m in watch.metrics() + sampler.metrics()},
            "readings": len(sampler.readings), "stamps": [r.at_ns for r in sampler.readings]}
print(json.dumps({**said, "all": all_gpus()}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    pytest.importorskip("pynvml")
    if shutil.which("gcc") is None:
        pytest.skip("the library that stands in for NVML needs gcc")
    folder = tmp_path_factory.mktemp("nvml")
    source = Path(__file__).with_name("fake_nvml.c")
    command = ["gcc", "-shared", "-fPIC", "-o", str(folder / "libnvidia-ml.so.1"), str(source)]
    subprocess.run(command, check=True)
    return folder


@pytest.fixture
def probe(library, tmp_path):
    """Return what a process says that finds the library in the given scenario."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "moebench").symlink_to(Path(moebench.__file__).resolve().parent)

    def run(scenario):
        found = {"FAKE_NVML": scenario, "LD_LIBRARY_PATH": str(library), "PYTHONPATH": str(package)}
        env = {**os.environ, **found}
        done = subprocess.run([sys.executable, "-c", PROBE], env=env, capture_output=True, text=True, check=True)
        return json.loads(done.stdout)

    return run


def test_a_board_that_tells_everything(probe):
    said = probe("normal")
    assert said["facts"] == {
        **{"source": "fake", "driver": "000.00-fake", "name": "Fake GPU", "uuid": "GPU-fake"},
        **{"memory_bytes": 2**34, "ecc": True},
    }
    assert said["all"] == [said["facts"]]
    reading = said["reading"]
    assert (reading["sm_clock_mhz"], reading["memory_clock_mhz"], reading["temperature_c"]) == (1410, 1215, 61)
    assert (reading["power_w"], reading["throttled"]) == (250.0, [])  # idleness holds no clock down
    metrics = said["metrics"]
    assert metrics["gpu_sm_clock_before"] == metrics["gpu_sm_clock_after"] == 1410
    assert metrics["gpu_throttled_share"] == 0.0
    assert metrics["gpu_sitting_energy"] == 5.0 * (said["readings"] - 1)  # the counter's difference, in joules
    assert "gpu_sitting_energy_integrated" not in metrics
    assert said["readings"] >= 3
    assert said["stamps"] == sorted(said["stamps"])


def test_a_board_without_power_still_tells_its_clocks(probe):
    said = probe("no_power")
    assert said["reading"]["power_w"] is None
    assert said["reading"]["energy_j"] is None
    assert said["reading"]["sm_clock_mhz"] == 1410
    metrics = said["metrics"]
    assert metrics["gpu_sitting_energy"] is metrics["gpu_sitting_energy_integrated"] is None
    assert metrics["gpu_sitting_power_mean"] is None  # NULL, never 0


def test_without_a_counter_the_power_is_integrated_under_its_own_name(probe):
    metrics = probe("no_energy")["metrics"]
    assert metrics["gpu_sitting_energy"] is None
    assert metrics["gpu_sitting_energy_integrated"] == pytest.approx(250.0 * metrics["gpu_sitting_seconds"])


def test_what_holds_the_clocks_down_is_named(probe):
    said = probe("throttle")
    assert said["seen"] == [["sw_power_cap", "hw_thermal_slowdown"]] * 2
    assert said["metrics"]["gpu_throttled_share"] == 1.0


@pytest.mark.parametrize(("scenario", "all_of_them"), [("driver_not_loaded", None), ("no_device", [])])
def test_no_driver_and_no_device_are_no_source(probe, scenario, all_of_them):
    said = probe(scenario)
    assert said["facts"]["source"] == "none"
    assert said["why"].startswith("NVML answers: ")
    assert said["all"] == all_of_them
    told = {name: value for name, value in said["metrics"].items() if name != "gpu_sitting_seconds"}
    assert set(told.values()) == {None}


def test_a_board_that_is_lost_tells_nothing_and_breaks_nothing(probe):
    said = probe("gpu_lost")
    assert said["facts"]["source"] == "fake"
    assert {value for name, value in said["reading"].items() if name != "at_ns"} == {None}


# ---------------------------------------------------------------------------------------------------------------------
# Without a library


def test_without_the_package_or_the_driver_there_is_no_source():
    def absent():
        raise ImportError

    gpu = open_gpu(None, absent)
    assert gpu.source == "none"
    assert gpu.why.endswith("pip install nvidia-ml-py")
    assert gpu.read().sm_clock_mhz is None
    with gpu:
        pass


def test_readings_around_turns_give_clocks_before_after_and_lowest():
    clocks = iter([(1980.0, ()), (1500.0, ("sw_power_cap",)), (None, None), (1700.0, ())])

    def read():
        clock, throttled = next(clocks)
        return Reading(0, sm_clock_mhz=clock, throttled=throttled)

    watch = Watch(read)
    assert [watch.look() for _ in range(4)] == [(), ("sw_power_cap",), (), ()]
    found = {metric.name: (metric.value, metric.n) for metric in watch.metrics()}
    assert found["gpu_sm_clock_before"] == (1980.0, 1)
    assert found["gpu_sm_clock_after"] == (1700.0, 1)
    assert found["gpu_sm_clock_lowest"] == (1500.0, 3)
    assert found["gpu_memory_clock_lowest"] == (None, 0)
    assert found["gpu_throttled_share"] == (1 / 3, 3)
    assert watch.series() == []  # a reading is missing


def test_the_integral_is_the_trapezoid_rule_in_joules():
    readings = [Reading(0, power_w=100.0), Reading(2 * 10**9, power_w=200.0), Reading(3 * 10**9, power_w=None)]
    assert integral(readings) == 300.0
    assert integral(readings[:1]) is None


def test_a_sampler_reads_at_both_ends_however_short_it_is_open():
    times = iter(range(0, 10**12, 10**9))
    with Sampler(lambda: Reading(next(times), energy_j=7.0), interval=60.0) as sampler:
        pass
    assert len(sampler.readings) == 2
    found = {metric.name: metric.value for metric in sampler.metrics()}
    assert (found["gpu_sitting_energy"], found["gpu_sitting_seconds"]) == (0.0, 1.0)


def test_on_the_cpu_nothing_is_watched():
    with watched(None) as told:
        pass
    assert told == []
    assert Gpu().source == "none"


# ---------------------------------------------------------------------------------------------------------------------
# The store


def row(source):
    return {"case_key": "k", "run_id": "r", "status": "ok", "executed": json.dumps({"device": {"source": source}})}


def test_the_store_refuses_rows_of_a_driver_that_is_a_fake(tmp_path, monkeypatch):
    folder = tmp_path / "runs" / "r"
    with pytest.raises(ResultsError, match="a library that stands in for the GPU's driver"):
        write_part(folder, "part", {"cases": [row("fake")]})
    assert not folder.exists()
    assert write_part(folder, "true", {"cases": [row("nvml")]}).is_dir()
    monkeypatch.setenv("MOEBENCH_FAKE_GPU", "1")  # as tests may
    assert write_part(folder, "part", {"cases": [row("fake")]}).is_dir()
