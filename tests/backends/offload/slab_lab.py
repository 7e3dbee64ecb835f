"""Small models in slab files, traces, and a prefetcher and an execution whose decisions are easy to foresee."""

from __future__ import annotations

import os
import random
import threading
import time
from contextlib import contextmanager

import torch

from moebench.backends.offload.access import Access
from moebench.backends.offload.file import SlabFile, write_slabs
from moebench.contracts import Scheme
from moebench.moe.blocks import codecs as blocks
from moebench.moe.codecs.rtn import round_to_nearest
from moebench.moe.experts import ExpertStore

EXPERTS, HIDDEN, WIDTH = 6, 32, 32
LAYERS = (0, 1, 2, 5)


def store(seed, dtype=torch.float32, experts=EXPERTS, width=WIDTH, hidden=HIDDEN):
    """Return dense experts; every number is different from run to run of the seed's neighbours."""
    generator = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=generator).to(dtype)
    down = torch.randn(experts, hidden, width, generator=generator).to(dtype)
    return ExpertStore(gate_up, down, ("ffn",) * experts)


def quantized(dense, scheme):
    """Return the experts in the codes of ``scheme``."""
    encode = round_to_nearest if scheme.codec == "rtn" else blocks.encode
    gate_up, down = (tuple(encode(weight, scheme) for weight in weights) for weights in (dense.gate_up, dense.down))
    return ExpertStore(gate_up, down, dense.kinds)


def low(dense):
    """Return the experts in four bits."""
    return quantized(dense, Scheme("rtn", 4, 32))


class Model:
    """A model with its experts in memory and in a file."""

    def __init__(self, path, layers=LAYERS, make=store, low=None):
        self.stores = {layer: make(layer) for layer in layers}
        self.low = {layer: low(one) for layer, one in self.stores.items()} if low else {}
        self.path = write_slabs(path, self.stores.items(), low)
        self.file = SlabFile.open(path)

    def expected(self, key, form="full"):
        """Return (gate_up, down) of an expert as they were written."""
        found = (self.low if form == "low" else self.stores)[key[0]]
        return found.gate_up[key[1]], found.down[key[1]]

    def check(self, served):
        """Assert that a served expert is the one that was written, bit for bit; return its event."""
        if served.event.how == "in_place":
            assert served.gate_up is served.down is None
        else:
            form = "low" if served.event.how == "low" else "full"
            for weight, wanted in zip((served.gate_up, served.down), self.expected(served.key, form), strict=True):
                assert same(weight, wanted), served.event
        return served.event


def parts(weight):
    """Return the stored tensors of a weight."""
    return {"": weight} if isinstance(weight, torch.Tensor) else weight.parts()


def same(weight, wanted):
    """Whether two weights are of one type and stored in the same bytes."""
    mine, others = parts(weight), parts(wanted)
    return mine.keys() == others.keys() and all(
        part.dtype == others[name].dtype
        and part.shape == others[name].shape
        and torch.equal(part.reshape(-1).view(torch.uint8), others[name].reshape(-1).view(torch.uint8))
        for name, part in mine.items()
    )


def access(layer, experts, step=0):
    """Return an access of one token to some experts."""
    experts = tuple(sorted(experts))
    return Access(step, layer, experts, (1,) * len(experts), (1.0 / len(experts),) * len(experts) if experts else ())


def uniform(steps, seed, k=2, layers=LAYERS, experts=EXPERTS):
    """Return accesses that ask for k experts, each as likely as any other."""
    rng = random.Random(seed)
    return [access(layer, rng.sample(range(experts), k), step) for step in range(steps) for layer in layers]


def zipf(steps, seed, layers=LAYERS, experts=EXPERTS):
    """Return accesses that ask for one to three experts, low ids far more often."""
    rng = random.Random(seed)
    weights = [1 / (expert + 1) ** 1.5 for expert in range(experts)]
    return [
        access(layer, set(rng.choices(range(experts), weights, k=3)), step) for step in range(steps) for layer in layers
    ]


def sticky(steps, seed, layers=LAYERS, experts=EXPERTS):
    """Return accesses that mostly ask for what the layer asked for before; now and then for all experts, or none."""
    rng, last = random.Random(seed), {}
    made = []
    for step in range(steps):
        for layer in layers:
            if layer not in last or rng.random() < 0.3:
                last[layer] = rng.sample(range(experts), rng.choice((0, 1, 2, 2, experts)))
            made.append(access(layer, last[layer], step))
    return made


class NextLayer:
    """Proposes the same experts, and the ones after them, in the layer that comes next."""

    needs_future = False

    def propose(self, moment):
        layers = moment.layout.layers
        after = layers[(layers.index(moment.access.layer) + 1) % len(layers)]
        wanted = {expert + i for expert in moment.access.experts for i in (0, 1)}
        return [(after, expert % moment.layout.experts) for expert in sorted(wanted)]


class ByTurns:
    """Lets missing experts be fetched, computed in place, fetched in few bits, deferred, by turns."""

    def __init__(self, ways=("fetch", "in_place", "low", "deferred")):
        self.ways, self.count = ways, 0

    def decide(self, missing, moment):
        chosen = {key: self.ways[(self.count + i) % len(self.ways)] for i, key in enumerate(missing)}
        self.count += len(missing)
        return chosen


class Gate:
    """Holds back reads of ``Source`` until they are let through, and notes their order."""

    def __init__(self, patch):
        from moebench.backends.offload.source import Source

        self.begun, self.open = [], threading.Event()
        read = Source.read

        def held(source, slab, target, name):
            self.begun.append(name)
            assert self.open.wait(20)
            read(source, slab, target, name)

        patch.setattr(Source, "read", held)


def until(condition):
    """Wait until something is so; give up after ten seconds."""
    for _ in range(2000):
        if condition():
            return
        time.sleep(0.005)
    raise AssertionError("it never came to be so")


def reader_threads():
    """Return the reader threads that live."""
    return [thread for thread in threading.enumerate() if thread.name.startswith("slabs-")]


@contextmanager
def forked(work):
    """Run ``work`` in a copy of this process, without importing anything anew; gives its id."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    try:
        yield child
    finally:
        try:
            os.kill(child, 9)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
