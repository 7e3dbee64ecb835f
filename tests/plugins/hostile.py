"""Backends that misbehave, each in one way; ``moebench run plugin=tests/plugins/hostile.py`` must outlive them all.

``EXPECTED`` says how each one must end. Two honest-looking ones end well, and why is said at their functions:
``prints`` is only noisy, and ``caches_by_content`` cannot be told from a backend that is right and fast.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moebench.backends import rules
from moebench.contracts import Availability, Descriptor, ExecutedPath, Execution, LayerSpec, Refusal

LOUD = 2000


@dataclass
class Memory:
    """What a backend keeps between its calls."""

    calls: int = 0
    answers: dict[Any, Any] = field(default_factory=dict)


Call = Callable[[Callable[[Any], Any], Memory, Any, Any], None]
"""A behaviour: ``(honest, memory, x_TH, out_TH)``, where ``honest(out_TH)`` writes the right answer."""


class Session:
    """Layers of one hostile backend. ``path`` tells what it claims to have executed after so many calls."""

    def __init__(self, executors: Mapping[int, Any], call: Call, path: Callable[[int], ExecutedPath]) -> None:
        self._executors, self._call, self._path, self._memory = executors, call, path, Memory()

    def layer(self, index: int) -> Callable[..., Any]:
        honest = self._executors[index]

        def execute(x_TH: Any, *inputs: Any, out_TH: Any = None) -> Any:
            self._memory.calls += 1
            self._call(lambda out: honest(x_TH, *inputs, out_TH=out), self._memory, x_TH, out_TH)
            return out_TH

        return execute

    def hint(self, layer: int, experts: Any, priority: float) -> None: ...

    def executed(self) -> ExecutedPath:
        return self._path(self._memory.calls)

    def events(self) -> tuple[()]:
        return ()

    def resident_bytes(self) -> int:
        return 0

    def close(self) -> None: ...


def dense(calls: int) -> ExecutedPath:
    return ExecutedPath("dense")


@dataclass(frozen=True)
class Hostile:
    """A backend that computes as ``eager`` does, except for what ``call``, ``load_first`` and ``path`` make of it."""

    call: Call
    load_first: Callable[[], None] | None = None
    path: Callable[[int], ExecutedPath] = dense
    excludes: tuple[str, ...] = ()

    def availability(self) -> Availability:
        return Availability(True)

    def supports(self, spec: LayerSpec) -> Execution | Refusal:
        refused = rules.refusal(spec, "a hostile backend", ("float32",))
        return refused or rules.execution(spec, ("topk", "sorted"), excludes=self.excludes)

    def load(self, layers: Mapping[int, Any], specs: Mapping[int, LayerSpec]) -> Session:
        from moebench.backends.eager import EagerExecutor

        if self.load_first is not None:
            self.load_first()
        executors = {index: EagerExecutor(store, specs[index]) for index, store in layers.items()}
        return Session(executors, self.call, self.path)


def honest_call(honest, memory, x_TH, out_TH):
    honest(out_TH)


def crash() -> None:
    ctypes.string_at(0)


# --- crashes, hangs and errors ---------------------------------------------------------------------------------------


def segfault(params):
    return Hostile(lambda honest, memory, x_TH, out_TH: crash())


def segfault_load(params):
    return Hostile(honest_call, load_first=crash)


def hangs(params):
    return Hostile(lambda honest, memory, x_TH, out_TH: time.sleep(3600))


def killed(params):
    """What the kernel does to a worker when memory runs out."""
    return Hostile(lambda honest, memory, x_TH, out_TH: os.kill(os.getpid(), signal.SIGKILL))


def allocates(params):
    """Ask for more memory than there can be."""

    def call(honest, memory, x_TH, out_TH):
        import torch

        torch.empty(2**60, dtype=torch.uint8)

    return Hostile(call)


def exits(params):
    return Hostile(lambda honest, memory, x_TH, out_TH: os._exit(0))


def sys_exits(params):
    return Hostile(lambda honest, memory, x_TH, out_TH: sys.exit(0))


def raises(params):
    def call(honest, memory, x_TH, out_TH):
        raise RuntimeError("the kernel was built for another device\nsecond line")

    return Hostile(call)


# --- wrong answers ---------------------------------------------------------------------------------------------------


def wrong(params):
    """One value in one row is off by one thousandth of the row's norm."""

    def call(honest, memory, x_TH, out_TH):
        honest(out_TH)
        out_TH[-1, 0] += 1e-3 * out_TH[-1].norm()

    return Hostile(call)


