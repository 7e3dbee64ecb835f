"""Cases shared over devices, with fake ones that drift, throttle and boost: both sides of a pair are on one device."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

FAKE = '''
"""A device whose clock is far from steady: its speed depends on itself and on the time, alike for every process."""
import math, os, random, time
import numpy as np

BUSY = np.ones((32, 32))

class Trial:
    steps = 1

    def __init__(self, work):
        self.work, self.device = work, os.environ["CUDA_VISIBLE_DEVICES"]
        self.random = random.Random(os.getpid())

    def run(self):
        self.at = time.monotonic()
        return BUSY @ BUSY

    def device_ns(self):
        drift = 1 + 0.2 * math.sin(self.at / 3)                    # warms up and cools down
        throttle = 1.5 if self.at % 7 < 1.5 else 1.0               # falls back to a lower clock for a while
        boost = 0.8 if self.at % 5 < 0.7 else 1.0
        slower = 1.4 if self.device == "1" else 1.0                # no two devices are alike
        noise = 1 + 0.01 * self.random.random()
        ns = int(1e6 * self.work * slower * drift * throttle * boost * noise)
        return ns // 2 * 2 + int(self.device)                      # odd times are those of device 1

FACTOR = float(os.environ.get("SLOWER", "1"))

def __getattr__(name):
    if name.startswith("same"):
        return lambda: Trial(1.0)
    if name.startswith("slower"):
        return lambda: Trial(FACTOR)
    raise AttributeError(name)
'''

TARGETS = [f"{kind}{number}" for kind in ("same", "slower") for number in range(3)]


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A gate over two fake devices; returns (its JSON, its store)."""
    folder = tmp_path_factory.mktemp("devices")
    identity = ("-c", "user.name=t", "-c", "user.email=t@example.org")
    for number, factor in enumerate(("1", "1.1")):
        (folder / "fake.py").write_text(FAKE.replace('"SLOWER", "1"', f'"SLOWER", "{factor}"'))
        if number == 0:
            subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
        subprocess.run(["git", "add", "-A"], cwd=folder, check=True)
        subprocess.run(["git", *identity, "commit", "-qm", factor], cwd=folder, check=True)
    named = [word for target in TARGETS for word in ("--target", f"fake:{target}")]
    store, out = folder / "store", folder / "gate.json"
    command = [sys.executable, "-m", "moebench.bench", "gate", "--base", "HEAD~1", "--candidate", "HEAD", "--quiet"]
    options = ["--devices", "0,1", "--seconds=0.2", "--max-seconds=0.2", "--json", str(out), "--store", str(store)]
    done = subprocess.run([*command, *options, *named], cwd=folder, capture_output=True, text=True, env={**os.environ})
    assert done.returncode == 1, done.stderr
    return json.loads(out.read_text()), store


def test_drift_is_no_regression_and_work_is(gated):
    times = {one["label"].split(":")[1]: one for one in gated[0]["judged"] if one["kind"] == "time"}
    assert {one["clock"] for one in times.values()} == {"device"}
    assert {name: one["verdict"] for name, one in times.items()} == {
        name: "equivalent" if name.startswith("same") else "regressed" for name in TARGETS
    }
    assert all(one["lo"] <= 1.1 <= one["hi"] for name, one in times.items() if name.startswith("slower"))


def test_both_sides_of_every_pair_are_on_one_device_and_both_devices_work(gated, query):
    rows = query(
        gated[1],
        """
        SELECT case_key, pair, list_sort(list(DISTINCT one % 2)) AS devices
        FROM (SELECT case_key, pair, unnest(ns) AS one FROM turns WHERE clock = 'device') GROUP BY case_key, pair
        """,
    )
    assert len({case_key for case_key, _, _ in rows}) == len(TARGETS)
    assert {tuple(devices) for _, _, devices in rows} == {(0,), (1,)}
