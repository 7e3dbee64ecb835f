"""A device with two streams that run when they please: as late as they may, as early as they may, or by chance.

What is given to a stream runs only when somebody waits for it, or when the schedule says so; copies read their source
when they run. So whoever forgets to wait, in any of the three places where one must, sees other bytes than were read.
"""

from __future__ import annotations

import random
import threading
import zlib
from collections import deque

import torch

POISON = 0xA5


class Stream:
    """Things to do, in order; ``done`` counts them."""

    def __init__(self):
        self.todo, self.given, self.done = deque(), 0, 0

    def give(self, work):
        self.todo.append(work)
        self.given += 1


class Link:
    """``eager``: the probability that a stream runs on, all it may, whenever something is given to either."""

    def __init__(self, copies=0.5, computing=0.5, seed=0):
        self.side, self.compute = Stream(), Stream()
        self.eager = ((self.side, copies), (self.compute, computing))
        self.rng, self.lock = random.Random(seed), threading.RLock()
        self.wrong, self.pinned_bytes, self.copies = [], 0, 0

    # What the memory of slots asks of a link

    def pinned(self, nbytes):
        self.pinned_bytes += nbytes
        memory = torch.empty(nbytes + 4096, dtype=torch.uint8)
        skip = -memory.data_ptr() % 4096
        return memory[skip : skip + nbytes]

    def empty(self, nbytes):
        return torch.full((nbytes,), POISON, dtype=torch.uint8)

    def copy(self, target, source, after):
        with self.lock:
            self.copies += 1
            given = zlib.crc32(source.numpy())
            self.side.give(after)
            self.side.give(lambda: target.fill_(POISON))
            self.side.give(lambda: self._copied(target, source, given))
            self._some()
            return self.side, self.side.given

    def mark(self):
        with self.lock:
            return self.compute, self.compute.given

    def follow(self, mark):
        with self.lock:
            self.compute.give(mark)
            self._some()

    def finish(self, mark):
        with self.lock:
            stream, place = mark
            self._run(stream, place)

    # What a test does with it

    def launch(self, work):
        """Give work to the device, as a kernel is: it runs some time later."""
        with self.lock:
            self.compute.give(work)
            self._some()

    def synchronize(self):
        with self.lock:
            for stream in (self.compute, self.side):
                self._run(stream, stream.given)

    def _copied(self, target, source, given):
        if zlib.crc32(source.numpy()) != given:
            self.wrong.append("pinned memory was written to before its copy had ended")
        target.copy_(source)

    def _some(self):
        for stream, chance in self.eager:
            if self.rng.random() < chance:
                self._run(stream, stream.given, force=False)

    def _run(self, stream, place, force=True):
        """Run a stream up to a place; where it waits for the other one, that one runs too, or this one stops."""
        while stream.done < place:
            work = stream.todo[0]
            if isinstance(work, tuple):
                other, there = work
                if other.done < there and not force:
                    return
                self._run(other, there)
            stream.todo.popleft()
            stream.done += 1
            if callable(work):
                work()
