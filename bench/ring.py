"""A ring: one or more live worker processes on the same cores, to which the parent grants turns."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..contracts import MoebenchError
from .protocol import PROTOCOL, Channel, DeadlineError, EndOfStreamError

HELLO_TIMEOUT = 300.0
FAREWELL_TIMEOUT = 5.0
"""So long a worker may take to end after it closed its pipe, or we ours."""


class WorkerError(Exception):
    """The worker answered with an error; it lives on."""

    def __init__(self, message: str, traceback: str) -> None:
        super().__init__(message)
        self.traceback = traceback


class WorkerDiedError(Exception):
    """The worker process is gone."""


class WorkerTimeoutError(Exception):
    """The worker did not answer in time and was killed."""


class WorkerStartError(Exception):
    """A worker with this environment, which some cases need, could not start; others may."""

    def __init__(self, message: str, environment: Mapping[str, str]) -> None:
        super().__init__(message)
        self.environment = environment


class WorkerProcess:
    """One worker with its pipes and its log."""

    def __init__(
        self,
        environment: Mapping[str, str],
        threads: int,
        cores: Sequence[int],
        python: str = sys.executable,
        cwd: Path | None = None,
    ) -> None:
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the worker
        command = [python, "-m", "moebench.bench.worker", str(theirs_in), str(theirs_out)]
        self._process = subprocess.Popen(
            [*command, ",".join(map(str, cores))],
            pass_fds=(theirs_in, theirs_out),
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            env=worker_environment(environment, threads),
            cwd=cwd,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._channel = Channel(ours_in, ours_out)
        self._next = 0
        self.last_message = "start"
        self.alive = True

    def request(
        self,
        op: str,
        timeout: float,
        on_progress: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> dict[str, Any]:
        """Send a request and wait for its reply; each sign of progress starts the deadline anew."""
        self._next += 1
        self.last_message = op
        try:
            self._channel.send({"op": op, "id": self._next, **arguments})
            while True:
                reply = self._channel.receive(timeout)
                if "progress" not in reply:
                    break
                if on_progress is not None:
                    on_progress(*reply["progress"])
        except EndOfStreamError:
            raise WorkerDiedError(self._cause_of_death(op)) from None
        except ValueError:
            self.kill()
            raise WorkerDiedError(f"the worker's answer to '{op}' was no message, and it was killed.") from None
        except DeadlineError:
            self.kill()
            raise WorkerTimeoutError(f"no answer to '{op}' within {timeout:g} s; the worker was killed.") from None
        if reply["id"] != self._next:
            self.kill()
            raise WorkerDiedError(f"the worker answered out of order to '{op}' and was killed.")
        if "error" in reply:
            raise WorkerError(reply["error"]["message"], reply["error"]["traceback"])
        result: dict[str, Any] = reply["ok"]
        return result

    def _cause_of_death(self, op: str) -> str:
        try:
            code = self._process.wait(timeout=FAREWELL_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            return f"the worker closed its pipe during '{op}' and was killed."
        self.alive = False
        if code >= 0:
            return f"the worker exited with code {code} during '{op}'."
        name = signal.Signals(-code).name
        hint = " (often: out of memory)" if name == "SIGKILL" else ""
        return f"the worker was killed by {name}{hint} during '{op}'."

    def log(self, limit: int = 20_000) -> str:
        """Return the end of what the worker printed."""
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - limit))
        return self._log.read().decode(errors="replace")

    def kill(self) -> None:
        """End the worker now."""
        self._process.kill()
        self._process.wait()
        self.alive = False

    def close(self) -> None:
        """End the worker and free its pipes."""
        self._channel.close()
        try:
            self._process.wait(timeout=FAREWELL_TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
        self.alive = False
        self._log.close()


def worker_environment(extra: Mapping[str, str], threads: int) -> dict[str, str]:
    """Return the environment of a worker: threads fixed, waiting threads asleep, hubs and telemetry off."""
    fixed = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    fixed |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **fixed, **extra}


def ring_cores(threads: int) -> list[int]:
    """Return the cores of a ring: the last ``threads`` that this process may use, the same for all its workers."""
    if not hasattr(os, "sched_getaffinity"):
        return []
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[-threads:]


class Ring:
    """The workers of one sitting, one for each distinct environment of the group's cases.

    ``shared`` holds variables for all of them, ``python`` and ``cwd`` what runs them and where: a gate's side may be
    another revision or environment. ``cores`` defaults to ``ring_cores``. With ``greet=False`` the workers are started
    and nothing more: ``hello`` must follow.
    """

    def __init__(
        self,
        environments: Sequence[Mapping[str, str]],
        threads: int,
        plugins: Sequence[str],
        *,
        shared: Mapping[str, str] = MappingProxyType({}),
        python: str = sys.executable,
        cwd: Path | None = None,
        cores: Sequence[int] | None = None,
        greet: bool = True,
    ) -> None:
        self.cores = ring_cores(threads) if cores is None else list(cores)
        self._workers: dict[tuple[tuple[str, str], ...], WorkerProcess] = {}
        self.versions: dict[str, Any] = {}
        for environment in environments:
            key = _environment_key(environment)
            if key not in self._workers:
                self._workers[key] = WorkerProcess({**environment, **shared}, threads, self.cores, python, cwd)
        self._plugins = list(plugins)
        if greet:
            self.hello()

    def hello(self) -> None:
        """Let every worker import what it needs, and learn what it is; one that cannot start ends the ring."""
        for key, worker in self._workers.items():
            try:
                self.versions = worker.request("hello", HELLO_TIMEOUT, plugins=self._plugins, protocol=PROTOCOL)
            except (WorkerError, WorkerDiedError, WorkerTimeoutError) as error:
                last = (worker.log(2000).strip().splitlines() or [""])[-1]
                self.close()
                sentence = f"a worker could not start: {error} {last}".strip()
                if not key:
                    raise MoebenchError(sentence) from error
                raise WorkerStartError(sentence, dict(key)) from error

    def worker(self, environment: Mapping[str, str]) -> WorkerProcess:
        """Return the worker with this environment."""
        return self._workers[_environment_key(environment)]

    def log(self) -> str:
        """Return what the workers printed."""
        return "\n".join(worker.log() for worker in self._workers.values()).strip()

    def close(self) -> None:
        """End all workers."""
        for worker in self._workers.values():
            worker.close()


def _environment_key(environment: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted(environment.items()))
