"""The slab file: what any reader of safetensors sees in it, what comes back from it, and what a crash leaves of it."""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import re
import resource
import signal
import time
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from moebench.backends.offload import writer
from moebench.backends.offload.file import OffloadError, SlabFile, write_slabs
from moebench.backends.offload.source import Source
from moebench.contracts import Scheme, load_file
from moebench.moe.experts import ExpertStore

lab = load_file(Path(__file__).parent / "slab_lab.py")

SCHEMES = [
    Scheme("rtn", 8, None),
    Scheme("rtn", 4, 32),
    Scheme("rtn", 3, 16, symmetric=False),
    *(Scheme(name, 4.0) for name in ("nf4", "mxfp4", "nvfp4")),
    *(Scheme(name, 8.0) for name in ("fp8_e4m3", "fp8_e5m2")),
    Scheme("ternary", 2.0),
    Scheme("binary", 1.0),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return lab.Model(tmp_path_factory.mktemp("slabs") / "model.safetensors", low=lab.low)


def read_all(model, file=None):
    """Read every slab as a store does, and compare it with what was written."""
    file = file or model.file
    source = Source(file, "page_cache")
    for form, slabs in file.header.slabs.items():
        for key, slab in slabs.items():
            buffer = bytearray(file.slab_bytes(form))
            source.read(slab, memoryview(buffer)[: slab.nbytes], str(key))
            found = file.weights(key, form, torch.frombuffer(buffer, dtype=torch.uint8))
            assert all(
                lab.same(weight, wanted) for weight, wanted in zip(found, model.expected(key, form), strict=True)
            )
    source.close()


def test_any_reader_of_safetensors_finds_every_matrix(model):
    with safe_open(model.path, "pt") as file:
        names = set(file.keys())
        for form, layer, expert in itertools.product(("full", "low"), lab.LAYERS, range(lab.EXPERTS)):
            for name, weight in zip(("gate_up", "down"), model.expected((layer, expert), form), strict=True):
                for part, tensor in lab.parts(weight).items():
                    called = ".".join(filter(None, (form, str(layer), str(expert), name, part)))
                    names.remove(called)
                    assert torch.equal(file.get_tensor(called), tensor)
        assert all(name.startswith("pad.") and not file.get_tensor(name).any() for name in names)
        assert json.loads(file.metadata()["layout"]) == {"layers": list(lab.LAYERS), "experts": lab.EXPERTS}


def test_slabs_begin_where_direct_reads_may(model):
    offsets = [slab.offset for slabs in model.file.header.slabs.values() for slab in slabs.values()]
    assert model.file.data_begin % 4096 == 0
    assert all(offset % 4096 == 0 for offset in offsets)
    assert len(set(offsets)) == len(offsets) == 2 * model.file.layout.size
    assert (model.file.slab_bytes("full"), model.file.slab_bytes("low")) == (12288, 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16], ids=str)
def test_dense_experts_come_back_bit_for_bit(tmp_path, dtype):
    read_all(lab.Model(tmp_path / "m", make=lambda seed: lab.store(seed, dtype)))


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda scheme: f"{scheme.codec}{scheme.bits:g}")
def test_quantized_experts_come_back_bit_for_bit(tmp_path, scheme):
    read_all(lab.Model(tmp_path / "m", (3,), lambda seed: lab.quantized(lab.store(seed), scheme)))


def test_layers_may_differ_in_width(tmp_path):
    model = lab.Model(tmp_path / "m", make=lambda seed: lab.store(seed, width=16 * (seed + 1)))
    assert model.file.slab_bytes() == 3 * 16 * 6 * lab.HIDDEN * 4
    read_all(model)


@pytest.mark.parametrize("room", [0, 1])
def test_more_layers_than_the_header_has_room_for(tmp_path, monkeypatch, room):
    monkeypatch.setattr(writer, "ROOM_LAYERS", room)
    monkeypatch.setattr(writer, "CHUNK", 5000)  # what is moved overlaps with where it goes
    model = lab.Model(tmp_path / "m", tuple(range(9)))
    read_all(model)
    with safe_open(model.path, "pt") as file:
        assert torch.equal(file.get_tensor("full.8.5.down"), model.stores[8].down[5])


def test_one_layer_is_held_at_a_time(tmp_path):
    alive = []

    def layers():
        for layer in range(4):
            assert [one() for one in alive] == [None] * layer
            made = lab.store(layer)
            alive.append(weakref.ref(made))
            yield layer, made
            del made

    write_slabs(tmp_path / "m", layers(), lab.low)
    assert len(alive) == 4


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path):
    dense = lab.store(0)

    class Own:
        scheme, shape = Scheme("mine", 4.0), (64, 32)

    cases = {
        "no layers": [],
        "kind copy": [(0, ExpertStore(dense.gate_up, dense.down, ("copy", *dense.kinds)))],
        "ascending": [(1, dense), (1, dense)],
        "an earlier one 6": [(0, dense), (1, lab.store(1, experts=3))],
        "codec mine": [(0, ExpertStore((Own(),) * 6, (Own(),) * 6, dense.kinds))],
    }
    for said, layers in cases.items():
        with pytest.raises(OffloadError, match=said):
            write_slabs(tmp_path / "m", layers)
    assert os.listdir(tmp_path) == []


# What is not whole


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_damaged_header_is_never_taken(model, data):
    whole = model.path.read_bytes()
    text_end = 8 + len(model.file.header.encode())
    place = data.draw(st.integers(0, text_end - 1))
    byte = data.draw(st.integers(0, 255).filter(lambda value: value != whole[place]))
    path = model.path.with_name("damaged")
    path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
    with pytest.raises(OffloadError, match="damaged"):
        SlabFile.open(path)


