"""What the next layer's gate says of this layer's input, for sessions that read hints: whom it will probably ask for.

This is the speculative loading of Mixtral-offloading (arXiv 2312.17238): the residual stream changes little from layer
to layer, so a gate one layer ahead is often right. Shape letters: T tokens, H hidden, E experts, K slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ..contracts import Executor, Session

if TYPE_CHECKING:
    from torch import Tensor, nn


class Hinting:
    """An executor that first tells ``session`` which ``k`` experts of ``layer`` a gate chooses for its tokens.

    An expert's priority is the sum of its probabilities over the tokens that choose it.
    """

    def __init__(self, executor: Executor, session: Session, layer: int, gate_EH: Tensor, k: int) -> None:
        self.executor, self.session, self.layer, self.gate_EH, self.k = executor, session, layer, gate_EH, k

    def __call__(self, x_TH: Tensor, *inputs: Any, out_TH: Tensor | None = None) -> Any:
        """Give the hints and return what the executor returns."""
        for expert, priority in likely(x_TH, self.gate_EH, self.k).items():
            self.session.hint(self.layer, (expert,), priority)
        return self.executor(x_TH, *inputs, out_TH=out_TH)


def likely(x_TH: Tensor, gate_EH: Tensor, k: int) -> dict[int, float]:
    """Return the experts that a gate chooses for any of the tokens, each with its summed probability."""
    import torch

    with torch.no_grad():
        probs_TE = torch.nn.functional.linear(x_TH.to(gate_EH.dtype), gate_EH).float().softmax(-1)
        values_TK, indices_TK = probs_TE.topk(k, dim=-1)
        sums_E = probs_TE.new_zeros(len(gate_EH)).index_add_(0, indices_TK.flatten(), values_TK.flatten())
    return {expert: priority for expert, priority in enumerate(sums_E.tolist()) if priority > 0}


def gates(model: nn.Module, modules: Mapping[int, Any]) -> dict[int, Tensor]:
    """Return the gate's matrix [E, H] beside each of the expert modules; those without exactly one are left out."""
    names = {module: name for name, module in model.named_modules()}
    found = {}
    for index, module in modules.items():
        own, parent = set(module.modules()), model.get_submodule(names[module].rpartition(".")[0])
        shape = (module.num_experts, module.down_proj.shape[1])
        others = [getattr(one, "weight", None) for one in parent.modules() if one not in own]
        matrices = [weight for weight in others if weight is not None and tuple(weight.shape) == shape]
        if len(matrices) == 1:
            found[index] = matrices[0].detach()
    return found


def hinting(model: nn.Module, modules: Mapping[int, Any], session: Session) -> dict[int, Executor]:
    """Return the executors of a session by layer, giving hints of the layer that comes next where it reads them."""
    executors = {index: session.layer(index) for index in modules}
    if not getattr(session, "reads_hints", False):
        return executors
    beside, order = gates(model, modules), sorted(modules)
    for index, after in pairwise(order):
        if after in beside:
            k = getattr(modules[after].config, "num_experts_per_tok", 1)
            executors[index] = Hinting(executors[index], session, after, beside[after], k)
    return executors
