"""Expert merging: experts that do alike become one, their average (after MC-SMoE, arXiv 2310.01334).

The order of an expert's channels means nothing, so that two experts may be one function and their average none. Each
expert's channels are put in the order that is most like its group's centre, by an assignment, before averaging.
Shape letters: E experts, G groups, F channels, H hidden, D features, T tokens.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as nnf
from torch import Tensor

from ...contracts import MoebenchError
from ..layer import LayerWeights, ffn_hidden

Groups = Sequence[Sequence[int]]
"""Expert ids of each group, its centre first; every expert is in one."""


def expert_outputs(weights: LayerWeights, x_TH: Tensor) -> Tensor:
    """Return what each expert says of the same tokens, [E, T * H] in the dtype of ``x_TH``: features to group by."""
    _check_experts(weights)
    pairs = zip(weights.gate_up, weights.down, strict=True)
    outputs = [
        nnf.linear(ffn_hidden(x_TH, gate_up.to(x_TH.dtype), weights.activation, weights.gated), down.to(x_TH.dtype))
        for gate_up, down in pairs
    ]
    return torch.stack(outputs).flatten(1)


def group_experts(features_ED: Tensor, load_E: Tensor, groups: int) -> Groups:
    """Return ``groups`` groups: the busiest experts are the centres, each other one joins the most similar.

    Similar are features (router rows, or ``expert_outputs``) of a large cosine. Groups are in the order of their
    centres' ids.
    """
    experts = len(features_ED)
    if not 0 < groups <= experts or len(load_E) != experts:
        raise ValueError(f"groups={groups} must lie between 1 and {experts} experts, each with a load.")
    centres = sorted(load_E.argsort(descending=True, stable=True)[:groups].tolist())
    unit_ED = nnf.normalize(features_ED.double(), dim=1)
    nearest_E = (unit_ED @ unit_ED[centres].T).argmax(dim=1).tolist()
    found = [[centre] for centre in centres]
    for expert, group in enumerate(nearest_E):
        if expert not in centres:
            found[group].append(expert)
    return found


def aligned_order(gate_up: Tensor, down: Tensor, like_gate_up: Tensor, like_down: Tensor) -> Tensor:
    """Return order_F int64: channel ``order_F[f]`` of the expert does what channel f of the other does.

    The sum of the inner products of all weights of paired channels is the largest that there is, which makes the
    squared distance the least (linear_sum_assignment).
    """
    if importlib.util.find_spec("scipy") is None:
        raise MoebenchError(
            "the channels of experts are aligned by scipy, which is missing; run pip install 'moebench[quantization]'."
        )
    from scipy.optimize import linear_sum_assignment

    own_FD, like_FD = _channels(gate_up, down), _channels(like_gate_up, like_down)
    return torch.from_numpy(linear_sum_assignment((like_FD @ own_FD.T).numpy(), maximize=True)[1])


def merge(weights: LayerWeights, groups: Groups, load_E: Tensor, align: bool = True) -> LayerWeights:
    """Return the layer with one expert for each group: the average of its members, weighted by ``load_E``.

    Rows and biases of the router are averaged alike, so that the softmax runs over the groups; where no member has any
    load all count the same. Without ``align`` channels are averaged as they lie.
    """
    _check_groups(weights, groups)
    made = [_merged(weights, list(members), load_E, align) for members in groups]

    def rows(tensor: Tensor | None) -> Tensor | None:
        if tensor is None:
            return None
        return torch.stack([_average(tensor[list(members)], load_E[list(members)]) for members in groups])

    return replace(
        weights,
        gate_up=torch.stack([gate_up for gate_up, _ in made]),
        down=torch.stack([down for _, down in made]),
        router_EH=rows(weights.router_EH),
        router_bias_E=rows(weights.router_bias_E),
    )


def _merged(weights: LayerWeights, members: list[int], load_E: Tensor, align: bool) -> tuple[Tensor, Tensor]:
    width = weights.down.shape[2]
    parts, columns = [], []
    for member in members:
        gate_up, down = weights.gate_up[member], weights.down[member]
        if align and member != members[0]:
            order_F = aligned_order(gate_up, down, weights.gate_up[members[0]], weights.down[members[0]])
            gate_up, down = gate_up.reshape(-1, width, gate_up.shape[1])[:, order_F].flatten(0, 1), down[:, order_F]
        parts.append(gate_up)
        columns.append(down)
    load = load_E[members]
    return _average(torch.stack(parts), load), _average(torch.stack(columns), load)


def _average(values: Tensor, load: Tensor) -> Tensor:
    """Return the mean over the first axis weighted by ``load``, in the dtype of ``values``."""
    share = load.double() if float(load.sum()) > 0 else torch.ones(len(load), dtype=torch.float64)
    mean: Tensor = torch.tensordot(share / share.sum(), values.double(), dims=1)
    return mean.to(values.dtype)


def _channels(gate_up: Tensor, down: Tensor) -> Tensor:
    """Return all weights of each channel, [F, D] float64."""
    rows_PFH = gate_up.double().reshape(-1, down.shape[1], down.shape[0])
    return torch.cat([*rows_PFH.unbind(), down.double().T], dim=1)


def _check_experts(weights: LayerWeights) -> None:
    if weights.is_dense or weights.heads:
        raise ValueError("merging wants a layer of FFN experts; choose a model with experts.")


def _check_groups(weights: LayerWeights, groups: Groups) -> None:
    _check_experts(weights)
    experts = len(weights.down)
    if any(not members for members in groups) or sorted(e for members in groups for e in members) != [*range(experts)]:
        raise ValueError(f"groups must hold each of the layer's {experts} experts once, and none be empty.")
