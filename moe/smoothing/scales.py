"""Smoothing: outliers of a layer's inputs become a part of its weights, and the function stays (EAQuant, SmoothQuant).

SmoothQuant divides input channel j by s_j = max|x_j|^a / max|w_j|^(1-a) and multiplies the weights that read it by the
same, so that activations and weights are about equally hard to quantize. The experts and the router of an MoE layer
read one vector, the output of one norm; EAQuant takes the largest s_j that any of them asks for. The norm's gain would
take 1 / s; here, where the layer begins behind the norm, 1 / s is a factor of what the layer reads.

Shape letters: H hidden, E experts, F expert width, S width of the shared expert.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..channel_stats import ChannelStats
from ..layer import LayerWeights, SharedExpert


@dataclass(frozen=True, eq=False)
class Folded:
    """A layer that gives, for the inputs x * ``input_scale_H``, what the layer it was made of gives for x."""

    weights: LayerWeights
    input_scale_H: Tensor


@dataclass(frozen=True)
class LayerStats:
    """What calibration saw: the layer's inputs by expert and of ``all`` tokens, and what ``down`` of each expert read.

    ``shared_hidden`` is of the shared expert's hidden channels, None where the layer has no shared expert.
    """

    experts: Sequence[ChannelStats]
    all: ChannelStats
    hidden: Sequence[ChannelStats] = ()
    shared_hidden: ChannelStats | None = None


def fold_input(weights: LayerWeights, scale_H: Tensor) -> Folded:
    """Return the layer with every weight that reads the input multiplied by ``scale_H``, whose inputs take 1 / it."""
    if scale_H.shape != weights.gate_up.shape[-1:] or not bool((scale_H > 0).all() and scale_H.isfinite().all()):
        raise ValueError(f"a scale wants one positive number for each of the {weights.gate_up.shape[-1]} inputs.")

    def times(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else _times(tensor, scale_H)

    shared = weights.shared
    if shared is not None:
        shared = replace(
            shared, gate_up=_times(shared.gate_up, scale_H), gate_H=times(shared.gate_H), mix_2H=times(shared.mix_2H)
        )
    folded = replace(
        weights, gate_up=_times(weights.gate_up, scale_H), router_EH=times(weights.router_EH), shared=shared
    )
    return Folded(folded, 1 / scale_H)


def _times(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the product in the dtype of ``weight``, rounded once."""
    return (weight.to(scale.dtype) * scale).to(weight.dtype)


def inject_outliers(weights: LayerWeights, channels: Sequence[int], factor: float) -> Folded:
    """Return the same function with inputs ``factor`` times as large in ``channels``, as large models have them.

    The weights that read these are smaller by the same factor. For tests and comparisons of smoothing.
    """
    hidden = weights.gate_up.shape[-1]
    if not set(channels) <= set(range(hidden)) or factor <= 0:
        raise ValueError(f"channels must lie below the layer's {hidden} inputs, and factor={factor} be positive.")
    scale_H = torch.ones(hidden, dtype=torch.float64)
    scale_H[list(channels)] = 1 / factor
    return fold_input(weights, scale_H)


def channel_scale(absmax_I: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Return max|x|^alpha / max|w|^(1-alpha) of each input channel of ``weight`` [.., I], [I] float64.

    0 where no input or no weight is other than 0: such a channel asks for no scale.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} must lie between 0 (weights alone) and 1 (activations alone).")
    largest_I = weight.abs().flatten(0, -2).amax(dim=0).double()
    absmax_I = absmax_I.double()
    asked_I = absmax_I.pow(alpha) / largest_I.pow(1 - alpha)
    return torch.where((absmax_I > 0) & (largest_I > 0), asked_I, torch.zeros_like(asked_I))


def largest(scales: Sequence[Tensor]) -> Tensor:
    """Return the largest scale that is asked for in each channel, 1 where none is."""
    found_I = torch.stack(list(scales)).amax(dim=0)
    return torch.where(found_I > 0, found_I, torch.ones_like(found_I))


