import json
import os
import re
import resource
import shutil
import socket
import subprocess
import sys
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from moebench.results.errors import ResultsError
from moebench.results.parts import (
    blob_row,
    list_parts,
    read_manifest,
    set_aside,
    verify_part,
    write_json_atomic,
    write_part,
)
from moebench.results.rows import arrow_schema, arrow_table
from moebench.results.schema import KEYS, SCHEMA_VERSION, TABLES


@pytest.fixture
def part(sitting, tmp_path):
    sitting.write_run(tmp_path, "r1", ["g1"])
    return tmp_path / "runs" / "r1" / "g1"


def test_every_table_has_arrow_types_and_keys_that_exist():
    for table, columns in TABLES.items():
        assert arrow_schema(table).names == list(columns)
        assert set(KEYS[table]) <= set(columns)


def test_a_part_has_exactly_the_columns_of_the_schema_and_compresses(part):
    tables = read_manifest(part)["tables"]
    assert tables == {"cases": 2, "timings": 2, "metrics": 1, "series": 1, "items": 1, "blobs": 1}
    for table in tables:
        file = pq.ParquetFile(part / f"{table}.parquet")
        assert file.schema_arrow.equals(arrow_schema(table))
        assert {file.metadata.row_group(0).column(i).compression for i in range(file.metadata.num_columns)} == {"ZSTD"}
    assert sorted(p.name for p in part.iterdir()) == sorted(
        [*(f"{t}.parquet" for t in tables), "blobs", "manifest.json"]
    )


def test_manifest_says_version_rows_and_the_writers_own_keys(part):
    manifest = read_manifest(part)
    assert (manifest["schema_version"], manifest["name"], manifest["run_id"]) == (SCHEMA_VERSION, "g1", "r1")
    assert manifest["mode"] == "interleaved"
    blob = pq.read_table(part / "blobs.parquet").to_pylist()[0]
    assert (part / "blobs" / blob["sha256"]).read_bytes() == b"log of g1"
    assert blob["bytes"] == len(b"log of g1")


def test_what_is_missing_or_not_finite_is_null_and_never_zero(part):
    case = pq.read_table(part / "cases.parquet").to_pylist()[1]
    assert case["error"] is None
    assert case["dtype"] is None
    assert pq.read_table(part / "metrics.parquet").to_pylist()[0]["hi"] is None
    assert pq.read_table(part / "series.parquet").to_pylist()[0]["values"] == [1.0, None, 0.1 + 0.2]


@pytest.mark.parametrize(
    ("table", "row", "sentence"),
    [
        ("case", {}, "there is no table 'case'; known: runs, hosts, cases"),
        ("cases", {"staus": "ok"}, "table 'cases' has no column 'staus'; add it to results/schema.py first"),
        ("cases", {"tokens": "many"}, "column 'tokens' of table 'cases' must hold INTEGER"),
        ("cases", {"tokens": 2**40}, "column 'tokens' of table 'cases' must hold INTEGER"),
        ("cases", {"flags": "contended"}, r"column 'flags' of table 'cases' must hold VARCHAR\[\]"),
        ("cases", {"params": "{"}, "column 'params' of table 'cases' must hold JSON"),
        ("cases", {"finished_at": "yesterday"}, "column 'finished_at' of table 'cases' must hold TIMESTAMP"),
        ("cases", {"tokens": 1.5}, "column 'tokens' of table 'cases' must hold INTEGER"),
        ("cases", {"suite": 3}, "column 'suite' of table 'cases' must hold VARCHAR"),
        ("cases", {"elapsed_s": "long"}, "column 'elapsed_s' of table 'cases' must hold DOUBLE"),
        ("timings", {"turn": [2**40]}, r"column 'turn' of table 'timings' must hold INTEGER\[\]"),
        ("timings", {"ns": [1.5]}, r"column 'ns' of table 'timings' must hold BIGINT\[\]"),
    ],
)
def test_rows_that_do_not_fit_are_told_in_one_sentence(table, row, sentence):
    with pytest.raises(ResultsError, match=sentence) as told:
        arrow_table(table, [row])
    assert "\n" not in str(told.value)


