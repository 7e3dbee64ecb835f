"""What cannot be is told in one sentence, with exit status 2, before time is spent; what was measured is kept."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from moebench.results import parts
from moebench.results.parts import list_parts
from moebench.results.schema import SCHEMA_VERSION

HOSTILE = Path(__file__).parent.parent / "plugins" / "hostile.py"


def one_sentence(result, status=2):
    """Return what a failed command said: one line and no traceback."""
    assert result.returncode == status, result
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("moebench: ")
    return lines[0].removeprefix("moebench: ")


# ---------------------------------------------------------------------------------------------------------------------
# Impossible combinations


def skipped(engine, store, *settings):
    """Return the reasons of ``--plan``."""
    result = engine(store, "run", "--plan", *settings)
    assert result.returncode == 0, result.stderr
    assert not (store / "runs").exists()
    return [line for line in result.stdout.splitlines() if line.startswith("skipped: ")]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            ["suite=selftest", "axes.routing=topk", "axes.backend=packed", "axes.quantization=int8"],
            "packed computes in bfloat16, not float32",
        ),
        (["suite=selftest", "axes.routing=moepp", "axes.traffic=zipf"], "leaves to the router; use another traffic"),
        (["suite=selftest", "axes.residency=cold"], "use axes.residency=warm"),
        (["suite=selftest", "axes.traffic=recorded"], "has no recorded hidden states; use axes.traffic=gaussian"),
        (["suite=training", "model=tiny", "axes.backend=batched"], "batched has no backward"),
    ],
)
def test_an_impossible_combination_is_skipped_with_its_reason(settings, words, engine, tmp_path):
    reasons = skipped(engine, tmp_path, *settings)
    assert reasons
    assert all(words in reason for reason in reasons)


def test_a_model_too_large_is_skipped_with_the_arithmetic(engine, tmp_path):
    settings = [
        "model=deepseek-v3",
        "axes.dtype=float32",
        "axes.tokens=64",
        "axes.backend=eager",
        "engine.memory=0.001",
    ]
    (reason,) = skipped(engine, tmp_path, *settings)
    assert "does not fit: 256 experts x 3 x 7168 x 2048 x 4 bytes" in reason
    assert "GiB may be used; choose a smaller model or dtype" in reason


def test_nothing_that_can_run_is_an_error_and_leaves_no_run(engine, tmp_path):
    result = engine(tmp_path, "run", "suite=selftest", "axes.residency=cold")
    assert "nothing of the plan can run here" in one_sentence(result)
    assert "skipped: " in result.stdout
    assert not (tmp_path / "runs").exists()


def test_what_is_skipped_beside_what_runs_is_kept_with_its_reason(engine, small, query, tmp_path):
    result = engine(tmp_path, "run", "--quiet", *small, "axes.backend=[eager,packed]")
    assert result.returncode == 0, result.stderr
    rows = query(
        tmp_path, "SELECT backend, status, reason IS NOT NULL, len(ns) > 0 FROM timings GROUP BY ALL ORDER BY 1"
    )
    assert rows == [("eager", "ok", False, True), ("packed", "skipped", True, None)]


def test_a_split_group_repeats_its_anchor_and_doubles_no_row(engine, small, query, store_problems, tmp_path):
    """Memory for one method at a time: three methods make pieces that share their first case."""
    one_method = 3 * 8 * 3 * 64 * 32 * 4  # three copies of 8 experts of three matrices
    share = 1.5 * one_method / psutil.virtual_memory().available
    settings = [*small, "axes.backend=eager", "axes.quantization=[none,int8,int4]", f"engine.memory={share:.3g}"]
    settings += ["params.quantization.int4.group=32"]
    result = engine(tmp_path, "run", "--quiet", *settings)
    assert result.returncode == 0, result.stderr
    assert len(list_parts(tmp_path)) == 2
    assert query(tmp_path, "SELECT quantization, status FROM cases ORDER BY 1") == [
        ("int4", "ok"),
        ("int8", "ok"),
        ("none", "ok"),
    ]
    sittings = "SELECT quantization, count(DISTINCT sitting) FROM timings GROUP BY 1 ORDER BY 1"
    assert query(tmp_path, sittings) == [("int4", 1), ("int8", 1), ("none", 2)]
    assert store_problems(tmp_path) == []


# ---------------------------------------------------------------------------------------------------------------------
# Stores


def test_a_store_that_is_a_file_is_told(engine, small, tmp_path):
    (tmp_path / "file").write_text("")
    sentence = one_sentence(engine(tmp_path / "file", "run", *small))
    assert sentence.endswith("is a file; choose a folder with store=PATH or $MOEBENCH_STORE.")


@pytest.mark.parametrize("place", ["/proc/moebench", "/dev/null/moebench"])
def test_a_store_that_cannot_be_written_is_told(place, engine, small):
    assert "cannot be written" in one_sentence(engine(Path(place), "run", "--quiet", *small))


def test_a_part_of_a_newer_schema_is_told_and_left_alone(engine, finished_copy):
    store, _ = finished_copy
    (part,) = list_parts(store)
    manifest = json.loads((part / "manifest.json").read_text()) | {"schema_version": SCHEMA_VERSION + 1}
    manifest["checksum"] = parts._checksum(manifest)
    (part / "manifest.json").write_text(json.dumps(manifest))
    (store / "moebench.duckdb").unlink()
    result = engine(store, "ingest")
    assert result.returncode == 0
    assert "install a newer moebench to read it" in one_sentence(result, status=0)
    assert part.is_dir()


def limited(engine, store, limit, *arguments):
    """Run with files of at most ``limit`` bytes, as on a disk that is nearly full."""
    return subprocess.run(
        [sys.executable, "-m", "moebench.bench", *arguments],
        env=engine.env(store),
        cwd=engine.cache,
        capture_output=True,
        text=True,
        timeout=120,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY)),
    )


def test_a_disk_full_from_the_start_is_told(engine, small, tmp_path):
    assert "cannot write" in one_sentence(limited(engine, tmp_path, 500, "run", "--quiet", *small))


def test_a_disk_full_at_the_ingest_keeps_what_was_measured(engine, small, query, tmp_path):
    settings = ("run", "--quiet", *small, "axes.backend=eager")
    sentence = one_sentence(limited(engine, tmp_path, 20_000, *settings))
    assert "moebench.duckdb" in sentence
    assert query(tmp_path, "SELECT status FROM cases") == [("ok",)]
    assert engine(tmp_path, "ingest").returncode == 0
    assert query(tmp_path, "SELECT status FROM cases", database=True) == [("ok",)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 512 KiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "moebench", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system can only be mounted by root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_between_groups_keeps_the_first(engine, small, query, small_disk):
    """Filled up when the first part is there; with room again, the same command goes on."""
    settings = ("run", "--quiet", *small, "axes.tokens=[16,32]", "axes.residency=warm", "axes.backend=eager")
    process = engine.start(small_disk, *settings)
    while not list_parts(small_disk) and process.poll() is None:
        time.sleep(0.01)
    with (small_disk / "filler").open("wb", buffering=0) as filler:
        try:
            while True:
                filler.write(bytes(4096))
        except OSError:
            pass
    out, err = process.communicate(timeout=120)
    sentence = one_sentence(subprocess.CompletedProcess(process.args, process.returncode, out, err))
    assert "No space left on device" in sentence
    assert query(small_disk, "SELECT tokens, status FROM cases") == [(16, "ok")]
    (small_disk / "filler").unlink()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert engine(small_disk, *settings).returncode == 0
    assert query(small_disk, "SELECT tokens, status FROM cases ORDER BY 1") == [(16, "ok"), (32, "ok")]
    assert len(list(small_disk.glob("runs/*/run.json"))) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Plug-ins that cannot be used

GOOD = "Descriptor('backend', 'mine', 'mine', 'moebench.backends.eager:create')"
IMPORT = "from moebench.contracts import Descriptor\n"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (None, "does not exist; check the path"),
        ("def broken(:\n", "could not be loaded (SyntaxError"),
        ("import nothing_of_that_name\n", "could not be loaded (ModuleNotFoundError: No module named 'nothing_of"),
        ("raise SystemExit(0)\n", "could not be loaded (SystemExit"),
        ("x = 1\n", "has no DESCRIPTORS"),
        ("DESCRIPTORS = [1]\n", "1 is no plug-in"),
        (f"{IMPORT}DESCRIPTORS = [{GOOD}, {GOOD}]\n", "two plug-ins of kind backend are called 'mine'"),
        (f"{IMPORT}DESCRIPTORS = [{GOOD.replace('mine', 'eager')}]\n", "are called 'eager'; rename one"),
        (f"{IMPORT}DESCRIPTORS = [{GOOD.replace('backend', 'bakend', 1)}]\n", "did you mean 'backend'"),
    ],
)
def test_a_plugin_file_that_cannot_be_used_is_told(source, words, engine, small, tmp_path):
    file = tmp_path / "plugin.py"
    if source is not None:
        file.write_text(source)
    assert words in one_sentence(engine(tmp_path / "store", "run", f"plugin={file}", *small))


def test_a_worker_that_cannot_start_is_told(engine, small, tmp_path):
    """A plug-in file that the parent can read and that ends every worker."""
    file = tmp_path / "plugin.py"
    file.write_text("import os, sys\nif 'torch' in sys.modules:\n    os._exit(3)\nDESCRIPTORS = []\n")
    sentence = one_sentence(engine(tmp_path / "store", "run", "--quiet", f"plugin={file}", *small))
    assert "a worker could not start: the worker exited with code 3 during 'hello'" in sentence


def test_an_environment_in_which_no_worker_starts_costs_only_its_own_cases(engine, small, query, tmp_path):
    file = tmp_path / "plugin.py"
    environment = "environment={'PYTHONHOME': '/nowhere'}"
    file.write_text(f"{IMPORT}DESCRIPTORS = [{GOOD[:-1]}, {environment})]\n")
    store = tmp_path / "store"
    result = engine(store, "run", "--quiet", f"plugin={file}", *small, "axes.backend=[eager,mine]")
    assert result.returncode == 1, result.stderr
    rows = dict(query(store, "SELECT backend, status FROM cases"))
    assert rows == {"eager": "ok", "mine": "crashed"}
    ((reason,),) = query(store, "SELECT reason FROM cases WHERE backend = 'mine'")
    assert reason.startswith("a worker could not start: the worker exited with code")


def test_a_backend_that_cannot_be_asked_costs_only_its_own_cases(engine, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(
        "from moebench.contracts import Descriptor\n\n\n"
        "class Broken:\n    def availability(self):\n        raise RuntimeError('no driver')\n\n\n"
        "def create(params):\n    return Broken()\n\n\n"
        "DESCRIPTORS = [Descriptor('backend', 'broken', 'x', f'{__file__}:create')]\n"
    )
    settings = (f"plugin={plugin}", "suite=selftest", "axes.backend=[eager,broken]", "axes.routing=topk", "--plan")
    result = engine(tmp_path, "run", *settings)
    assert result.returncode == 0, result.stderr
    assert "could not be asked (RuntimeError: no driver)" in result.stdout
    assert "1 cases" in result.stdout
