"""Slots on a device: nothing is used before it arrived, and nothing overwritten while it is used or on its way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moebench.backends.offload.cache import Cache
from moebench.backends.offload.file import OffloadError
from moebench.backends.offload.memory import DeviceMemory
from moebench.backends.offload.policies.recency import LRU
from moebench.backends.offload.store import SlotStore
from moebench.contracts import load_file

lab = load_file(Path(__file__).parent / "slab_lab.py")
fake = load_file(Path(__file__).parent / "fake_link.py")

SCHEDULES = {
    "all late": (0.0, 0.0),
    "copies at once": (1.0, 0.0),
    "work at once": (0.0, 1.0),
    "all at once": (1.0, 1.0),
    "by chance": (0.5, 0.5),
    "seldom": (0.1, 0.1),
}
ACCESSES = lab.sticky(10, 5)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lab.Model(tmp_path_factory.mktemp("slabs") / "model.safetensors", low=lab.low)


def mishaps(model, link, capacity=5, readers=2, staging=1):
    """Serve accesses on the device of ``link``, whose work looks at every weight; return what it saw amiss."""
    cache = Cache(LRU(), capacity, model.file.layout, lab.NextLayer(), None, lab.ByTurns(("fetch", "low")))
    seen = []

    def work(served):
        def look():
            try:
                model.check(served)
            except AssertionError:
                link.wrong.append(served.event)
            seen.append(served.key)

        return look

    with SlotStore(model.file, cache, device=link, readers=readers, staging=staging) as store:
        for access in ACCESSES:
            for served in store.serve(access):
                link.launch(work(served))
        link.synchronize()
        assert store.resident_bytes() == (capacity + staging) * 12288
    assert store.resident_bytes() == 0
    assert len(seen) == sum(len(access.experts) for access in ACCESSES)
    assert link.pinned_bytes == (readers + 1) * 12288
    return link.wrong


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_device_sees_what_was_written_whatever_runs_when(model, schedule, readers):
    for seed, capacity in ((0, 5), (1, 0), (2, 12)):
        link = fake.Link(*SCHEDULES[schedule], seed)
        assert mishaps(model, link, capacity, readers) == []
        assert link.copies > 30
    assert lab.reader_threads() == []


def no_wait_before_use(patch):
    patch.setattr(DeviceMemory, "ready", DeviceMemory._slot)


def no_mark_after_use(patch):
    patch.setattr(DeviceMemory, "used", lambda self, slot: None)


def no_wait_for_pinned(patch):
    finish = fake.Link.finish
    in_reader = lambda: lab.threading.current_thread().name.startswith("slabs-")  # noqa: E731
    patch.setattr(fake.Link, "finish", lambda link, mark: None if in_reader() else finish(link, mark))


@pytest.mark.parametrize("omission", [no_wait_before_use, no_mark_after_use, no_wait_for_pinned])
def test_the_fake_device_catches_each_wait_that_is_left_out(model, monkeypatch, omission):
    omission(monkeypatch)
    found = {name: len(mishaps(model, fake.Link(*chances))) for name, chances in SCHEDULES.items()}
    assert any(found.values()), found


def test_copies_have_ended_when_the_store_is_closed(model):
    link = fake.Link(0.0, 0.0)
    with SlotStore(model.file, Cache(LRU(), 4, model.file.layout, lab.NextLayer()), device=link) as store:
        list(store.serve(lab.access(0, [1, 2])))
    assert link.side.done == link.side.given


def test_a_read_that_fails_keeps_no_pinned_memory(model, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "read_error:3")
    link = fake.Link()
    with SlotStore(model.file, Cache(LRU(), 4, model.file.layout), device=link) as store:
        with pytest.raises(OffloadError, match="Input/output error"):
            [list(store.serve(access)) for access in ACCESSES]
        assert store.memory._landings.qsize() == 2


def test_memory_that_is_not_to_be_had_is_told(model):
    class Small(fake.Link):
        def empty(self, nbytes):
            raise RuntimeError("CUDA out of memory.\nmore lines")

    with pytest.raises(OffloadError, match=r"out of memory.*lower the capacity"):
        SlotStore(model.file, Cache(LRU(), 4, model.file.layout), device=Small())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that torch finds")
def test_a_real_gpu_sees_what_was_written(model):
    cache = Cache(LRU(), 5, model.file.layout, lab.NextLayer(), None, lab.ByTurns(("fetch", "low")))
    with SlotStore(model.file, cache, device="cuda", readers=2) as store:
        for access in ACCESSES:
            for served in store.serve(access):
                parts = [lab.parts(weight) for weight in (served.gate_up, served.down)]
                form = "low" if served.event.how == "low" else "full"
                for found, weight in zip(parts, model.expected(served.key, form), strict=True):
                    assert all(torch.equal(found[name].cpu(), part) for name, part in lab.parts(weight).items())
