"""Facts of the host: NULL where they cannot be had; and the sources that a plan stands on."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest

from moebench.bench import host
from moebench.bench.ring import ring_cores
from moebench.suites.offload import energy


def test_the_facts_are_plain_and_the_stable_ones_identify_the_host():
    first, second = host.host_facts(), host.host_facts()
    json.dumps(first, allow_nan=False)
    assert first["host_key"] == second["host_key"]
    assert first["stable"]["cores"] >= 1
    assert first["stable"]["memory_bytes"] > 0


def refuses(handle):
    raise RuntimeError("Not Supported")


def nvml(**changes):
    module = types.ModuleType("pynvml")
    values = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlDeviceGetCount": lambda: 1,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "a GPU",
        "nvmlDeviceGetUUID": lambda handle: "GPU-1",
        "nvmlDeviceGetEccMode": refuses,
        "NVMLError": RuntimeError,
        "nvmlDeviceGetMemoryInfo": lambda handle: types.SimpleNamespace(total=10),
        "nvmlSystemGetDriverVersion": lambda: "1.2",
    }
    for name, value in {**values, **changes}.items():
        setattr(module, name, value)
    return module


def fails():
    raise RuntimeError("Driver Not Loaded")


@pytest.mark.parametrize("module", [None, nvml(nvmlInit=fails), nvml(nvmlDeviceGetCount=fails)])
def test_without_nvml_the_gpus_are_null(module, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert host.host_facts()["stable"]["gpus"] is None


def test_with_nvml_the_gpus_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    assert host.host_facts()["stable"]["gpus"] == [
        {"source": "nvml", "driver": "1.2", "name": "a GPU", "uuid": "GPU-1", "memory_bytes": 10, "ecc": None}
    ]


def test_what_cannot_be_read_is_null(monkeypatch, tmp_path):
    monkeypatch.setattr(energy, "COUNTER", tmp_path / "absent")
    assert host.host_facts()["snapshot"]["rapl_uj"] is None
    monkeypatch.setattr(host, "_read", lambda path: None)
    assert host.caches() == {}
    assert host.last_level_cache() is None


def test_cache_sizes_are_bytes(monkeypatch):
    for name, size in host.caches().items():
        assert name in ("L1", "L2", "L3", "L4")
        assert size >= 1024


def test_the_cores_of_a_ring_are_ours():
    assert 1 <= len(ring_cores(1)) <= 1
    assert len(ring_cores(10_000)) == host.host_facts()["stable"]["cores"]


def test_git_tells_the_commit_of_its_own_folder_only(tmp_path):
    assert host.git_facts(tmp_path) == (None, None)
    assert host.git_facts(Path(host.__file__).parent) == (None, None)


def test_the_packages_are_all_that_are_installed():
    installed = host.packages()
    assert {"torch", "duckdb", "pyarrow"} <= set(installed)


def test_an_edited_source_or_plugin_changes_the_hash(tmp_path, monkeypatch):
    root = tmp_path / "moebench"
    for name in ("bench/__init__.py", "bench/host.py", "kernels/cpu/a.cpp", "kernels/__init__.py", "contracts.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("1")
    plugin = tmp_path / "plugin.py"
    plugin.write_text("1")
    monkeypatch.setattr(host, "__file__", str(root / "bench" / "host.py"))
    seen = [host.source_hash([]), host.source_hash([str(plugin)])]
    for file in (plugin, root / "bench/host.py", root / "kernels/cpu/a.cpp", root / "contracts.py"):
        file.write_text("2")
        seen.append(host.source_hash([str(plugin)]))
    (root / "bench" / "new.yaml").write_text("1")
    seen.append(host.source_hash([str(plugin)]))
    assert len(set(seen)) == len(seen)
    for other in ("bench/note.txt", ".venv/lib/x.py", "tests/test_x.py"):
        (root / other).parent.mkdir(parents=True, exist_ok=True)
        (root / other).write_text("1")
    assert host.source_hash([str(plugin)]) == seen[-1]


def test_the_source_hash_sees_an_edit_of_an_installed_plugin(tmp_path, monkeypatch):
    package = tmp_path / "moebench_edited"
    package.mkdir()
    (package / "__init__.py").write_text("")
    helper = package / "helper.py"
    helper.write_text("A = 1\n")
    info = tmp_path / "moebench_edited-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: moebench-edited\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[moebench.backend]\nedited = moebench_edited:DESCRIPTOR\n")
    without = host.source_hash([])
    monkeypatch.syspath_prepend(tmp_path)
    before = host.source_hash([])
    helper.write_text("A = 2\n")
    assert len({without, before, host.source_hash([])}) == 3