def test_values_are_taken_as_they_come():
    row = {"finished_at": "2026-01-01T02:00:00+02:00", "params": {"a": float("nan"), "b": (1,)}, "tokens": np.int64(3)}
    found = arrow_table("cases", [row]).to_pylist()[0]
    assert found["finished_at"] == datetime(2026, 1, 1)
    assert json.loads(found["params"]) == {"a": None, "b": [1]}
    assert found["tokens"] == 3
    assert arrow_table("timings", [{"ns": np.arange(3)}]).to_pylist()[0]["ns"] == [0, 1, 2]


def test_a_second_finish_leaves_the_first(sitting, part):
    before = {file: file.read_bytes() for file in part.rglob("*") if file.is_file()}
    log = b"another log"
    assert write_part(part.parent, "g1", sitting.tables("r1", "g1", log), {"log": log}) == part
    assert {file: file.read_bytes() for file in part.rglob("*") if file.is_file()} == before
    assert not list(part.parent.glob(".tmp-*"))


def test_a_second_finish_replaces_a_damaged_first(sitting, part):
    (part / "cases.parquet").unlink()
    sitting.write_run(part.parents[2], "r1", ["g1"])
    assert verify_part(part) is None
    assert (part.parents[2] / "corrupt" / "r1" / "g1").is_dir()


def test_leftovers_are_no_parts_and_the_next_writer_removes_them(sitting, part):
    with subprocess.Popen([sys.executable, "-c", "pass"]) as process:
        process.wait()
    dead = part.parent / f".tmp-g2-{socket.gethostname()}-{process.pid}"
    alive = part.parent / f".tmp-g3-{socket.gethostname()}-{os.getppid()}"
    elsewhere = part.parent / f".tmp-g4-otherhost-{process.pid}"
    for path in (dead, alive, elsewhere):
        shutil.copytree(part, path)
    assert list_parts(part.parents[2]) == [part]
    sitting.write_run(part.parents[2], "r1", ["g5"])
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()


def test_blobs_and_their_table_must_match(tmp_path):
    row = blob_row("r1", "c", "log", b"x")
    for rows, blobs in (([row], {}), ([], {"log": b"x"}), ([row], {"log": b"y"})):
        with pytest.raises(ResultsError, match="do not match; make one row with blob_row for each"):
            write_part(tmp_path / "runs" / "r1", "g", {"blobs": rows}, blobs, {})
    assert list_parts(tmp_path) == []


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", ".."])
def test_names_that_would_leave_the_folder_are_refused(name, tmp_path):
    with pytest.raises(ResultsError, match="cannot name a part"):
        write_part(tmp_path, name, {}, None, {})


def test_runs_and_reserved_keys_are_refused(tmp_path):
    with pytest.raises(ResultsError, match=r"table 'runs' does not belong in a part; write its fields to run\.json"):
        write_part(tmp_path, "g", {"runs": [{"run_id": "r"}]}, None, {})
    with pytest.raises(ResultsError, match="key 'tables' is set by write_part"):
        write_part(tmp_path, "g", {}, None, {"tables": {"cases": 9}})


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def newer(path):
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "schema_version": SCHEMA_VERSION + 1}))


