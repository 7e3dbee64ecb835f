"""Executions that change the result: what they must compute, and how far that is from the exact run.

Imported by workers only. Shape letters: B sequences, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...backends.offload.access import Future
from ...backends.offload.keeping import low_form
from ...backends.offload.opening import make_cache
from ...backends.plugins import Offload
from ...contracts import LayerSpec, Metric
from ...moe.experts import ExpertStore
from .in_memory import InMemory, session_in_memory
from .recording import Recording
from .stacks import Stack

CHANGES_RESULT = ("hobbit", "defer")
"""Executions that compute something else than all experts in full."""


def changes_result(params: Offload) -> bool:
    """Return whether outputs differ from those with all experts at hand by more than rounding."""
    return params.execution.partition(":")[0] in CHANGES_RESULT


@dataclass(frozen=True)
class Approximation:
    """``expected`` are the outputs [B, H] of each step by the recorded Routings; ``metrics`` say how far off one is."""

    expected: tuple[Tensor, ...]
    metrics: tuple[Metric, ...]


def approximate(
    stack: Stack,
    recording: Recording,
    specs: Mapping[int, LayerSpec],
    stores: Mapping[int, ExpertStore],
    params: Offload,
) -> Approximation:
    """Run the method with all experts in memory: by the recorded Routings, then by its own for the distance."""
    low = {} if params.low == "none" else {index: low_form(params.low)(store) for index, store in stores.items()}

    def run(replayed: bool) -> list[Tensor]:
        cache = make_cache(params, recording.layout, Future(recording.accesses), popularity=recording.popularity)
        stack.layers.serve_by(
            session_in_memory(InMemory(stores, low, cache), specs), recording.routings if replayed else None
        )
        stack.begin()
        return [stack.step(step) for step in range(recording.steps)]

    expected, free = run(True), run(False)
    return Approximation(tuple(expected), (*_distances(stack, recording, free),))


def _distances(stack: Stack, recording: Recording, found: list[Tensor]) -> list[Metric]:
    """Return ``kl_to_exact`` in nats a token where there is a head, and ``output_error`` |y - y'| / |y'|."""
    pairs = list(zip(found, recording.final, strict=True))
    errors = torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1).clamp(min=1e-30) for a, b in pairs])
    metrics = [Metric("output_error", float(errors.mean()), "1", n=len(errors))]
    kls, agree = [], []
    for final_BH, exact_BV in zip(found, recording.logits, strict=True):
        logits_BV = stack.logits(final_BH)
        if logits_BV is None or exact_BV is None:
            continue
        exact = exact_BV.double().log_softmax(-1)
        kls.append((exact.exp() * (exact - logits_BV.double().log_softmax(-1))).sum(-1))
        agree.append((logits_BV.argmax(-1) == exact_BV.argmax(-1)).double())
    if kls:
        metrics.append(Metric("kl_to_exact", float(torch.cat(kls).mean()), "nat", n=len(torch.cat(kls))))
        metrics.append(Metric("agreement_with_exact", float(torch.cat(agree).mean()), "1", n=len(torch.cat(agree))))
    return metrics
