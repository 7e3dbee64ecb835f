"""An unfinished run goes on where it was cut off; a finished one measures again; nothing of older sources is reused."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from moebench.results.parts import list_parts

GROUPS = ("axes.tokens=[16,32]", "axes.residency=warm")
PLUGIN = """
from moebench.contracts import Descriptor

DESCRIPTORS = [Descriptor("backend", "mine", "eager by another name", "moebench.backends.eager:create")]
"""


def runs(store):
    """Return run id -> its record."""
    return {file.parent.name: json.loads(file.read_text()) for file in sorted(store.glob("runs/*/run.json"))}


def parts(store):
    """Return part -> inode of its manifest: a part that is written again has another one."""
    return {part: (part / "manifest.json").stat().st_ino for part in list_parts(store)}


def cut_off(engine, store, *settings):
    """Start a run and kill it as soon as its first part is there."""
    process = engine.start(store, "run", "--quiet", *settings)
    deadline = time.monotonic() + 60
    while not parts(store) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    with process:
        process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert len(parts(store)) == 1
    assert [record["status"] for record in runs(store).values()] == ["running"]


@pytest.fixture(scope="module")
def resumed(engine, small, tmp_path_factory):
    """A store whose run was cut off after its first group and then finished, and what was there in between."""
    store = tmp_path_factory.mktemp("resumed")
    plugin = store / "mine.py"
    plugin.write_text(PLUGIN)
    settings = (f"plugin={plugin}", *small, *GROUPS, "axes.backend=[eager,mine]")
    cut_off(engine, store, *settings)
    between = parts(store)
    result = engine(store, "run", *settings)
    return store, settings, between, result


def test_an_unfinished_run_is_resumed_group_by_group(resumed):
    store, _, between, result = resumed
    assert result.returncode == 0, result.stderr
    assert "is finished already" in result.stderr
    (record,) = runs(store).values()
    assert record["status"] == "finished"
    after = parts(store)
    assert len(after) == 2
    assert between.items() <= after.items()  # the first part was not touched


def test_the_summary_covers_the_groups_of_both_sittings(resumed):
    assert "4 ok" in resumed[3].stdout


def test_a_finished_run_measures_again_and_an_edited_plugin_is_a_new_plan(resumed, engine, query, tmp_path):
    """Three runs in a copy of the store: the same again, then one that is cut off, then that one after an edit."""
    original, settings, _, _ = resumed
    store = tmp_path / "store"
    shutil.copytree(original, store)
    again = engine(store, "run", "--quiet", *settings)
    assert again.returncode == 0, again.stderr
    assert len(runs(store)) == 2
    assert len({record["plan_hash"] for record in runs(store).values()}) == 1

    unfinished = store / "runs" / max(runs(store)) / "run.json"
    record = json.loads(unfinished.read_text())
    unfinished.write_text(json.dumps({**record, "status": "running"}))
    plugin = Path(settings[0].removeprefix("plugin="))
    before = plugin.read_text()
    try:
        plugin.write_text(before + "\n# edited\n")
        edited = engine(store, "run", "--quiet", *settings)
    finally:
        plugin.write_text(before)
    assert edited.returncode == 0, edited.stderr
    assert len(runs(store)) == 3
    newest = max(runs(store))
    assert runs(store)[newest]["plan_hash"] != record["plan_hash"]
    assert query(store, f"SELECT count(*) FROM cases WHERE run_id = '{newest}' AND status = 'ok'") == [(4,)]
    assert json.loads(unfinished.read_text())["status"] == "running"  # nothing of the older plan was taken up


def test_two_processes_with_the_same_command_do_not_disturb_each_other(engine, small, query, store_problems, tmp_path):
    processes = [
        engine.start(tmp_path, "run", "--quiet", *small, "axes.tokens=16", "axes.residency=warm") for _ in "ab"
    ]
    told = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], told
    assert {record["status"] for record in runs(tmp_path).values()} == {"finished"}
    assert len(runs(tmp_path)) == 2
    for database in (False, True):
        counts = query(tmp_path, "SELECT run_id, count(*) FROM cases GROUP BY run_id", database=database)
        assert sorted(counts) == [(run, 2) for run in runs(tmp_path)]
    assert store_problems(tmp_path) == []


def test_a_failure_before_the_cut_still_fails_the_resumed_run(engine, small, tmp_path):
    """The exit status is that of the whole run, not of what this process measured."""
    hostile = Path(__file__).parent.parent / "plugins" / "hostile.py"
    settings = (f"plugin={hostile}", *small, "axes.tokens=32", "axes.backend=[eager,raises]")
    assert engine(tmp_path, "run", "--quiet", *settings).returncode == 1
    (file,) = tmp_path.glob("runs/*/run.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))  # as if cut off at the end
    between = parts(tmp_path)
    assert engine(tmp_path, "run", "--quiet", *settings).returncode == 1
    assert parts(tmp_path) == between
    assert len(runs(tmp_path)) == 1


def test_a_damaged_part_of_an_unfinished_run_is_measured_again(engine, finished_copy, store_problems):
    store, settings = finished_copy
    (file,) = store.glob("runs/*/run.json")
    (part,) = parts(store)
    file.write_text(json.dumps({**json.loads(file.read_text()), "status": "running"}))
    (store / "moebench.duckdb").unlink()
    (part / "timings.parquet").write_bytes(b"half")
    assert engine(store, "run", "--quiet", *settings).returncode == 0
    assert len(list(store.glob("corrupt/*/*"))) == 1
    assert len(runs(store)) == 1
    assert store_problems(store) == []
