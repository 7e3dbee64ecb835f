"""The shared expert that a scheme has and a layer lacks, with seeded weights.

Shape letters: T tokens, H hidden, S width of the shared expert, F width of a routed one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..layer import SharedExpert
from ..router import seeded_normal

if TYPE_CHECKING:
    from ..layer import LayerWeights
    from ..router_params.shared import SharedRule
    from ..shapes import ModelShape


def shared_expert(rule: SharedRule | None, weights: LayerWeights, shape: ModelShape, seed: int) -> SharedExpert | None:
    """Return the shared expert of ``rule``: an FFN as the layer's routed ones are, each map with std 1 / sqrt(inputs).

    None where the rule is None, or the layer has a shared expert of its own.
    """
    if rule is None or weights.shared is not None:
        return None
    hidden, width = shape.hidden, rule.channels(shape.width)
    rows = 2 * width if weights.gated else width
    return SharedExpert(
        seeded_normal((rows, hidden), hidden**-0.5, seed, "shared.gate_up"),
        seeded_normal((hidden, width), width**-0.5, seed, "shared.down"),
        seeded_normal((hidden,), hidden**-0.5, seed, "shared.gate") if rule.gate == "sigmoid" else None,
        weights.activation,
        seeded_normal((2, hidden), hidden**-0.5, seed, "shared.mix") if rule.gate == "softmax2" else None,
        weights.gated,
    )
