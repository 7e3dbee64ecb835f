"""A trained MoE language model with other experts: its layers as LayerWeights, changed, in a model of the new sizes.

For the models of transformers whose experts are one tensor [E, 2F, H] and whose configuration says
``moe_intermediate_size``, as that of tinymoe does. Shape letters: B windows, T tokens, E experts, F channels, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...moe.layer import LayerWeights
from ...moe.routing import Routing
from ...moe.transforms.slim import taylor_terms
from ..models.smollm2_jobs import ffn_of
from . import experts
from .language import gates

Change = Callable[[int, LayerWeights], LayerWeights]
"""From a decoder layer's index and its experts to other ones."""

HALF = 0.5


def layer_weights(model: Any) -> dict[int, LayerWeights]:
    """Return experts and gate of each MoE layer, on the CPU; shared experts are left where they are."""
    return {
        layer: LayerWeights(
            ffn_of(model.model.layers[layer]).experts.gate_up_proj.detach().cpu(),
            ffn_of(model.model.layers[layer]).experts.down_proj.detach().cpu(),
            gate.weight.detach().cpu(),
            activation=model.config.hidden_act,
        )
        for layer, gate in gates(model).items()
    }


def changed_model(model: Any, change: Change) -> Any:
    """Return a model of its own, float32, with each MoE layer's experts and gate as ``change`` makes them.

    All layers must come out alike, because one configuration says their sizes; a token has no more experts than there
    are.
    """
    from transformers import AutoModelForCausalLM

    made = {layer: change(layer, weights) for layer, weights in layer_weights(model).items()}
    if not made or len({weights.down.shape for weights in made.values()}) != 1:
        raise ValueError("compressed layers must all have as many experts, as wide; give each layer the same sizes.")
    number, _, width = next(iter(made.values())).down.shape
    config = copy.deepcopy(model.config)
    config.moe_intermediate_size, config.num_experts = width, number
    config.num_experts_per_tok = min(config.num_experts_per_tok, number)
    new = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=experts.register())
    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    for layer, weights in made.items():
        if weights.router_EH is None:
            raise ValueError("a compressed layer needs its gate's rows; return a router_EH.")
        prefix = _prefix(model, layer)
        state[f"{prefix}.experts.gate_up_proj"] = weights.gate_up
        state[f"{prefix}.experts.down_proj"] = weights.down
        state[f"{prefix}.gate.weight"] = weights.router_EH
    new.load_state_dict(state)
    return new.to(next(model.parameters()).device)


def _prefix(model: Any, layer: int) -> str:
    block = ffn_of(model.model.layers[layer])
    name: str = next(name for name, module in model.named_modules() if module is block)
    return name


def log_probabilities(model: Any, ids_BT: Tensor) -> Tensor:
    """Return log-probabilities of every token but each window's first, [B * (T - 1), V] float32."""
    hidden_BTH = model.model(ids_BT[:, :-1], use_cache=False).last_hidden_state
    logits_NV: Tensor = model.lm_head(hidden_BTH).flatten(0, 1).float()
    return logits_NV.log_softmax(-1)


def distillation_loss(student: Any, teacher: Any, ids_BT: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats per token; no gradient goes to the teacher."""
    with torch.no_grad():
        wanted_NV = log_probabilities(teacher, ids_BT)
    return divergence(log_probabilities(student, ids_BT), wanted_NV)


def divergence(found_NV: Tensor, wanted_NV: Tensor) -> Tensor:
    """Return KL(wanted || found) in nats, the mean over rows of log-probabilities [N, V]."""
    return F.kl_div(found_NV, wanted_NV, reduction="batchmean", log_target=True)


@dataclass
class Evidence:
    """What calibration batches say of each MoE layer: its experts' tokens, and its channels' Taylor terms."""

    load_E: dict[int, Tensor] = field(default_factory=dict)
    terms_EF: dict[int, Tensor] = field(default_factory=dict)


def evidence(student: Any, teacher: Any, batches: Iterable[Tensor]) -> Evidence:
    """Return loads, and the terms sum_t h_f dL_KD/dh_f of the distillation loss, over ``batches`` of ids_BT.

    The loss of a student that is its teacher is at its least, where every gradient is zero. So gradients are taken
    where all routed experts count half: to first order, and by the midpoint rule, the terms then add up to what the
    loss changes by when the experts go. (SlimMoE does not say where it takes them.)
    """
    own, found = layer_weights(student), Evidence()
    student.eval()
    for ids_BT in batches:
        for layer, (x_TH, indices_TK, weights_TK, gradient_TH) in _at_half(student, teacher, ids_BT).items():
            routing = Routing.topk(indices_TK, weights_TK, len(own[layer].down))
            terms_EF = taylor_terms(own[layer], routing, x_TH, gradient_TH)
            found.load_E[layer] = found.load_E.get(layer, 0) + routing.counts_E
            found.terms_EF[layer] = found.terms_EF.get(layer, 0) + terms_EF
    return found


def _at_half(student: Any, teacher: Any, ids_BT: Tensor) -> dict[int, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return (x_TH, indices_TK, weights_TK, dL/dy_TH) of each MoE layer, its routed experts counting half."""
    with torch.no_grad():
        wanted_NV = log_probabilities(teacher, ids_BT)  # before any hook: the teacher may be the student itself
    caught: dict[int, tuple[tuple[Tensor, ...], Tensor]] = {}

    def hook(layer: int) -> Any:
        def halve(module: Any, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            caught[layer] = (inputs, output * HALF)
            return caught[layer][1]

        return halve

    with ExitStack() as stack, torch.enable_grad():
        for layer in gates(student):
            handle = ffn_of(student.model.layers[layer]).experts.register_forward_hook(hook(layer))
            stack.callback(handle.remove)
        loss = divergence(log_probabilities(student, ids_BT), wanted_NV)
        slopes = torch.autograd.grad(loss, [scaled_TH for _, scaled_TH in caught.values()])
    found = {}
    for (layer, (inputs, _)), slope_TH in zip(caught.items(), slopes, strict=True):
        x_TH, indices_TK, weights_TK = (tensor.detach().cpu() for tensor in inputs)
        found[layer] = (x_TH, indices_TK, weights_TK, slope_TH.cpu())
    return found