DAMAGE = {
    "flipped byte": (lambda p: flip(p / "timings.parquet", 100), "timings.parquet does not match its sha256"),
    "flipped blob": (lambda p: flip(next((p / "blobs").iterdir()), 0), "does not match its sha256"),
    "truncated": (lambda p: os.truncate(p / "cases.parquet", 50), "cases.parquet has 50 bytes, not"),
    "missing file": (lambda p: (p / "metrics.parquet").unlink(), "metrics.parquet is missing"),
    "no manifest": (lambda p: (p / "manifest.json").unlink(), r"has no manifest\.json"),
    "manifest is no JSON": (lambda p: (p / "manifest.json").write_text("{"), r"an unreadable manifest\.json"),
    "manifest is a list": (lambda p: (p / "manifest.json").write_text("[]"), "does not match its own checksum"),
    "manifest changed": (lambda p: newer(p / "manifest.json"), "does not match its own checksum"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_seen_and_told(damage, part):
    harm, sentence = DAMAGE[damage]
    assert verify_part(part) is None
    harm(part)
    told = verify_part(part)
    assert told.startswith("part r1/g1 ")
    assert re.search(sentence, told)
    assert list_parts(part.parents[2]) == [part]


def test_every_flipped_byte_of_a_part_is_seen(part):
    rng = np.random.default_rng(0)
    for file in [file for file in part.rglob("*") if file.is_file()]:
        size = file.stat().st_size
        for place in rng.integers(0, size, 5):
            flip(file, int(place))
            assert verify_part(part) is not None, (file, place)
            flip(file, int(place))
    assert verify_part(part) is None


def test_set_aside_keeps_names_and_never_overwrites(sitting, part):
    store = part.parents[2]
    assert set_aside(part) == "part r1/g1 was set aside as corrupt/r1/g1."
    sitting.write_run(store, "r1", ["g1"])
    assert set_aside(part) == "part r1/g1 was set aside as corrupt/r1/g1.2."
    assert verify_part(store / "corrupt" / "r1" / "g1") is None
    assert set_aside(part) == "part r1/g1 was set aside by another process."


def test_parquet_of_a_stranger_is_refused(part):
    from moebench.results import parts as module

    table = pq.read_table(part / "cases.parquet").append_column("extra", pa.array([1, 2]))
    pq.write_table(table, part / "cases.parquet")
    manifest = read_manifest(part)
    data = (part / "cases.parquet").read_bytes()
    manifest["files"]["cases.parquet"] = {"bytes": len(data), "sha256": module.hashlib.sha256(data).hexdigest()}
    manifest["checksum"] = module._checksum(manifest)
    (part / "manifest.json").write_text(json.dumps(manifest))
    assert verify_part(part) == "part r1/g1 is damaged: in cases.parquet column 'extra' is not of the schema."


def test_a_file_in_the_way_is_one_sentence(tmp_path):
    (tmp_path / "runs").write_text("not a folder")
    with pytest.raises(ResultsError, match=r"cannot write .* what was written before is kept") as told:
        write_part(tmp_path / "runs" / "r1", "g", {}, None, {})
    assert "\n" not in str(told.value)
    with pytest.raises(ResultsError, match="choose another folder"):
        write_json_atomic(tmp_path / "runs" / "r1" / "run.json", {})


def test_a_full_disk_is_one_sentence_and_keeps_what_was_there(sitting, part):
    """RLIMIT_FSIZE stands for a full disk: the write of a larger blob fails half-way."""
    rows = [blob_row("r1", "c", "log", b"x" * 200_000)]
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))\n"
        "from pathlib import Path\n"
        "from moebench.results.errors import ResultsError\n"
        "from moebench.results.parts import write_part\n"
        f"try: write_part(Path(sys.argv[1]), 'big', {{'blobs': {rows!r}}}, {{'log': b'x' * 200_000}}, {{}})\n"
        "except ResultsError as error: print(error)\n"
    )
    told = subprocess.run([sys.executable, "-c", code, part.parent], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"cannot write {part.parent / 'big'} (File too large): make room there")
    assert list_parts(part.parents[2]) == [part]
    assert verify_part(part) is None
    assert not list(part.parent.glob(".tmp-*"))
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 100_000


def test_json_is_replaced_at_once_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "run.json"
    write_json_atomic(path, {"n": 1})
    with pytest.raises(ResultsError, match="store plain values and None for NaN"):
        write_json_atomic(path, {"n": float("nan")})
    assert json.loads(path.read_text()) == {"n": 1}
    write_json_atomic(path, {"n": 2})
    assert json.loads(path.read_text()) == {"n": 2}
    assert [file.name for file in path.parent.iterdir()] == ["run.json"]
