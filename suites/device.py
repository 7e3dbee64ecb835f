"""Where a case's tensors lie: the devices that a run may name, and why one cannot be used here. Imports no torch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata

from ..contracts import Case, unknown
from ..kernels import devices

DEVICES = ("cpu", "cuda")
"""The devices by torch's names; ``cuda`` is the first that the environment variable CUDA_VISIBLE_DEVICES shows."""


def device_refusal(case: Case, cuda_graph: bool = False, of_suite: Sequence[str] = DEVICES) -> str | None:
    """Return why a case cannot run on its device, or None; ``of_suite`` are the devices that its suite uses."""
    if case.device not in DEVICES:
        return unknown("device", case.device, DEVICES)
    if case.device == "cpu":
        return "cuda_graph=true needs a GPU; add device=cuda, or leave it out." if cuda_graph else None
    if case.device not in of_suite:
        return f"suite '{case.suite}' runs on {', '.join(of_suite)} alone; leave device={case.device} out."
    return _missing(case.device) or (_graph_refusal(case) if cuda_graph else None)


def _missing(device: str) -> str | None:
    absent = devices.missing("CUDA", "ROCm")
    if absent:
        return f"device={device} is not here ({absent}); leave it out to measure on the CPU."
    version = metadata.version("torch")
    if version.endswith("+cpu"):
        return f"torch {version} is built without GPUs; install the build of torch for this machine's driver."
    return None


def _graph_refusal(case: Case) -> str | None:
    """A graph's calls are the same launches on the same buffers, one after the other."""
    if case.residency == "cold":
        return "a CUDA graph is timed with a warm L2; add axes.residency=warm, or leave cuda_graph out."
    if case.pass_ != "forward" or case.boundary == "sorted":
        return "a CUDA graph takes pass=forward and a boundary of one shape, topk or logits; leave cuda_graph out."
    return None