def expert_aware_scale(weights: LayerWeights, stats: LayerStats, alpha: float = 0.5) -> Tensor:
    """Return s_j = max(max_e s_j^e, s_j^router), [H] float64 (EAQuant): each expert by the tokens that it gets.

    A shared expert is one more expert, which gets all tokens.
    """
    _check_experts(weights, stats.experts)
    pairs = zip(stats.experts, weights.gate_up, strict=True)
    asked = [channel_scale(one.absmax_I, gate_up, alpha) for one, gate_up in pairs]
    if weights.shared is not None:
        asked.append(channel_scale(stats.all.absmax_I, weights.shared.gate_up, alpha))
    if weights.router_EH is not None:
        asked.append(channel_scale(stats.all.absmax_I, weights.router_EH, alpha))
    return largest(asked)


def router_scale(weights: LayerWeights, stats: LayerStats, alpha: float = 0.5) -> Tensor:
    """Return the scale that the router alone asks for, [H] float64."""
    if weights.router_EH is None:
        raise ValueError("the layer has no gate that could ask for a scale; smooth it by 'experts' or by 'input'.")
    return largest([channel_scale(stats.all.absmax_I, weights.router_EH, alpha)])


def naive_scale(weights: LayerWeights, stats: LayerStats, alpha: float = 0.5) -> Tensor:
    """Return SmoothQuant's scale of the whole input, as if all that reads it were one matrix: no expert is known."""
    readers = [weights.gate_up.flatten(0, -2)]
    readers += [] if weights.shared is None else [weights.shared.gate_up]
    readers += [] if weights.router_EH is None else [weights.router_EH.to(weights.gate_up.dtype)]
    return largest([channel_scale(stats.all.absmax_I, torch.cat(readers), alpha)])


def smooth_hidden(weights: LayerWeights, stats: LayerStats, alpha: float = 0.5) -> LayerWeights:
    """Return the layer with what ``down`` reads divided by a scale of each expert and channel, and ``down`` times it.

    The scale goes into the rows of ``up``, where it is exact: the hidden channels of a gated FFN are act(gate) * up.
    """
    if not weights.gated:
        raise ValueError("the hidden channels of an ungated FFN pass its activation and take no scale; leave it out.")
    _check_experts(weights, stats.hidden)
    gate_up, down = weights.gate_up.clone(), weights.down.clone()
    for expert, one in enumerate(stats.hidden):
        gate_up[expert], down[expert] = _hidden_folded(gate_up[expert], down[expert], one, alpha)
    shared = weights.shared
    if shared is not None and stats.shared_hidden is not None:
        shared = _shared_folded(shared, stats.shared_hidden, alpha)
    return replace(weights, gate_up=gate_up, down=down, shared=shared)


def _shared_folded(shared: SharedExpert, stats: ChannelStats, alpha: float) -> SharedExpert:
    if not shared.gated:
        return shared
    gate_up, down = _hidden_folded(shared.gate_up, shared.down, stats, alpha)
    return replace(shared, gate_up=gate_up, down=down)


def _hidden_folded(gate_up: Tensor, down: Tensor, stats: ChannelStats, alpha: float) -> tuple[Tensor, Tensor]:
    scale_F = largest([channel_scale(stats.absmax_I, down, alpha)])
    gate_FH, up_FH = gate_up.chunk(2)
    return torch.cat([gate_FH, _times(up_FH, 1 / scale_F[:, None])]), _times(down, scale_F)


def _check_experts(weights: LayerWeights, stats: Sequence[ChannelStats]) -> None:
    if weights.is_dense or weights.heads:
        raise ValueError("expert-aware smoothing wants a layer of FFN experts; choose a model with experts.")
    if len(stats) != len(weights.down):
        raise ValueError(f"{len(stats)} statistics for {len(weights.down)} experts; calibrate each expert once.")
