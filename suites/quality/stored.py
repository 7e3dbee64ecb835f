"""What the changed layers of a model take as they are stored, and what was found when their bits were planned."""

from __future__ import annotations

from ...contracts import Metric
from ...moe.experts import ExpertStore
from .changed import Changed


def stored_metrics(changed: Changed) -> list[Metric]:
    """Return the bytes of the routed experts; where these are quantized, the stored bits per weight of all that is.

    Shared experts and attention count where they are quantized. Of a plan come its facts, and the stored
    bits per weight over all its layers, which may be more than those that are changed.
    """
    subjects = [block.subject for block in changed.blocks.values()]
    stores = [subject.layer.store for subject in subjects]
    metrics = [Metric("expert_bytes", float(sum(store.nbytes for store in stores)), "byte")]
    if any(store.quantized for store in stores):
        quantized = [store for store in stores if store.quantized]
        quantized += [subject.layer.shared_store for subject in subjects if subject.layer.shared_store is not None]
        stored = sum(store.nbytes for store in quantized) + changed.attention.nbytes
        weights = sum(_weights(store) for store in quantized) + changed.attention.weights
        metrics.append(Metric("stored_bits_per_weight", 8 * stored / weights, "bit"))
    plan = subjects[0].plan if subjects else None
    if plan is None:
        return metrics
    planned = Metric("planned_bits_per_weight", plan.cost, "bit")
    return [*metrics, planned, *(Metric(name, value, "1") for name, value in plan.facts.items())]


def _weights(store: ExpertStore) -> int:
    """Return how many weights the experts of a quantized store have."""
    shapes = [weight.shape for weights in (store.gate_up, store.down) for weight in weights]
    return sum(rows * columns for rows, columns in shapes)
