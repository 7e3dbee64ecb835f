"""The GPU of a worker, through torch; made when it is asked for, since a torch without GPUs raises at an event."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...contracts import MoebenchError
from .clock import Device, flush_bytes

WARM_CALLS = 3
"""Calls on a stream of their own before a capture, as torch's notes on graphs want them."""


class TorchDevice:
    """The current CUDA (or ROCm) device of torch; see ``clock.Device``."""

    def __init__(self) -> None:
        import torch

        self._cuda = torch.cuda
        self._torch = torch
        self._properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self._buffer: Any = None

    def event(self) -> Any:
        """Return an event that keeps the time."""
        return self._cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]

    def flush(self) -> None:
        """Write zeros over a buffer larger than the L2; it is made at the first call."""
        if self._buffer is None:
            size = flush_bytes(int(self._properties.L2_cache_size))
            self._buffer = self._torch.empty(size // 4, dtype=self._torch.int32, device="cuda")
        self._buffer.zero_()

    def synchronize(self) -> None:
        """Wait for the device."""
        self._cuda.synchronize()

    def capture(self, call: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Return (replay, output) of a graph of ``call``, warmed up on a stream of its own."""
        current, side = self._cuda.current_stream(), self._cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(current)
        with self._cuda.stream(side):
            for _ in range(WARM_CALLS):
                call()
        current.wait_stream(side)
        graph = self._cuda.CUDAGraph()
        with self._cuda.graph(graph):
            output = call()
        return graph.replay, output

    def facts(self) -> dict[str, Any]:
        """Return name, uuid, compute capability, L2 bytes and the version of CUDA (or HIP) that torch was built for."""
        one = self._properties
        uuid = str(getattr(one, "uuid", "")) or None
        return {
            "name": one.name,
            "uuid": uuid if uuid is None or uuid.startswith("GPU-") else f"GPU-{uuid}",
            "capability": f"{one.major}.{one.minor}",
            "l2_bytes": int(one.L2_cache_size),
            "cuda": self._torch.version.cuda,
            "hip": self._torch.version.hip,
        }


def open_device() -> Device:
    """Return the worker's GPU, or say in one sentence that torch finds none."""
    import torch

    if not torch.cuda.is_available():
        raise MoebenchError(f"torch {torch.__version__} finds no GPU; leave device=cuda out to measure on the CPU.")
    return TorchDevice()
