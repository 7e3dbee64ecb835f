"""The language between the parent and its workers: JSON lines over two inherited pipes, never stdout.

Requests (each with ``id``):

- ``hello {plugins}`` -> ``{protocol, versions, threads, capability}``
- ``prepare {trial, case}`` -> ``{steps, input_sha256, executed, seen, device, stream, seconds}``; ``device`` tells of
  the GPU, ``stream`` says that every turn must be all steps in order
- ``turn {trial, first_step, calls}`` -> ``{ns, cpu_ns, device_ns, switches, warm_s, ready_s}``;
  ``device_ns`` is empty where no clock of a device times the calls; where the engine's does, ``ns`` is the host's time
  to launch them, and there are ``wait_s``, its wait at the end, and ``throttled``, what held the device's clocks down
- ``verify {trial}`` -> ``{check}`` of every output of the turn's last round through the steps
- ``sketch {trial}`` -> ``{sketch}``: random projections of these outputs (workers of older revisions know it not)
- ``facts {trial}`` -> ``{facts, cost, rss}``
- ``run_once {trial}`` streams ``{id, progress}`` and ends with ``{check, seconds}``
- ``close {trial}`` frees a trial.

A reply has the id of its request and either ``ok`` or ``error {type, message, traceback}``. Tensors never cross.
"""

from __future__ import annotations

import json
import os
import selectors
import time
from collections.abc import Mapping
from typing import Any

PROTOCOL = 1
"""Version of the messages; a worker of another version is refused."""


class EndOfStreamError(Exception):
    """The other side closed its pipe."""


class DeadlineError(Exception):
    """No complete line came before the deadline."""


class Channel:
    """One end of the two pipes: whole JSON lines in, whole JSON lines out."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self._read_fd, self._write_fd = read_fd, write_fd
        self._buffer = b""
        self._closed = False
        self._selector = selectors.DefaultSelector()
        self._selector.register(read_fd, selectors.EVENT_READ)

    def send(self, message: Mapping[str, Any]) -> None:
        """Write one message."""
        data = json.dumps(message, allow_nan=True).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._write_fd, data) :]
        except BrokenPipeError as error:
            raise EndOfStreamError from error

    def receive(self, timeout: float | None = None) -> dict[str, Any]:
        """Wait (asleep, never spinning) for one message."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and (left <= 0 or not self._selector.select(left)):
                raise DeadlineError
            chunk = os.read(self._read_fd, 1 << 16)
            if not chunk:
                raise EndOfStreamError
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        return message

    def close(self) -> None:
        """Close both pipes, once: a number that was closed may be another file's by now."""
        if self._closed:
            return
        self._closed = True
        self._selector.close()
        for fd in (self._read_fd, self._write_fd):
            os.close(fd)