def test_a_file_that_is_not_whole_is_refused(model, tmp_path):
    whole, path = model.path.read_bytes(), tmp_path / "m"
    for content in (b"", b"abc", whole[:4096], whole[:-1], whole[:-4096], whole + b"\0", bytes(len(whole))):
        path.write_bytes(content)
        with pytest.raises(OffloadError, match="write it anew"):
            SlabFile.open(path)
    save_file({"w": torch.ones(2)}, path, {"format": "pt"})
    with pytest.raises(OffloadError, match="not a slab file"):
        SlabFile.open(path)
    for missing in (tmp_path / "none", tmp_path):
        with pytest.raises(OffloadError, match="write it first"):
            SlabFile.open(missing)


def test_another_version_is_named(model, tmp_path):
    path = tmp_path / "m"
    path.write_bytes(model.path.read_bytes().replace(b'"version":"1"', b'"version":"2"'))
    with pytest.raises(OffloadError, match="version 2, and version 1"):
        SlabFile.open(path)


def test_an_expert_that_is_not_there_is_named(model, tmp_path):
    with pytest.raises(OffloadError, match="no expert 6 of layer 5"):
        model.file.slab((5, 6))
    plain = lab.Model(tmp_path / "m", (0,))
    with pytest.raises(OffloadError, match="no form low"):
        plain.file.slab((0, 0), "low")


# Crashes, and others who write


def slowly(stores, pause=0.002):
    for layer, one in stores.items():
        time.sleep(pause)
        yield layer, one


def test_a_killed_writer_leaves_nothing_or_all(tmp_path):
    stores = {layer: lab.store(layer) for layer in range(6)}
    path, rng, seen = tmp_path / "m", random.Random(0), []
    for _ in range(25):
        path.unlink(missing_ok=True)
        with lab.forked(lambda: write_slabs(path, slowly(stores))) as child:
            time.sleep(rng.uniform(0, 0.04))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        seen.append(path.exists())
        if path.exists():
            assert SlabFile.open(path).layout.layers == tuple(range(6))
    assert not all(seen), "no writer was killed in time; lengthen the pauses"
    model = lab.Model(path, tuple(range(6)))
    read_all(model)
    assert os.listdir(tmp_path) == ["m"]  # what the killed ones left is gone


def test_what_was_there_stays_until_the_new_file_is_whole(tmp_path):
    model = lab.Model(tmp_path / "m")

    def layers():
        yield 0, lab.store(7)
        read_all(model, SlabFile.open(model.path))
        raise RuntimeError("the model cannot be read")

    with pytest.raises(RuntimeError, match="cannot be read"):
        write_slabs(model.path, layers())
    read_all(model, SlabFile.open(model.path))
    assert os.listdir(tmp_path) == ["m"]


def test_writers_of_one_file_take_turns(tmp_path):
    path, (first_read, first_write) = tmp_path / "m", os.pipe()
    second_read, second_write = os.pipe()

    def first():
        write_slabs(path, waiting())

    def waiting():
        os.write(second_write, b"holds")
        os.read(first_read, 1)
        yield 0, lab.store(1)

    def second():
        write_slabs(path, begun())

    def begun():
        os.write(second_write, b"begun")
        yield 0, lab.store(2)

    with lab.forked(first) as one:
        assert os.read(second_read, 5) == b"holds"
        with lab.forked(second) as other:
            os.set_blocking(second_read, False)
            time.sleep(0.1)
            with pytest.raises(BlockingIOError):
                os.read(second_read, 5)
            os.write(first_write, b".")
            assert os.waitpid(one, 0)[1] == os.waitpid(other, 0)[1] == 0
    with safe_open(path, "pt") as file:
        assert torch.equal(file.get_tensor("full.0.3.down"), lab.store(2).down[3])


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("MOEBENCH_OFFLOAD_FAULT", "write_full:9")
    with pytest.raises(OffloadError, match=r"No space left on device.*free space"):
        lab.Model(tmp_path / "m")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_is_really_full(tmp_path):
    """A file system of 256 KiB that only the child sees."""
    answer, write = os.pipe()
    libc = ctypes.CDLL(None)

    def work():
        private = libc.unshare(0x20000) or libc.mount(b"none", b"/", None, 0x44000, None)
        if private or libc.mount(b"tmpfs", os.fsencode(tmp_path), b"tmpfs", 0, b"size=256k"):
            os._exit(77)
        try:
            lab.Model(tmp_path / "m")
        except OffloadError as error:
            os.write(write, f"{error} {os.listdir(tmp_path)}".encode())

    with lab.forked(work) as child:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(write)
    if code == 77:
        pytest.skip("this user may not mount a file system")
    with os.fdopen(answer) as said:
        assert re.fullmatch(r".* cannot be written \(No space left on device\); free space .* \[\]", said.read())


def test_a_limit_on_the_size_of_files_is_told_and_leaves_nothing(tmp_path):
    said = tmp_path / "said"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
        try:
            lab.Model(tmp_path / "m", tuple(range(6)))
        except OffloadError as error:
            said.write_text(str(error))

    with lab.forked(work) as child:
        assert os.waitpid(child, 0)[1] == 0
    assert "File too large" in said.read_text()
    assert "free space" in said.read_text()
    assert os.listdir(tmp_path) == ["said"]


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OffloadError, match="choose another folder"):
        lab.Model(tmp_path / "file" / "m")
