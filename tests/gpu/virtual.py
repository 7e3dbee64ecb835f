"""A GPU of virtual time: queued work takes the time that it says, and everything that is done is written down."""

from __future__ import annotations

from types import SimpleNamespace

FLUSH_NS = 100_000


class Event:
    def __init__(self, device):
        self.device, self.at = device, None

    def record(self):
        self.device.log.append("record")
        self.at = self.device.queued

    def elapsed_time(self, end):
        assert self.device.reached >= end.at, "an event was read before the device had reached it"
        return (end.at - self.at) / 1e6


class Device:
    """``queued`` is when the work launched so far will be done; ``reached`` how far the host has waited."""

    def __init__(self, call_ns=7_000, captures=True):
        self.call_ns, self.captures = call_ns, captures
        self.log, self.queued, self.reached = [], 0, 0

    def event(self):
        return Event(self)

    def flush(self):
        self.log.append("flush")
        self.queued += FLUSH_NS

    def launch(self, step=0):
        self.log.append("call")
        self.queued += self.call_ns
        return SimpleNamespace(step=step)

    def synchronize(self):
        self.log.append("wait")
        self.reached = self.queued

    def capture(self, call):
        if not self.captures:
            raise RuntimeError("operation not permitted when stream is capturing\nmore lines")
        before = len(self.log)
        output = call()
        del self.log[before:]  # captured, not launched

        def replay():
            self.log.append("replay")
            self.queued += self.call_ns

        return replay, output

    def facts(self):
        return {"name": "virtual", "uuid": None, "capability": "0.0", "l2_bytes": 1, "cuda": None, "hip": None}
