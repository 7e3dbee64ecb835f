"""A backend that kills its worker at the first load of a run and works afterwards; $MOEBENCH_MARK remembers it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from moebench.backends.eager import create
from moebench.contracts import Descriptor


class OnceBitten:
    def __init__(self, eager):
        self._eager = eager
        self.availability, self.supports = eager.availability, eager.supports

    def load(self, layers, specs):
        mark = Path(os.environ["MOEBENCH_MARK"])
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self._eager.load(layers, specs)


def make(params):
    return OnceBitten(create(params))


DESCRIPTORS = [Descriptor("backend", "once_bitten", "dies once", f"{__file__}:make")]
