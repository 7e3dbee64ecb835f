"""A backend that is right but for one expert, whose outputs are cut towards zero where they should be rounded.

Rounding becomes a bias of half a unit in the last of ``bits`` bits: too little for an eye, and all one way.
``moebench run suite=backend_kl plugin=tests/plugins/slightly_wrong.py axes.backend=slightly_wrong`` must name it.
"""

from __future__ import annotations

from dataclasses import dataclass

from moebench.backends.eager import Eager, EagerExecutor
from moebench.backends.session import Session
from moebench.contracts import Descriptor, ExecutedPath


@dataclass(frozen=True)
class Params:
    """``expert`` of ``layer`` keeps ``bits`` bits of each output; ``layer`` -1 spoils the first that is loaded."""

    layer: int = -1
    expert: int = 3
    bits: int = 9


def cut(values, bits):
    """Return float32 values without the bits of their mantissas beyond ``bits``: towards zero, never up."""
    import torch

    mask = -(1 << (24 - bits))
    return (values.float().contiguous().view(torch.int32) & mask).view(torch.float32).to(values.dtype)


def spoiled(params):
    """Return the executor that spoils the expert."""

    class Spoiled(EagerExecutor):
        def add_sorted(self, y_TH, x_TH, token_N, offsets_E1, weight_N):
            super().add_sorted(y_TH, x_TH, token_N, offsets_E1, weight_N)
            start, stop = offsets_E1[params.expert], offsets_E1[params.expert + 1]
            mine_N = token_N[start:stop]
            out_NH = (
                self.ffn(x_TH[mine_N], *self.per_expert()[params.expert], params.expert) * weight_N[start:stop, None]
            )
            y_TH.index_add_(0, mine_N, (cut(out_NH, params.bits) - out_NH).to(y_TH.dtype))

    return Spoiled


class SlightlyWrong(Eager):
    """The backend."""

    def __init__(self, params):
        self.params = params

    def load(self, layers, specs):
        wrong = min(layers) if self.params.layer < 0 else self.params.layer
        made = {index: spoiled(self.params) if index == wrong else EagerExecutor for index in layers}
        return Session({i: made[i](store, specs[i]) for i, store in layers.items()}, ExecutedPath("dense"))


def make(params):
    return SlightlyWrong(params)


DESCRIPTORS = [Descriptor("backend", "slightly_wrong", "one expert is cut, not rounded", f"{__file__}:make", Params)]
