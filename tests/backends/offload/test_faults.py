"""What a bad disk does ends in a sentence that names the expert, never in a wrong number and never in a hang."""

from __future__ import annotations

import os
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from moebench.backends.offload.cache import Cache
from moebench.backends.offload.file import OffloadError, SlabFile
from moebench.backends.offload.policies.recency import LRU
from moebench.backends.offload.source import Source
from moebench.backends.offload.store import SlotStore
from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "slab_lab.py")

ACCESSES = lab.uniform(6, 11)
FIRST = f"expert {ACCESSES[0].experts[0]} of layer 0"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return lab.Model(tmp_path_factory.mktemp("slabs") / "model.safetensors")


@pytest.fixture
def model(written, tmp_path, monkeypatch):
    """A copy of the model's file to be harmed; no reader thread may outlive the test."""
    path = tmp_path / "model.safetensors"
    shutil.copy(written.path, path)
    made = object.__new__(lab.Model)
    made.stores, made.low, made.path, made.file = written.stores, {}, path, SlabFile.open(path)
    yield made
    assert lab.reader_threads() == []


def open_store(model, capacity=6, prefetcher=None, **settings):
    return SlotStore(model.file, Cache(LRU(), capacity, model.file.layout, prefetcher), **settings)


def serve_all(model, store, accesses=ACCESSES):
    for access in accesses:
        for served in store.serve(access):
            model.check(served)


def fails(model, said, **settings):
    """Serve until the store ends, which it must, with a sentence; and it must stay so."""
    with open_store(model, **settings) as store:
        with pytest.raises(OffloadError, match=said) as first:
            serve_all(model, store)
        for _ in range(2):
            with pytest.raises(OffloadError) as again:
                next(store.serve(ACCESSES[0]))
            assert str(again.value) == str(first.value)
    assert str(first.value).count("\n") == 0
    return str(first.value)


@pytest.mark.parametrize("number", [1, 2, 7])
@pytest.mark.parametrize("readers", [1, 3])
def test_a_failing_read_names_the_expert(model, monkeypatch, number, readers):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", f"read_error:{number}")
    said = fails(model, r"expert \d of layer \d cannot be read .* \(Input/output error\); see whether", readers=readers)
    if number == readers == 1:
        assert said.startswith(FIRST)


def test_a_failing_prefetch_ends_the_store_too(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "read_error:4")
    fails(model, "Input/output error", prefetcher=lab.NextLayer())


def test_a_short_read_is_asked_for_again(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "read_short:1+")
    for io in ("direct", "page_cache"):
        with open_store(model, io=io) as store:
            serve_all(model, store)


def test_a_read_beyond_the_deadline_ends_the_store(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "read_slow:3")
    monkeypatch.setenv("MOEBENCH_OFFLOAD_SLOW_S", "0.4")
    fails(model, r"reading expert \d of layer \d .* takes longer than 0.1 s; .* a longer deadline", deadline_s=0.1)
    with open_store(model, deadline_s=20) as store:  # with a longer one the numbers are right
        serve_all(model, store)


def test_a_queued_read_behind_a_slow_one_is_not_waited_for_forever(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "read_slow:1")
    monkeypatch.setenv("MOEBENCH_OFFLOAD_SLOW_S", "0.5")
    with open_store(model, deadline_s=0.1) as store:
        store._readers.submit((5, 5), "full", 0, True, store.first)
        with pytest.raises(OffloadError, match=r"reading expert 5 of layer 5 .* longer than 0.1 s"):
            list(store.serve(lab.access(0, [1, 2])))


def test_a_read_that_failed_before_it_was_asked_for_is_told(model, monkeypatch):
    first_is_out, read = threading.Event(), Source.read

    def failing(source, slab, target, name):
        if name == "expert 2 of layer 0":
            assert first_is_out.wait(20)
            raise OffloadError("the second one cannot be read")
        read(source, slab, target, name)

    monkeypatch.setattr(Source, "read", failing)
    with open_store(model) as store:
        serving = store.serve(lab.access(0, [1, 2]))
        model.check(next(serving))
        first_is_out.set()
        lab.until(lambda: store._readers._failure)
        with pytest.raises(OffloadError, match="the second one"):
            next(serving)


