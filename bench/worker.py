"""The worker process: prepares trials, calls them under the clocks, and checks their outputs.

Started as ``python -m moebench.bench.worker READ_FD WRITE_FD`` with its environment (threads, caches) already set.
It pins itself to the given cores, asks the kernel to kill it when its parent dies or memory runs out, and freezes the
garbage collector. Everything printed goes to a log, never to the pipes.
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import os
import platform
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..contracts import Case, Check, MoebenchError, Registry, plain
from .gpu.clock import Device
from .gpu.timer import Devices, DeviceTimer
from .gpu.torch_device import open_device
from .protocol import PROTOCOL, Channel, EndOfStreamError

PR_SET_PDEATHSIG = 1


class Worker:
    """Answers requests one after the other; see ``protocol`` for the messages."""

    def __init__(
        self, channel: Channel, cores: Sequence[int] = (), open_device: Callable[[], Device] = open_device
    ) -> None:
        self.channel, self.cores, self._devices = channel, cores, Devices(open_device)
        self.registry: Registry | None = None
        self.trials: dict[str, _Held] = {}

    def serve(self) -> None:
        """Answer until the parent closes its end."""
        handlers: Mapping[str, Callable[..., dict[str, Any]]] = {
            "hello": self.hello,
            "prepare": self.prepare,
            "turn": self.turn,
            "verify": self.verify,
            "sketch": self.sketch,
            "facts": self.facts,
            "run_once": self.run_once,
            "close": self.close,
        }
        while True:
            try:
                request = self.channel.receive()
            except EndOfStreamError:
                return
            name, number = request.pop("op"), request.pop("id")
            self._number = number
            try:
                reply = {"id": number, "ok": handlers[name](**request)}
            except (Exception, SystemExit) as error:
                reply = {"id": number, "error": _describe(error)}
            try:
                self.channel.send(reply)
            except EndOfStreamError:
                return

    def hello(self, plugins: list[str], protocol: int) -> dict[str, Any]:
        """Import torch, load the plug-ins, pin to the cores, and tell what runs here.

        Pinned after the imports: the workers of a gate, all on one core in the end, may import side by side.
        """
        if protocol != PROTOCOL:
            raise MoebenchError(f"worker speaks protocol {PROTOCOL}, not {protocol}; use one version of moebench.")
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.registry = Registry.load(plugins)
        if self.cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, self.cores)
        return {
            "protocol": PROTOCOL,
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        }

    def prepare(self, trial: str, case: Mapping[str, Any]) -> dict[str, Any]:
        """Make a trial ready; nothing of this is timed."""
        if self.registry is None:
            raise MoebenchError("prepare came before hello; say hello first.")
        started = time.perf_counter()
        resolved = Case.from_json(case)
        suite = self.registry.get("suite", resolved.suite).create()
        time_by_device = self._devices.timer_of(resolved)
        held = _Held(suite.prepare(resolved, self.registry), resolved)
        if time_by_device is not None:
            held.timer = time_by_device(held.trial)
        self.trials[trial] = held
        gc.collect()
        gc.freeze()
        return {
            "steps": held.trial.steps,
            "input_sha256": getattr(held.trial, "input_sha256", None),
            "executed": plain(held.trial.facts().executed) if resolved.protocol == "timed" else None,
            "seen": held.excluded_operators(),
            "device": held.timer and held.timer.told,
            "stream": held.trial.state == "stream",
            "seconds": time.perf_counter() - started,
        }

    def turn(self, trial: str, first_step: int, calls: int) -> dict[str, Any]:
        """Call the trial ``calls`` times, each call timed on its own."""
        return self.trials[trial].turn(first_step, calls)

    def verify(self, trial: str) -> dict[str, Any]:
        """Check every output of the last round against its reference."""
        return {"check": plain(self.trials[trial].verify())}

    def sketch(self, trial: str) -> dict[str, Any]:
        """Tell the outputs of the last round in a few numbers, by which a gate compares its two sides."""
        from .sketch import sketch

        return {"sketch": {str(step): sketch(output) for step, output in self.trials[trial].outputs.items()}}

    def facts(self, trial: str) -> dict[str, Any]:
        """Tell metrics, series, items and the cost of a call."""
        held = self.trials[trial]
        told = held.trial.facts()
        facts = plain(told if held.timer is None else held.timer.added(told))
        cost = plain(held.trial.cost(0)) if held.case.protocol == "timed" else None
        return {"facts": facts, "cost": cost, "rss": _peak_rss()}

    def run_once(self, trial: str) -> dict[str, Any]:
        """Run every step once, telling progress; for evaluations and training, which have no latency."""
        held = self.trials[trial]
        started = time.perf_counter()
        worst, flips = Check(True), 0
        for step in range(held.trial.steps):
            output = held.trial.run(step)
            check = held.trial.verify(step, output)
            flips += check.flips
            if not check.ok or (check.error or 0.0) >= (worst.error or 0.0):
                worst = check
            if not check.ok:
                break
            self.channel.send({"id": self._number, "progress": [step + 1, held.trial.steps]})
        return {"check": plain(dataclasses.replace(worst, flips=flips)), "seconds": time.perf_counter() - started}

    def close(self, trial: str) -> dict[str, Any]:
        """Free a trial."""
        held = self.trials.pop(trial, None)
        if held is not None:
            held.trial.close()
        gc.unfreeze()
        gc.collect()
        return {}


@dataclasses.dataclass
class _Held:
    """A trial with the outputs of the last round through its steps."""

    trial: Any
    case: Case
    outputs: dict[int, Any] = dataclasses.field(default_factory=dict)
    timer: DeviceTimer | None = None

    def turn(self, first_step: int, calls: int) -> dict[str, Any]:
        trial, steps, timer = self.trial, self.trial.steps, self.timer
        run = trial.run if timer is None else timer.begin(trial.run)
        wall, cpu = time.perf_counter_ns, time.process_time_ns
        device, device_ns = getattr(trial, "device_ns", None), []
        self.outputs = {}
        entered = time.perf_counter()
        if self.case.residency == "warm" and trial.state != "stream":
            trial.run(first_step % steps)
        warmed = time.perf_counter()
        trial.begin_turn()
        ready = time.perf_counter()
        ns, cpu_ns = [0] * calls, [0] * calls
        renewed = 0.0
        gc.disable()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        try:
            for call in range(calls):
                if call and call % steps == 0:
                    renewed += self._renew()
                step = (first_step + call) % steps
                cpu_start = cpu()
                start = wall()
                output = run(step)
                end = wall()
                cpu_end = cpu()
                ns[call], cpu_ns[call] = end - start, cpu_end - cpu_start
                self.outputs[step] = output
                if device is not None:
                    device_ns.append(device())
        finally:
            gc.enable()
        switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - before
        return {
            "ns": ns,
            "cpu_ns": cpu_ns,
            "device_ns": device_ns,
            "switches": switches,
            "warm_s": warmed - entered,
            "ready_s": ready - warmed + renewed,
            **({} if timer is None else timer.end()),
        }

    def _renew(self) -> float:
        """Begin another round through the steps, off the clock; return the seconds that it took.

        Every input is then another than in the last call of its step, so that no answer can be kept from that call.
        """
        entered = time.perf_counter()
        self.outputs = {}
        self.trial.begin_turn()
        return time.perf_counter() - entered

    def verify(self) -> Check:
        if not self.outputs:
            return Check(False, reason="no call was made before the check")
        last = {id(output): (step, output) for step, output in self.outputs.items()}
        checks: list[Check] = [self.trial.verify(step, output) for step, output in last.values()]
        failed = [check for check in checks if not check.ok]
        worst = max(failed or checks, key=lambda check: check.error or 0.0)
        return dataclasses.replace(worst, flips=sum(check.flips for check in checks))

    def excluded_operators(self) -> list[str]:
        """Return the operators that the plan excludes and that one untimed call nevertheless used.

        Native code cannot be seen into: only operators that go through torch's dispatcher count. A trial whose calls
        hold more than the backend's work has ``backend_call(step)`` for that work alone.
        """
        excludes = set(self.case.execution.excludes)
        if not excludes or self.case.protocol != "timed":
            return []
        from torch.utils._python_dispatch import TorchDispatchMode

        seen: set[str] = set()

        class Record(TorchDispatchMode):  # type: ignore[no-untyped-call]
            def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
                seen.add(str(func))
                return func(*args, **(kwargs or {}))

        self.trial.begin_turn()
        with Record():  # type: ignore[no-untyped-call]
            getattr(self.trial, "backend_call", self.trial.run)(0)
        return sorted(seen & excludes)


def _describe(error: BaseException) -> dict[str, str]:
    kind = type(error).__name__
    plain_words = isinstance(error, MoebenchError)
    lines = f"asked to exit with {error.code}" if isinstance(error, SystemExit) else str(error)
    first = next(iter(lines.strip().splitlines()), "no message")
    return {
        "type": kind,
        "message": str(error) if plain_words else f"{kind}: {first}",
        "traceback": "" if plain_words else traceback.format_exc(),
    }


def _peak_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _settle_in() -> None:
    """Die with the parent, and be the first to go when memory runs out."""
    if sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent died before the kernel was asked
            os._exit(1)
        Path("/proc/self/oom_score_adj").write_text("1000")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides what an interrupt means


def main(arguments: list[str]) -> None:
    """Serve on the two given descriptors, pinned to the given cores (comma-separated, may be empty)."""
    read_fd, write_fd = int(arguments[0]), int(arguments[1])
    _settle_in()
    Worker(Channel(read_fd, write_fd), [int(core) for core in arguments[2].split(",") if core]).serve()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # taking torch down in good order takes longer than many a group


if __name__ == "__main__":
    main(sys.argv[1:])
