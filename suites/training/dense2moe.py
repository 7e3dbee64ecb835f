"""A dense language model's student with experts in the place of its FFNs, distilled in stages (Dense2MoE, 2510.09094).

The stages of the paper: a shared expert alone learns from the teacher's predictions; it is frozen, and routed experts
learn from predictions, from the features of every block and from balance; last, blocks become a mixture, too. The paper
is of a diffusion transformer, whose mixtures of blocks are chosen by timestep and class for a whole image. A language
model has neither, and a choice for a whole text would look ahead: here each token chooses, by what enters its group of
blocks.

Shape letters: B windows, T tokens, H hidden, E routed experts, S shared channels, C channels of a routed expert, K
slots, M blocks of a group.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...moe.balance.registry import Term, total
from ...moe.experts import ACTIVATIONS
from ...moe.layer import LayerWeights, ffn_hidden
from ...moe.routing import Routing
from ...moe.transforms.params import TaylorSplit
from ...moe.transforms.taylor import taylor
from ..models import substream
from ..models.smollm2_jobs import ffn_inputs
from . import experts
from .compressing import divergence, log_probabilities
from .distill import Text, held_out_divergence
from .language import LanguageModelTask, windows_at

Phase = Literal["shared", "experts", "blocks"]

SLICES, SHARED, K = 16, 4, 2
"""A quarter of the channels are always on, 12 experts have a sixteenth each, and a token has two: 37.5 % are active."""

BALANCE = (Term("switch", 0.01),)
FEATURE = 1.0
"""Coefficient of the features, each a part of the teacher's own."""

GROUP = 2
"""Blocks of a mixture, of which a token has one."""


class SplitFFN(nn.Module):
    """The channels of one FFN: some always on, and where there are routed experts the best ``k`` of these for a token.

    A token's weights are k times a softmax over its experts', so that in the mean they count as in the FFN. ``routed``
    holds the Routing of the last call.
    """

    def __init__(self, weights: LayerWeights, k: int) -> None:
        super().__init__()
        if weights.shared is None or weights.router_EH is None:
            raise ValueError("an FFN is split into shared channels and routed ones; give structure 'taylor' both.")
        self.shared_gate_up = nn.Parameter(weights.shared.gate_up.clone())
        self.shared_down = nn.Parameter(weights.shared.down.clone())
        self.gate_up_proj, self.down_proj = nn.Parameter(weights.gate_up.clone()), nn.Parameter(weights.down.clone())
        self.router_EH = nn.Parameter(weights.router_EH.clone())
        self.activation, self.act_fn = weights.activation, ACTIVATIONS[weights.activation]
        self.num_experts, self.k, self.on = len(weights.down), k, False
        self.routed: Routing | None = None

    def routed_parameters(self) -> tuple[nn.Parameter, ...]:
        """Return what only a token of routed experts meets."""
        return self.gate_up_proj, self.down_proj, self.router_EH

    def forward(self, x_BTH: Tensor) -> Tensor:
        """Return y_BTH."""
        x_NH = x_BTH.flatten(0, -2)
        y_NH = F.linear(ffn_hidden(x_NH, self.shared_gate_up, self.activation), self.shared_down)
        if self.on:
            logits_NE = F.linear(x_NH, self.router_EH)
            best_NK, indices_NK = logits_NE.topk(self.k, dim=-1)
            weights_NK = self.k * best_NK.softmax(-1)
            self.routed = Routing.topk(indices_NK, weights_NK, self.num_experts, logits_NE, logits_NE.softmax(-1))
            y_NH = y_NH + experts.forward(self, x_NH, indices_NK, weights_NK)
        return y_NH.view_as(x_BTH)


class GatedBlock(nn.Module):
    """One block of a mixture: it changes a token by what the group's gate says of it, 0 where another one was chosen.

    The first of a group asks the gate. M times the probability of the chosen block is its weight: 1 where all are
    equal.
    """

    def __init__(self, block: nn.Module, gate: BlockGate, place: int) -> None:
        super().__init__()
        self.block, self.gate_of_group, self.place = block, gate, place

    @property
    def mlp(self) -> Any:
        """The FFN, where a block is looked for one."""
        return self.block.mlp

    def forward(self, hidden_BTH: Tensor, *arguments: Any, **named: Any) -> Tensor:
        """Return the residual stream after the block."""
        if self.place == 0:
            self.gate_of_group(hidden_BTH)
        weight_BT1 = self.gate_of_group.weights_BTM[..., self.place, None]
        changed_BTH: Tensor = self.block(hidden_BTH, *arguments, **named)
        return hidden_BTH + weight_BT1 * (changed_BTH - hidden_BTH)


class BlockGate(nn.Module):
    """Which one of M consecutive blocks a token has."""

    def __init__(self, hidden: int, blocks: int) -> None:
        super().__init__()
        self.rows_MH = nn.Parameter(torch.zeros(blocks, hidden))
        self.weights_BTM = torch.empty(0)
        self.routed: Routing | None = None

    def forward(self, hidden_BTH: Tensor) -> None:
        """Choose for every token, by its normalised state."""
        blocks = len(self.rows_MH)
        logits_BTM = F.linear(F.normalize(hidden_BTH, dim=-1) * hidden_BTH.shape[-1] ** 0.5, self.rows_MH)
        probs_BTM = logits_BTM.softmax(-1)
        best_BT1, index_BT1 = probs_BTM.max(-1, keepdim=True)
        self.weights_BTM = torch.zeros_like(probs_BTM).scatter(-1, index_BT1, blocks * best_BT1)
        flat = (index_BT1.flatten(0, 1), best_BT1.flatten(0, 1))
        self.routed = Routing.topk(*flat, blocks, logits_BTM.flatten(0, 1), probs_BTM.flatten(0, 1))


