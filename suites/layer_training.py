"""A trial of one layer's training step: forward and backward into the input and the experts' weights."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..contracts import Case, Check, Cost, Facts, Metric, Registry
from ..moe.experts import ExpertStore
from ..moe.layer import SharedExpert
from ..moe.oracle import reference
from ..moe.oracle_gradients import Gradients, compare_gradients, reference_gradients
from .layer import STEPS, LayerTrial
from .memory import PeakBytes, saved_bytes
from .subject import Batch


class TrainingTrial(LayerTrial):
    """One training step: y = layer(x), then backward from a fixed random dL/dy. Gradients are checked as y is.

    The routed experts' dense weights are leaves of their own; the shared expert is frozen and passes its gradient to x.
    """

    def __init__(self, case: Case, registry: Registry) -> None:
        super().__init__(case, registry)
        rng = torch.Generator().manual_seed(case.seed)
        grad_TH = torch.randn(self.x[0].shape, generator=rng).to(self.x[0].dtype)
        self.expected = [self._expected(batch, grad_TH) for batch in self.batches]
        self.grad_TH = self._here(grad_TH)

    def _expected(self, batch: Batch, grad_TH: Tensor) -> Gradients:
        layer, x_TH = self.subject.layer, batch.x_TH
        if layer.shared is None:
            return reference_gradients(layer.store, batch.routing, x_TH, grad_TH)
        routed_TH = reference(layer.store, batch.routing, x_TH).y_TH
        beside_TH, through_TH = _shared_gradients(layer.shared, x_TH, routed_TH, grad_TH)
        gradients = reference_gradients(layer.store, batch.routing, x_TH, through_TH)
        return replace(gradients, x_TH=gradients.x_TH + beside_TH)

    def _stores(self) -> list[ExpertStore]:
        store = self._here(self.subject.layer.store)
        if not isinstance(store.gate_up, Tensor) or not isinstance(store.down, Tensor):
            raise ValueError("quantized weights have no gradient; use quantization=none")
        self.gate_up = store.gate_up.detach().clone().requires_grad_()
        self.down = store.down.detach().clone().requires_grad_()
        return [replace(store, gate_up=self.gate_up, down=self.down)]

    def _forward(self, step: int) -> tuple[Tensor, Tensor]:
        """Return (y, the x that it was made of, as a leaf)."""
        x_TH = self.x[step % STEPS].detach().requires_grad_()
        y_TH: Tensor = next(self.executors)(x_TH, *self.inputs[step % STEPS], out_TH=None)
        if self.shared is not None:
            y_TH = self.shared.added_to(y_TH, x_TH).to(x_TH.dtype)
        return y_TH, x_TH

    def run(self, step: int) -> tuple[Tensor, Gradients]:  # type: ignore[override]
        """Return (y, gradients) of one step."""
        y_TH, x_TH = self._forward(step)
        gradients = torch.autograd.grad(y_TH, (x_TH, self.gate_up, self.down), self.grad_TH)
        return y_TH.detach(), Gradients(*gradients)

    def verify(self, step: int, output: tuple[Tensor, Gradients]) -> Check:  # type: ignore[override]
        """Check the output as in the forward pass, then every gradient."""
        y_TH, gradients = output
        forward = super().verify(step, y_TH)
        if not forward.ok:
            return forward
        return compare_gradients(self._back(gradients), self.expected[self._batch_number(step)], self.x[0].dtype)

    def cost(self, step: int) -> Cost:
        """Return three times the forward flops (dL/dx and dL/dW besides y), and weights read twice, written once."""
        forward = super().cost(step)
        return replace(forward, flops=3 * forward.flops, bytes=3 * forward.bytes)

    def facts(self) -> Facts:
        """Return the forward facts with the bytes that a step saves for backward and needs at its peak."""
        facts = super().facts()
        known = [self.gate_up, self.down, *self.x, self.grad_TH]
        saved = saved_bytes(lambda: self._forward(0), known)
        with PeakBytes(known) as peak:
            self.run(0)
        own = (Metric("saved_tensor_bytes", float(saved), "byte"), Metric("peak_step_bytes", float(peak.peak), "byte"))
        return replace(facts, metrics=(*facts.metrics, *own))


def _shared_gradients(shared: SharedExpert, x_TH: Tensor, routed_TH: Tensor, grad_TH: Tensor) -> tuple[Tensor, Tensor]:
    """Return the float64 gradients through the frozen shared expert: of x, and of the sum of the routed experts."""
    exact = shared.to(x_TH.dtype).to(torch.float64)
    leaves = [t.detach().double().requires_grad_() for t in (x_TH, routed_TH)]
    y_TH = exact.added_to(leaves[1], leaves[0])
    beside_TH, through_TH = torch.autograd.grad(y_TH, leaves, grad_TH.double())
    return beside_TH, through_TH
