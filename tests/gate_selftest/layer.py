"""A plain torch MoE layer with injected real work, as the target of a gate: what the gate's self-test judges.

``make_trial(case)`` reads ``MOEBENCH_INJECTED``, the number of small products that each call does besides, one number
for each case. Base and candidate thus run the same code, and differ in work that was really done.
"""

from __future__ import annotations

import os

import torch

HIDDEN, WIDTH = 256, 512
CASES = (  # tokens, experts, k
    (64, 8, 2),
    (96, 8, 2),
    (128, 8, 2),
    (160, 8, 2),
    (64, 16, 4),
    (96, 16, 4),
    (192, 8, 1),
    (256, 8, 1),
)

UNIT_ROWS, UNIT_WIDTH = 4, 64
"""One unit of injected work: a product of 4 x 256 by 256 x 64, a few microseconds."""


class MoELayer:
    """Top-k routing, a loop over experts, SwiGLU; float32."""

    steps = 2

    def __init__(self, tokens: int, experts: int, k: int, injected: int) -> None:
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(tokens * 1000 + experts)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator)

        self.k, self.injected = k, injected
        self.x = [normal(tokens, HIDDEN) for _ in range(self.steps)]
        self.router_EH = normal(experts, HIDDEN) / HIDDEN**0.5
        self.gate_up_E2FH = normal(experts, 2 * WIDTH, HIDDEN) / HIDDEN**0.5
        self.down_EHF = normal(experts, HIDDEN, WIDTH) / WIDTH**0.5
        self.extra = normal(HIDDEN, UNIT_WIDTH)

    def run(self, step: int) -> torch.Tensor:
        """Return y_TH of the inputs of ``step``, after the injected products."""
        x_TH = self.x[step]
        for _ in range(self.injected):
            x_TH[:UNIT_ROWS] @ self.extra
        weights_TK, experts_TK = (x_TH @ self.router_EH.T).softmax(-1).topk(self.k)
        y_TH = torch.zeros_like(x_TH)
        for expert in range(len(self.router_EH)):
            token_N, slot_N = (experts_TK == expert).nonzero(as_tuple=True)
            if len(token_N):
                gate_NF, up_NF = (x_TH[token_N] @ self.gate_up_E2FH[expert].T).chunk(2, dim=-1)
                out_NH = (torch.nn.functional.silu(gate_NF) * up_NF) @ self.down_EHF[expert].T
                y_TH.index_add_(0, token_N, out_NH * weights_TK[token_N, slot_N, None])
        return y_TH


def make_trial(case: int) -> MoELayer:
    """Return case number ``case`` with the injected work that the environment names."""
    counts = [int(count) for count in os.environ.get("MOEBENCH_INJECTED", "").split(",") if count]
    return MoELayer(*CASES[case], counts[case] if counts else 0)