def split_model(teacher: Any, text: Text, shared: int, seed: int) -> Any:
    """Return a student whose FFNs are split by Taylor terms, ``shared`` of SLICES slices always on, no expert routed.

    All but the FFNs is the teacher's, and frozen.
    """
    student = copy.deepcopy(teacher).requires_grad_(False)
    drawn = windows_at(text.ids_N, text.batch, text.end, substream(seed, "calibration"))
    params = TaylorSplit(experts=SLICES, shared=shared, k=K)
    for layer, x_TH in zip(student.model.layers, ffn_inputs(teacher, drawn.flatten()), strict=True):
        ffn = layer.mlp
        gate_up = torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight])
        dense = LayerWeights(gate_up.detach(), ffn.down_proj.weight.detach(), activation=teacher.config.hidden_act)
        layer.mlp = SplitFFN(taylor(params)(dense, x_TH, seed), K)
    return student


def enter(student: Any, phase: Phase) -> None:
    """Make a student ready for a phase: what is on in it, and what is trained.

    In phase ``experts`` the shared expert is frozen; in phase ``blocks`` all that replaced FFNs is trained.
    """
    layers = student.model.layers
    for layer in layers:
        ffn = layer.mlp
        ffn.on = phase != "shared"
        for name, parameter in ffn.named_parameters():
            parameter.requires_grad_(phase != "experts" if name.startswith("shared") else ffn.on)
    if phase == "blocks":
        for first in range(0, len(layers) - GROUP + 1, GROUP):
            gate = BlockGate(student.config.hidden_size, GROUP)
            for place in range(GROUP):
                layers[first + place] = GatedBlock(layers[first + place], gate, place)


def active_parameters(student: Any) -> float:
    """Return the weights of the FFNs' experts that a token meets, routers left out, in the mean over blocks chosen."""
    met = 0.0
    for layer in student.model.layers:
        ffn = layer.mlp
        own = ffn.shared_gate_up.numel() + ffn.shared_down.numel()
        if ffn.on:
            own += ffn.k * (ffn.gate_up_proj[0].numel() + ffn.down_proj[0].numel())
        met += own / (GROUP if isinstance(layer, GatedBlock) else 1)
    return met


def used_parameters(student: Any) -> int:
    """Return how many parameters a student has, without routers and experts of FFNs that are never on."""
    off = [ffn for ffn in student.modules() if isinstance(ffn, SplitFFN) and not ffn.on]
    unused = {id(parameter) for ffn in off for parameter in ffn.routed_parameters()}
    return sum(int(parameter.numel()) for parameter in student.parameters() if id(parameter) not in unused)


class BlockTask(LanguageModelTask):
    """A split student's training: KL(teacher || student), and what ``features`` says besides.

    With ``features`` each block's residual stream is compared with the teacher's, as a part of the teacher's squared
    norm; of blocks in a mixture only the last of a group has a counterpart. Routers and gates are kept in balance.
    """

    def __init__(self, student: Any, teacher: Any, text: Text, seed: int, features: bool, device: str = "cpu") -> None:
        super().__init__(student, text.ids_N, text.held_out, text.batch, text.end, seed, device)
        self.teacher, self.features = teacher.to(device).eval(), features

    def loss(self, batch: Tensor) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Return the sum of all terms, and each by name."""
        with torch.no_grad(), _streams(self.teacher) as wanted:
            wanted_NV = log_probabilities(self.teacher, batch)
        with _streams(self.model) as found:
            kl = divergence(log_probabilities(self.model, batch), wanted_NV)
        terms = {"kl": kl}
        if self.features:
            terms["feature"] = (
                FEATURE
                * torch.stack(
                    [
                        (mine - theirs).square().sum() / theirs.square().sum()
                        for mine, theirs in self._pairs(found, wanted)
                    ]
                ).mean()
            )
        routings = [place.routed for place in _routing_places(self.model)]
        if routings:
            terms["balance"] = torch.stack([total(routing, None, BALANCE) for routing in routings]).mean()
        return torch.stack(list(terms.values())).sum(), {"loss": kl, **terms}

    def _pairs(self, found: Sequence[Tensor], wanted: Sequence[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the residual streams that should agree."""
        for layer, mine, theirs in zip(self.model.model.layers, found, wanted, strict=True):
            if not isinstance(layer, GatedBlock) or layer.place == GROUP - 1:
                yield mine, theirs

    def evaluate(self) -> Mapping[str, float]:
        """Return bits per byte and the divergence in nats per token, of the held-out windows."""
        return {**super().evaluate(), "kl": held_out_divergence(self.model, self.teacher, self.held_out, self.device)}


def _routing_places(model: Any) -> Iterator[Any]:
    """Yield routers that chose experts, and gates that chose blocks."""
    for module in model.modules():
        if isinstance(module, BlockGate) or (isinstance(module, SplitFFN) and module.on):
            yield module


@contextmanager
def _streams(model: Any) -> Iterator[list[Tensor]]:
    """Collect the residual stream behind every block while the context is open."""
    caught: list[Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, inputs, output: caught.append(output))
        for layer in model.model.layers
    ]
    try:
        yield caught
    finally:
        for handle in handles:
            handle.remove()
