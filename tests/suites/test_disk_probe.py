"""The disk probe of suite ``roofline``: it reads what was written, and says so where it did not."""

from __future__ import annotations

import os

import pytest

from moebench.bench.run import planned
from moebench.contracts import MoebenchError, Registry
from moebench.suites.disk import BLOCK, Disk

SETTINGS = ("suite=roofline", "axes.threads=1", "suite.levels={}")


@pytest.fixture
def case(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_CACHE", str(tmp_path))
    plan, _ = planned([*SETTINGS, f"suite.disk_bytes={3 * BLOCK}"], Registry.load())
    (own,) = [one for one in plan.cases if one.backend.params["probe"] == "disk"]
    return own


def test_every_byte_is_read(case, tmp_path):
    probe = Disk(case)
    probe.begin_turn()
    assert not probe.verify(0, probe.view).ok  # nothing was read yet
    check = probe.verify(0, probe.run(0))
    assert (check.ok, check.error) == (True, 0.0)
    assert probe.cost(0).bytes == 3 * BLOCK
    assert (probe.facts().notes["rate"], probe.facts().notes["per"]) == ("bandwidth_disk", "bytes")
    (file,) = (tmp_path / "probes").glob("*.bin")
    with file.open("r+b") as stream:
        stream.seek(2 * BLOCK + 5)
        stream.write(b"?")
        os.fsync(stream.fileno())
    assert "checksum" in probe.verify(0, probe.run(0)).reason
    os.truncate(file, 2 * BLOCK)
    with pytest.raises(MoebenchError, match="ended after 0"):
        probe.run(0)
    probe.close()


def test_a_file_system_without_direct_reads_is_told(case, monkeypatch):
    def refuse(path, flags):
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MoebenchError, match="takes no O_DIRECT"):
        Disk(case)


def test_there_is_no_disk_probe_unasked_and_no_half_block():
    plan, _ = planned(SETTINGS, Registry.load())
    assert {one.backend.params["probe"] for one in plan.cases} == {"gemm", "read"}
    with pytest.raises(MoebenchError, match="multiple of 8388608"):
        planned([*SETTINGS, "suite.disk_bytes=1000"], Registry.load())
