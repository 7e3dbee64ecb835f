"""Real processes, really killed: nothing is lost, doubled or half-visible."""

import random
import signal
import subprocess
import sys
import time

import pytest

from moebench.results.database import DATABASE, DatabaseBusyError, ingest, open_database, rebuild
from moebench.results.errors import ResultsError
from moebench.results.parts import list_parts, verify_part
from moebench.results.query import run_sql


@pytest.fixture(scope="module")
def whole(sitting, dump, tmp_path_factory):
    """What the store holds when nothing goes wrong."""
    store = tmp_path_factory.mktemp("whole")
    sitting.write_run(store, "r1", ["g1", "g2", "g3"])
    ingest(store)
    return dump(store)


# A part has 8 files, run.json before it is one more: numbers reach first, middle and last file, part and side.
FAULTS = ["write:1", "write:2", "write:9", "write:12", "fsync:1", "fsync:18"]
FAULTS += ["rename:1", "rename:3", "rename:4", "ingest:1", "ingest:2", "ingest:5"]


@pytest.mark.parametrize("fault", FAULTS)
def test_killed_at_a_fault_point_then_the_same_again(fault, sitting, whole, dump, dump_parts, tmp_path):
    killed = sitting.start(tmp_path, "r1", fault)
    assert killed.wait(60) == -signal.SIGKILL, killed.stderr.read()
    seen = list_parts(tmp_path)
    assert [verify_part(part) for part in seen] == [None] * len(seen)
    assert set(dump_parts(tmp_path)["cases"]) <= set(whole["cases"])
    again = sitting.start(tmp_path, "r1")
    assert again.wait(60) == 0, again.stderr.read()
    assert dump(tmp_path) == whole
    assert dump_parts(tmp_path) == whole
    assert not list(tmp_path.rglob(".tmp-*"))


def test_a_mistyped_fault_point_is_told(sitting, tmp_path):
    process = sitting.start(tmp_path, "r1", "renam")
    assert process.wait(60) == 1
    assert b"names no fault point; write one of write, fsync, rename, ingest" in process.stderr.read()


def test_three_processes_ingest_at_once(sitting, dump, dump_parts, tmp_path):
    processes = [sitting.start(tmp_path, run_id) for run_id in ("r1", "r2", "r3")]
    assert [process.wait(60) for process in processes] == [0, 0, 0], [p.stderr.read() for p in processes]
    found = dump(tmp_path)
    assert len(found["parts"]) == 9
    assert len(found["cases"]) == 18
    assert found == dump_parts(tmp_path)


def test_killed_at_random_moments_of_an_ingest(sitting, dump, dump_parts, tmp_path):
    rng = random.Random(7)
    parts = [f"g{n}" for n in range(12)]
    sitting.write_run(tmp_path, "r1", parts)
    kills = 0
    for _ in range(5):
        process = sitting.start(tmp_path, "r1", parts="g0")
        time.sleep(rng.uniform(0.2, 0.7))
        process.kill()
        kills += process.wait(60) == -signal.SIGKILL
    assert kills, "every process ended before it was killed: wait less"
    assert ingest(tmp_path).set_aside == []
    assert len(dump(tmp_path)["parts"]) == len(parts)
    assert dump(tmp_path) == dump_parts(tmp_path)
    rebuild(tmp_path)
    assert dump(tmp_path) == dump_parts(tmp_path)


HOLD = "import duckdb, sys; c = duckdb.connect(sys.argv[1]); print('held', flush=True); sys.stdin.read()"


@pytest.fixture
def held(sitting, tmp_path):
    """A store whose database another process holds open."""
    sitting.write_run(tmp_path, "r1", ["g1"])
    ingest(tmp_path)
    command = [sys.executable, "-c", HOLD, str(tmp_path / DATABASE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        yield tmp_path, process
        process.kill()


def test_reading_goes_on_while_the_database_is_held(held):
    store, process = held
    assert run_sql(store, "SELECT count(*) AS n FROM cases", format="csv") == "n\n2\n"
    with pytest.raises(DatabaseBusyError, match=f"held by another process \\({process.pid}\\); end it or try again"):
        ingest(store, timeout_s=0.1)


def test_an_ingest_waits_for_its_turn(held, sitting, dump):
    store, process = held
    waiting = sitting.start(store, "r2")
    time.sleep(0.8)
    assert waiting.poll() is None
    process.stdin.close()
    assert waiting.wait(60) == 0
    assert len(dump(store)["parts"]) == 4


def test_a_database_that_is_none_is_told_and_rebuilt(sitting, dump, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    (tmp_path / DATABASE).write_bytes(b"no database " * 1000)
    with pytest.raises(ResultsError, match="it can be rebuilt from the parts"):
        open_database(tmp_path / DATABASE)
    assert rebuild(tmp_path).parts_added == 1
    assert len(dump(tmp_path)["cases"]) == 2


def test_a_disk_that_is_full_during_an_ingest_loses_nothing(sitting, dump, dump_parts, tmp_path):
    """RLIMIT_FSIZE stands for a full disk: the database cannot grow."""
    sitting.write_run(tmp_path, "r1", ["g1", "g2"])
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))\n"
        "from pathlib import Path\n"
        "from moebench.results.database import ingest\n"
        "from moebench.results.errors import ResultsError\n"
        "try: ingest(Path(sys.argv[1]))\n"
        "except ResultsError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert told.stdout.count("\n") == 1, told
    assert "moebench.duckdb c" in told.stdout
    assert ingest(tmp_path).set_aside == []
    assert len(dump(tmp_path)["parts"]) == 2
    assert dump(tmp_path) == dump_parts(tmp_path)
