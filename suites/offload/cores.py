"""Where reader threads may run: beside the core of the thread that computes. Imports nothing of ours."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def roaming() -> Iterator[None]:
    """Let threads that are started within the block run wherever the parent process may.

    A worker is pinned to as many cores as it has computing threads; one that reads beside them on the same core would
    take turns with what it is to be hidden behind. The calling thread goes back to its own cores.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    own = os.sched_getaffinity(0)
    os.sched_setaffinity(0, own | os.sched_getaffinity(os.getppid()))
    try:
        yield
    finally:
        os.sched_setaffinity(0, own)
