"""A backend that is right and sleeps 0.2 s in every call: for tests of who waits for whom."""

from __future__ import annotations

import time

from moebench.backends.eager import Eager, EagerExecutor
from moebench.backends.session import open_session
from moebench.contracts import Descriptor


class SlowExecutor(EagerExecutor):
    def add(self, y_TH, x_TH, inputs):
        time.sleep(0.2)
        super().add(y_TH, x_TH, inputs)


class Slow(Eager):
    def load(self, layers, specs):
        return open_session(SlowExecutor, layers, specs)


def create(params):
    return Slow()


DESCRIPTORS = [Descriptor("backend", "slow", "eager with a nap", f"{__file__}:create")]