def wrong_later(params):
    """Right for the first turns and wrong afterwards: a check of the first call alone would pass it."""

    def call(honest, memory, x_TH, out_TH):
        honest(out_TH)
        if memory.calls > 40:
            out_TH[0] *= 1.01

    return Hostile(call)


def writes_nan(params):
    return Hostile(lambda honest, memory, x_TH, out_TH: out_TH.fill_(float("nan")))


def unwritten(params):
    """The lower half of the output is not touched."""

    def call(honest, memory, x_TH, out_TH):
        answer_TH = x_TH.clone()
        honest(answer_TH)
        half = len(out_TH) // 2
        out_TH[:half] = answer_TH[:half]

    return Hostile(call)


def lazy(params):
    """Each buffer is written once; later calls find the former answer in it and write nothing."""

    def call(honest, memory, x_TH, out_TH):
        if memory.answers.setdefault(out_TH.data_ptr(), memory.calls) == memory.calls:
            honest(out_TH)

    return Hostile(call)


# --- remembered answers ----------------------------------------------------------------------------------------------


def _remembering(key: Callable[[Any], Any]) -> Hostile:
    def call(honest, memory, x_TH, out_TH):
        name = key(x_TH)
        if name not in memory.answers:
            honest(out_TH)
            memory.answers[name] = out_TH.clone()
        out_TH.copy_(memory.answers[name])

    return Hostile(call)


def caches(params):
    """The first answer is given to every question."""
    return _remembering(lambda x_TH: None)


def caches_by_pointer(params):
    """The answer is kept under the address of the input, whose content the engine changes before each turn."""
    return _remembering(lambda x_TH: x_TH.data_ptr())


def caches_by_content(params):
    """The answer is kept under the content of the input, so it is always the right one.

    No oracle can object: inputs come back, because references are made once. Only flag ``implausible`` can tell, where
    the host's roofline is known and the remembered answer comes faster than it allows.
    """
    return _remembering(lambda x_TH: hash(tuple(x_TH[0].tolist())))


# --- silent fall-backs -----------------------------------------------------------------------------------------------


def falls_back(params):
    """It says what it executes, and that is not what the plan says."""
    return Hostile(honest_call, path=lambda calls: ExecutedPath("dequantized"))


def falls_back_late(params):
    """It keeps to the plan until it is called often enough."""
    return Hostile(honest_call, path=lambda calls: ExecutedPath("dense", "mask" if calls > 10 else "none"))


def falls_back_by_operator(params):
    """It excludes plain products and uses them."""
    return Hostile(honest_call, excludes=("aten.mm.default", "aten.addmm.default", "aten.linear.default"))


# --- only noisy ------------------------------------------------------------------------------------------------------


def prints(params):
    """Everything printed goes to the worker's log: the protocol has pipes of its own."""

    def call(honest, memory, x_TH, out_TH):
        print('{"id": 1, "ok": {}}' * LOUD)
        os.write(1, b"straight to the descriptor\n")
        print("to stderr", file=sys.stderr)
        honest(out_TH)

    return Hostile(call)


EXPECTED = {
    "segfault": ("crashed", "killed by SIGSEGV"),
    "segfault_load": ("crashed", "killed by SIGSEGV during 'prepare'"),
    "hangs": ("timed_out", "no answer to 'turn' within"),
    "killed": ("crashed", "killed by SIGKILL (often: out of memory)"),
    "allocates": ("failed", "RuntimeError"),
    "exits": ("crashed", "exited with code 0"),
    "sys_exits": ("failed", "SystemExit: asked to exit with 0"),
    "raises": ("failed", "RuntimeError: the kernel was built for another device"),
    "wrong": ("wrong", "of its norm"),
    "wrong_later": ("wrong", "of its norm"),
    "writes_nan": ("wrong", "NaN"),
    "unwritten": ("wrong", "unwritten"),
    "lazy": ("wrong", "unwritten"),
    "caches": ("wrong", "of its norm"),
    "caches_by_pointer": ("wrong", "of its norm"),
    "falls_back": ("fell_back", "the plan says weights=dense, the backend executed dequantized"),
    "falls_back_late": ("fell_back", "the plan says sparse=none, the backend executed mask"),
    "falls_back_by_operator": ("fell_back", "the plan excludes aten."),
    "caches_by_content": ("ok", ""),
    "prints": ("ok", ""),
}
"""How each backend must end: status, and words of its reason."""

DESCRIPTORS = [Descriptor("backend", name, f"misbehaves: {name}", f"{__file__}:{name}") for name in EXPECTED]
