"""The trial of a roofline bound: the least time of a layer's routed experts on a named device, from its peak figures.

A model and no measurement: every operation at the peak rate, every byte once at the full bandwidth, whichever takes
longer (Williams, Waterman and Patterson, "Roofline", CACM 52(4), 2009).
"""

from __future__ import annotations

from typing import Literal

from ..contracts import Case, Check, Cost, Facts, Metric
from ..kernels.targets import SOURCE, Device, device
from ..moe.shapes import ModelShape
from .base import ELEMENT_SIZE


def balanced_cost(shape: ModelShape, tokens: int, element: int) -> Cost:
    """Return the least work of ``tokens`` spread evenly: each expert that they can reach is read once.

    As for measured rows: two flops a weight and assignment; hidden states are read and written once.
    """
    assignments = tokens * shape.top_k
    distinct = min(shape.experts, assignments)
    per_expert = shape.matrices * shape.hidden * shape.width
    moved = element * (distinct * per_expert + 2 * tokens * shape.hidden)
    return Cost(2.0 * assignments * per_expert, float(moved), distinct, assignments, float(moved))


def bound_seconds(cost: Cost, flops: float, bytes_per_s: float) -> float:
    """Return the longer of computing and moving."""
    return max(cost.flops / flops, cost.bytes / bytes_per_s)


class BoundTrial:
    """One device, one number of tokens."""

    state: Literal["none"] = "none"
    steps = 1

    def __init__(self, case: Case, shape: ModelShape) -> None:
        self.case, self.shape = case, shape
        self.device: Device = device(case.backend.params["device"])
        self._cost = balanced_cost(shape, case.tokens, ELEMENT_SIZE[case.dtype])

    def begin_turn(self) -> None:
        """Nothing to make ready."""

    def run(self, step: int) -> float:
        """Return the bound, in seconds."""
        return bound_seconds(self._cost, self.device.flops[self.case.dtype], self.device.bytes_per_s)

    def verify(self, step: int, output: float) -> Check:
        """Count the work anew, assignment by assignment, and check that the bound is the time of the slower part."""
        shape, tokens, element = self.shape, self.case.tokens, ELEMENT_SIZE[self.case.dtype]
        flops, read = 0, set()
        for assignment in range(tokens * shape.top_k):
            read.add(assignment % shape.experts)
            flops += 2 * shape.matrices * shape.hidden * shape.width
        moved = shape.expert_bytes(element) * len(read) // shape.experts + 2 * tokens * shape.hidden * element
        computing, moving = flops / self.device.flops[self.case.dtype], moved / self.device.bytes_per_s
        ok = output in (computing, moving) and output >= computing and output >= moving
        return Check(ok, reason="" if ok else "the bound is not the time of the slower of computing and moving")

    def cost(self, step: int) -> Cost:
        """Return the work that is bounded."""
        return self._cost

    def facts(self) -> Facts:
        """Return the bound and what it is made of, and where the device's figures come from."""
        cost, seconds = self._cost, self.run(0)
        metrics = (
            Metric("time_bound", seconds * 1e6, "us"),
            Metric("intensity", cost.flops / cost.bytes, "flop/byte"),
            Metric("flops", cost.flops, "flop"),
            Metric("bytes", cost.bytes, "byte"),
            Metric("distinct_experts", cost.distinct_experts, "1"),
            Metric("assignments", cost.assignments, "1"),
        )
        return Facts(metrics, notes={"reason": f"a roofline bound, no measurement; peaks from {SOURCE}"})

    def close(self) -> None:
        """Nothing to free."""