def test_what_goes_wrong_in_a_thread_in_any_other_way_is_told(model, monkeypatch):
    monkeypatch.setattr(Source, "read", lambda *args: 1 / 0)
    fails(model, rf"reading {FIRST} failed \(ZeroDivisionError: division by zero\)")


@pytest.mark.parametrize("io", ["direct", "page_cache"])
def test_one_wrong_byte_is_named(model, io):
    harmed = (2, 4)
    slab = model.file.slab(harmed)
    with model.path.open("r+b") as file:
        file.seek(model.file.data_begin + slab.offset + random.Random(io).randrange(slab.nbytes))
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 0x10]))
    model.file = SlabFile.open(model.path)  # the header is whole: it is the read that tells
    whole = [access for access in ACCESSES if harmed not in access.keys]
    with open_store(model, io=io) as store:
        serve_all(model, store, whole)
        with pytest.raises(OffloadError, match=r"expert 4 of layer 2 is damaged: .* checksum; write the file anew"):
            list(store.serve(lab.access(2, [3, 4])))


def truncated(path):
    os.truncate(path, path.stat().st_size - 4096)


def deleted(path):
    path.unlink()


def replaced(path):
    other = path.with_name("other")
    shutil.copy(path, other)
    os.rename(other, path)


def touched(path):
    os.utime(path)


@pytest.mark.parametrize("harm", [truncated, deleted, replaced, touched])
def test_a_file_that_is_not_the_one_that_was_opened(model, harm):
    said = "No such file" if harm is deleted else "changed after it was opened"
    with open_store(model) as store:
        list(store.serve(ACCESSES[0]))
        harm(model.path)
        with pytest.raises(OffloadError, match=rf"expert \d of layer 1 cannot be read .*{said}"):
            serve_all(model, store, ACCESSES[1:])
    with pytest.raises(OffloadError, match=said):
        open_store(model)


def test_a_read_past_the_end_is_told(model, monkeypatch):
    monkeypatch.setattr(Source, "_check_unchanged", lambda source: None)  # as if it were cut at that very moment
    with open_store(model) as store:
        truncated(model.path)
        with pytest.raises(OffloadError, match=r"expert 5 of layer 5 .*ends before all of it"):
            list(store.serve(lab.access(5, [5])))


def test_a_file_system_without_direct_reads_names_the_other_way(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "no_direct")
    with pytest.raises(OffloadError, match=r"no direct reads \(O_DIRECT\); use io=page_cache"):
        open_store(model)
    with open_store(model, io="page_cache") as store:
        serve_all(model, store)


def test_a_fault_that_does_not_exist_is_named(model, monkeypatch):
    for wanted in ("read_eror", "read_error:x"):
        monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", wanted)
        with pytest.raises(OffloadError, match="is no fault; write one of read_error"):
            open_store(model)


def test_a_store_that_is_forgotten_ends_its_threads(model):
    store = open_store(model)
    list(store.serve(ACCESSES[0]))
    del store
    lab.until(lambda: lab.reader_threads() == [])


def test_a_killed_store_leaves_the_file_whole(model):
    before = model.path.read_bytes()
    rng = random.Random(1)

    def work():
        with open_store(model, prefetcher=lab.NextLayer(), readers=2) as store:
            while True:
                serve_all(model, store)

    for _ in range(5):
        with lab.forked(work) as child:
            time.sleep(rng.uniform(0.005, 0.05))
            os.kill(child, signal.SIGKILL)
            assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert model.path.read_bytes() == before
    with open_store(model) as store:
        serve_all(model, store)
