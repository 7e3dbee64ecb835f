"""Claims of self-contrast decoding (SCMoE).

Shape letters: B sequences, V vocabulary, T tokens, E experts.
"""

from __future__ import annotations

import torch

from ...moe.router import Pipeline
from ...moe.routing import Context
from ..decoding import Ranked, SelfContrast, contrast
from .base import Claim, Outcome, Scene, layer_shape


@torch.no_grad()
def scmoe_greedy(scene: Scene) -> Outcome:
    """Count tokens that differ from greedy decoding where beta = 0, where both passes agree, and where alpha = 1."""
    strong_BV, weak_BV = (scene.normal(400, 1000, name=name) for name in ("strong", "weak"))
    greedy_B = strong_BV.argmax(-1)
    cases = [
        contrast(strong_BV, weak_BV, SelfContrast(beta=0.0)),
        contrast(strong_BV, strong_BV, SelfContrast()),
        contrast(strong_BV, weak_BV, SelfContrast(alpha=1.0)),
    ]
    differ = sum(int((scores_BV.argmax(-1) != greedy_B).sum()) for scores_BV in cases)
    changed = float((contrast(strong_BV, weak_BV, SelfContrast()).argmax(-1) != greedy_B).double().mean())
    return Outcome(
        float(differ), 0.0, changed > 0.05, "the contrast changes nothing at all", {"changed_share": changed}
    )


@torch.no_grad()
def scmoe_weak(scene: Scene) -> Outcome:
    """Return the most experts that a token has in the weak pass, rank-3 routing of a top-2 model."""
    pipeline = scene.router("mixtral", layer_shape(8)).router
    if not isinstance(pipeline, Pipeline):
        raise TypeError("routing 'mixtral' is no longer a pipeline; mend this claim.")
    router, x_TH = Ranked(pipeline), scene.normal(512, 32)
    weak, strong = router(x_TH, Context(ranks=SelfContrast().weak)), router(x_TH, Context())
    apart = not set(zip(weak.token_N.tolist(), weak.expert_N.tolist(), strict=True)) & set(
        zip(strong.token_N.tolist(), strong.expert_N.tolist(), strict=True)
    )
    return Outcome(float(weak.k_T.max()), 1.0, apart, "the weak pass uses experts of the strong one")


CLAIMS: dict[str, Claim] = {"scmoe-greedy": scmoe_greedy, "scmoe-weak": scmoe_weak}
